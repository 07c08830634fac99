"""The closed form: converted layers fitted to what the teacher's attention does on some text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tamba import progress
from tamba.calibrate import calibrate, fit_output
from tamba.data import TokenBlocks
from tamba.model.attention import Attention
from tamba.model.config import AttentionSpec
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.recipe import LeastSquares
from tamba.trace import each, trace
from tamba.train.log import StageLog
from tamba.train.objectives import Pairs

_POOL_BYTES = 4 << 30
"""Activations held at once."""


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


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known) if known else 0.0
