"""The rows of `tamba bench kernels`: our recurrent operators beside every peer, on a GPU or a CPU.

A row is one operator at one shape, forward (`…_fwd`) or forward with backward (`…_fwd_bwd`). The
GPU's shapes are those of real layers: S1, S2 and S4 a Mamba-2 2.7B layer, S3 a Mamba-2 layer made
of a Llama's attention, B8 and L4096 and L65536 Mamba-1 layers. Its arguments are bfloat16; step
sizes of SSD, decays, skips and states are float32. The CPU's rows are float32.

Floors, by shape: every argument and result moved once, the chunked form's matrix products at a
chunk of 256 with the causal half counted, the scan's exponentials, one a token, channel and state.
Backward: x, its gradient and the output's once each, B and C read twice and their gradients written
in float32; 3.5 times the forward products; exponentials once more. A row with both passes has the
sum of the passes' floors.

Shape letters: `B` batch, `T` tokens, `D` channels, `H` heads, `G` groups, `P` head_dim,
`N` d_state, `W` taps.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tamba.bench.ceilings import Ceilings, Cost
from tamba.bench.measure import (
    GRAPH_BELOW,
    Bar,
    EventClock,
    Graph,
    Times,
    WallClock,
    Work,
    peak_of,
    poison,
    reason,
    relative_rms,
    reset_resident_peak,
    resident,
    take_turns,
)
from tamba.bench.peers import (
    Call,
    Peers,
    Refusal,
    Side,
    keep_share_of_configurations,
    tune_briefly,
)
from tamba.ops import causal_conv1d, reference, selective_scan, ssd

Inputs = dict[str, Tensor]

OURS = "ours"
BOUND = {torch.bfloat16: 5e-3, torch.float32: 1e-5}
"""Largest relative RMS error of any output, state or gradient to float64; more voids a row."""
# Seconds; on a CPU a side that takes longer runs as seldom as can be.
_PATIENCE = 5.0
# A peer further off than this is no peer: its time would be that of another function.
_PEER_BOUND = 5e-2


@dataclass(frozen=True)
class Row:
    """One workload.

    Args:
        id: ``operator_passes/shape``.
        shape: sizes by letter, for the record.
        make: fresh random arguments on a device, from a seed; x first.
        ours: our operator.
        truth: the same in float64, on the device; independent of what `ours` runs.
        peers: by name.
        costs: of each pass.
        bars: what was asked for.
        backward: whether gradients of every floating argument are part of the work.
        with_last: whether the backward pass has a gradient of the last state, too.
    """

    id: str
    shape: dict[str, int]
    make: Callable[[torch.device, int], Inputs]
    ours: Call
    truth: Call
    peers: dict[str, Side]
    costs: tuple[Cost, ...]
    bars: tuple[Bar, ...] = ()
    backward: bool = False
    with_last: bool = True

    def sides(self) -> dict[str, Side]:
        """Ours first."""
        return {OURS: Side(lambda: self.ours), **self.peers}

    def floor(self, at: Ceilings) -> tuple[float, str]:
        """Seconds no implementation can beat, and what bounds the longest pass."""
        bounds = [cost.bound(at) for cost in self.costs]
        return sum(seconds for seconds, _ in bounds), max(bounds)[1]


# Costs


def ssd_costs(
    batch: int, length: int, heads: int, head_dim: int, d_state: int, groups: int, *, gated: bool
) -> tuple[Cost, Cost]:
    """Forward and backward of SSD with bfloat16 arguments and float32 step sizes."""
    tokens, chunk = batch * length, 256
    x, b, dt = 2 * tokens * heads * head_dim, 2 * tokens * groups * d_state, 4 * tokens * heads
    z = x if gated else 0
    flops = tokens * (
        chunk * d_state * groups + chunk * head_dim * heads + 4 * d_state * head_dim * heads
    )
    forward = Cost(bytes=2 * x + 2 * b + dt + z, flops=flops)
    backward = Cost(bytes=3 * x + 8 * b + 2 * dt + 2 * z, flops=3.5 * flops)
    return forward, backward


def scan_costs(
    batch: int, length: int, channels: int, d_state: int, *, item: int = 2
) -> tuple[Cost, Cost]:
    """Forward and backward of the selective scan with a gate; `item` bytes a number."""
    x, b = item * batch * length * channels, item * batch * length * d_state
    exponentials = batch * length * channels * d_state
    return (
        Cost(bytes=4 * x + 2 * b, exponentials=exponentials),
        Cost(bytes=7 * x + 4 * b, exponentials=exponentials),
    )


def conv_costs(batch: int, length: int, channels: int, *, item: int = 2) -> tuple[Cost, Cost]:
    """Forward and backward of the convolution."""
    x = item * batch * length * channels
    return Cost(bytes=2 * x), Cost(bytes=3 * x)


# Arguments and operators


def _random(device: torch.device, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return numbers


def _ssd_inputs(
    shape: Mapping[str, int],
    *,
    dtype: torch.dtype,
    gated: bool = False,
    packed: bool = False,
    state: bool = False,
) -> Callable[[torch.device, int], Inputs]:
    batch, length, heads = shape["B"], shape["L"], shape["H"]
    head_dim, groups, d_state = shape["P"], shape["G"], shape["N"]

    def make(device: torch.device, seed: int) -> Inputs:
        random = _random(device, seed)
        found = {
            "x": random(batch, length, heads, head_dim, dtype=dtype),
            "dt": random(batch, length, heads),
            "A": -random(heads).exp() * 4,
            "B": random(batch, length, groups, d_state, dtype=dtype),
            "C": random(batch, length, groups, d_state, dtype=dtype),
            "D": random(heads),
            "dt_bias": random(heads) - 3,
        }
        if gated:
            found["z"] = random(batch, length, heads, head_dim, dtype=dtype)
        if state:
            found["state"] = random(batch, heads, head_dim, d_state)
        if packed:
            found["starts"] = random(batch, length) > 3.1  # one token in a thousand
        return found

    return make


def _scan_inputs(
    shape: Mapping[str, int], *, dtype: torch.dtype
) -> Callable[[torch.device, int], Inputs]:
    batch, length, channels, d_state = shape["B"], shape["L"], shape["D"], shape["N"]

    def make(device: torch.device, seed: int) -> Inputs:
        random = _random(device, seed)
        return {
            "x": random(batch, length, channels, dtype=dtype),
            "dt": random(batch, length, channels, dtype=dtype),
            "A": -random(channels, d_state).exp() * 4,
            "B": random(batch, length, 1, d_state, dtype=dtype),
            "C": random(batch, length, 1, d_state, dtype=dtype),
            "D": random(channels),
            "z": random(batch, length, channels, dtype=dtype),
            "dt_bias": random(channels) - 3,
        }

    return make


def _conv_inputs(
    shape: Mapping[str, int], *, dtype: torch.dtype
) -> Callable[[torch.device, int], Inputs]:
    def make(device: torch.device, seed: int) -> Inputs:
        random = _random(device, seed)
        return {
            "x": random(shape["B"], shape["L"], shape["C"], dtype=dtype),
            "weight": random(shape["C"], shape["W"], dtype=dtype),
            "bias": random(shape["C"], dtype=dtype),
        }

    return make


@contextmanager
def plain_torch() -> Iterator[None]:
    """Operators without their kernels."""
    before = os.environ.get("TAMBA_KERNELS")
    os.environ["TAMBA_KERNELS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TAMBA_KERNELS"]
        else:
            os.environ["TAMBA_KERNELS"] = before


def _in_plain_torch(call: Call) -> Call:
    """The truth on a GPU: our plain-torch operator, which the tests hold to the recurrence."""

    def truth(**t: Tensor) -> tuple[Tensor, Tensor | None]:
        with plain_torch():
            return call(**t)

    return truth


# Rows


def gpu_rows(peers: Peers) -> list[Row]:
    """Rows of a CUDA device; those with something to reach come first, should time run out."""
    rows = [*_ssd_rows(peers), *_scan_rows(peers), *_conv_rows(peers)]
    return sorted(rows, key=lambda row: not row.bars)


SSD_SHAPES: dict[str, dict[str, int]] = {
    "S1": {"B": 1, "L": 8192, "H": 80, "P": 64, "N": 128, "G": 1},
    "S2": {"B": 8, "L": 2048, "H": 80, "P": 64, "N": 128, "G": 1},
    "S3": {"B": 1, "L": 8192, "H": 32, "P": 128, "N": 128, "G": 32},
    "S4": {"B": 1, "L": 131072, "H": 80, "P": 64, "N": 128, "G": 1},
}
_SSD_FORWARD = {
    "S1": (Bar("us", 115), Bar("times:mamba_ssm", 1.8), Bar("times:fla", 2.5)),
    "S2": (Bar("us", 230), Bar("times:mamba_ssm", 1.8)),
    "S3": (Bar("us", 180), Bar("times:mamba_ssm", 2.0), Bar("times:fla", 1.3)),
    "S4": (Bar("us", 1900), Bar("times:mamba_ssm", 1.8)),
}
_SSD_BOTH = (
    Bar("floor_share", 1 / 3),
    Bar("times:mamba_ssm", 1.8),
    Bar("times:fla", 1.3),
    Bar("extra_over_inputs", 1.2),
)
_SSD_BOTH_US = {"S1": 600, "S2": 1200}


def _ssd_rows(peers: Peers) -> Iterator[Row]:
    call = partial(ssd, dt_softplus=True)

    forward_sides = {
        "mamba_ssm": peers.mamba_ssd(),
        "fla": peers.fla_ssd(),
        "fla, B and C expanded before": peers.fla_ssd(expanded=True),
    }
    both_sides = {
        "mamba_ssm": peers.mamba_ssd(),
        "fla": peers.fla_ssd(),
        "fla, its guard off": peers.fla_ssd(guard=False),
    }
    only_mamba = {"mamba_ssm": peers.mamba_ssd()}
    for name, shape in SSD_SHAPES.items():
        sizes = (shape["B"], shape["L"], shape["H"], shape["P"], shape["N"], shape["G"])
        costs = ssd_costs(*sizes, gated=False)
        row = Row(
            id=f"ssd_fwd/{name}",
            shape=shape,
            make=_ssd_inputs(shape, dtype=torch.bfloat16),
            ours=call,
            truth=_in_plain_torch(call),
            peers=forward_sides,
            costs=costs[:1],
            bars=_SSD_FORWARD[name],
        )
        yield row
        if name != "S4":
            us = (Bar("us", _SSD_BOTH_US[name]),) if name in _SSD_BOTH_US else ()
            yield replace(
                row,
                id=f"ssd_fwd_bwd/{name}",
                make=_ssd_inputs(shape, dtype=torch.bfloat16, state=True),
                peers=both_sides,
                costs=costs,
                bars=us + _SSD_BOTH,
                backward=True,
            )
        if name in ("S1", "S3"):
            gated = ssd_costs(*sizes, gated=True)
            yield replace(
                row,
                id=f"ssd_fwd_gated/{name}",
                make=_ssd_inputs(shape, dtype=torch.bfloat16, gated=True),
                peers={"mamba_ssm": peers.mamba_ssd(), "fla": peers.fla_ssd()},
                costs=gated[:1],
                bars=(),
            )
        if name == "S1":
            yield replace(
                row,
                id=f"ssd_fwd_packed/{name}",
                make=_ssd_inputs(shape, dtype=torch.bfloat16, packed=True),
                peers=only_mamba,
                bars=(),
            )


SCAN_SHAPES: dict[str, dict[str, int]] = {
    "B8": {"B": 8, "L": 2048, "D": 4096, "N": 16},
    "L4096": {"B": 1, "L": 4096, "D": 5120, "N": 16},
    "L65536": {"B": 1, "L": 65536, "D": 1536, "N": 16},
    # Short enough for a loop over tokens.
    "L512": {"B": 8, "L": 512, "D": 4096, "N": 16},
}
_SCAN_BARS = {
    "scan1_fwd/B8": (Bar("us", 380), Bar("times:selective_scan_cuda", 1.3)),
    "scan1_fwd_bwd/B8": (Bar("us", 1100), Bar("times:selective_scan_cuda", 1.2)),
}


def _scan_rows(peers: Peers) -> Iterator[Row]:
    def call(**t: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**t, dt_softplus=True)

    for name, shape in SCAN_SHAPES.items():
        costs = scan_costs(*shape.values())
        row = Row(
            id=f"scan1_fwd/{name}",
            shape=shape,
            make=_scan_inputs(shape, dtype=torch.bfloat16),
            ours=call,
            truth=_in_plain_torch(call),
            peers=(
                {"transformers": peers.transformers_scan()}
                if name == "L512"
                else {"selective_scan_cuda": peers.cuda_scan()}
            ),
            costs=costs[:1],
            bars=_SCAN_BARS.get(f"scan1_fwd/{name}", (Bar("floor_share", 1 / 1.3),)),
        )
        yield replace(row, bars=()) if name == "L512" else row
        if name != "L512":
            yield replace(
                row,
                id=f"scan1_fwd_bwd/{name}",
                costs=costs,
                bars=_SCAN_BARS.get(f"scan1_fwd_bwd/{name}", ()),
                backward=True,
                # The CUDA peer has no gradient of the last state.
                with_last=False,
            )


def _conv_rows(peers: Peers) -> Iterator[Row]:
    def call(**t: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**t, activation="silu")

    for channels in (4096, 6144):
        shape = {"B": 8, "L": 2048, "C": channels, "W": 4}
        costs = conv_costs(shape["B"], shape["L"], channels)
        row = Row(
            id=f"conv_fwd/C{channels}",
            shape=shape,
            make=_conv_inputs(shape, dtype=torch.bfloat16),
            ours=call,
            truth=_in_plain_torch(call),
            peers={
                "fla": peers.fla_conv(),
                "causal_conv1d": peers.cuda_conv(),
                "transformers": peers.transformers_conv(),
            },
            costs=costs[:1],
            bars=(Bar("floor_share", 0.85),),
            with_last=False,
        )
        yield row
        yield replace(row, id=f"conv_fwd_bwd/C{channels}", costs=costs, backward=True)


def cpu_rows(peers: Peers) -> list[Row]:
    """Rows of a CPU, in float32, against the recurrences."""
    rows: list[Row] = []

    def both(row: Row, costs: tuple[Cost, Cost], bars: tuple[Bar, ...]) -> None:
        name, _, shape = row.id.partition("/")
        rows.append(replace(row, id=f"{name}_fwd/{shape}", costs=costs[:1], bars=bars))
        rows.append(
            replace(row, id=f"{name}_fwd_bwd/{shape}", costs=costs, bars=bars, backward=True)
        )

    def scan(**t: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**t, dt_softplus=True)

    shape = {"B": 1, "L": 2048, "D": 576, "N": 16}
    both(
        Row(
            id="scan1/D576",
            shape=shape,
            make=_scan_inputs(shape, dtype=torch.float32),
            ours=scan,
            truth=lambda **t: reference.selective_scan(**t, dt_softplus=True),
            peers={
                "transformers": peers.transformers_scan(),
                "mambapy": peers.transformers_scan(mambapy=True),
            },
            costs=(),
            with_last=False,
        ),
        scan_costs(*shape.values(), item=4),
        (Bar("times:transformers", 20), Bar("times:mambapy", 3)),
    )
    for groups in (1, 9):
        shape = {"B": 1, "L": 2048, "H": 9, "P": 64, "N": 64, "G": groups}
        # In products of 64 x 64 x 64 a chunk: the scores once a group, three more a head; going
        # back four of the scores' kind a group and nine in all with the recomputed ones.
        product = 2 * 64**3 * shape["L"] / 64
        both(
            Row(
                id=f"ssd/G{groups}",
                shape=shape,
                make=_ssd_inputs(shape, dtype=torch.float32),
                ours=lambda **t: ssd(**t, dt_softplus=True),
                truth=lambda **t: reference.ssd(**t, dt_softplus=True),
                peers={
                    "transformers": peers.transformers_ssd(256),
                    "transformers, chunk 64": peers.transformers_ssd(64),
                },
                costs=(),
                with_last=False,
            ),
            (
                Cost(flops=product * (groups + 3 * shape["H"])),
                Cost(flops=product * (3 * groups + 6 * shape["H"])),
            ),
            (Bar("times:transformers", 5),),
        )
    shape = {"B": 8, "L": 512, "C": 1728, "W": 4}
    both(
        Row(
            id="conv/C1728",
            shape=shape,
            make=_conv_inputs(shape, dtype=torch.float32),
            ours=lambda **t: causal_conv1d(**t, activation="silu"),
            truth=lambda **t: reference.causal_conv1d(**t, activation="silu"),
            peers={"transformers": peers.transformers_conv()},
            costs=(),
            with_last=False,
        ),
        conv_costs(shape["B"], shape["L"], shape["C"], item=4),
        (),
    )
    return rows


# One row


@dataclass
class _Ready:
    """A side on one input set: the work to time, and its results by our names."""

    work: Work
    results: Callable[[], dict[str, Tensor]]


def _prepare(row: Row, side: Side, call: Call, inputs: Inputs, seed: int) -> _Ready:
    """Arguments in the side's layout, gradients of its outputs, and the call on them."""
    given = {name: side.adapt(name, t) for name, t in inputs.items()}
    if not row.backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                y, last = call(**given)
            return (y,) if last is None else (y, last)

        def outputs() -> dict[str, Tensor]:
            found = dict(zip(("y", "last"), forward(), strict=False))
            return {name: side.restore(name, t) for name, t in found.items()}

        return _Ready(forward, outputs)

    leaves = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for name, t in given.items()
    }
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    y_shape = inputs["x"].shape
    random = _random(inputs["x"].device, seed)
    grad_y = side.adapt("x", random(*y_shape, dtype=inputs["x"].dtype))
    grads = [grad_y]

    def both() -> tuple[Tensor, ...]:
        y, last = call(**leaves)
        ends = [y]
        if row.with_last and last is not None:
            ends.append(last)
            if len(grads) == 1:
                grads.append(random(*last.shape))
        found = torch.autograd.grad(ends, [leaves[n] for n in wanted], grads[: len(ends)])
        return (*(end.detach() for end in ends), *found)

    def results() -> dict[str, Tensor]:
        names = ["y", "last"] if row.with_last else ["y"]
        found = both()
        names = names[: len(found) - len(wanted)] + [f"grad of {name}" for name in wanted]
        restored = {}
        for name, tensor in zip(names, found, strict=True):
            short = name.removeprefix("grad of ")
            if short not in side.without:
                restored[name] = side.restore(short, tensor)
        return restored

    return _Ready(both, results)


