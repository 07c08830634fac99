"""What a stage did, for records and plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

_POINTS = 48
"""Losses shown a stage."""


@dataclass(frozen=True)
class StageLog:
    """What a stage did.

    Args:
        stage: its kind.
        tokens: text that it went over.
        losses: (tokens so far, mean loss since the last point). For ``least_squares`` and ``align``
            a loss is the mean over layers of the squared error relative to the variance of the
            teacher's output; for ``distil`` it is nats a token.
        layers: what is left of each layer's variance, by student layer.
        skipped: steps whose loss or gradient was no number, and which moved nothing.
        seconds: that it took, over all the runs that it was cut into.
        step_seconds: of a step, the median; 0 for a stage without steps.
    """

    stage: str
    tokens: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    layers: dict[int, float] = field(default_factory=dict)
    skipped: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            "stage": self.stage,
            "tokens": self.tokens,
            "losses": [list(point) for point in self.losses],
            "layers": {str(i): left for i, left in self.layers.items()},
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "step_seconds": round(self.step_seconds, 6),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageLog:
        losses = [(int(tokens), float(loss)) for tokens, loss in data["losses"]]
        layers = {int(i): float(left) for i, left in data["layers"].items()}
        rest = int(data["skipped"]), float(data["seconds"]), float(data["step_seconds"])
        return cls(data["stage"], data["tokens"], losses, layers, *rest)


def stage_log(
    stage: str,
    tokens: int,
    losses: Sequence[Sequence[float]],
    layers: Sequence[int] = (),
    seconds: Sequence[float] = (),
) -> StageLog:
    """The curve of a stage in a few points.

    Args:
        tokens: text that its steps went over.
        losses: the parts of the loss of each step, NaN in one that was skipped.
        layers: which layer each part is of; their means over the last eighth are kept.
        seconds: of each step.
    """
    whole = [step for step in losses if all(map(math.isfinite, step))]
    points = []
    for some in _split(range(len(losses)), _POINTS):
        values = [value for i in some for value in losses[i] if all(map(math.isfinite, losses[i]))]
        if values:
            points.append(((some[-1] + 1) * tokens // len(losses), _mean(values)))
    tail = whole[-max(1, len(losses) // 8) :]
    left = {layer: _mean([step[k] for step in tail]) for k, layer in enumerate(layers) if tail}
    skipped = len(losses) - len(whole)
    step = median(seconds) if seconds else 0.0
    return StageLog(stage, tokens, points, left, skipped, math.fsum(seconds), step)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _split(items: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    count = min(most, len(items))
    for a, b in pairwise(round(i * len(items) / count) for i in range(count + 1)):
        yield items[a:b]
