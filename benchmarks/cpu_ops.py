"""The recurrent operators on a CPU, beside the fallbacks of transformers and mambapy's scan.

    python benchmarks/cpu_ops.py --out benchmarks/results/cpu-ops.json

Rows `cpu_scan` (1 x 2048 tokens, 576 channels, state 16), `cpu_ssd` (1 x 2048 tokens, 9 heads of
64, state 64, with one group and with nine) and `cpu_conv` (8 x 512 tokens, 1728 channels), forward
and forward with backward. All sides of a row get the same numbers in one process and take turns,
in an order that flips every round; ratios are of medians. Peak memory is what a fresh process adds
to its resident set over its arguments. The error is the relative RMS error to the float64
recurrence. The floor is what the machine, measured first, would need at the least: for the scan
one exponential a token, channel and state (two with the backward pass, which recomputes), for SSD
the matrix products at the rate of a large float32 product, for the convolution reading and writing
its arguments once.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """One workload.

    Args:
        name: of the row.
        make: arguments from a length; leaves that require gradients.
        sides: by name, what runs on the arguments and gives y as [B, T, ...]; `ours` first.
        truth: the same in float64.
        exponentials, flops, bytes: of the forward pass and of both passes, for the floor.
        bars: (side, passes) to the least ratio of times asked for.
        slow: (side, passes) that are timed once, so long do they take.
    """

    name: str
    length: int
    make: Callable[[int], dict[str, Tensor]]
    sides: dict[str, Callable[..., Tensor]]
    truth: Callable[..., Tensor]
    exponentials: tuple[float, float] = (0, 0)
    flops: tuple[float, float] = (0, 0)
    bytes: tuple[float, float] = (0, 0)
    bars: dict[tuple[str, str], float] = field(default_factory=dict)
    slow: tuple[tuple[str, str], ...] = ()


def scan_row() -> Row:
    """Mamba-1."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    from tamba.ops import reference, selective_scan

    channels, d_state, length = 576, 16, 2048

    def make(length: int) -> dict[str, Tensor]:
        return {
            "x": torch.randn(1, length, channels),
            "dt": torch.randn(1, length, channels) - 3,
            "A": -torch.rand(channels, d_state) * 16,
            "B": torch.randn(1, length, d_state),
            "C": torch.randn(1, length, d_state),
            "D": torch.randn(channels),
            "z": torch.randn(1, length, channels),
        }

    def ours(op: Any = selective_scan, **t: Tensor) -> Tensor:
        t["B"], t["C"] = t["B"][:, :, None], t["C"][:, :, None]
        return op(**t, dt_softplus=True)[0]

    def peer(use_mambapy: bool, **t: Tensor) -> Tensor:
        # Transformers keeps time last; its mixer gets there with the same views.
        x, dt, B, C, z = (t[name].mT for name in ("x", "dt", "B", "C", "z"))
        y = mamba_selective_scan(
            x, dt, t["A"], B, C, t["D"], z, delta_softplus=True, use_mambapy=use_mambapy
        )
        return y.mT

    numbers = length * channels * d_state
    return Row(
        "cpu_scan",
        length,
        make,
        {
            "ours": ours,
            "transformers": lambda **t: peer(False, **t),
            "mambapy": lambda **t: peer(True, **t),
        },
        lambda **t: ours(reference.selective_scan, **t),
        exponentials=(numbers, 2 * numbers),
        bars={
            ("transformers", "forward"): 20,
            ("mambapy", "forward"): 3,
            ("transformers", "both"): 20,
            ("mambapy", "both"): 3,
        },
        slow=(("transformers", "both"),),
    )


