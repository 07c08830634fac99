"""Random arguments for the operators, and the comparison of an operator with its recurrence.

Every float argument requires a gradient. The truth is always computed in float64 from the same
numbers; outputs at positions that are no tokens are not compared, but must be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compare import Kind, assert_same

Operator = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Arguments:
    """Arguments of one call: tensors by name, which may require gradients, and the rest."""

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def call(self, operator: Operator, **changed: Any) -> tuple[Tensor, Tensor]:
        """Call with some arguments changed; those set to None are left out."""
        given = {**self.tensors, **self.masks, **self.options, **changed}
        return operator(**{name: value for name, value in given.items() if value is not None})

    def to(self, dtype: torch.dtype, *names: str) -> Arguments:
        """The named tensors (all without names) in another dtype, as fresh leaves."""
        tensors = {
            name: t.detach().to(dtype if name in names or not names else t.dtype).requires_grad_()
            for name, t in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    def span(self, start: int, stop: int, state: Tensor | None) -> Arguments:
        """The same for some of the tokens, from a given state."""
        by_token = {"x", "dt", "B", "C", "z"}
        tensors = {
            name: t[:, start:stop] if name in by_token else t for name, t in self.tensors.items()
        }
        tensors.pop("state", None)
        masks = dict(self.masks)
        if masks.get("starts") is not None:
            masks["starts"] = masks["starts"][:, start:stop]
        if masks.get("padding") is not None:
            masks["padding"] = (masks["padding"] - start).clamp(0, stop - start)
        if state is not None:
            tensors["state"] = state
        return replace(self, tensors=tensors, masks=masks)

    @property
    def real(self) -> Tensor:
        """[B, T] bool: which positions are tokens."""
        batch, length = self.tensors["x"].shape[:2]
        padding = self.masks.get("padding")
        if padding is None:
            return torch.ones(batch, length, dtype=torch.bool)
        return torch.arange(length, device=padding.device) >= padding[:, None]


def ssd_arguments(
    batch: int = 2,
    length: int = 13,
    heads: int = 4,
    head_dim: int = 3,
    groups: int = 2,
    d_state: int = 5,
    *,
    state: bool = True,
    starts: bool | Tensor = False,
    padding: bool | Tensor = False,
    chunk_size: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Arguments:
    """Arguments of `ssd`, named as there."""
    random = _Random(seed, dtype)
    tensors = {
        "x": random(batch, length, heads, head_dim),
        "dt": random(batch, length, heads),
        "A": -random(heads).exp(),
        "B": random(batch, length, groups, d_state),
        "C": random(batch, length, groups, d_state),
        "D": random(heads),
        "dt_bias": random(heads),
    }
    if state:
        tensors["state"] = random(batch, heads, head_dim, d_state)
    masks = random.masks(batch, length, starts, padding)
    return Arguments(tensors, masks, {"dt_softplus": True, "chunk_size": chunk_size}).to(dtype)


def scan_arguments(
    batch: int = 2,
    length: int = 13,
    channels: int = 12,
    groups: int = 2,
    d_state: int = 5,
    *,
    state: bool = True,
    starts: bool | Tensor = False,
    padding: bool | Tensor = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Arguments:
    """Arguments of `selective_scan`, named as there."""
    random = _Random(seed, dtype)
    tensors = {
        "x": random(batch, length, channels),
        "dt": random(batch, length, channels),
        "A": -random(channels, d_state).exp(),
        "B": random(batch, length, groups, d_state),
        "C": random(batch, length, groups, d_state),
        "D": random(channels),
        "z": random(batch, length, channels),
        "dt_bias": random(channels),
    }
    if state:
        tensors["state"] = random(batch, channels, d_state)
    masks = random.masks(batch, length, starts, padding)
    return Arguments(tensors, masks, {"dt_softplus": True}).to(dtype)


def conv_arguments(
    batch: int = 2,
    length: int = 13,
    channels: int = 6,
    width: int = 4,
    *,
    state: bool = True,
    starts: bool | Tensor = False,
    padding: bool | Tensor = False,
    activation: str | None = "silu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Arguments:
    """Arguments of `causal_conv1d`, named as there."""
    random = _Random(seed, dtype)
    tensors = {
        "x": random(batch, length, channels),
        "weight": random(channels, width),
        "bias": random(channels),
    }
    if state:
        tensors["state"] = random(batch, channels, width - 1)
    masks = random.masks(batch, length, starts, padding)
    return Arguments(tensors, masks, {"activation": activation}).to(dtype)


def assert_agree(
    operator: Operator,
    truth: Operator,
    arguments: Arguments,
    kind: Kind,
    gradient_kind: Kind | None = None,
    *,
    without: tuple[str, ...] = (),
) -> None:
    """Outputs, last states and, with a `gradient_kind`, all gradients agree with `truth`'s.

    `without` names arguments whose gradients are left out.
    """
    exact = arguments.to(torch.float64)
    y, state = arguments.call(operator)
    want_y, want_state = exact.call(truth)
    assert bool(torch.isfinite(y).all()), "output is not finite"
    real = arguments.real.to(y.device)
    assert_same(y[real], want_y[real], kind, "y")
    assert_same(state, want_state, kind, "state")
    if gradient_kind is None:
        return
    random = _Random(7, torch.float64)
    weight_y = random(*y.shape).to(y.device) * real.view(*real.shape, *[1] * (y.dim() - 2))
    weight_state = random(*state.shape).to(y.device)
    names = list(arguments.tensors)
    got = torch.autograd.grad(
        (y * weight_y).sum() + (state * weight_state).sum(), list(arguments.tensors.values())
    )
    want = torch.autograd.grad(
        (want_y * weight_y).sum() + (want_state * weight_state).sum(), list(exact.tensors.values())
    )
    for name, got_one, want_one in zip(names, got, want, strict=True):
        if name in without:
            continue
        assert got_one.dtype == arguments.tensors[name].dtype
        assert_same(got_one, want_one, gradient_kind, f"gradient of {name}")


def assert_splits_agree(
    operator: Operator, arguments: Arguments, cuts: list[int], kind: Kind = "fp64"
) -> None:
    """One call equals calls on the spans between `cuts`, each from the last one's state."""
    want_y, want_state = arguments.call(operator)
    length = arguments.tensors["x"].shape[1]
    edges = [0, *cuts, length]
    state, outputs = arguments.tensors.get("state"), []
    for start, stop in pairwise(edges):
        y, state = arguments.span(start, stop, state).call(operator)
        outputs.append(y)
    real = arguments.real
    assert_same(torch.cat(outputs, dim=1)[real], want_y[real], kind, f"y, cut at {cuts}")
    assert state is not None
    assert_same(state, want_state, kind, f"state, cut at {cuts}")


def a_start_in_each_row() -> Tensor:
    """[2, 13]: late enough for the state to be seen by tokens before it, behind padding too."""
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[0, 7] = starts[1, 9] = True
    return starts


class _Random:
    """Normal numbers from a seed; rounded to `dtype`, so that lower precisions start equal."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return numbers.to(self._dtype)

    def masks(
        self, batch: int, length: int, starts: bool | Tensor, padding: bool | Tensor
    ) -> dict[str, Tensor | None]:
        """Given tensors as they are; True for random ones."""
        if starts is True:
            starts = torch.rand(batch, length, generator=self._generator) < 0.15
        if padding is True:
            padding = torch.randint(0, length + 1, (batch,), generator=self._generator)
            padding[0] = 0
        return {
            "starts": starts if isinstance(starts, Tensor) else None,
            "padding": padding if isinstance(padding, Tensor) else None,
        }
