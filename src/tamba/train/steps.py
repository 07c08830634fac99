"""The stages of gradient steps, on models in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch

from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.recipe import Align, Distil
from tamba.train.engine import NOWHERE, Place, run_steps
from tamba.train.log import StageLog
from tamba.train.objectives import (
    AlignObjective,
    DistilObjective,
    LiveTeacher,
    Pairs,
    TeacherSignal,
)
from tamba.train.schedules import active_layers, n_steps


def align(
    student: TambaForCausalLM,
    teacher: TambaForCausalLM,
    pairs: Pairs,
    blocks: TokenBlocks,
    stage: Align,
    seed: int = 0,
    place: Place = NOWHERE,
) -> StageLog:
    """Train every converted mixer, apart, to give what the teacher's does on the teacher's input.

    The loss is the squared error relative to the variance of the teacher's output. Layers know
    nothing of one another, so on a CPU several are trained at a time.

    Args:
        student: changed in place, in the mixers of `pairs` alone, which are float32 at least.
        seed: of the order of rows.
        place: where checkpoints are kept, and who hears of the steps.

    Raises:
        UserError: losses that are no numbers, or a disk without room.
    """
    mixers = tuple(f"model.layers.{i}.mixer." for i in pairs)
    moving = {name for name, _ in student.named_parameters() if name.startswith(mixers)}
    # Threads share one process' gradients; wrapped models count on hooks that run in one of them.
    alone = student.device.type == "cpu" and not torch.distributed.is_initialized()
    threads = torch.get_num_threads() if alone else 1
    objective = AlignObjective(student, teacher, pairs, blocks, stage, threads)
    try:
        return run_steps(objective, stage, blocks, moving, seed=seed, place=place)
    finally:
        objective.close()


def distil(
    student: TambaForCausalLM,
    teacher: TambaForCausalLM | None,
    trained: Iterable[str],
    blocks: TokenBlocks,
    stage: Distil,
    seed: int = 0,
    place: Place = NOWHERE,
    *,
    pairs: Pairs | None = None,
    fresh: Callable[[str], bool] = lambda name: True,
    signal: TeacherSignal | None = None,
) -> StageLog:
    """Train parameters of the student on the teacher's next-token distribution, the text, or both.

    Args:
        student: changed in place.
        teacher: None where the stage has no use for it.
        trained: names of the parameters that move, which are float32 at least.
        seed: of the order of rows, and of layers that are replaced at random.
        place: where checkpoints are kept, and who hears of the steps.
        pairs: converted layers, for a stage that replaces them by and by.
        fresh: whether a parameter takes `stage.lr` rather than `stage.lr_pretrained`.
        signal: what the teacher says of a piece, where it is not `teacher` that says it.

    Raises:
        UserError: teacher and student have other vocabularies, losses that are no numbers, or a
            disk without room.
    """
    words = student.config.vocab_size
    if stage.asks_teacher and teacher is not None and teacher.config.vocab_size != words:
        raise UserError(
            "train: distil",
            f"teacher and student have {teacher.config.vocab_size} and {words} tokens",
            "distil between models that share a tokenizer",
        )
    if signal is None and stage.asks_teacher and teacher is not None:
        signal = LiveTeacher(teacher, getattr(torch, stage.dtype))
    active = None
    if stage.replacement != "at_once" and teacher is not None:
        steps = n_steps(stage, blocks.length)
        active = active_layers(stage, pairs or {}, attention_layers(teacher.config), steps, seed)
    objective = DistilObjective(
        student, signal if stage.asks_teacher else None, stage, teacher, pairs, active
    )
    with _frozen(teacher):
        return run_steps(
            objective,
            stage,
            blocks,
            set(trained),
            fresh=fresh,
            seed=seed,
            place=place,
            uneven=active is not None,
        )


def attention_layers(config: TambaConfig) -> int:
    """How many layers of a model are attention."""
    return sum(isinstance(spec.mixer, AttentionSpec) for spec in config.block_specs)


@contextmanager
def _frozen(model: TambaForCausalLM | None) -> Iterator[None]:
    """Inside, the model takes no gradients: its layers may stand in the student's own graph."""
    if model is None:
        yield
        return
    before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def trained_parameters(names: Iterable[str], made: Collection[int], what: str) -> list[str]:
    """Names of what a `Distil` stage moves.

    Args:
        names: of all parameters of the student.
        made: student layers whose mixers the build made.
        what: ``mixers``, ``mixers+norms``, ``mixers+mlp``, ``all-but-mlp`` or ``all``.
    """
    mixers = tuple(f"model.layers.{i}.mixer." for i in made)
    moves: dict[str, Callable[[str], bool]] = {
        "mixers": lambda name: name.startswith(mixers),
        "mixers+norms": lambda name: name.startswith(mixers) or "norm." in name,
        "mixers+mlp": lambda name: name.startswith(mixers) or ".mlp." in name,
        "all-but-mlp": lambda name: ".mlp." not in name,
        "all": lambda name: True,
    }
    return [name for name in names if moves[what](name)]
