"""How the benchmarks measure: turns, clocks, memory, errors; knows nothing of what is measured.

All sides of a comparison run in one process on the same inputs and take turns, in an order that
flips every round, so that a drift of the machine's speed meets all of them. Inputs rotate among
several sets, together larger than the last cache. What is reported of a side's times is the median
with the 20th and 80th percentile.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], object]

GRAPH_BELOW = 100e-6
"""Seconds: shorter work is timed as replays of a CUDA graph, without the gaps between launches."""


class Clock(Protocol):
    """Runs a piece of work and says how many seconds it took."""

    def __call__(self, work: Work) -> float: ...


class WallClock:
    """Seconds by the wall, for work that is done when the call returns."""

    name = "wall clock"

    def __call__(self, work: Work) -> float:
        collects = gc.isenabled()
        gc.disable()  # Python's own housekeeping is not the work
        try:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        finally:
            if collects:
                gc.enable()


class EventClock:
    """Seconds on a CUDA device, between two events.

    The device first spins for a while, so that the host has queued the whole work before the first
    event passes: what is timed is the device, not the host that feeds it.
    """

    name = "events"
    _CYCLES_A_SECOND = 2e9
    _LONGEST_SPIN = 20e-3

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._queueing = 1e-3  # seconds that the host needed lately to queue a piece of work

    def __call__(self, work: Work) -> float:
        spin = min(1.5 * self._queueing, self._LONGEST_SPIN)
        torch.cuda._sleep(int(spin * self._CYCLES_A_SECOND))
        start = time.perf_counter()
        self._begin.record()
        work()
        self._end.record()
        self._queueing = max(50e-6, 0.9 * self._queueing, time.perf_counter() - start)
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3


def clock_for(device: torch.device) -> EventClock | WallClock:
    """The clock for work on a device."""
    return EventClock() if device.type == "cuda" else WallClock()


class Graph:
    """A piece of work for each input set, captured once; calling it replays all of them."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.sets = len(works)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for work in works:
                work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._kept = []
        with torch.cuda.graph(self._graph):
            for work in works:
                self._kept.append(work())

    def __call__(self) -> None:
        self._graph.replay()


@dataclass(frozen=True)
class Times:
    """Seconds of one side.

    Args:
        rounds: how many were taken.
        by: the clock's name.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    by: str

    @classmethod
    def of(cls, taken: Sequence[float], by: str) -> Times:
        """Summary of a list that is not empty."""
        cuts = quantiles(taken, n=5, method="inclusive") if len(taken) > 1 else [taken[0]] * 4
        return cls(median(taken), cuts[0], cuts[3], len(taken), by)

    def microseconds(self) -> dict[str, Any]:
        """For a record: ``us``, ``p20_us``, ``p80_us``, ``rounds``, ``timed_by``."""
        return {
            "us": 1e6 * self.median,
            "p20_us": 1e6 * self.p20,
            "p80_us": 1e6 * self.p80,
            "rounds": self.rounds,
            "timed_by": self.by,
        }


def take_turns(
    works: Mapping[str, Sequence[Work]],
    clock: Clock,
    rounds: int,
    *,
    warm_up: int = 2,
    patience: float = math.inf,
    each: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every side in every round.

    Args:
        works: by side, one piece of work for each input set.
        rounds: the order of the sides flips from one to the next; so does the input set.
        warm_up: rounds before, which do not count.
        patience: a side whose first call takes longer than so many seconds is timed by that call
            alone.
        each: called after each round.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    slow: set[str] = set()
    for turn in range(-warm_up, rounds):
        for name in list(works) if turn % 2 == 0 else list(works)[::-1]:
            if name in slow:
                continue
            taken = clock(works[name][turn % len(works[name])])
            if turn == -warm_up and taken > patience:
                slow.add(name)
                times[name].append(taken)
            elif turn >= 0:
                times[name].append(taken)
        if turn >= 0:
            each()
    return times


def relative_rms(got: Tensor, want: Tensor) -> float:
    """RMS of the error over the RMS of what is wanted, in float64; not finite where `got` is not.

    Worked through in slices, so that it needs little memory beside its arguments.
    """
    if got.shape != want.shape:
        return math.inf
    error = square = 0.0
    pairs = zip(
        got.detach().reshape(-1).split(1 << 24), want.reshape(-1).split(1 << 24), strict=True
    )
    for a, b in pairs:
        b64 = b.double()
        error += float((a.double() - b64).square().sum())
        square += float(b64.square().sum())
    return math.sqrt(error) / (math.sqrt(square) or 1.0) if math.isfinite(error) else math.inf


def poison(device: torch.device, size: int) -> None:
    """Leave NaN in the memory that a CUDA device hands out next: `size` bytes and small pieces."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    large = min(size, int(0.6 * free)) // 4
    pieces = [torch.full((large,), math.nan, device=device)]
    pieces += [torch.full((1 << 16,), math.nan, device=device) for _ in range(64)]
    del pieces


@dataclass
class Peak:
    """What `peak_of` found: bytes at most in use, above what was in use before and in all."""

    bytes: int = 0
    total: int = 0


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Peak of a CUDA device's memory while the block runs.

    Of a CPU's nothing is known: 0.
    """
    found = Peak()
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    torch.cuda.synchronize(device)
    found.total = torch.cuda.max_memory_allocated(device)
    found.bytes = found.total - before


def resident(name: str) -> int:
    """Bytes resident in this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def reset_resident_peak() -> None:
    """Start `resident("VmHWM")` again from now."""
    Path("/proc/self/clear_refs").write_text("5")


def reason(error: BaseException) -> str:
    """An exception as one line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "failed: out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    return f"failed: {type(error).__name__}: {first}"[:300]


@dataclass(frozen=True)
class Bar:
    """A figure that was asked for.

    Args:
        what: ``us``, ``extra_over_inputs``, ``extra_mib`` or ``peak_over_peer`` (at most),
            ``times:PEER`` (the peer's time over ours), ``floor_share`` or ``mfu`` (at least).
        value: the bar.
    """

    what: str
    value: float

    def judge(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The bar beside what a row reached; `met` is None where it could not be measured."""
        kind, _, peer = self.what.partition(":")
        reached: float | None
        if kind == "us":
            reached = row["ours_us"]
        elif kind == "times":
            reached = row["ratios"].get(peer)
        else:
            reached = row[kind]
        met = None
        if reached is not None:
            at_most = kind in ("us", "extra_over_inputs", "extra_mib", "peak_over_peer")
            met = reached <= self.value if at_most else reached >= self.value
        return {**asdict(self), "reached": reached, "met": met}
