"""How tests compare tensors: one function and the one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["exact", "fp64", "fp32", "kernel", "decode", "half", "half_gradient"]


@dataclass(frozen=True)
class Tolerance:
    """Bounds that all hold at once.

    Args:
        absolute, relative: each element is off by no more than absolute + relative * |want|.
        of_largest: each element is off by no more than this share of the largest |want|.
        rms: root mean square of the error over that of `want`.
    """

    absolute: float = float("inf")
    relative: float = 0.0
    of_largest: float = float("inf")
    rms: float = float("inf")


TOLERANCES: dict[Kind, Tolerance] = {
    # Equal bits: copied weights, untouched parameters, greedy tokens.
    "exact": Tolerance(absolute=0.0),
    # Two ways to compute the same in float64.
    "fp64": Tolerance(of_largest=1e-10),
    # Two ways to compute the same in float32; ours against another implementation.
    "fp32": Tolerance(absolute=1e-5, relative=1e-5),
    # A kernel's float32 results and gradients against the float64 truth.
    "kernel": Tolerance(rms=1e-5),
    # Logits of the cached path against one full pass, float32.
    "decode": Tolerance(absolute=1e-4),
    # bfloat16 or float16 arithmetic against a float32 or float64 reference: values, gradients.
    "half": Tolerance(rms=5e-3),
    "half_gradient": Tolerance(rms=1e-2),
}


def assert_same(got: Tensor, want: Tensor, kind: Kind, name: str = "") -> None:
    """Raise AssertionError, with where and how far, unless `got` is `want` within `kind`.

    Shapes must agree; for ``"exact"`` dtypes too. NaN is never the same as anything.
    """
    what = f"{name or 'tensor'} ({kind})"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if kind == "exact":
        assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, not {want.dtype}"
    if got.numel() == 0:
        return
    if got.dtype == want.dtype and got.device == want.device and torch.equal(got, want):
        return
    bounds = TOLERANCES[kind]
    got64, want64 = got.detach().double().cpu(), want.detach().double().cpu()
    same = got64 == want64  # also where both are the same infinity
    error = torch.where(same, 0.0, (got64 - want64).abs()).nan_to_num(nan=float("inf"))
    largest = float(want64.abs().max()) or 1.0
    rms = float(error.square().mean().sqrt() / (want64.square().mean().sqrt() or 1.0))
    allowed = (bounds.absolute + bounds.relative * want64.abs()).clamp(
        max=bounds.of_largest * largest
    )
    excess = (error - allowed).nan_to_num(nan=float("inf"))
    if not bool((excess > 0).any()) and not rms > bounds.rms:
        return
    score = excess if bool((excess > 0).any()) else error
    worst = tuple(int(i) for i in torch.unravel_index(score.argmax(), score.shape))
    raise AssertionError(
        f"{what}: max error {float(error.max()):.3g}, relative RMS error {rms:.3g}, "
        f"{int((excess > 0).sum())} of {error.numel()} elements out of bounds; "
        f"worst at {worst}: got {float(got64[worst]):.9g}, want {float(want64[worst]):.9g}"
    )


def relative_rms(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of what is wanted."""
    error = (got.detach().double() - want.detach().double()).square().mean().sqrt()
    return float(error / (want.detach().double().square().mean().sqrt() or 1.0))
