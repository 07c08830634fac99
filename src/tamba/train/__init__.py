"""Repair a student: fit its converted layers in closed form, align them, distil the whole.

A recipe's stages run in its order. `least_squares` and `align` look at one converted layer at a
time and ask that it do what the teacher's attention does; `distil` runs the student end to end. The
functions of those names work on models in memory; `train` reads and writes folders around them.

Weights that move are float32 masters whatever the student is stored in; all others, and the
teacher, are held once, in the type that the recipe gives them. Matrix products run in the type that
the stage names. Text is gone over in pools of rows, as many as memory is set aside
for: what the frozen parts of teacher and student compute is computed once a pool and then trained
on, as often as the stage's tokens ask for.

Shape letters: `n` rows, `B` rows of a batch, `T` tokens of a row, `D` d_model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tamba
from tamba import progress
from tamba.artefact import versions
from tamba.calibrate import calibrate, can_calibrate, fit_output
from tamba.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    load_model,
    load_tokenizer,
    open_checkpoint,
    open_model,
    parameter_specs,
)
from tamba.data import Batch, TokenBlocks, text_digest
from tamba.errors import UserError
from tamba.model.attention import Attention
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.ops.losses import Weights, next_token_loss
from tamba.plan import LayerPlan, read_plan
from tamba.recipe import Align, Distil, LeastSquares, Recipe, as_recipe
from tamba.text import prepare_text, read_text
from tamba.trace import climb, computing, each, enter, finish, places, trace
from tamba.train.steps import Curve, Learner, Memory, Schedule, StageLog, orders, pools

_POOL_BYTES = 4 << 30
"""Activations held at once."""
_STEPS_APART = 64
"""Steps of `align` after which layers wait for one another, so that a whole state can be kept."""

Pairs = Mapping[int, int]
"""Student layer -> the teacher's attention layer that it was made of."""


# Closed form.


