"""What "the same" means, for each kind of comparison: the one table of tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

# kind: (relative, absolute). `exact` asks for equal bits, `half` for a small relative RMS error.
TOLERANCES = {
    "exact": (0.0, 0.0),
    "fp64": (1e-10, 1e-12),  # our maths against reference maths, both in float64
    "fp32": (1e-5, 1e-5),  # chunked against recurrent, ours against transformers
    "decode": (0.0, 1e-4),  # logits of a cut, padded or packed pass against one plain pass
    "half": (5e-3, 0.0),  # bfloat16 against the float32 or float64 reference
}


def assert_same(got: Tensor, want: Tensor, kind: str) -> None:
    """Raise AssertionError unless `got` equals `want` as closely as `kind` asks."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} is not {tuple(want.shape)}"
    rtol, atol = TOLERANCES[kind]
    if kind == "exact":
        if torch.equal(got, want):
            return
        ok = torch.zeros(())
    elif kind == "half":
        ok = torch.tensor(relative_rms(got, want) <= rtol)
    else:
        ok = torch.isclose(got.double(), want.double(), rtol=rtol, atol=atol)
    if ok.all():
        return
    error = (got.double() - want.double()).abs()
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    raise AssertionError(
        f"not the same ({kind}): largest error {float(error.flatten()[worst]):.3g} at {index}, "
        f"where {float(got.flatten()[worst]):.6g} stands for {float(want.flatten()[worst]):.6g}; "
        f"relative RMS {relative_rms(got, want):.3g}"
    )


def relative_rms(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of what is wanted."""
    scale = want.double().square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got.double() - want.double()).square().mean().sqrt() / scale)
