"""What every recurrent operator does to its arguments before the maths starts.

Shapes of what may be left out; step sizes with bias, softplus, limits and padding; document starts
that padding overrules; the precision that states and sums are kept in; protection from autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def shaped(tensor: Tensor | None, *shape: int) -> bool:
    """Whether an argument is left out or has this shape."""
    return tensor is None or tensor.shape == shape


def shapes(**tensors: Tensor | None) -> str:
    """Names and shapes of arguments, for messages."""
    return ", ".join(
        f"{name} {None if t is None else tuple(t.shape)}" for name, t in tensors.items()
    )


def dense(tensor: Tensor | None) -> Tensor | None:
    """An argument with its numbers side by side, for kernels that know no stride of it."""
    return None if tensor is None else tensor.contiguous()


def step_sizes(
    dt: Tensor,
    *,
    dtype: torch.dtype,
    bias: Tensor | None,
    softplus: bool,
    limit: tuple[float, float] | None,
    padding: Tensor | None,
) -> Tensor:
    """dt ready for use, in `dtype`: bias, softplus, limits, and 0 where there is no token.

    Args:
        dt: [B, T, H] or [B, T, D].
        dtype: what to compute in.
        bias: [H] or [D], or None.
        softplus: whether dt goes through softplus after the bias.
        limit: least and greatest value, or None.
        padding: [B], leading positions that are no tokens, or None.
    """
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    if limit is not None:
        dt = dt.clamp(*limit)
    if padding is not None:
        dt = dt.masked_fill(pads(padding, dt.shape[1])[..., None], 0.0)
    return dt


def pads(padding: Tensor, length: int) -> Tensor:
    """[B, length] bool: True at the `padding[b]` leading positions of row b."""
    return torch.arange(length, device=padding.device) < padding[:, None]


def real_starts(starts: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """`starts` with those at positions that are no tokens taken out."""
    if starts is None or padding is None:
        return starts
    return starts & ~pads(padding, starts.shape[1])


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is, else float32: what decays, sums and states are kept in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _device_of(*values: object) -> str:
    """Type of the device of the first tensor."""
    return next((v.device.type for v in values if isinstance(v, Tensor)), "cpu")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with the dtypes it was given: autocast would recast its matrix products."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device_of(*args, *kwargs.values())
        # Devices that only stand for one (meta) have no autocast to ask about.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