def least_squares(
    student: TambaForCausalLM,
    teacher: TambaForCausalLM,
    pairs: Pairs,
    blocks: TokenBlocks,
    stage: LeastSquares,
) -> StageLog:
    """Fit each converted layer to what the teacher's attention does, in closed form.

    Args:
        student: changed in place.
        pairs: which layers.
        blocks: text; as many rows as the stage has tokens are used.

    Raises:
        UserError: a mixer that `calibrate` cannot set, or too little text.
    """
    dtype = getattr(torch, stage.dtype)
    rows = blocks.take(max(1, stage.tokens // blocks.length))
    whole = stage.fit == "mixer"
    left: dict[int, float] = {}
    width = 2 * teacher.config.hidden_size + (_widest_heads(teacher, pairs) if whole else 0)
    for some in _groups(sorted(pairs), len(rows) * rows.length * width * dtype.itemsize):
        watched = [pairs[i] for i in some]
        seen = trace(teacher, rows, mixers=watched, heads=whole, dtype=dtype).mixers

        def fit(index: int, _: Any, seen: Any = seen) -> float:
            mixer, attention = _mixer(student, index), teacher.model.layers[pairs[index]].mixer
            assert isinstance(attention, Attention)
            if not whole:
                return fit_output(mixer, seen[pairs[index]], ridge=stage.ridge, dtype=dtype)
            key = attention.rotary_key
            angles = None if key is None else teacher.model._rotary[key]
            return calibrate(
                mixer, attention, angles, seen[pairs[index]], ridge=stage.ridge, dtype=dtype
            )

        if whole or stage.inputs == "teacher":
            found = each(fit, some, device=student.device, label="least squares")
            left |= dict(zip(some, found, strict=True))
        if stage.inputs == "student":
            wanted = {i: seen[pairs[i]].outputs for i in some}
            left |= _fit_upwards(student, wanted, rows, stage.ridge, dtype)
    tokens = len(rows) * rows.length
    return StageLog(stage.stage, tokens, [(tokens, _mean(left.values()))], left)


def _fit_upwards(
    student: TambaForCausalLM,
    wanted: Mapping[int, Tensor],
    rows: TokenBlocks,
    ridge: float,
    dtype: torch.dtype,
) -> dict[int, float]:
    """Fit output projections from the bottom, each layer given what those below it now give."""
    left = {}
    for index in progress.track(sorted(wanted), "least squares"):
        label = f"student reads up to layer {index}"
        seen = trace(student, rows, mixers=[index], dtype=dtype, label=label).mixers[index]
        seen.outputs.copy_(wanted[index])
        left[index] = fit_output(_mixer(student, index), seen, ridge=ridge, dtype=dtype)
    return left


def _widest_heads(teacher: TambaForCausalLM, pairs: Pairs) -> int:
    specs = [teacher.config.block_specs[i].mixer for i in pairs.values()]
    return max(s.n_heads * s.head_dim for s in specs if isinstance(s, AttentionSpec))


def _groups(layers: Sequence[int], bytes_each: int) -> Iterator[Sequence[int]]:
    size = max(1, _POOL_BYTES // max(1, bytes_each))
    for first in range(0, len(layers), size):
        yield layers[first : first + size]


def _mixer(student: TambaForCausalLM, index: int) -> RecurrentMixer:
    mixer = student.model.layers[index].mixer
    assert isinstance(mixer, RecurrentMixer)
    return mixer


# Layer by layer.


def align(
    student: TambaForCausalLM,
    teacher: TambaForCausalLM,
    pairs: Pairs,
    blocks: TokenBlocks,
    stage: Align,
    seed: int = 0,
    memory: Memory | None = None,
) -> StageLog:
    """Train every converted mixer, apart, to give what the teacher's does on the teacher's input.

    The loss is the squared error relative to the variance of the teacher's output. Layers know
    nothing of one another, so on a CPU several are trained at a time.

    Args:
        student: changed in place, in the mixers of `pairs` alone, which are float32 at least.
        seed: of the order of rows.
        memory: keeps the stage while it runs, and knows how far it came before.

    Raises:
        UserError: the loss is no longer a number.
    """
    dtype = _gradient_dtype(stage)
    schedule = Schedule(stage, blocks.length)
    learners = {i: Learner(_named_mixer(student, i), stage, schedule) for i in pairs}
    curve = Curve(stage.stage, schedule.tokens)
    taken = 0 if memory is None else memory.resume(learners, curve)
    bytes_each = 2 * len(pairs) * teacher.config.hidden_size * dtype.itemsize * blocks.length
    for pool, whole in pools(blocks, bytes_each, stage.batch, schedule.steps, _POOL_BYTES):
        steps = whole.after(taken)
        if not steps.count:
            continue
        seen = trace(teacher, pool, mixers=pairs.values(), dtype=dtype).mixers
        for part in steps.parts(_STEPS_APART):

            def train_one(
                index: int, advance: Any, seen: Any = seen, part: Any = part, whole: Any = whole
            ) -> None:
                mixer, learner, this = _mixer(student, index), learners[index], seen[pairs[index]]
                variance = _variance(this.outputs)
                for rows in orders(len(this.inputs), stage.batch, whole, part, seed):
                    total = torch.zeros((), device=variance.device, dtype=variance.dtype)
                    for some in _at_once(rows, stage):
                        with computing(mixer, dtype, grad=True):
                            got = mixer(this.inputs[some], None, places(this.starts[some]))
                        error = got.to(variance.dtype) - this.outputs[some]
                        loss = error.square().sum(-1).mean() / variance
                        loss = loss * (len(some) / len(rows))
                        loss.backward()
                        total += loss.detach()
                    learner.step()
                    curve.add(index, learner.taken, total)
                    advance(1 / len(pairs))

            each(train_one, list(pairs), device=student.device, label="align", total=part.count)
            curve.check()
            if memory is not None:
                memory.offer(learners, curve, part.stop)
    return curve.log(by_layer=True)


def _named_mixer(student: TambaForCausalLM, index: int) -> dict[str, torch.nn.Parameter]:
    """The parameters of a layer's mixer, by their names in the student."""
    prefix = f"model.layers.{index}.mixer."
    return {prefix + name: p for name, p in _mixer(student, index).named_parameters()}


def _at_once(rows: Tensor, stage: Align | Distil) -> Sequence[Tensor]:
    """The rows of a step in groups that go through together."""
    return rows.split(stage.micro_batch or len(rows))


def _variance(outputs: Tensor) -> Tensor:
    """Mean over tokens of the squared distance from the mean output."""
    count = outputs.shape[0] * outputs.shape[1]
    wide = torch.promote_types(outputs.dtype, torch.float32)
    total, square = torch.zeros(()), torch.zeros(())
    for part in outputs.flatten(0, 1).split(8192):
        x = part.to(wide)
        total, square = total + x.double().sum(0), square + x.square().sum().double()
    return ((square - total.square().sum() / count) / count).clamp_min(1e-30).to(wide)


# End to end.


def distil(
    student: TambaForCausalLM,
    teacher: TambaForCausalLM | None,
    trained: Iterable[str],
    blocks: TokenBlocks,
    stage: Distil,
    seed: int = 0,
    memory: Memory | None = None,
) -> StageLog:
    """Train parameters of the student on the teacher's next-token distribution, the text, or both.

    Layers below the first that moves are run once a pool, and so is the teacher.

    Args:
        student: changed in place.
        teacher: None where the stage has no use for it.
        trained: names of the parameters that move, which are float32 at least.
        seed: of the order of rows.
        memory: keeps the stage while it runs, and knows how far it came before.

    Raises:
        UserError: teacher and student have other vocabularies, or the loss is no longer a number.
    """
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        raise UserError(
            "train: distil",
            f"teacher and student have {teacher.config.vocab_size} and "
            f"{student.config.vocab_size} tokens",
            "distil between models that share a tokenizer",
        )
    dtype = _gradient_dtype(stage)
    weights = Weights(kl=stage.kl, ce=stage.ce, temperature=stage.temperature)
    names = set(trained)
    moving = {n: p for n, p in student.named_parameters() if n in names}
    first = _first_layer(moving)
    schedule = Schedule(stage, blocks.length)
    curve = Curve(stage.stage, schedule.tokens)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    learner = Learner(moving, stage, schedule)
    taken = 0 if memory is None else memory.resume({0: learner}, curve)
    top = len(student.model.layers)
    bytes_each = blocks.length * student.config.hidden_size * 8

    def loss_of(rows: Tensor, pool: TokenBlocks, below: Tensor | None, above: Tensor | None) -> Any:
        batch = Batch(pool.tokens[rows].long(), pool.starts[rows]).to(student.device)
        at = rows.to(student.device)
        with computing(student, dtype, grad=True):
            hidden, tokens = enter(student, batch)
            if below is not None:
                hidden = below[at]
            hidden = finish(student, climb(student, hidden, tokens, first or 0, top))
            wanted = None
            if teacher is not None and above is not None:
                with torch.no_grad():
                    wanted = finish(teacher, above[at])
            return _loss(student, hidden, teacher, wanted, batch, weights)

    try:
        for pool, whole in pools(blocks, bytes_each, stage.batch, schedule.steps, _POOL_BYTES):
            steps = whole.after(taken)
            if not steps.count:
                continue
            below = above = None
            if first is not None:
                label = "student's frozen layers read"
                frozen = trace(student, pool, streams=[first], dtype=dtype, label=label)
                below = frozen.streams[first]
            if teacher is not None:
                last = len(teacher.model.layers)
                above = trace(teacher, pool, streams=[last], dtype=dtype).streams[last]
            with progress.task("distil", steps.count) as advance:
                for rows in orders(len(pool), stage.batch, whole, steps, seed):
                    # A mean over predicted tokens, however rows are divided.
                    predicted = _predicted(pool, rows)
                    total = torch.zeros((), dtype=torch.float64, device=student.device)
                    for some in _at_once(rows, stage):
                        loss = loss_of(some, pool, below, above)
                        loss = loss * (_predicted(pool, some) / max(1, predicted))
                        loss.backward()
                        total += loss.detach()
                    learner.step()
                    curve.add(0, learner.taken, total)
                    curve.check()
                    if memory is not None:
                        memory.offer({0: learner}, curve, learner.taken)
                    advance(1, note=f"{float(total):.3f} nats")
    finally:
        for parameter in student.parameters():
            parameter.requires_grad_(True)
    return curve.log()


def _predicted(pool: TokenBlocks, rows: Tensor) -> int:
    return int(Batch(pool.tokens[rows], pool.starts[rows]).predicted.sum())


def _loss(
    student: TambaForCausalLM,
    hidden: Tensor,
    teacher: TambaForCausalLM | None,
    wanted: Tensor | None,
    batch: Batch,
    weights: Weights,
) -> Tensor:
    """The loss of a batch from what the heads are given, [B, T, D] each, over predicted tokens."""
    here = batch.predicted
    return next_token_loss(
        hidden[:, :-1][here],
        student.lm_head.weight,
        batch.tokens[:, 1:][here],
        teacher_hidden=None if wanted is None else wanted[:, :-1][here],
        teacher_head=None if teacher is None else teacher.lm_head.weight,
        weights=weights,
    )


def _first_layer(names: Iterable[str]) -> int | None:
    """The lowest layer that holds one of these parameters; None if something below layers does."""
    layers = []
    for name in names:
        if name.startswith("model.embed_tokens"):
            return None
        if name.startswith("model.layers."):
            layers.append(int(name.split(".")[2]))
    return min(layers, default=None)


def trained_parameters(names: Iterable[str], made: Iterable[int], what: str) -> list[str]:
    """Names of what a `Distil` stage moves.

    Args:
        names: of all parameters of the student.
        made: student layers whose mixers the build made.
        what: ``mixers``, ``mixers+norms`` or ``all``.
    """
    if what == "all":
        return list(names)
    mixers = tuple(f"model.layers.{i}.mixer." for i in made)
    return [
        name
        for name in names
        if name.startswith(mixers) or (what == "mixers+norms" and "norm." in name)
    ]


def _gradient_dtype(stage: Align | Distil) -> torch.dtype:
    if stage.dtype == "float16":
        raise UserError(
            f"train: {stage.stage}", "float16 gradients vanish without scaling", "use bfloat16"
        )
    dtype: torch.dtype = getattr(torch, stage.dtype)
    return dtype


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known) if known else 0.0


# Folders.


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    student: str | Path,
    text: str | Path | None = None,
) -> list[StageLog]:
    """Repair a student by the stages of a recipe.

    What has changed is kept beside `out`, in a hidden folder, after each stage and every few
    minutes of gradient steps; a run that was cut off goes on from there, to the same weights.

    Args:
        recipe: the recipe or its file.
        out: the checkpoint folder to make: weights, tokenizer, `train.json` (losses, inputs,
            versions), `record.json` for the report, and what the build left.
        student: the checkpoint that `build` wrote.
        text: the folder of prepared text; None to prepare it here.

    Returns:
        What each stage did.

    Raises:
        UserError: no stages, a student without a plan, a model or text that cannot be; `out` is not
            made.
    """
    recipe = as_recipe(recipe)
    source = Path(student)
    if not recipe.train:
        raise UserError(recipe.where("train"), "has no stages", "add a [[train]] section")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UserError(str(out), "already exists", "choose another folder or remove it")
    checkpoint, giver = open_checkpoint(source), open_model(recipe)
    plan = _plan_of(source)
    pairs = {i: plan.entries[i].index for i in plan.converted}
    _check_pairs(giver.tamba_config, checkpoint.tamba_config, pairs, source)
    moves = check_stages(
        recipe, checkpoint.tamba_config, checkpoint.parameters, giver.tamba_config, plan
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare_text(recipe) if text is None else read_text(text)
    blocks = prepared.train
    if blocks is None:
        raise UserError(recipe.where("data.train"), "names no text", "training needs some")
    model, teacher = _load(recipe, checkpoint, giver, moves, device)
    folder = Path(out).absolute().parent / f".{Path(out).absolute().name}.stages"
    memory = Memory(folder, _digest(recipe, checkpoint, blocks), model)
    logs = memory.restore()
    for stage, moved in list(zip(recipe.train, moves, strict=True))[len(logs) :]:
        rows = _of_length(blocks, stage.length, recipe)
        memory.moves(moved)
        if isinstance(stage, Distil):
            guide = teacher if stage.uses_teacher else None
            log = distil(model, guide, moved, rows, stage, recipe.seed, memory)
        else:
            assert teacher is not None
            if isinstance(stage, LeastSquares):
                log = least_squares(model, teacher, pairs, rows, stage)
            else:
                log = align(model, teacher, pairs, rows, stage, recipe.seed, memory)
        logs.append(log)
        memory.keep(log)
    _write(Path(out), recipe, checkpoint, model, logs, memory.digest)
    memory.forget()
    return logs


def _load(
    recipe: Recipe,
    student: Checkpoint,
    teacher: Checkpoint,
    moves: Iterable[Collection[str]],
    device: str,
) -> tuple[TambaForCausalLM, TambaForCausalLM | None]:
    """Both models, each weight once: masters in float32, the rest in the type of the recipe.

    The teacher is None where no stage asks it.
    """
    masters = {name for names in moves for name in names}
    model = load_model(student, _held(student.tamba_config.dtype, recipe), device, wide=masters)
    if not any(not isinstance(s, Distil) or s.uses_teacher for s in recipe.train):
        return model, None
    asked = recipe.teacher.dtype or teacher.tamba_config.dtype
    return model, load_model(teacher, _held(asked, recipe), device)


def _held(asked: torch.dtype | str | None, recipe: Recipe) -> torch.dtype:
    """The type of weights that do not move: as asked where all stages compute in it, or float32."""
    name = str(asked or torch.float32).removeprefix("torch.")
    held = name if all(stage.dtype == name for stage in recipe.train) else "float32"
    dtype: torch.dtype = getattr(torch, held)
    return dtype


def _digest(recipe: Recipe, student: Checkpoint, blocks: TokenBlocks) -> str:
    """Of everything that the trained weights depend on."""
    raw = blocks.tokens.numpy().tobytes() + blocks.starts.numpy().tobytes()
    return text_digest(
        [
            recipe.digest("seed", "teacher", "train"),
            student.digest(),
            hashlib.sha256(raw).hexdigest(),
            tamba.__version__,
        ]
    )


def check_stages(
    recipe: Recipe,
    student: TambaConfig,
    names: Iterable[str],
    teacher: TambaConfig,
    plan: LayerPlan,
) -> list[list[str]]:
    """Refuse a stage that cannot run before the first of them does.

    Args:
        recipe: whose stages.
        student: what `plan` makes of the teacher, and `names` its parameters.
        teacher: the configuration of the recipe's teacher.

    Returns:
        What each stage moves.

    Raises:
        UserError: a stage with nothing to move, rows that cannot be cut, other vocabularies, a type
            or a fit that cannot be.
    """
    names = list(names)
    pairs = {i: plan.entries[i].index for i in plan.converted}
    # Converted, transplanted or fresh: whatever is not the teacher's own.
    made = [i for i, entry in enumerate(plan.entries) if entry.action != "keep"]
    moves = []
    for index, stage in enumerate(recipe.train):
        where = recipe.where(f"train.{index} ({stage.stage})")
        _check_length(stage.length, recipe.data.length, recipe)
        if isinstance(stage, Distil):
            _gradient_dtype(stage)
            moved = trained_parameters(names, made, stage.train)
            if not moved:
                raise UserError(
                    where, f"train = '{stage.train}' names no parameter of this plan", "use 'all'"
                )
            if stage.uses_teacher and student.vocab_size != teacher.vocab_size:
                raise UserError(
                    where,
                    f"the teacher has {teacher.vocab_size} words and the student "
                    f"{student.vocab_size}",
                    "set kl = 0 and ce = 1",
                )
            moves.append(moved)
            continue
        if isinstance(stage, Align):
            _gradient_dtype(stage)
        if not pairs:
            raise UserError(where, "the plan converts no layer", "leave this stage out")
        if isinstance(stage, LeastSquares) and stage.fit == "mixer":
            for ours, theirs in pairs.items():
                heads = teacher.block_specs[theirs].mixer
                assert isinstance(heads, AttentionSpec)
                if not can_calibrate(student.block_specs[ours].mixer, heads):
                    raise UserError(
                        where,
                        f"fit = 'mixer' cannot set the mixer of layer {ours}",
                        "use fit = 'output'",
                    )
        moves.append(trained_parameters(names, pairs, "mixers"))
    return moves


def _plan_of(folder: Path) -> LayerPlan:
    path = folder / "plan.toml"
    if not path.is_file():
        raise UserError(str(folder), "holds no plan.toml", "give a checkpoint that build wrote")
    return read_plan(path)


def _check_pairs(teacher: TambaConfig, student: TambaConfig, pairs: Pairs, source: Path) -> None:
    """Refuse a plan that does not describe this student."""
    for ours, theirs in pairs.items():
        fits = (
            ours < student.num_hidden_layers
            and theirs < teacher.num_hidden_layers
            and not isinstance(student.block_specs[ours].mixer, AttentionSpec)
            and isinstance(teacher.block_specs[theirs].mixer, AttentionSpec)
        )
        if not fits:
            raise UserError(
                f"{source / 'plan.toml'}: layers[{ours}]",
                f"layer {ours} of the student is not the teacher's layer {theirs}, converted",
                "build the student again",
            )


def _check_length(length: int | None, of: int, recipe: Recipe) -> None:
    if length is not None and (length < 2 or of % length):
        raise UserError(
            recipe.where("train"),
            f"length = {length} does not divide the {of} tokens of a row",
            "choose a divisor of data.length",
        )


def _of_length(blocks: TokenBlocks, length: int | None, recipe: Recipe) -> TokenBlocks:
    """The same text in rows of another length; where a row is cut, a document begins."""
    if length is None or length == blocks.length:
        return blocks
    _check_length(length, blocks.length, recipe)
    starts = blocks.starts.reshape(-1, length).clone()
    starts[:, 0] = True
    tokens = blocks.tokens.reshape(-1, length)
    return TokenBlocks(tokens, starts, blocks.n_tokens, blocks.bytes_per_token)


def _write(
    out: Path,
    recipe: Recipe,
    source: Checkpoint,
    model: TambaForCausalLM,
    logs: Sequence[StageLog],
    digest: str,
) -> None:
    """The trained checkpoint, in the types that the student was stored in."""
    specs = parameter_specs(source.tamba_config)
    parameters = dict(model.named_parameters())
    config = json.loads(source.tamba_config.to_json_string())
    writer = CheckpointWriter(out, specs, config, shard_bytes=recipe.output.shard_bytes)
    with writer, progress.task("write", len(specs)) as advance:
        for name, spec in specs.items():
            tensor = parameters[name].detach().to(device="cpu", dtype=spec.dtype)
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"train: {name}", "is no longer a number", "lower the learning rate"
                )
            writer.write(name, tensor)
            advance()
        for name, path in source.companions().items():
            writer.add_file(name, path)
        folder = source.folder
        if folder is None:
            if (tokenizer := load_tokenizer(source)) is not None:
                tokenizer.save_pretrained(writer.folder)
        else:
            for name in ("plan.toml", "build.json"):
                if (folder / name).is_file():
                    writer.add_file(name, folder / name)
        writer.add_file("recipe.toml", recipe.text)
        record = {
            "stages": [log.to_dict() for log in logs],
            "inputs": digest,
            "versions": versions(),
        }
        writer.add_file("train.json", json.dumps(record, indent=1) + "\n")
        points = [
            {"stage": name, "tokens": tokens, "loss": loss}
            for name, log in zip(_told_apart([log.stage for log in logs]), logs, strict=True)
            for tokens, loss in log.losses
        ]
        writer.add_file("record.json", json.dumps({"training": points}, indent=1) + "\n")


def _told_apart(stages: Sequence[str]) -> list[str]:
    """Names of stages in their order, counted where a kind comes more than once."""
    return [
        f"{kind} {stages[: i + 1].count(kind)}" if stages.count(kind) > 1 else kind
        for i, kind in enumerate(stages)
    ]
