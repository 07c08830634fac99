"""What a step does, as functions of its number: its learning rate, and which layers are converted.

Nothing here remembers anything, so that a run which goes on in the middle does as it would have
done.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence

import torch

from tamba.errors import UserError
from tamba.recipe import Align, Distil

Active = Callable[[int], Collection[int]]
"""Step -> the converted layers that run in it; the teacher's attention stands in for the others."""

_THESEUS_RISE = 0.75
"""Share of the steps after which every layer is converted for good."""


def n_steps(stage: Align | Distil, length: int) -> int:
    """Steps of a stage on rows of `length` tokens; one at least."""
    return max(1, stage.tokens // (stage.batch * length))


def rate_factor(stage: Align | Distil, steps: int, step: int) -> float:
    """What the highest learning rate is multiplied with at step 0, 1, ... of `steps`."""
    warmup = math.ceil(stage.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    match stage.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - share
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * share))
        case "wsd":
            left = (steps - step) / max(1, math.ceil(stage.cooldown * steps))
            return min(1.0, left)


def active_layers(
    stage: Distil,
    converted: Collection[int],
    n_attention: int,
    steps: int,
    seed: int,
    where: str = "train: distil",
) -> Active:
    """When each converted layer takes the place of the teacher's attention.

    Args:
        converted: student layers that have an attention layer of the teacher to stand in for them.
        n_attention: attention layers of the teacher, of which `stage.shares` are shares.
        steps: of the stage.
        seed: of ``theseus``'s draws.
        where: what messages begin with.

    Raises:
        UserError: fewer steps than phases, so that some layers would never be replaced.
    """
    layers = replacement_order(stage, converted)
    if stage.replacement == "at_once":
        return lambda step: layers
    if stage.replacement == "theseus":
        return lambda step: _drawn(layers, _chance(stage, steps, step), seed, step)
    counts = [*range(1, len(layers) + 1)]
    if stage.replacement == "progressive":
        wanted = {round(n_attention * (1.0 - share)) for share in stage.shares}
        counts = sorted({n for n in wanted if 0 < n < len(layers)} | {len(layers)})
    if steps < len(counts):
        raise UserError(
            where,
            f"replacement = '{stage.replacement}' takes {len(counts)} phases, and the stage has "
            f"{steps} step{'s' * (steps != 1)}",
            "give more tokens, or a smaller batch",
        )
    return lambda step: layers[: counts[min(step, steps - 1) * len(counts) // steps]]


def _chance(stage: Distil, steps: int, step: int) -> float:
    rise = max(1.0, _THESEUS_RISE * steps)
    return min(1.0, stage.chance + (1.0 - stage.chance) * step / rise)


def _drawn(layers: Sequence[int], chance: float, seed: int, step: int) -> list[int]:
    mixed = hashlib.sha256(f"theseus {seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
    draws = torch.rand(len(layers), generator=generator).tolist()
    # One at least: where mixers alone move, a step of the teacher's layers would teach nothing.
    chance = max(chance, math.nextafter(min(draws, default=0.0), 1.0))
    return [layer for layer, draw in zip(layers, draws, strict=True) if draw < chance]


def replacement_order(stage: Distil, converted: Collection[int]) -> list[int]:
    """The converted layers, first replaced first."""
    layers = sorted(converted)
    match stage.order:
        case "bottom_up":
            return layers
        case "top_down":
            return layers[::-1]
        case "spread":
            # Halves, then quarters, ...: the digits of the place in base two, read backwards.
            bits = max(1, (len(layers) - 1).bit_length())
            return [
                layers[i]
                for i in sorted(range(len(layers)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
            ]
        case named:
            return [*named, *(layer for layer in layers if layer not in named)]
