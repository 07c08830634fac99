"""No kernel has two binaries for calls that differ in length, batch or document layout alone.

Found without a GPU, from what Triton would compile each launch for.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from specialisation import Launch, _interpreted, differences, key_of, launches
from tamba.ops import causal_conv1d, selective_scan, ssd
from tamba.ops.kernels import conv
from tamba.ops.losses import Weights, next_token_loss

# (batch, length): of both a 1, an odd one, powers of two, and more than a card has programs for.
CASES = [
    (2, 512), (2, 1000), (2, 63), (1, 512), (3, 128), (16, 65), (1, 4097), (1, 16), (1, 1), (3, 1),
    (1, 17), (64, 24),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_memory_as_it_is() -> None:
    """Nothing here is computed, so that nothing need be filled."""
    torch.use_deterministic_algorithms(False)


def parts(batch: int, length: int, widths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Views of the output of one projection, as a mixer has them."""
    whole = torch.empty(batch, length, sum(widths), dtype=dtype)
    return [part.requires_grad_() for part in whole.split(widths, dim=-1)]


def masks(batch: int, length: int, starts: bool, padding: bool, late: int) -> dict[str, Any]:
    """Where documents start, in a tensor of its own or from token `late` of another; padding."""
    return {
        "starts": torch.zeros(batch, length + late, dtype=torch.bool)[:, late:] if starts else None,
        "padding": torch.zeros(batch, dtype=torch.long) if padding else None,
    }


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def call_conv(batch, length, dtype, state, width=64, **mask):
    x, _ = parts(batch, length, [width, 24], dtype)
    weight, bias = leaf(width, 4, dtype=dtype), leaf(width, dtype=dtype)
    past = leaf(batch, width, 3, dtype=dtype) if state else None
    return causal_conv1d(x, weight, bias, activation="silu", state=past, **mask)


def call_scan(batch, length, dtype, state, channels=64, d_state=16, **mask):
    x, z = parts(batch, length, [channels, channels], dtype)
    _, B, C = parts(batch, length, [4, d_state, d_state], dtype)
    dt = leaf(batch, length, channels, dtype=dtype)
    past = leaf(batch, channels, d_state) if state else None
    return selective_scan(
        x, dt, leaf(channels, d_state), B[:, :, None], C[:, :, None], D=leaf(channels), z=z,
        dt_bias=leaf(channels), dt_softplus=True, state=past, **mask,
    )  # fmt: skip


def call_ssd(batch, length, dtype, state, heads=4, groups=2, **mask):
    z, x, B, C, dt = parts(batch, length, [heads * 32] * 2 + [groups * 16] * 2 + [heads], dtype)
    past = leaf(batch, heads, 32, 16) if state else None
    return ssd(
        x.unflatten(-1, (heads, 32)), dt, leaf(heads), B.unflatten(-1, (groups, 16)),
        C.unflatten(-1, (groups, 16)), D=leaf(heads), z=z.unflatten(-1, (heads, 32)),
        dt_bias=leaf(heads), dt_softplus=True, state=past, **mask,
    )  # fmt: skip


OPERATORS = {
    "conv": call_conv,
    "conv_whole_blocks": partial(call_conv, width=256),
    "scan": call_scan,
    "scan_few_states": partial(call_scan, d_state=5),
    "scan_many_states": partial(call_scan, d_state=33),
    "scan_odd_channels": partial(call_scan, channels=36),
    "ssd": call_ssd,
    "ssd_alone": partial(call_ssd, groups=4),
}


def keys(operator, batch, length, dtype, state, starts, padding, last, late=0) -> set[Launch]:
    with launches() as found:
        mask = masks(batch, length, starts, padding, late)
        y, left = operator(batch, length, dtype, state, **mask)
        outputs = [y, left] if last else [y]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    assert found
    return set(found)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("first", [CASES[0], (1, 16)], ids=["long_first", "short_first"])
def test_length_batch_and_layout_ask_for_no_other_binary(name, dtype, first):
    for given in [
        dict(state=False, starts=False, padding=False, last=False),
        dict(state=True, starts=False, padding=False, last=True),
        dict(state=False, starts=True, padding=False, last=False),
        dict(state=True, starts=True, padding=True, last=True),
    ]:
        known = keys(OPERATORS[name], *first, dtype, **given)
        for i, case in enumerate(CASES):
            new = keys(OPERATORS[name], *case, dtype, **given, late=i % 3)
            assert not differences(known, new), (case, given)
