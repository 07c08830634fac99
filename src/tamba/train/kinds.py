"""The kinds of stages: what each moves, when it cannot be, and who does it.

A new kind is a section of the recipe and an entry of `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tamba.calibrate import can_calibrate
from tamba.chats import check_chats, read_rows
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.generate import end_tokens
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import LayerPlan
from tamba.recipe import Align, ChatStage, Distil, Dpo, LeastSquares, OnPolicy, Recipe, Sft
from tamba.train.chat import Framed, dpo, frame, on_policy, sft
from tamba.train.chat_steps import check_library
from tamba.train.closed_form import least_squares
from tamba.train.log import StageLog
from tamba.train.mixing import can_compare
from tamba.train.objectives import Pairs, TeacherSignal
from tamba.train.schedules import active_layers, n_steps
from tamba.train.steps import align, attention_layers, distil, trained_parameters
from tamba.train.teacher import need_int8
from tamba.train.trainer import Place


@dataclass(frozen=True)
class Case:
    """What is known of a stage before any weight is read.

    Args:
        student, teacher: their configurations; `plan` makes the one of the other.
        names: of the student's parameters.
    """

    recipe: Recipe
    student: TambaConfig
    teacher: TambaConfig
    plan: LayerPlan
    names: list[str]

    @property
    def pairs(self) -> Pairs:
        """Converted layer -> the teacher's layer that it was made of."""
        return {i: self.plan.entries[i].index for i in self.plan.converted}

    @property
    def made(self) -> list[int]:
        """Layers with a mixer that is not the teacher's own: converted, transplanted or fresh."""
        return [i for i, entry in enumerate(self.plan.entries) if entry.action != "keep"]


