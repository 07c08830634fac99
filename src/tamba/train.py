"""Repair a student: fit its converted layers in closed form, align them, distil the whole.

A recipe's stages run in its order. `least_squares` and `align` look at one converted layer at a
time and ask that it do what the teacher's attention does; `distil` runs the student end to end. The
functions of those names work on models in memory; `train` reads and writes folders around them.

Weights that move are float32 masters whatever the student is stored in, and matrix products run in
the type that the stage names. Text is gone over in pools of rows, as many as memory is set aside
for: what the frozen parts of teacher and student compute is computed once a pool and then trained
on, as often as the stage's tokens ask for.

Shape letters: `n` rows, `B` rows of a batch, `T` tokens of a row, `D` d_model.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tamba
from tamba import progress
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
from tamba.model.config import AttentionSpec
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.ops.losses import Weights, next_token_loss
from tamba.plan import LayerPlan, read_plan
from tamba.recipe import Align, Distil, LeastSquares, Recipe, as_recipe
from tamba.text import prepare_text, read_text
from tamba.trace import climb, computing, each, enter, finish, places, trace

_POOL_BYTES = 4 << 30
"""Activations held at once."""
_POINTS = 48
"""Losses kept a stage."""

Pairs = Mapping[int, int]
"""Student layer -> the teacher's attention layer that it was made of."""