def _in_float64(inputs: Inputs) -> Inputs:
    return {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}


def run_row(
    row: Row,
    device: torch.device,
    ceilings: Ceilings,
    *,
    rounds: int = 50,
    seed: int = 0,
    each: Callable[[], object] = lambda: None,
    measure_memory: bool = True,
) -> dict[str, Any]:
    """Check, time and measure every side of a row; the record says what each could not do.

    Args:
        each: called after every round.
        measure_memory: on a CPU, whether to start a process a side for its peak memory.
    """
    on_gpu = device.type == "cuda"
    spent: dict[str, float] = {}
    begun = time.perf_counter()

    def lap(what: str) -> None:
        spent[what] = time.perf_counter() - begun - sum(spent.values())

    sets = _sets(row, device)
    inputs = [row.make(device, 1000 * seed + i) for i in range(sets)]
    input_bytes = sum(t.nbytes for t in inputs[0].values())
    sides = row.sides()
    reports: dict[str, dict[str, Any]] = {name: {} for name in sides}
    works: dict[str, list[_Ready]] = {}
    want = _truth(row, inputs[0], seed)
    bound = BOUND[inputs[0]["x"].dtype]
    lap("arguments and truth")
    for name, side in sides.items():
        try:
            call = side.load()
            if on_gpu and name != OURS:
                tune_briefly()
            first = _prepare(row, side, call, inputs[0], seed)
            reports[name] |= _checked(first, want, device, input_bytes)
            if not reports[name]["error"] <= (bound if name == OURS else _PEER_BOUND):
                raise Refusal(f"wrong result: relative RMS error {reports[name]['error']:.1e}")
            rest = [_prepare(row, side, call, i, seed) for i in inputs[1:]]
            works[name] = [first, *rest]
        except Refusal as refusal:
            reports[name]["reason"] = str(refusal)
        except Exception as error:
            reports[name]["reason"] = reason(error)
        lap(f"{name} compiled and checked")
    del want
    for name, times in _timed(works, on_gpu, rounds, each).items():
        reports[name] |= times
    lap("times")
    if not on_gpu and measure_memory:
        for name in works:
            reports[name]["extra_bytes"] = _added_memory(row.id, name)
        lap("memory")
    found = record_of(row, reports, row.floor(ceilings), bound, input_bytes, rounds)
    return {**found, "seconds": spent}