def ssd_row(groups: int) -> Row:
    """Mamba-2."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    from tamba.ops import reference, ssd

    heads, head_dim, d_state, length = 9, 64, 64, 2048
    stock = Mamba2Config().chunk_size

    def make(length: int) -> dict[str, Tensor]:
        return {
            "x": torch.randn(1, length, heads, head_dim),
            "dt": torch.randn(1, length, heads) - 3,
            "A": -torch.rand(heads) * 16,
            "B": torch.randn(1, length, groups, d_state),
            "C": torch.randn(1, length, groups, d_state),
            "D": torch.randn(heads),
        }

    def ours(op: Any = ssd, **t: Tensor) -> Tensor:
        return op(**t, dt_softplus=True)[0]

    def peer(chunk_size: int, **t: Tensor) -> Tensor:
        x, dt, A, B, C, D = t.values()
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D, dt_softplus=True)

    # In products of 64 x 64 x 64 a chunk: the scores once a group, three more a head; going back
    # four of the scores' kind a group and nine in all with the recomputed ones.
    product = 2 * 64**3 * length / 64
    return Row(
        f"cpu_ssd, {groups} group{'s' if groups > 1 else ''}",
        length,
        make,
        {
            "ours": ours,
            f"transformers, chunk {stock}": lambda **t: peer(stock, **t),
            "transformers, chunk 64": lambda **t: peer(64, **t),
        },
        lambda **t: ours(reference.ssd, **t),
        flops=(product * (groups + 3 * heads), product * (4 * groups + 9 * heads)),
        bars={
            (f"transformers, chunk {stock}", "forward"): 5,
            (f"transformers, chunk {stock}", "both"): 5,
        },
    )


def conv_row() -> Row:
    """The convolution before either."""
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn

    from tamba.ops import causal_conv1d, reference

    batch, length, channels = 8, 512, 1728

    def make(length: int) -> dict[str, Tensor]:
        return {
            "x": torch.randn(batch, length, channels),
            "weight": torch.randn(channels, 4),
            "bias": torch.randn(channels),
        }

    def ours(op: Any = causal_conv1d, **t: Tensor) -> Tensor:
        return op(**t, activation="silu")[0]

    def peer(**t: Tensor) -> Tensor:
        return causal_conv1d_fn(t["x"].mT, t["weight"], t["bias"], activation="silu").mT

    numbers = 4 * batch * length * channels
    return Row(
        "cpu_conv",
        length,
        make,
        {"ours": ours, "transformers": peer},
        lambda **t: ours(reference.causal_conv1d, **t),
        bytes=(2 * numbers, 5 * numbers),
    )


ROWS: dict[str, Callable[[], Row]] = {
    "scan": scan_row,
    "ssd1": lambda: ssd_row(1),
    "ssd9": lambda: ssd_row(9),
    "conv": conv_row,
}
PASSES = ("forward", "both")


def run(side: Callable[..., Tensor], tensors: dict[str, Tensor], passes: str) -> Outputs:
    """y, and with both passes the gradients of a weighted sum of it over tokens."""
    if passes == "forward":
        with torch.no_grad():
            return (side(**tensors),)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = side(**leaves)
    weight = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype).view(1, -1, *[1] * (y.dim() - 2))
    return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), weight.expand_as(y)))


def errors(row: Row, seed: int) -> dict[str, dict[str, float | str]]:
    """By side and passes, the largest relative RMS error of y or any gradient to float64."""
    torch.manual_seed(seed)
    tensors = row.make(row.length)
    exact = {name: t.double() for name, t in tensors.items()}
    found: dict[str, dict[str, float | str]] = {name: {} for name in row.sides}
    for passes in PASSES:
        want = run(row.truth, exact, passes)
        for name, side in row.sides.items():
            if (name, passes) in row.slow:
                found[name][passes] = "not computed: too slow"
                continue
            got = run(side, tensors, passes)
            found[name][passes] = max(
                float((a.double() - b).square().mean().sqrt() / b.square().mean().sqrt())
                for a, b in zip(got, want, strict=True)
            )
    return found


def seconds(row: Row, passes: str, rounds: int) -> dict[str, list[float]]:
    """Times of all sides, taking turns on fresh numbers."""
    times: dict[str, list[float]] = {name: [] for name in row.sides}
    for turn in range(-1, rounds):
        torch.manual_seed(turn + 100)
        tensors = row.make(row.length)
        names = list(row.sides) if turn % 2 else list(reversed(row.sides))
        for name in names:
            if (name, passes) in row.slow and turn != rounds - 1:
                continue
            gc.collect()
            start = time.perf_counter()
            run(row.sides[name], tensors, passes)
            if turn >= 0:  # the first is to warm up
                times[name].append(time.perf_counter() - start)
    return times


def resident(name: str) -> int:
    """Bytes resident in this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def added_memory(key: str, side: str, passes: str) -> int:
    """Bytes that one run adds to the resident set of this fresh process, at its peak."""
    row = ROWS[key]()
    torch.manual_seed(0)
    run(row.sides[side], row.make(32), passes)  # libraries load what they load
    tensors = row.make(row.length)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(row.sides[side], tensors, passes)
    return resident("VmHWM") - before


