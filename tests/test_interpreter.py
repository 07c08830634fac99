"""What the tests replace of Triton's interpreter still does what it did."""

from __future__ import annotations

import pytest
import torch

from interpreter import INTERPRETED  # isort: skip  # passes all by where Triton is missing
import triton
import triton.language as tl

interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")


@triton.jit
def _power(x, n: tl.constexpr):
    made = x
    for _ in range(n - 1):
        made = made * x
    return made


@triton.jit
def _powers(x, y, size: tl.constexpr, n: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y + at, _power(tl.load(x + at), n))


@interpreted
def test_a_function_that_a_kernel_calls_finds_the_language_replaced() -> None:
    was = (tl.load, tl.core.load, tl.tensor.__add__)
    for dtype in (torch.float32, torch.int32):
        x = torch.arange(8).to(dtype)
        y = torch.zeros_like(x)
        _powers[(1,)](x, y, 8, 3)
        assert torch.equal(y, x**3)
        assert (tl.load, tl.core.load, tl.tensor.__add__) == was


@interpreted
@pytest.mark.parametrize(("dtype", "largest"), [(torch.int32, 46340), (torch.int16, 181)], ids=str)
def test_numbers_that_overflow_are_seen(dtype: torch.dtype, largest: int) -> None:
    y = torch.zeros(2, dtype=dtype)
    _powers[(1,)](torch.tensor([1, -largest], dtype=dtype), y, 2, 2)
    assert y.tolist() == [1, largest**2]
    with pytest.raises(Exception, match=f"{str(dtype).removeprefix('torch.')} overflows"):
        _powers[(1,)](torch.tensor([1, -largest - 1], dtype=dtype), y, 2, 2)


@interpreted
def test_a_tuple_knows_its_type() -> None:
    made = tl.tuple([tl.constexpr(2), 3])
    assert [str(t) for t in made.type] == ["constexpr_type[2]", "constexpr_type[3]"]
    assert made[1] == 3