def _sets(row: Row, device: torch.device) -> int:
    """Input sets that are together larger than four times the last cache."""
    if device.type != "cuda":
        return 3
    moved = sum(cost.bytes for cost in row.costs) or 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(8, math.ceil(4 * cache / moved)))


def _truth(row: Row, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Results in float64 by name; of gradients for the same gradients of the outputs."""
    exact = _in_float64(inputs)
    if not row.backward:
        with torch.no_grad():
            y, last = row.truth(**exact)
        return {"y": y} if last is None else {"y": y, "last": last}
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in exact.items()}
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    y, last = row.truth(**leaves)
    random = _random(y.device, seed)
    ends = [y]
    grads = [random(*y.shape, dtype=inputs["x"].dtype).double()]
    if row.with_last and last is not None:
        ends.append(last)
        grads.append(random(*last.shape).double())
    found = torch.autograd.grad(ends, [leaves[name] for name in wanted], grads)
    names = ["y", "last"][: len(ends)] + [f"grad of {name}" for name in wanted]
    return dict(zip(names, (*(end.detach() for end in ends), *found), strict=True))


def _checked(
    ready: _Ready, want: Mapping[str, Tensor], device: torch.device, input_bytes: int
) -> dict[str, Any]:
    """Errors on poisoned memory, whether a second run gives the same bits, memory on a GPU."""
    if device.type == "cuda":
        ready.results()  # compile and tune, on memory that is not watched
        poison(device, 4 * input_bytes)
    start = time.perf_counter()
    first = ready.results()
    slow = device.type == "cpu" and time.perf_counter() - start > _PATIENCE
    errors = {name: relative_rms(got, want[name]) for name, got in first.items() if name in want}
    same = None
    if not slow:
        again = ready.results()
        same = all(torch.equal(first[name], again[name]) for name in first)
        del again
    del first
    found: dict[str, Any] = {
        "error": max(errors.values()),
        "errors": errors,
        "repeatable": same,
    }
    if device.type == "cuda":
        with peak_of(device) as peak:
            outputs = ready.work()
        assert isinstance(outputs, tuple)
        found["extra_bytes"] = max(0, peak.bytes - sum(t.nbytes for t in outputs))
    return found


def _timed(
    works: Mapping[str, Sequence[_Ready]],
    on_gpu: bool,
    rounds: int,
    each: Callable[[], object],
) -> dict[str, dict[str, Any]]:
    """Times of every side; with graphs where ours is short."""
    plain = {name: [ready.work for ready in readies] for name, readies in works.items()}
    if not works:
        return {}
    if not on_gpu:
        clock = WallClock()
        taken = take_turns(plain, clock, rounds, patience=_PATIENCE, warm_up=1, each=each)
        return {n: Times.of(t, clock.name).microseconds() for n, t in taken.items()}
    events = EventClock()
    quick = take_turns(plain, events, 5)
    ours = Times.of(quick[OURS], events.name).median if OURS in quick else math.inf
    graphs: dict[str, Graph] = {}
    if ours < GRAPH_BELOW:
        for name, mine in plain.items():
            try:
                graphs[name] = Graph(mine)
            except Exception:  # what cannot be captured is timed by events, and the record says so
                torch.cuda.synchronize()
    mixed: dict[str, list[Work]] = {
        name: [graphs[name]] if name in graphs else mine for name, mine in plain.items()
    }
    taken = take_turns(mixed, events, rounds, each=each)
    found = {}
    for name, seconds in taken.items():
        graph = graphs.get(name)
        if graph is not None:
            seconds = [s / graph.sets for s in seconds]
        found[name] = Times.of(seconds, "graph" if graph else events.name).microseconds()
    return found


class Named(Protocol):
    """What a record takes from a row as it is."""

    @property
    def id(self) -> str: ...
    @property
    def shape(self) -> dict[str, int]: ...
    @property
    def bars(self) -> tuple[Bar, ...]: ...


def record_of(
    row: Named,
    reports: dict[str, dict[str, Any]],
    floor: tuple[float, str],
    bound: float,
    input_bytes: int,
    rounds: int,
) -> dict[str, Any]:
    """The row as the result file has it, from what is known of each side.

    Args:
        floor: seconds, and what bounds them.
        bound: largest error of ours.
        rounds: that were asked for.
    """
    seconds, floor_of = floor
    ours = reports[OURS]
    us = ours.get("us")
    void = None if us is not None else ours.get("reason", "not timed")
    peers: dict[str, float | str] = {}
    ratios: dict[str, float] = {}
    for name, report in reports.items():
        if name == OURS:
            continue
        if "us" not in report:
            peers[name] = report.get("reason", "not timed")
            continue
        peers[name] = report["us"]
        if us is not None:
            ratios[name] = report["us"] / us
    extra = ours.get("extra_bytes")
    record: dict[str, Any] = {
        "id": row.id,
        "shape": row.shape,
        "floor_us": 1e6 * seconds,
        "floor_of": floor_of,
        "ours_us": us,
        "ours_p20_us": ours.get("p20_us"),
        "ours_p80_us": ours.get("p80_us"),
        "floor_share": None if us is None else 1e6 * seconds / us,
        "peers": peers,
        "ratios": ratios,
        "error": _finite(ours.get("error")),
        "error_bound": bound,
        "void": void,
        "extra_bytes": extra,
        "input_bytes": input_bytes,
        "extra_over_inputs": extra / input_bytes if isinstance(extra, int) else None,
        "extra_mib": extra / 2**20 if isinstance(extra, int) else None,
        "repeatable": ours.get("repeatable"),
        "sides": {
            name: {key: _finite(value) for key, value in report.items()}
            for name, report in reports.items()
        },
    }
    record["bars"] = [bar.judge(record) for bar in row.bars]
    return record


def _finite(value: Any) -> Any:
    """JSON has no infinity: None in its place."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Memory on a CPU, and peers' compilers


def _added_memory(row_id: str, side: str, limit: float = 900.0) -> int | str:
    """Bytes that one run adds to the resident set of a fresh process at its peak, or why not."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_added_memory, args=(theirs, row_id, side))
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return f"stopped after {limit:.0f} s"
        return ours.recv()
    except EOFError:
        return "failed: the process ended"
    finally:
        child.kill()
        child.join()


def _send_added_memory(pipe: Any, row_id: str, side_name: str) -> None:
    row = next(row for row in cpu_rows(Peers()) if row.id == row_id)
    side, device = row.sides()[side_name], torch.device("cpu")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    call = side.load()
    small = {
        name: t[:, :32].contiguous() if t.dim() > 2 else t
        for name, t in row.make(device, 1).items()
    }
    _prepare(row, side, call, small, 0).work()  # libraries load what they load
    ready = _prepare(row, side, call, row.make(device, 0), 0)
    reset_resident_peak()
    before = resident("VmRSS")
    ready.work()
    pipe.send(resident("VmHWM") - before)


def _compile_share(folder: Path | None, ids: Sequence[str], part: int, parts: int) -> None:
    """One of the processes that compile the peers' configurations beforehand."""
    device = torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 / parts))
    for row in gpu_rows(Peers(folder, may_build=False)):
        if row.id not in ids:
            continue
        inputs = row.make(device, 0)
        for name, side in row.peers.items():
            if "cuda" in name or name in ("causal_conv1d", "transformers"):
                continue
            try:
                call = side.load()
                keep_share_of_configurations(part, parts)
                _prepare(row, side, call, inputs, 0).work()
                torch.cuda.synchronize()
            except Exception:
                continue  # the run itself says why


if __name__ == "__main__":
    _folder = None if sys.argv[1] == "-" else Path(sys.argv[1])
    _compile_share(_folder, sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4]))
