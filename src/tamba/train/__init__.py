"""Repair a student: fit its converted layers in closed form, align them, distil the whole.

A recipe's stages run in its order; `kinds` says what each is. `least_squares` and `align` look at
one converted layer at a time and ask that it do what the teacher's attention does; `distil` runs
the student end to end; `sft`, `dpo` and `on_policy` teach it to converse. The functions of those
names work on models in memory; `train` reads and writes folders around them.

Weights that move are float32 masters whatever the student is stored in; all others, and the
teacher, are held once, in the type that the recipe gives them. Matrix products run in the type that
the stage names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import tamba
from tamba import progress
from tamba.artefact import versions
from tamba.chats import sources_digest
from tamba.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    load_model,
    load_tokenizer,
    open_checkpoint,
    open_model,
    parameter_specs,
)
from tamba.data import TokenBlocks, text_digest
from tamba.errors import UserError, nearest
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import LayerPlan, read_plan
from tamba.recipe import WRITTEN, Align, ChatStage, Distil, LeastSquares, Recipe, Stage, as_recipe
from tamba.text import Side, check_lengths, prepare_text, read_text
from tamba.train.chat import dpo, on_policy, sft
from tamba.train.chat_steps import shares
from tamba.train.closed_form import least_squares
from tamba.train.kinds import KINDS, Case, Job, frame_all
from tamba.train.log import StageLog
from tamba.train.memory import Memory, same_everywhere, together
from tamba.train.objectives import Pairs
from tamba.train.steps import align, distil, trained_parameters
from tamba.train.teacher import StoredTop, check_room, shorten, write_top
from tamba.train.trainer import Place, check_launch, full

__all__ = [
    "Place",
    "StageLog",
    "align",
    "check_stages",
    "distil",
    "dpo",
    "least_squares",
    "on_policy",
    "sft",
    "train",
    "trained_parameters",
]

_TRAIN: tuple[Side, ...] = ("train",)
_PREPARE = "share their files, and give text that was written once with --text"


def train(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    student: str | Path,
    text: str | Path | None = None,
    stages: Sequence[str | int] = (),
) -> list[StageLog]:
    """Repair a student by the stages of a recipe.

    What has changed is kept beside `out`, in a hidden folder, after each stage and every few
    minutes of gradient steps; a run that was cut off goes on from there, to the same weights. Under
    ``accelerate launch`` or ``torchrun`` all processes call this, and the first one writes.

    Args:
        recipe: the recipe or its file.
        out: the checkpoint folder to make: weights, tokenizer, `train.json` (losses, inputs,
            versions), `record.json` for the report, and what the build left.
        student: the checkpoint that `build` wrote, or one that `train` did.
        text: the folder of prepared text; None to prepare it here.
        stages: which of the recipe's stages to run, by kind or by number from 0; all if empty.

    Returns:
        What each stage did.

    Raises:
        UserError: no stages, a student without a plan, a model or text that cannot be; `out` is not
            made.
    """
    recipe = _with_stages(as_recipe(recipe), stages)
    source, out = Path(student), Path(out)
    if not recipe.train:
        raise UserError(recipe.where("train"), "has no stages", "add a [[train]] section")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "already exists", "choose another folder or remove it")
    checkpoint, giver = open_checkpoint(source), open_model(recipe)
    plan = _plan_of(source)
    case = Case(recipe, checkpoint.tamba_config, giver.tamba_config, plan, [*checkpoint.parameters])
    _check_pairs(giver.tamba_config, checkpoint.tamba_config, case.pairs, source)
    moves = check_stages(
        recipe, checkpoint.tamba_config, checkpoint.parameters, giver.tamba_config, plan
    )
    check_lengths(recipe, giver.tamba_config)
    loggers = _loggers(recipe)
    for index, stage in enumerate(recipe.train):
        if not isinstance(stage, LeastSquares):
            check_launch(stage, recipe.where_stage(index))
    processes = PartialState(cpu=not torch.cuda.is_available())
    _check_shares(recipe, processes.num_processes)
    _check_graphs(recipe, processes)
    writes = processes.is_main_process
    prepared = prepare_text(recipe, sides=_TRAIN) if text is None else read_text(text)
    blocks = prepared.train
    talks = any(isinstance(stage, ChatStage) for stage in recipe.train)
    if blocks is None and not all(isinstance(stage, ChatStage) for stage in recipe.train):
        raise UserError(recipe.where("data.train"), "names no text", "training needs some")
    if blocks is not None:
        _check_words(recipe, blocks, checkpoint, giver)
    teachers = _Teachers(recipe, giver, processes)
    texts = [_text_of(stage, blocks, recipe) for stage in recipe.train]
    teachers.check(texts)
    model = _load_student(recipe, checkpoint, moves, processes.device)
    folder = out.absolute().parent / f".{out.absolute().name}.stages"
    tokenizer = load_tokenizer(checkpoint) if talks else None
    digest = _digest(recipe, checkpoint, blocks)
    same_everywhere(digest, recipe.where("train"), "recipe, student and text", _PREPARE)
    memory = Memory(folder, digest, writes)
    done = len(memory.restore(model))
    same_everywhere(done, str(folder), "stages")
    framed = frame_all(recipe, model, tokenizer, done)
    for index, (stage, moved) in list(enumerate(zip(recipe.train, moves, strict=True)))[done:]:
        place = Place(
            memory.stage_folder(index),
            memory.logs_folder / f"{index}-{stage.stage}",
            loggers,
        )
        signal, teacher = teachers.of(stage, texts[index])
        job = Job(
            *(case, model, teacher, texts[index], moved, place, tokenizer, signal),
            framed.get(index),
        )
        begun = time.monotonic()
        log = KINDS[type(stage)].run(job, stage)
        if not log.seconds:
            log = replace(log, seconds=time.monotonic() - begun)
        del job, signal, teacher  # the next stage's may not fit beside it
        if any(isinstance(p, DTensor) for p in model.parameters()):
            model = _whole(model, recipe, checkpoint, moves, processes.device)
        memory.keep(log, model, moved)
    with together(out):
        if writes:
            _write(out, recipe, checkpoint, model, memory)
    memory.forget()
    return memory.logs


def _with_stages(recipe: Recipe, chosen: Sequence[str | int]) -> Recipe:
    """The recipe with some of its stages, in its order."""
    if not chosen:
        return recipe
    kinds = [stage.stage for stage in recipe.train]
    wanted: set[int] = set()
    for one in map(str, chosen):
        found = [i for i, kind in enumerate(kinds) if one in (kind, str(i))]
        if not found:
            names = [*dict.fromkeys(kinds), *map(str, range(len(kinds)))]
            raise UserError(recipe.where("train"), f"has no stage '{one}'", nearest(one, names))
        wanted.update(found)
    return recipe.with_stages(sorted(wanted))


def _loggers(recipe: Recipe) -> tuple[str, ...]:
    """Who hears of the steps.

    Raises:
        UserError: one that transformers does not know, or that is not installed.
    """
    asked = recipe.output.report_to
    if asked is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    where = recipe.where("output.report_to")
    for name in {*asked} - {"all", "none"}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                where, f"no logger called '{name}'", nearest(name, [*INTEGRATION_TO_CALLBACK])
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise UserError(where, f"'{name}' cannot be used ({error})", "install it") from error
    return asked


def _check_shares(recipe: Recipe, processes: int) -> None:
    """Refuse a batch that so many processes cannot share, before any stage runs."""
    for index, stage in enumerate(recipe.train):
        where = recipe.where_stage(index)
        if isinstance(stage, ChatStage):
            shares(stage, processes, where)
        elif not isinstance(stage, LeastSquares) and stage.batch % processes:
            raise UserError(
                where,
                f"batch = {stage.batch} cannot be shared by {processes} processes",
                "choose a multiple",
            )


def _check_graphs(recipe: Recipe, processes: PartialState) -> None:
    """Refuse graphs that were asked for where there can be none, before any stage runs."""
    if processes.device.type == "cuda" and processes.num_processes == 1:
        return
    for index, stage in enumerate(recipe.train):
        if isinstance(stage, Align | Distil) and stage.graphs is True:
            raise UserError(
                recipe.where_stage(index),
                "graphs = true, and they are for one process on a GPU",
                "leave graphs out",
            )


def _check_words(
    recipe: Recipe, blocks: TokenBlocks, student: Checkpoint, teacher: Checkpoint
) -> None:
    """Refuse text with words that a model which reads it does not have, whoever wrote them."""
    readers = [student]
    if any(KINDS[type(s)].uses_teacher(s) for s in recipe.train if not isinstance(s, ChatStage)):
        readers.append(teacher)
    most = int(blocks.tokens.max())
    for reader in readers:
        words = reader.tamba_config.vocab_size
        if most >= words:
            raise UserError(
                reader.location,
                f"has {words} words, and the text one of number {most}",
                "use models that share a tokenizer, and text that was prepared with it",
            )


class _Teachers:
    """The teacher as each stage wants it, one at a time: whole, in 8 bits, on disk, or not at all.

    Args:
        giver: its checkpoint.
        processes: each holds a teacher of its own; the first one writes what is stored.
    """

    def __init__(self, recipe: Recipe, giver: Checkpoint, processes: PartialState) -> None:
        self._recipe, self._giver, self._processes = recipe, giver, processes
        self._held: tuple[str, TambaForCausalLM] | None = None

    def check(self, texts: Sequence[TokenBlocks | None]) -> None:
        """Refuse what was stored of something else, or has no room, before any stage runs.

        Raises:
            UserError: which folder, and what is not the same or how much is missing.
        """
        for stage, rows in zip(self._recipe.train, texts, strict=True):
            folder = self._folder(stage)
            if rows is None or folder is None:
                continue
            if folder.exists():
                self._open(folder, stage, rows)
            elif isinstance(stage, Distil) and stage.top_k is not None:
                check_room(folder, rows, stage.top_k)

    def of(
        self, stage: Stage, rows: TokenBlocks | None
    ) -> tuple[StoredTop | None, TambaForCausalLM | None]:
        """What is stored for a stage, and the teacher if it asks one."""
        folder = self._folder(stage)
        stored = None
        if folder is not None and rows is not None:
            assert isinstance(stage, Distil) and stage.top_k is not None
            with together(folder):
                if self._processes.is_main_process and not folder.exists():
                    write_top(
                        self._load(stage.teacher),
                        rows,
                        folder,
                        digest=self._name(stage),
                        k=stage.top_k,
                        temperature=stage.temperature,
                        dtype=getattr(torch, stage.dtype),
                        batch_size=stage.micro_batch or stage.batch,
                    )
            stored = self._open(folder, stage, rows)
        if not KINDS[type(stage)].uses_teacher(stage):
            self._held = None
            return stored, None
        return stored, self._load(stage.teacher if isinstance(stage, Distil) else "live")

    def _folder(self, stage: Stage) -> Path | None:
        if not isinstance(stage, Distil) or stage.stored is None:
            return None
        return self._recipe.file.parent / Path(stage.stored).expanduser()

    def _open(self, folder: Path, stage: Stage, rows: TokenBlocks) -> StoredTop:
        assert isinstance(stage, Distil) and stage.top_k is not None
        stored = StoredTop(folder)
        stored.check(rows, digest=self._name(stage), k=stage.top_k, temperature=stage.temperature)
        return stored

    def _name(self, stage: Distil) -> str:
        return self._giver.digest() + (" in 8 bits" if stage.teacher == "int8" else "")

    def _load(self, how: str) -> TambaForCausalLM:
        if self._held is None or self._held[0] != how:
            self._held = None
            asked = self._recipe.teacher.dtype or self._giver.tamba_config.dtype
            held = _held(asked, self._recipe)
            model = load_model(self._giver, held, str(self._processes.device))
            self._held = how, shorten(model) if how == "int8" else model
        return self._held[1]


def _load_student(
    recipe: Recipe,
    student: Checkpoint,
    moves: Iterable[Collection[str]],
    device: torch.device,
) -> TambaForCausalLM:
    masters = {name for names in moves for name in names}
    held = _held(student.tamba_config.dtype, recipe)
    return load_model(student, held, str(device), wide=masters)


def _whole(
    sharded: TambaForCausalLM,
    recipe: Recipe,
    source: Checkpoint,
    moves: Sequence[Collection[str]],
    device: torch.device,
) -> TambaForCausalLM:
    """A student as it was before a stage shared its weights out, with what the stage made of it."""
    masters = {name for names in moves for name in names}
    kept = {}
    for name, parameter in sharded.named_parameters():
        if name in masters:
            kept[name] = full(parameter.detach()).cpu()
    del sharded, parameter
    model = _load_student(recipe, source, moves, device)
    with torch.no_grad():
        for name, tensor in kept.items():
            model.get_parameter(name).copy_(tensor)
    return model


def _held(asked: torch.dtype | str | None, recipe: Recipe) -> torch.dtype:
    """The type of weights that do not move: as asked where all stages compute in it, or float32."""
    name = str(asked or torch.float32).removeprefix("torch.")
    held = name if all(stage.dtype == name for stage in recipe.train) else "float32"
    dtype: torch.dtype = getattr(torch, held)
    return dtype


def _digest(recipe: Recipe, student: Checkpoint, blocks: TokenBlocks | None) -> str:
    """Of everything that the trained weights depend on."""
    raw = b""
    if blocks is not None:
        raw = blocks.tokens.numpy().tobytes() + blocks.starts.numpy().tobytes()
    chats = [
        s
        for stage in recipe.train
        if isinstance(stage, ChatStage)
        for s in recipe.chat_sources(stage)
    ]
    return text_digest(
        [
            recipe.digest("seed", "teacher", "train"),
            student.digest(),
            hashlib.sha256(raw).hexdigest(),
            *sources_digest(chats),
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
    case = Case(recipe, student, teacher, plan, list(names))
    moves = []
    for index, stage in enumerate(recipe.train):
        if not isinstance(stage, ChatStage):
            _check_length(stage.length, recipe.data.length, recipe)
        moves.append(KINDS[type(stage)].check(case, stage, recipe.where_stage(index)))
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
    if length is None:
        return
    joined = length > of and WRITTEN in recipe.data.train
    if length < 2 or (length < of and of % length) or (joined and length % of):
        raise UserError(
            recipe.where("train"),
            f"length = {length} {'does not divide' if length < of else 'is no multiple of'} "
            f"the {of} tokens of a row",
            f"choose a {'divisor' if length < of else 'multiple'} of data.length",
        )


def _text_of(stage: Stage, blocks: TokenBlocks | None, recipe: Recipe) -> TokenBlocks | None:
    """Rows that a stage reads; None for one on conversations."""
    if blocks is None or isinstance(stage, ChatStage):
        return None
    return _of_length(blocks, stage.length, recipe)


def _of_length(blocks: TokenBlocks, length: int | None, recipe: Recipe) -> TokenBlocks:
    """The same text in rows of another length.

    Where a row is cut, a document begins. Longer rows are packed anew from the text, so that long
    documents stay whole; what the teacher wrote is short, and its rows are joined.
    """
    if length is None or length == blocks.length:
        return blocks
    _check_length(length, blocks.length, recipe)
    if length > blocks.length and WRITTEN not in recipe.data.train:
        data = recipe.data.model_copy(update={"length": length})
        longer = prepare_text(recipe.model_copy(update={"data": data}), sides=_TRAIN).train
        assert longer is not None
        return longer
    joined = max(1, length // blocks.length)
    whole = blocks.take(len(blocks) // joined * joined)
    if not len(whole):
        raise UserError(
            recipe.where("train"), f"the text fills no row of {length} tokens", "give more"
        )
    starts = whole.starts.reshape(-1, length).clone()
    starts[:, 0] = True
    tokens = whole.tokens.reshape(-1, length)
    return TokenBlocks(tokens, starts, whole.n_tokens, blocks.bytes_per_token)


def _write(
    out: Path,
    recipe: Recipe,
    source: Checkpoint,
    model: TambaForCausalLM,
    memory: Memory,
) -> None:
    """The trained checkpoint, in the types that the student was stored in."""
    logs = memory.logs
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
        if memory.logs_folder.is_dir():
            shutil.copytree(memory.logs_folder, writer.folder / "logs")
        writer.add_file("recipe.toml", recipe.text)
        record = {
            "stages": [log.to_dict() for log in logs],
            "inputs": memory.digest,
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
