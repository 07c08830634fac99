"""What a machine can reach at most: bytes copied, matrix products, exponentials a second.

Measured first in every run. A floor must be a bound, so where a card is known the larger of the
measured and the known figure counts; another card's floors rest on what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tamba.bench.measure import Clock, EventClock

try:
    import triton
    import triton.language as tl
except ImportError:  # the measure of exponentials is left out then
    triton = None


@dataclass(frozen=True)
class Ceilings:
    """Rates a second.

    Args:
        copy: bytes, read plus written.
        flops: of a large matrix product in the type that the rows compute in.
        exponentials: in float32.
    """

    copy: float
    flops: float
    exponentials: float

    def largest(self, other: Ceilings) -> Ceilings:
        """Rate by rate the larger."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Ceilings(*(max(pair) for pair in pairs))

    def to_dict(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)


H100 = Ceilings(copy=3.0e12, flops=798e12, exponentials=3.7e12)
"""H100 80GB HBM3: device readings; exponentials are 16 a clock and multiprocessor."""
KNOWN = {"NVIDIA H100 80GB HBM3": H100}


@dataclass(frozen=True)
class Cost:
    """The least that any implementation of one pass must do.

    Args:
        bytes: read and written once.
        flops: of matrix products.
        exponentials: of a state's decays.
    """

    bytes: float = 0
    flops: float = 0
    exponentials: float = 0

    def bound(self, at: Ceilings) -> tuple[float, str]:
        """Seconds below which no implementation can go, and what bounds it."""
        times = {
            "bytes": self.bytes / at.copy,
            "flops": self.flops / at.flops,
            "exponentials": self.exponentials / at.exponentials,
        }
        what = max(times, key=lambda name: times[name])
        return times[what], what


def measure_ceilings(device: torch.device) -> dict[str, Any]:
    """``measured`` and ``used``: rates by name."""
    measured = _on_gpu(device) if device.type == "cuda" else _on_cpu()
    known = KNOWN.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    used = measured if known is None else measured.largest(known)
    return {"measured": measured.to_dict(), "used": used.to_dict()}


def _best(clock: Clock, work: Callable[[], object], amount: float, repeats: int) -> float:
    """The highest rate of several tries, after two to warm up."""
    return amount / min([clock(work) for _ in range(repeats + 2)][2:])


def _on_gpu(device: torch.device) -> Ceilings:
    clock = EventClock()
    return Ceilings(
        copy=_copy_on_gpu(device, clock),
        flops=_flops_on_gpu(device, clock),
        exponentials=_exponentials_a_second(device, clock),
    )


def _copy_on_gpu(device: torch.device, clock: Clock) -> float:
    source = torch.empty(1 << 30, dtype=torch.int8, device=device).random_(-99, 99)
    target = torch.empty_like(source)
    return _best(clock, lambda: target.copy_(source), 2.0 * source.numel(), 15)


def _flops_on_gpu(device: torch.device, clock: Clock) -> float:
    n = 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return _best(clock, lambda: a @ b, 2.0 * n**3, 10)


def _exponentials_a_second(device: torch.device, clock: Clock) -> float:
    properties = torch.cuda.get_device_properties(device)
    if triton is None:
        # 16 a clock and multiprocessor, at the highest clock.
        return 16.0 * properties.multi_processor_count * 1e3 * properties.clock_rate
    programs, repeats = 16 * properties.multi_processor_count, 256
    numbers: Tensor = torch.rand(programs * 1024, device=device)
    return _best(
        clock,
        lambda: _exp_kernel[(programs,)](numbers, repeats, BLOCK=1024),
        float(programs * 1024 * repeats),
        10,
    )


if triton is not None:

    @triton.jit
    def _exp_kernel(numbers, repeats, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(numbers + at)
        for _ in range(repeats):
            # Nothing but exponentials; 2 ** -2 ** -2 ... stays between 0 and 1.
            value = tl.exp2(-value)
        tl.store(numbers + at, value)


def _on_cpu() -> Ceilings:
    def clock(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    source = torch.randn(1 << 24)
    target = torch.empty_like(source)
    square = torch.randn(1536, 1536)
    return Ceilings(
        copy=_best(clock, lambda: target.copy_(source), 8.0 * source.numel(), 13),
        flops=_best(clock, lambda: square @ square, 2.0 * 1536**3, 13),
        exponentials=_exponentials_on_cpu(clock),
    )


def _exponentials_on_cpu(clock: Clock) -> float:
    """Of torch's operator or, where Numba is installed, of our compiled loops: the larger.

    On some CPUs torch's takes four times as long as a loop that leaves numbers in registers.
    """
    small = -torch.rand(1 << 18)
    out = torch.empty_like(small)
    rate = _best(clock, lambda: torch.exp(small, out=out), float(small.numel()), 58)
    if find_spec("numba") is None:
        return rate
    from tamba.ops.kernels import scan_cpu

    rates, steps = torch.rand(64).numpy(), 1 << 14
    one = _best(clock, lambda: scan_cpu.exponentials(rates, steps), 64.0 * steps, 18)
    return max(rate, one * torch.get_num_threads())
