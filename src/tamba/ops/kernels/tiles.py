"""Tile sizes of the kernels: one table, checked in, and a tuner that nobody has to run.

A kernel asks `tile` for its sizes. The most specific entry wins: the operation with its bucket
before the operation alone, and then the card's architecture before ``"any"``. Nothing is timed
while a model runs, so that a first call costs its compilation and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch

logger = logging.getLogger("tamba")

Tile = Mapping[str, int]

# Architecture -> "operation" or "operation bucket" -> sizes. `warps` and `stages` are Triton's; the
# others are the kernel's own: `chunk`, `head_dim`, `rows` tokens or channels of a tile, `heads` per
# program, `per_sm` programs that share a multiprocessor. The bucket "wide" is float32 operands.
TILES: dict[str, dict[str, Tile]] = {
    "any": {
        "ssd_scan": {"chunk": 64, "head_dim": 64, "per_sm": 2, "warps": 4, "stages": 2},
        "ssd_scan wide": {"chunk": 32, "head_dim": 32, "per_sm": 2, "warps": 4, "stages": 1},
        "ssd_segments": {"head_dim": 64, "per_sm": 2, "warps": 4, "stages": 3},
        "ssd_segments wide": {"head_dim": 32, "per_sm": 2, "warps": 4, "stages": 1},
        "ssd_states": {"head_dim": 32, "per_sm": 2, "warps": 4, "stages": 2},
        "ssd_states wide": {"head_dim": 32, "per_sm": 2, "warps": 4, "stages": 1},
        # `states`: percent of the room of x for the states of all chunks of the heads at hand. A
        # group of one head is "alone".
        "ssd_grads": {
            **{"chunk": 64, "head_dim": 64, "states": 60, "per_sm": 2},
            **{"warps": 4, "stages": 2},
        },
        # With two stages its tiles need more shared memory than there is.
        "ssd_grads half N128 P128": {
            **{"chunk": 64, "head_dim": 64, "states": 60, "per_sm": 2},
            **{"warps": 4, "stages": 1},
        },
        "ssd_grads half alone": {
            **{"chunk": 64, "head_dim": 64, "states": 200, "per_sm": 2},
            **{"warps": 4, "stages": 1},
        },
        # Chunks of 32 spill some 20 times as much.
        "ssd_grads wide": {
            **{"chunk": 16, "head_dim": 32, "states": 200, "per_sm": 1},
            **{"warps": 4, "stages": 1},
        },
        # The forward pass keeps a state for every tile of the backward pass.
        "scan_forward": {
            "tokens": 8,
            "channels": 32,
            "polynomials": 0,
            "per_sm": 8,
            "least_tiles": 8,
            "warps": 1,
            "split": 128,
            "registers": 128,
        },
        # `split`: channels of a program whose states are split between two warps (9 to 16 states),
        # with at most so many `registers` a thread.
        "scan_backward": {
            "tokens": 8,
            "channels": 32,
            "polynomials": 0,
            "per_sm": 8,
            "least_tiles": 8,
            "warps": 1,
            "split": 64,
            "registers": 128,
        },
        "conv_forward": {"tokens": 8, "channels": 64, "per_sm": 128, "least_tiles": 4, "warps": 1},
        "conv_backward": {"tokens": 4, "channels": 256, "per_sm": 16, "least_tiles": 4, "warps": 1},
        # `runs` of `tokens`, run beside run, are a tile; a program of the backward pass does some.
        "conv_tile_forward": {"tokens": 8, "runs": 4, "channels": 256, "warps": 4},
        "conv_tile_backward": {"tokens": 8, "runs": 4, "channels": 64, "tiles": 4, "warps": 4},
        # `block` logits of a row at a time, `stages` of them in flight.
        "loss_dense": {"block": 4096, "warps": 16, "stages": 1},
        "loss_top": {"block": 4096, "warps": 16, "stages": 1},
        # Blocks of `states` by `states` are compared, `width` numbers of some `tokens` at a time.
        "lengths": {"tokens": 16, "width": 64, "warps": 4},
        "chords": {"states": 8, "tokens": 8, "width": 16, "warps": 4},
        "chord_sums": {"tokens": 16, "warps": 4},
        "centred": {"width": 64, "warps": 4, "stages": 3},
        "centred wide": {"width": 32, "warps": 4, "stages": 2},
    },
    "sm90": {
        "ssd_segments": {"head_dim": 64, "per_sm": 3, "warps": 4, "stages": 3},
        "ssd_grads half N128 P64": {
            **{"chunk": 64, "head_dim": 64, "states": 60, "per_sm": 2},
            **{"warps": 4, "stages": 3},
        },
        # Of `ssd_hopper`: registers of threads of the second group of warps, and of the feeder's.
        **{
            f"ssd_grads half hopper {case} N{n}": {
                **{"chunk": 64, "head_dim": 64, "states": states, "per_sm": 1},
                **{"warps": 4, "stages": stages, "worker": worker, "feeder": 40},
            }
            for case, n, states, stages, worker in (
                *(("shared", 128, 60, 3, 240), ("shared", 64, 60, 4, 240)),
                *(("alone", 128, 200, 2, 224), ("alone", 64, 200, 3, 240)),
            )
        },
        "ssd_states half N128 P64": {"head_dim": 64, "per_sm": 1, "warps": 4, "stages": 4},
        "ssd_states half N128 P128": {"head_dim": 64, "per_sm": 2, "warps": 4, "stages": 3},
    },
}
_overrides: dict[str, Tile] = {}


def tile(operation: str, *buckets: str, device: torch.device) -> Tile:
    """Sizes for `operation` on `device`.

    Args:
        operation: a key of the table.
        buckets: names of special cases that apply, the most special first.
        device: where it will run.
    """
    keys = [f"{operation} {bucket}" for bucket in buckets] + [operation]
    for tables in ([_overrides], [TILES.get(architecture(device), {}), TILES["any"]]):
        for key in keys:
            for table in tables:
                if key in table:
                    return table[key]
    raise KeyError(f"no tile sizes for {operation}")


@cache
def architecture(device: torch.device) -> str:
    """``"sm90"`` and the like; ``"any"`` where it is not a CUDA device."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the card has; 1 where there is none."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextmanager
def using(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Inside, these entries go before those of the table (keys as in the table)."""
    before = dict(_overrides)
    _overrides.update(tiles)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def tune(
    key: str, candidates: Sequence[Tile], run: Callable[[], object], *, repeats: int = 30
) -> list[tuple[float, Tile]]:
    """(microseconds, sizes), best first, of `run` under each candidate for the table's entry `key`.

    Candidates that do not compile or do not fit the card are left out. Needs a CUDA device.
    """
    timed: list[tuple[float, Tile]] = []
    for candidate in candidates:
        with using({key: candidate}):
            try:
                timed.append((_median_us(run, repeats), candidate))
            except Exception as error:  # whatever a compiler raises: the next one may fit
                logger.warning("%s %s: %s", key, dict(candidate), type(error).__name__)
    return sorted(timed, key=lambda one: one[0])


def _median_us(run: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return 1000 * spans[len(spans) // 2]