@dataclass(frozen=True, eq=False)
class Job:
    """One stage at work.

    Args:
        student: changed in place; what moves is float32 at least.
        teacher: None where the stage does not ask it.
        rows: the stage's text, at its length.
        moved: names of the parameters that move.
        place: where checkpoints are kept, and who hears of the steps.
        tokenizer: the student's, for stages on conversations, and their rows, framed.
        signal: what the teacher says of a piece, where it is not `teacher` that says it.
    """

    case: Case
    student: TambaForCausalLM
    teacher: TambaForCausalLM | None
    rows: TokenBlocks | None
    moved: list[str]
    place: Place
    tokenizer: Any = None
    signal: TeacherSignal | None = None
    framed: Framed | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of stage.

    Args:
        check: (case, stage, where) -> what the stage moves; raises UserError, whose message begins
            with `where`, if it cannot run.
        run: does it.
        uses_teacher: whether the teacher has to be loaded for a stage.
    """

    check: Callable[[Case, Any, str], list[str]]
    run: Callable[[Job, Any], StageLog]
    uses_teacher: Callable[[Any], bool] = lambda stage: True


def _check_least_squares(case: Case, stage: LeastSquares, where: str) -> list[str]:
    _check_converts(case, where)
    if stage.fit == "mixer":
        for ours, theirs in case.pairs.items():
            heads = case.teacher.block_specs[theirs].mixer
            assert isinstance(heads, AttentionSpec)
            if not can_calibrate(case.student.block_specs[ours].mixer, heads):
                raise UserError(
                    where,
                    f"fit = 'mixer' cannot set the mixer of layer {ours}",
                    "use fit = 'output'",
                )
    return trained_parameters(case.names, case.pairs, "mixers")


def _run_least_squares(job: Job, stage: LeastSquares) -> StageLog:
    assert job.teacher is not None and job.rows is not None
    log = least_squares(job.student, job.teacher, job.case.pairs, job.rows, stage)
    if torch.distributed.is_initialized():
        # All processes have computed the same, to the last bits; these must not differ either.
        for name in job.moved:
            torch.distributed.broadcast(job.student.get_parameter(name).data, src=0)
    return log


def _check_align(case: Case, stage: Align, where: str) -> list[str]:
    _check_dtype(stage, where)
    _check_converts(case, where)
    for ours, theirs in case.pairs.items() if stage.mixing else ():
        heads = case.teacher.block_specs[theirs].mixer
        assert isinstance(heads, AttentionSpec)
        if not can_compare(case.student.block_specs[ours].mixer, heads):
            raise UserError(
                where,
                f"layer {ours} has no matrix for each head of the attention",
                "convert to Mamba-2, or leave mixing out",
            )
    return trained_parameters(case.names, case.pairs, "mixers")


def _run_align(job: Job, stage: Align) -> StageLog:
    assert job.teacher is not None and job.rows is not None
    seed = job.case.recipe.seed
    return align(job.student, job.teacher, job.case.pairs, job.rows, stage, seed, job.place)


def _check_distil(case: Case, stage: Distil, where: str) -> list[str]:
    _check_dtype(stage, where)
    moved = trained_parameters(case.names, case.made, stage.train)
    if not moved:
        raise UserError(
            where, f"train = '{stage.train}' names no parameter of this plan", "use 'all'"
        )
    if stage.asks_teacher and case.student.vocab_size != case.teacher.vocab_size:
        raise UserError(
            where,
            f"the teacher has {case.teacher.vocab_size} words and the student "
            f"{case.student.vocab_size}",
            "set kl = 0 and ce = 1",
        )
    if stage.top_k is not None and stage.stored and stage.top_k >= case.teacher.vocab_size:
        raise UserError(
            where,
            f"top_k = {stage.top_k} of {case.teacher.vocab_size} words",
            "store fewer than all",
        )
    if stage.teacher == "int8":
        need_int8(where)
    if stage.replacement != "at_once":
        _check_converts(case, where)
        strange = [] if isinstance(stage.order, str) else {*stage.order} - {*case.pairs}
        if strange:
            raise UserError(
                where,
                f"order names layers that are not converted: {sorted(strange)}",
                f"name some of {sorted(case.pairs)}",
            )
        steps = n_steps(stage, stage.length or case.recipe.data.length)
        active_layers(stage, case.pairs, attention_layers(case.teacher), steps, 0, where)
    return moved


def _run_distil(job: Job, stage: Distil) -> StageLog:
    assert job.rows is not None
    made = tuple(f"model.layers.{i}.mixer." for i in job.case.made)
    return distil(
        job.student,
        job.teacher if stage.uses_teacher else None,
        job.moved,
        job.rows,
        stage,
        job.case.recipe.seed,
        job.place,
        pairs=job.case.pairs,
        fresh=lambda name: name.startswith(made),
        signal=job.signal,
    )


def _check_chat(case: Case, stage: ChatStage, where: str) -> list[str]:
    check_library(where)
    check_chats(case.recipe.chat_sources(stage))
    moved = trained_parameters(case.names, case.made, stage.train)
    if not moved:
        raise UserError(
            where, f"train = '{stage.train}' names no parameter of this plan", "use 'all'"
        )
    if stage.uses_teacher and case.student.vocab_size != case.teacher.vocab_size:
        raise UserError(
            where,
            f"the teacher has {case.teacher.vocab_size} words and the student "
            f"{case.student.vocab_size}",
            "use models that share a tokenizer",
        )
    return moved


def frame_all(
    recipe: Recipe, student: TambaForCausalLM, tokenizer: Any, done: int
) -> dict[int, Framed]:
    """The rows of every stage on conversations after the first `done`, before any of them runs.

    Raises:
        UserError: no tokenizer, or a row that cannot be used, by its place.
    """
    framed = {}
    for index, stage in list(enumerate(recipe.train))[done:]:
        if isinstance(stage, Sft | Dpo | OnPolicy):
            if tokenizer is None:
                raise UserError(
                    recipe.where_stage(index),
                    "the student has no tokenizer",
                    "put tokenizer.json beside its weights",
                )
            rows = read_rows(recipe.chat_sources(stage), limit=stage.rows)
            ends = end_tokens(student, tokenizer)
            words = student.config.vocab_size
            framed[index] = frame(stage, tokenizer, rows, ends, words, recipe.seed)
    return framed


def _run_chat(job: Job, stage: Sft | Dpo | OnPolicy) -> StageLog:
    runs: dict[type, Callable[..., StageLog]] = {Sft: sft, Dpo: dpo, OnPolicy: on_policy}
    return runs[type(stage)](
        job.student,
        job.tokenizer,
        stage,
        job.framed,
        teacher=job.teacher,
        moving=job.moved,
        seed=job.case.recipe.seed,
        place=job.place,
    )


def _check_converts(case: Case, where: str) -> None:
    if not case.pairs:
        raise UserError(where, "the plan converts no layer", "leave this stage out")
    ours, theirs = case.student.hidden_size, case.teacher.hidden_size
    if ours != theirs:
        raise UserError(
            where,
            f"the teacher's layers are {theirs} wide and the student's {ours}",
            "name the teacher that the student was made of",
        )


def _check_dtype(stage: Align | Distil, where: str) -> None:
    if stage.dtype == "float16":
        raise UserError(where, "float16 gradients vanish without scaling", "use bfloat16")


KINDS: dict[type, Kind] = {
    LeastSquares: Kind(_check_least_squares, _run_least_squares),
    Align: Kind(_check_align, _run_align),
    Distil: Kind(_check_distil, _run_distil, lambda stage: bool(stage.uses_teacher)),
    Sft: Kind(_check_chat, _run_chat, lambda stage: bool(stage.uses_teacher)),
    Dpo: Kind(_check_chat, _run_chat, lambda stage: bool(stage.uses_teacher)),
    OnPolicy: Kind(_check_chat, _run_chat),
}
