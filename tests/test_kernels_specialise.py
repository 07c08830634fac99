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

from specialisation import Launch, differences, forget_binders, interpreted, key_of, launches
from tamba.ops import causal_conv1d, selective_scan, ssd
from tamba.ops.directions import compare
from tamba.ops.kernels import conv, losses
from tamba.ops.kernels import selective_scan as scan_kernels

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
def test_length_batch_and_layout_ask_for_no_other_binary(name, dtype):
    """Whether a long sequence was first or a short one."""
    for given in [
        dict(state=False, starts=False, padding=False, last=False),
        dict(state=True, starts=False, padding=False, last=True),
        dict(state=False, starts=True, padding=False, last=False),
        dict(state=True, starts=True, padding=True, last=True),
    ]:
        first = {case: keys(OPERATORS[name], *case, dtype, **given) for case in (CASES[0], (1, 16))}
        for i, case in enumerate(CASES):
            new = keys(OPERATORS[name], *case, dtype, **given, late=i % 3)
            for other, known in first.items():
                assert not differences(known, new), (other, case, given)


def without(kernel: Any, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is asked to specialise on `argument` of `kernel` after all."""
    options = kernel.kwargs if interpreted(kernel) else vars(kernel)
    kept = [name for name in options["do_not_specialize"] if name != argument]
    assert len(kept) < len(options["do_not_specialize"])
    if interpreted(kernel):
        monkeypatch.setitem(kernel.kwargs, "do_not_specialize", kept)
    else:
        again = type(kernel)(kernel.fn, do_not_specialize=kept)
        monkeypatch.setattr(kernel, "params", again.params)
    forget_binders()


@pytest.mark.parametrize(("argument", "case"), [("starts_b", (2, 62)), ("starts", (2, 512))])
def test_a_specialised_argument_is_found(argument, case, monkeypatch):
    """A stride that is the length, and the place of a view: both as faulty as they once were."""
    given = dict(state=False, starts=True, padding=False, last=False)
    with monkeypatch.context() as patch:
        without(conv.forward_kernel, argument, patch)
        known = keys(call_conv, 2, 512, torch.bfloat16, **given)
        told = differences(known, keys(call_conv, *case, torch.bfloat16, **given, late=1))
    forget_binders()
    assert len(told) == 1
    assert "conv.forward_kernel" in told[0]
    assert f"{argument} " in told[0]


def test_a_way_that_was_not_compiled_is_found(monkeypatch):
    """A sequence cut into spans wants kernels that one span has no use for."""
    monkeypatch.setattr(scan_kernels._Prepared, "ways", lambda call, *others: (call.several,))
    given = dict(state=False, starts=False, padding=False, last=False)
    known = keys(call_scan, 1, 16, torch.bfloat16, **given)
    told = differences(known, keys(call_scan, 1, 4097, torch.bfloat16, **given))
    assert any("chain_kernel: launched for the first time" in line for line in told)


def test_what_is_compiled_for_is_what_triton_says():
    """An integer that is specialised has a key for 1, for 16 and for 17."""
    probe = importlib.import_module("triton_probe").probe
    out = torch.zeros(4)
    assert len({key_of(probe, out, size) for size in (1, 16, 17, 32, 33)}) == 3


def test_a_second_call_compiles_no_other_way():
    """Both ways are gone once, not at every call."""
    given = dict(dtype=torch.bfloat16, state=False, starts=None, padding=None)
    kinds: set[Any] = set()
    counts = []
    for _ in range(2):
        with launches(kinds) as found:
            call_scan(1, 16, **given)
        counts.append(len(found))
    assert counts == [5, 2]


@pytest.mark.parametrize("top", [False, True], ids=["dense", "top"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_losses_ask_for_no_other_binary(top, dtype):
    """Positions by number, and where a slice of them begins."""
    options = dict(kl=1.0, ce=1.0, temperature=2.0, beta=0.5, divergence="forward", grad=True)

    def of(n: int, first: int) -> set[Launch]:
        logits = torch.empty(n, 70, dtype=dtype)
        all_ = first + n
        targets, sums = torch.zeros(all_, dtype=torch.long), torch.empty(all_)
        with launches() as found:
            if top:
                indices = torch.zeros(all_, 5, dtype=torch.int32)
                given = indices, torch.empty(all_, 5), torch.empty(all_)
                losses.top(logits, *given, targets, sums, first, **options)
                losses.rest(logits, indices[:n].long(), 2.0)
            else:
                losses.dense(logits, torch.empty_like(logits), targets, sums, first, **options)
        assert len(found) == 1 + top
        return set(found)

    known = of(64, 0)
    for n, first in [(1, 0), (2, 1), (63, 64), (1000, 16), (1024, 1001)]:
        assert not differences(known, of(n, first)), (n, first)


def test_rows_begin_where_accesses_are_wide_or_are_copied():
    """Kernels take a row's place in memory for as even as the stride of tokens."""
    whole = torch.zeros(2, 5, 24)
    odd = torch.zeros(2 * 5 * 24 + 1).as_strided((2, 5, 16), (5 * 24 + 1, 24, 1))
    for fits in (whole, whole[..., 3:], whole[:, :1], odd[:1], torch.zeros(2, 5, 7)):
        assert scan_kernels.rows_of(fits) is fits
    for other in (odd, whole.mT, whole[:, :, ::2]):
        assert scan_kernels.rows_of(other).is_contiguous()
        assert torch.equal(scan_kernels.rows_of(other), other)
    assert scan_kernels.token_stride(whole[:, :1, 3:]) == 24  # of a view, of one token too
    assert scan_kernels.token_stride(torch.zeros(2, 24, 1).mT) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_comparing_states_asks_for_no_other_binary(dtype):
    """Rows, their length, and how many tokens count."""

    def of(batch: int, length: int, counted: int) -> set[Launch]:
        states = [torch.empty(batch, length, 64, dtype=dtype) for _ in range(4)]
        counts = torch.arange(length).expand(batch, length) < counted
        with launches() as found:
            compare(states, counts)
        assert len(found) == 4
        return set(found)

    known = of(2, 512, 512)
    for case in [(1, 4, 4), (1, 16, 15), (3, 17, 9), (16, 64, 64), (5, 33, 33), (64, 24, 7)]:
        assert not differences(known, of(*case)), case