@dataclass(frozen=True)
class StageLog:
    """What a stage did.

    Args:
        stage: its kind.
        tokens: text that it went over.
        losses: (tokens so far, mean loss since the last point). For ``least_squares`` and ``align``
            a loss is the mean over layers of the squared error relative to the variance of the
            teacher's output; for ``distil`` it is nats a token.
        layers: what is left of each layer's variance, by student layer.
    """

    stage: str
    tokens: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    layers: dict[int, float] = field(default_factory=dict)


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
) -> StageLog:
    """Train every converted mixer, apart, to give what the teacher's does on the teacher's input.

    The loss is the squared error relative to the variance of the teacher's output. Layers know
    nothing of one another, so on a CPU several are trained at a time.

    Args:
        student: changed in place, in the mixers of `pairs` alone.
        seed: of the order of rows.
    """
    dtype = _gradient_dtype(stage)
    schedule = _Schedule(stage, blocks.length)
    learners = {
        i: _Learner(dict(_mixer(student, i).named_parameters()), stage, schedule) for i in pairs
    }
    curve = _Curve(stage.stage, schedule.tokens, len(pairs))
    bytes_each = 2 * len(pairs) * teacher.config.hidden_size * dtype.itemsize * blocks.length
    for pool, steps in _pools(blocks, bytes_each, stage.batch, schedule.steps):
        seen = trace(teacher, pool, mixers=pairs.values(), dtype=dtype).mixers

        def train_one(index: int, advance: Any, seen: Any = seen, steps: Any = steps) -> float:
            mixer, learner, this = _mixer(student, index), learners[index], seen[pairs[index]]
            variance = _variance(this.outputs)
            recent = []
            for rows in _orders(len(this.inputs), stage.batch, steps, seed):
                with computing(student, dtype, grad=True):
                    got = mixer(this.inputs[rows], None, places(this.starts[rows]))
                error = (got.to(variance.dtype) - this.outputs[rows]).square().sum(-1).mean()
                loss = error / variance
                learner.step(loss)
                recent.append(loss.detach())
                curve.add(learner.taken, recent[-1])
                advance(1 / len(pairs))
            tail = recent[-max(1, len(recent) // 8) :]
            return float(torch.stack(tail).mean())

        layers = list(pairs)
        found = each(train_one, layers, device=student.device, label="align", total=steps.count)
        curve.layers |= dict(zip(layers, found, strict=True))
    return curve.log()


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
) -> StageLog:
    """Train parameters of the student on the teacher's next-token distribution, the text, or both.

    Layers below the first that moves are run once a pool, and so is the teacher.

    Args:
        student: changed in place.
        teacher: None where the stage has no use for it.
        trained: names of the parameters that move.
        seed: of the order of rows.

    Raises:
        UserError: teacher and student have other vocabularies.
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
    schedule = _Schedule(stage, blocks.length)
    curve = _Curve(stage.stage, schedule.tokens, 1)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for parameter in moving.values():
        parameter.requires_grad_(True)
    learner = _Learner(moving, stage, schedule)
    top = len(student.model.layers)
    bytes_each = blocks.length * student.config.hidden_size * 8
    try:
        for pool, steps in _pools(blocks, bytes_each, stage.batch, schedule.steps):
            below = None
            if first is not None:
                label = "student's frozen layers read"
                below = trace(student, pool, streams=[first], dtype=dtype, label=label)
            above = None
            if teacher is not None:
                last = len(teacher.model.layers)
                above = trace(teacher, pool, streams=[last], dtype=dtype).streams[last]
            with progress.task("distil", steps.count) as advance:
                for rows in _orders(len(pool), stage.batch, steps, seed):
                    batch = Batch(pool.tokens[rows].long(), pool.starts[rows]).to(student.device)
                    with computing(student, dtype, grad=True):
                        hidden, tokens = enter(student, batch)
                        if below is not None and first is not None:
                            hidden = below.streams[first][rows.to(hidden.device)]
                        hidden = finish(student, climb(student, hidden, tokens, first or 0, top))
                        wanted = None
                        if teacher is not None and above is not None:
                            with torch.no_grad():
                                wanted = finish(teacher, above[rows.to(hidden.device)])
                        loss = _loss(student, hidden, teacher, wanted, batch, weights)
                    learner.step(loss)
                    curve.add(learner.taken, loss.detach())
                    advance(1, note=f"{float(loss.detach()):.3f} nats")
    finally:
        for parameter in student.parameters():
            parameter.requires_grad_(True)
    return curve.log()


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


def trained_parameters(student: TambaForCausalLM, made: Iterable[int], what: str) -> list[str]:
    """Names of what a `Distil` stage moves.

    Args:
        made: student layers whose mixers the build made.
        what: ``mixers``, ``mixers+norms`` or ``all``.
    """
    if what == "all":
        return [name for name, _ in student.named_parameters()]
    mixers = tuple(f"model.layers.{i}.mixer." for i in made)
    return [
        name
        for name, _ in student.named_parameters()
        if name.startswith(mixers) or (what == "mixers+norms" and "norm." in name)
    ]


# Steps.


@dataclass(frozen=True)
class _Steps:
    """Steps `first` to `first + count` of a stage."""

    first: int
    count: int


class _Schedule:
    """Steps of a stage and their learning rates."""

    def __init__(self, stage: Align | Distil, length: int) -> None:
        self.stage = stage
        self.steps = max(1, stage.tokens // (stage.batch * length))
        self.tokens = self.steps * stage.batch * length

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        stage = self.stage
        warmup = math.ceil(stage.warmup * self.steps)
        if step < warmup:
            return stage.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - share,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
        }
        return stage.lr * factor[stage.schedule]


class _Learner:
    """AdamW over some parameters, one step after another."""

    def __init__(
        self, named: Mapping[str, nn.Parameter], stage: Align | Distil, schedule: _Schedule
    ) -> None:
        self.parameters = list(named.values())
        self._schedule = schedule
        self._clip = stage.clip
        decayed = {
            name
            for name, p in named.items()
            if p.dim() == 2 and name.rpartition(".")[2] not in RecurrentMixer.FLOAT32
        }
        matrices = [p for name, p in named.items() if name in decayed]
        others = [p for name, p in named.items() if name not in decayed]
        self._adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": stage.weight_decay},
                # Decaying norms, biases, taps and decays would pull them to a meaningless zero.
                {"params": others, "weight_decay": 0.0},
            ],
            lr=stage.lr,
            betas=stage.betas,
            fused=True,
        )
        self.taken = 0

    def step(self, loss: Tensor) -> None:
        loss.backward()
        if self._clip:
            nn.utils.clip_grad_norm_(self.parameters, self._clip)
        for group in self._adam.param_groups:
            group["lr"] = self._schedule.rate(self.taken)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.taken += 1


class _Curve:
    """Gathers losses of all learners into a few points."""

    def __init__(self, stage: str, tokens: int, learners: int) -> None:
        self.layers: dict[int, float] = {}
        self._stage, self._tokens, self._learners = stage, tokens, learners
        self._losses: dict[int, list[Tensor]] = {}

    def add(self, step: int, loss: Tensor) -> None:
        self._losses.setdefault(step, []).append(loss)

    def log(self) -> StageLog:
        steps = sorted(self._losses)
        points = []
        for some in _split(steps, _POINTS):
            # Added by threads in any order, and equal to the last bit all the same.
            values = sorted(float(v) for step in some for v in self._losses[step])
            points.append((some[-1] * self._tokens // len(steps), math.fsum(values) / len(values)))
        if points and not all(math.isfinite(loss) for _, loss in points):
            raise UserError(
                f"train: {self._stage}", "the loss is no longer a number", "lower the learning rate"
            )
        return StageLog(self._stage, self._tokens, points, self.layers)


def _split(items: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    count = min(most, len(items))
    for a, b in pairwise(round(i * len(items) / count) for i in range(count + 1)):
        yield items[a:b]


def _pools(
    blocks: TokenBlocks, bytes_each: int, batch: int, steps: int
) -> Iterator[tuple[TokenBlocks, _Steps]]:
    """Rows that are held at once, and the steps that are taken on them.

    No more rows than the steps can use; where these are more than one epoch, each pool gets its
    share of all of them.
    """
    n = min(len(blocks), steps * batch)
    size = min(n, max(batch, _POOL_BYTES // max(1, bytes_each)))
    count = -(-n // size)
    edges = [round(i * n / count) for i in range(count + 1)]
    shares = [round(i * steps / count) for i in range(count + 1)]
    for (a, b), (start, stop) in zip(pairwise(edges), pairwise(shares), strict=True):
        pool = TokenBlocks(blocks.tokens[a:b], blocks.starts[a:b], (b - a) * blocks.length)
        yield pool, _Steps(start, stop - start)


def _orders(n: int, batch: int, steps: _Steps, seed: int) -> Iterator[Tensor]:
    """Rows of each step: a new order of all `n` each epoch, the same for all layers."""
    left = torch.empty(0, dtype=torch.long)
    epoch = 0
    for _ in range(steps.count):
        while len(left) < batch:
            mixed = hashlib.sha256(f"{seed} {steps.first} {epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
            left = torch.cat([left, torch.randperm(n, generator=generator)])
            epoch += 1
        yield left[:batch]
        left = left[batch:]


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

    After each stage what has changed is kept beside `out`, in a hidden folder; a run that was
    interrupted goes on after its last whole stage, and ends with the same weights.

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
    checkpoint = open_checkpoint(source)
    plan = _plan_of(source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare_text(recipe) if text is None else read_text(text)
    blocks = prepared.train
    if blocks is None:
        raise UserError(recipe.where("data.train"), "names no text", "training needs some")
    model = load_model(checkpoint, torch.float32, device)
    teacher = load_model(open_model(recipe), torch.float32, device)
    pairs = {i: plan.entries[i].index for i in plan.converted}
    _check_pairs(teacher, model, pairs, source)
    # Converted, transplanted or fresh: whatever is not the teacher's own.
    made = [i for i, entry in enumerate(plan.entries) if entry.action != "keep"]
    _check_stages(recipe, model, teacher, pairs, made, blocks)
    memory = _Memory(Path(out), recipe, checkpoint, blocks)
    logs = memory.restore(model)
    for stage in recipe.train[len(logs) :]:
        rows = _of_length(blocks, stage.length, recipe)
        if isinstance(stage, LeastSquares):
            log = least_squares(model, teacher, pairs, rows, stage)
        elif isinstance(stage, Align):
            log = align(model, teacher, pairs, rows, stage, recipe.seed)
        else:
            names = trained_parameters(model, made, stage.train)
            log = distil(
                model, teacher if stage.uses_teacher else None, names, rows, stage, recipe.seed
            )
        logs.append(log)
        memory.keep(model, logs)
    _write(Path(out), recipe, checkpoint, model, logs, memory.digest)
    memory.forget()
    return logs


def _check_stages(
    recipe: Recipe,
    student: TambaForCausalLM,
    teacher: TambaForCausalLM,
    pairs: Pairs,
    made: Sequence[int],
    blocks: TokenBlocks,
) -> None:
    """Refuse a stage that cannot run before the first of them does."""
    for index, stage in enumerate(recipe.train):
        where = recipe.where(f"train.{index} ({stage.stage})")
        _of_length(blocks, stage.length, recipe)
        if isinstance(stage, Distil):
            _gradient_dtype(stage)
            if not trained_parameters(student, made, stage.train):
                raise UserError(
                    where, f"train = '{stage.train}' names no parameter of this plan", "use 'all'"
                )
            if stage.uses_teacher and student.config.vocab_size != teacher.config.vocab_size:
                raise UserError(
                    where,
                    f"the teacher has {teacher.config.vocab_size} words and the student "
                    f"{student.config.vocab_size}",
                    "set kl = 0 and ce = 1",
                )
            continue
        if isinstance(stage, Align):
            _gradient_dtype(stage)
        if not pairs:
            raise UserError(where, "the plan converts no layer", "leave this stage out")
        if isinstance(stage, LeastSquares) and stage.fit == "mixer":
            for ours, theirs in pairs.items():
                attention = teacher.model.layers[theirs].mixer
                assert isinstance(attention, Attention)
                if not can_calibrate(_mixer(student, ours), attention):
                    raise UserError(
                        where,
                        f"fit = 'mixer' cannot set the mixer of layer {ours}",
                        "use fit = 'output'",
                    )


def _plan_of(folder: Path) -> LayerPlan:
    path = folder / "plan.toml"
    if not path.is_file():
        raise UserError(str(folder), "holds no plan.toml", "give a checkpoint that build wrote")
    return read_plan(path)


def _check_pairs(
    teacher: TambaForCausalLM, student: TambaForCausalLM, pairs: Pairs, source: Path
) -> None:
    """Refuse a plan that does not describe this student."""
    for ours, theirs in pairs.items():
        fits = (
            ours < len(student.model.layers)
            and theirs < len(teacher.model.layers)
            and isinstance(student.model.layers[ours].mixer, RecurrentMixer)
            and isinstance(teacher.model.layers[theirs].mixer, Attention)
        )
        if not fits:
            raise UserError(
                f"{source / 'plan.toml'}: layers[{ours}]",
                f"layer {ours} of the student is not the teacher's layer {theirs}, converted",
                "build the student again",
            )


def _of_length(blocks: TokenBlocks, length: int | None, recipe: Recipe) -> TokenBlocks:
    """The same text in rows of another length; where a row is cut, a document begins."""
    if length is None or length == blocks.length:
        return blocks
    if length < 2 or blocks.length % length:
        raise UserError(
            recipe.where("train"),
            f"length = {length} does not divide the {blocks.length} tokens of a row",
            "choose a divisor of data.length",
        )
    starts = blocks.starts.reshape(-1, length).clone()
    starts[:, 0] = True
    tokens = blocks.tokens.reshape(-1, length)
    return TokenBlocks(tokens, starts, blocks.n_tokens, blocks.bytes_per_token)


class _Memory:
    """Whole stages of an unfinished run, beside its output.

    The folder is named after `out`; its files hold the tensors that differ from the student's, and
    the digest of what went in says whether they are of this run.
    """

    def __init__(self, out: Path, recipe: Recipe, student: Checkpoint, blocks: TokenBlocks) -> None:
        self.folder = out.absolute().parent / f".{out.absolute().name}.stages"
        raw = blocks.tokens.numpy().tobytes() + blocks.starts.numpy().tobytes()
        parts = [
            recipe.digest("seed", "teacher", "train"),
            student.digest(),
            hashlib.sha256(raw).hexdigest(),
            tamba.__version__,
        ]
        self.digest = text_digest(parts)
        self._before: dict[str, Tensor] = {}

    def restore(self, model: TambaForCausalLM) -> list[StageLog]:
        """Load the last whole stage of this run into the model; the logs up to there."""
        self._before = {name: p.detach().clone() for name, p in model.named_parameters()}
        path = self.folder / "stage.safetensors"
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                if facts["digest"] != self.digest:
                    return []
                logs = [_log_from(log) for log in json.loads(facts["logs"])]
                parameters = dict(model.named_parameters())
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                with torch.no_grad():
                    for name, tensor in tensors.items():
                        parameters[name].copy_(tensor)
                return logs
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            # Nothing of use is there: the run begins anew, which is always right.
            return []

    def keep(self, model: TambaForCausalLM, logs: Sequence[StageLog]) -> None:
        """Write what has changed so far, whole or not at all."""
        changed = {
            name: p.detach().cpu().contiguous()
            for name, p in model.named_parameters()
            if not torch.equal(p, self._before[name])
        }
        facts = {"digest": self.digest, "logs": json.dumps([_log_to(log) for log in logs])}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / "stage.part"
            save_file(changed, part, metadata=facts)
            part.replace(self.folder / "stage.safetensors")
        except (OSError, SafetensorError) as error:
            raise UserError(
                str(self.folder), f"cannot be written ({error})", "free some room on the disk"
            ) from error

    def forget(self) -> None:
        """The run is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _log_to(log: StageLog) -> dict[str, Any]:
    return {
        "stage": log.stage,
        "tokens": log.tokens,
        "losses": [list(point) for point in log.losses],
        "layers": {str(i): left for i, left in log.layers.items()},
    }


def _log_from(data: dict[str, Any]) -> StageLog:
    losses = [(int(tokens), float(loss)) for tokens, loss in data["losses"]]
    layers = {int(i): float(left) for i, left in data["layers"].items()}
    return StageLog(data["stage"], data["tokens"], losses, layers)


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
            "stages": [_log_to(log) for log in logs],
            "inputs": digest,
            "versions": {
                "tamba": tamba.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        writer.add_file("train.json", json.dumps(record, indent=1) + "\n")
        points = [
            {"stage": log.stage, "tokens": tokens, "loss": loss}
            for log in logs
            for tokens, loss in log.losses
        ]
        writer.add_file("record.json", json.dumps({"training": points}, indent=1) + "\n")