def ask_memory(key: str, side: str, passes: str, limit: float) -> int | str:
    """`added_memory` in a process of its own, or why there is no answer."""
    command = [sys.executable, __file__, "--memory", key, side, passes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"failed: {error.stderr.strip().splitlines()[-1]}"
    return int(done.stdout.split()[-1])


def ceilings() -> dict[str, float]:
    """What this machine reaches: numbers or bytes or operations a second."""

    def best(work: Callable[[], object], amount: float, repeats: int = 15) -> float:
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            rates.append(amount / (time.perf_counter() - start))
        return max(rates)

    small = -torch.rand(1 << 18)
    out = torch.empty_like(small)
    big = torch.randn(1 << 24)
    other = torch.empty_like(big)
    square = torch.randn(1536, 1536)
    half = square.bfloat16()
    batch = torch.randn(64, 64, 64)
    return {
        "exponentials_per_second": best(lambda: torch.exp(small, out=out), 1 << 18, 60),
        "copied_bytes_per_second": best(lambda: other.copy_(big), 8 * (1 << 24)),
        "flops_float32": best(lambda: square @ square, 2 * 1536**3),
        "flops_float32_64x64": best(lambda: batch @ batch, 64 * 2 * 64**3, 60),
        "flops_bfloat16": best(lambda: half @ half, 2 * 1536**3),
    }


def floor(row: Row, passes: str, ceiling: dict[str, float]) -> float:
    """Seconds below which the row cannot go on this machine."""
    index = PASSES.index(passes)
    return max(
        row.exponentials[index] / ceiling["exponentials_per_second"],
        row.flops[index] / ceiling["flops_float32"],
        row.bytes[index] / ceiling["copied_bytes_per_second"],
    )


def machine() -> dict[str, Any]:
    """What the figures were taken on and with."""
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in cpu if "model name" in line), "unknown")
    flags = next((line for line in cpu if line.startswith("flags")), "")
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "mambapy")},
    }


def measure(key: str, rounds: int, limit: float, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """A row's records, one for each of `PASSES`."""
    row = ROWS[key]()
    off = errors(row, seed=0)
    records = []
    for passes in PASSES:
        times = seconds(row, passes, rounds)
        memory = {name: ask_memory(key, name, passes, limit) for name in row.sides}
        ours, least = median(times["ours"]), floor(row, passes, ceiling)
        record: dict[str, Any] = {
            "row": row.name,
            "passes": "forward" if passes == "forward" else "forward and backward",
            "floor_seconds": least,
            "floor_share": least / ours,
            "sides": {},
        }
        for name, taken in times.items():
            spread = quantiles(taken, n=5) if len(taken) > 1 else [taken[0]] * 4
            side: dict[str, Any] = {
                "seconds": median(taken),
                "p20": spread[0],
                "p80": spread[3],
                "rounds": len(taken),
                "added_bytes": memory[name],
                "error": off[name][passes],
            }
            if name != "ours":
                side["times_ours"] = side["seconds"] / ours
                mine, theirs = memory["ours"], memory[name]
                if isinstance(mine, int) and isinstance(theirs, int):
                    side["memory_times_ours"] = theirs / mine
                bar = row.bars.get((name, passes))
                if bar is not None:
                    side["bar"], side["met"] = bar, side["times_ours"] >= bar
            record["sides"][name] = side
        records.append(record)
        show(record)
    return records


def show(record: dict[str, Any]) -> None:
    """One line a side."""
    print(
        f"{record['row']}, {record['passes']}: floor {record['floor_seconds'] * 1e3:.1f} ms "
        f"= {record['floor_share']:.0%} of ours"
    )
    for name, side in record["sides"].items():
        memory, error = side["added_bytes"], side["error"]
        error = error if isinstance(error, str) else f"{error:.1e}"
        memory = memory if isinstance(memory, str) else f"{memory / 2**20:.0f} MiB"
        line = (
            f"  {name:26} {side['seconds'] * 1e3:10.1f} ms "
            f"({side['p20'] * 1e3:.1f} to {side['p80'] * 1e3:.1f})  {memory:>10}  "
            f"error {error}"
        )
        if "times_ours" in side:
            line += f"  time x{side['times_ours']:.1f}"
        if "memory_times_ours" in side:
            line += f"  memory x{side['memory_times_ours']:.1f}"
        if "bar" in side:
            line += f"  bar x{side['bar']}: {'met' if side['met'] else 'MISSED'}"
        print(line, flush=True)


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description="CPU operators against transformers and mambapy.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one memory reading")
    parser.add_argument("--out", type=Path, help="where to write the JSON record")
    parser.add_argument("--memory", nargs=3, metavar=("ROW", "SIDE", "PASSES"))
    options = parser.parse_args()
    if options.memory:
        print(added_memory(*options.memory))
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    load_before, ceiling = os.getloadavg(), ceilings()
    print({name: f"{rate:.3g}" for name, rate in ceiling.items()}, flush=True)
    records = []
    for key in options.rows:
        records += measure(key, options.rounds, options.limit, ceiling)
    result = {
        "benchmark": "cpu-ops",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "ceilings": ceiling,
        "rows": records,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
