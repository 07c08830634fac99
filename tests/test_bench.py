"""The benchmarks: floors, turns, what voids a row, and what the record and the tables say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tamba
from tamba.bench import ceilings, cold_start, kernels, loss, measure, model, peers, tables
from tamba.bench.ceilings import H100, Ceilings, Cost
from tamba.bench.kernels import OURS, Row, run_row
from tamba.bench.measure import Bar, Times, relative_rms, take_turns
from tamba.bench.peers import Peers, Refusal, Side
from tamba.errors import UserError
from tamba.ops import reference, ssd
from tamba.ops.losses import Weights

CPU = torch.device("cpu")
SLOW_MACHINE = Ceilings(copy=1e10, flops=1e11, exponentials=1e9)


def ssd_floors(name: str) -> list[float]:
    shape = kernels.SSD_SHAPES[name]
    sizes = (shape["B"], shape["L"], shape["H"], shape["P"], shape["N"], shape["G"])
    costs = kernels.ssd_costs(*sizes, gated=False)
    return [1e6 * t for c in costs for t in (c.bytes / H100.copy, c.flops / H100.flops)]


# Worked by hand for 3.0 TB/s and 798 TFLOP/s: forward bytes and flops, backward bytes and flops.
@pytest.mark.parametrize(
    ("name", "microseconds"),
    [
        ("S1", [58, 41, 91, 142]),
        ("S2", [116, 81, 182, 285]),
        ("S3", [90, 43, 247, 151]),
        ("S4", [931, 651, 1460, 2279]),
    ],
)
def test_floors_of_ssd(name, microseconds):
    assert ssd_floors(name) == pytest.approx(microseconds, rel=0.012)


# The same at 3.7e12 exponentials a second: forward bytes and exponentials, backward bytes.
@pytest.mark.parametrize(
    ("shape", "microseconds"),
    [((8, 2048, 4096, 16), [179, 290, 313]), ((1, 4096, 5120, 16), [56, 91, 98])],
)
def test_floors_of_the_scan(shape, microseconds):
    forward, backward = kernels.scan_costs(*shape)
    found = [
        forward.bytes / H100.copy,
        forward.exponentials / H100.exponentials,
        backward.bytes / H100.copy,
    ]
    assert [1e6 * t for t in found] == pytest.approx(microseconds, rel=0.012)


def test_a_floor_is_the_longest_bound_of_each_pass_and_their_sum():
    row = next(r for r in kernels.gpu_rows(Peers()) if r.id == "scan1_fwd_bwd/B8")
    seconds, what = row.floor(H100)
    assert 1e6 * seconds == pytest.approx(290 + 313, rel=0.01)
    assert what == "bytes"
    assert Cost(bytes=30, flops=10).bound(Ceilings(10, 10, 1)) == (3, "bytes")


def test_the_larger_ceiling_counts():
    assert H100.largest(Ceilings(4e12, 1, 1)) == replace(H100, copy=4e12)


def test_ceilings_of_this_machine_are_rates(monkeypatch):
    monkeypatch.setattr(
        ceilings, "_best", lambda clock, work, amount, repeats: amount / clock(work)
    )
    found = ceilings.measure_ceilings(CPU)
    assert found["used"] == found["measured"]
    assert all(1e6 < rate < 1e16 for rate in found["used"].values())


def test_no_floor_of_a_cpu_rests_on_a_slow_exponential(monkeypatch):
    """Where torch's own is slower than the loops that it is to bound, theirs counts."""
    pytest.importorskip("numba")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for of_torch, of_loop, want in ((1e9, 5e9, 1e10), (3e9, 1e9, 3e9)):
        rates = iter([of_torch, of_loop])
        monkeypatch.setattr(ceilings, "_best", lambda *_, rates=rates: next(rates))
        assert ceilings._exponentials_on_cpu(lambda work: 1.0) == want
    from tamba.ops.kernels import scan_cpu

    rates = torch.rand(64)
    steps = torch.arange(1000.0)[:, None] * -(2.0**-20)
    want = torch.exp2(steps.double() * rates.double()).sum(0)
    got = torch.from_numpy(scan_cpu.exponentials(rates.numpy(), 1000))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


def clocked(seconds: dict[str, list[float]]):
    """A clock that needs no time: each side takes its seconds in turn."""
    order: list[str] = []
    left = {name: iter(s) for name, s in seconds.items()}

    def clock(work) -> float:
        name = work()
        order.append(name)
        return next(left[name])

    return clock, order


def test_sides_take_turns_in_an_order_that_flips():
    clock, order = clocked({"a": [9, 1, 2, 3], "b": [9, 4, 5, 6]})
    works = {name: [lambda name=name: name] for name in "ab"}
    times = take_turns(works, clock, 3, warm_up=1)
    assert order == list("ba" + "ab" + "ba" + "ab")
    assert times == {"a": [1, 2, 3], "b": [4, 5, 6]}  # what warms up does not count


def test_input_sets_rotate():
    seen: list[int] = []
    works = {"a": [lambda i=i: seen.append(i) for i in range(3)]}
    take_turns(works, lambda work: work() or 0.0, 6, warm_up=0)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_side_beyond_patience_is_timed_once():
    clock, order = clocked({"a": [1, 1, 1, 1], "slow": [60]})
    works = {name: [lambda name=name: name] for name in ("a", "slow")}
    times = take_turns(works, clock, 3, warm_up=1, patience=5)
    assert times == {"a": [1, 1, 1], "slow": [60]}
    assert order.count("slow") == 1


def test_medians_and_percentiles():
    times = Times.of([float(n) for n in range(1, 12)], "a clock")
    assert (times.median, times.p20, times.p80, times.rounds) == (6, 3, 9, 11)
    assert Times.of([2.0], "a clock").p80 == 2.0


def test_relative_rms():
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_rms(want + torch.tensor([0.3, 0.4]), want) == pytest.approx(0.1)
    assert relative_rms(torch.tensor([math.nan, 4.0]), want) == math.inf
    assert relative_rms(torch.zeros(3), want) == math.inf


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (Bar("us", 10), True),
        (Bar("us", 9), False),
        (Bar("times:peer", 2), True),
        (Bar("times:peer", 3), False),
        (Bar("times:absent", 1), None),
        (Bar("floor_share", 0.4), True),
        (Bar("extra_over_inputs", 1.2), False),
        (Bar("peak_over_peer", 0.6), True),
        (Bar("mfu", 0.6), False),
    ],
)
def test_bars(bar, met):
    row = {"ours_us": 10.0, "ratios": {"peer": 2.5}, "floor_share": 0.5, "extra_over_inputs": 2.0}
    judged = bar.judge({**row, "peak_over_peer": 0.5, "mfu": 0.5})
    assert judged["met"] is met
    assert {True: ": met", False: "missed", None: "not measured"}[met] in tables._bar(judged)


# One row, whole


def tiny_row(backward: bool = False, **changes) -> Row:
    """SSD at a size that takes milliseconds."""
    shape = {"B": 2, "L": 24, "H": 2, "P": 4, "N": 8, "G": 1}
    row = Row(
        id="ssd_fwd/tiny",
        shape=shape,
        make=kernels._ssd_inputs(shape, dtype=torch.float32, state=True),
        ours=lambda **t: ssd(**t, dt_softplus=True),
        truth=lambda **t: reference.ssd(**t, dt_softplus=True),
        peers={"transformers": Peers().transformers_ssd(8)},
        costs=kernels.ssd_costs(2, 24, 2, 4, 8, 1, gated=False)[: 1 + backward],
        bars=(Bar("times:transformers", 1e-9), Bar("us", 1e-9)),
        backward=backward,
    )
    return replace(row, **changes)


def measured(row: Row) -> dict:
    found = run_row(row, CPU, SLOW_MACHINE, rounds=2, seed=3, measure_memory=False)
    json.dumps(found, allow_nan=False)
    return found


@pytest.mark.parametrize("backward", [False, True])
def test_a_row(backward):
    found = measured(tiny_row(backward))
    assert found["void"] is None
    assert found["error"] < found["error_bound"] == 1e-5
    assert found["repeatable"]
    assert found["ours_p20_us"] <= found["ours_us"] <= found["ours_p80_us"]
    assert found["seconds"].keys() >= {"arguments and truth", "times"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["ratios"]["transformers"] == found["peers"]["transformers"] / found["ours_us"]
    assert found["floor_share"] == pytest.approx(found["floor_us"] / found["ours_us"])
    assert [bar["met"] for bar in found["bars"]] == [True, False]
    errors = found["sides"][OURS]["errors"]
    gradients = {f"grad of {name}" for name in tiny_row().make(CPU, 0)}
    assert errors.keys() == {"y", "last"} | (gradients if backward else set())


def wrong(scale_y: float = 1.0, scale_gradient: float = 1.0):
    """SSD with a planted fault in its result or in the gradient of x."""

    def call(**t):
        x = t["x"] + (scale_gradient - 1) * (t["x"] - t["x"].detach())
        y, last = ssd(**{**t, "x": x}, dt_softplus=True)
        return y * scale_y, last

    return call


@pytest.mark.parametrize("fault", [wrong(scale_y=1.001), wrong(scale_y=math.nan)])
def test_a_wrong_result_voids_the_row(fault):
    found = measured(tiny_row(ours=fault))
    assert "wrong result" in found["void"]
    assert found["ours_us"] is None
    assert not found["ratios"]
    assert [bar["met"] for bar in found["bars"]] == [None, None]
    assert isinstance(found["peers"]["transformers"], float)


def test_a_wrong_gradient_voids_the_row():
    fault = wrong(scale_gradient=1.001)
    assert measured(tiny_row(ours=fault))["void"] is None  # the forward pass is right
    assert "wrong result" in measured(tiny_row(backward=True, ours=fault))["void"]


def refuse():
    raise Refusal("not on this card")


def fail(**tensors):
    raise RuntimeError("kernel launch failed\nat line 3")


def test_a_peer_that_cannot_run_stays_with_its_reason():
    sides = {
        "refuses": Side(refuse),
        "fails": Side(lambda: fail),
        "is missing": Peers().fla_ssd(),
        "is wrong": Side(lambda: wrong(scale_y=1.2)),
    }
    found = measured(tiny_row(peers=sides))
    assert found["void"] is None
    assert found["peers"]["refuses"] == "not on this card"
    assert found["peers"]["fails"] == "failed: RuntimeError: kernel launch failed"
    assert "fla-core" in found["peers"]["is missing"]
    assert "wrong result" in found["peers"]["is wrong"]
    assert not found["ratios"]


@pytest.mark.parametrize(
    ("side", "operator"),
    [("transformers_scan", "scan"), ("transformers_conv", "conv"), ("transformers_ssd", "ssd")],
)
def test_layouts_of_peers_that_run_here(side, operator):
    """Results and gradients come back in our layout: a wrong one would not match the truth."""
    row = next(r for r in kernels.cpu_rows(Peers()) if r.id.startswith(operator) and r.backward)
    small = {"L": 16, "D": 12, "C": 12, "H": 2, "P": 4, "G": 1, "B": 2}
    shape = {name: min(size, small.get(name, size)) for name, size in row.shape.items()}
    make = {
        "scan": kernels._scan_inputs,
        "conv": kernels._conv_inputs,
        "ssd": kernels._ssd_inputs,
    }[operator]
    peer = getattr(Peers(), side)()
    row = replace(row, shape=shape, make=make(shape, dtype=torch.float32), peers={side: peer})
    found = measured(row)
    assert found["void"] is None
    assert isinstance(found["peers"][side], float)
    errors = found["sides"][side]["errors"]
    assert max(errors.values()) < 1e-4
    assert len(errors) == 1 + len(row.make(CPU, 0))


# Runs, records and tables


@pytest.fixture
def quick(monkeypatch):
    """A machine that is known, and no processes for memory."""
    rates = dict.fromkeys(("measured", "used"), H100.to_dict())
    monkeypatch.setattr("tamba.bench.measure_ceilings", lambda at: rates)
    monkeypatch.setattr(kernels, "_added_memory", lambda row, side: 5)


@pytest.mark.usefixtures("quick")
def test_a_run_writes_its_record_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_rows", lambda peers: [tiny_row(), tiny_row(id="ssd_fwd/2")])
    out = tmp_path / "records" / "kernels-cpu.json"
    seen = []
    record = tamba.bench(device="cpu", rounds=2, out=out, report=lambda row: seen.append(row["id"]))
    assert seen == ["ceilings", "ssd_fwd/tiny", "ssd_fwd/2"]
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    assert record.keys() >= {"suite", "date", "command", "machine", "ceilings", "seed", "rounds"}
    assert record["machine"]["versions"].keys() >= {"tamba", "torch", "transformers"}
    assert record["rows"][0]["extra_bytes"] == 5

    late = tamba.bench(device="cpu", limit_seconds=0.0, rows=["ssd_fwd/2"])
    assert late["rows"] == [{"id": "ssd_fwd/2", "not_run": "0 s were over"}]


@pytest.mark.usefixtures("quick")
def test_a_record_keeps_the_rows_that_another_run_measured(tmp_path, monkeypatch):
    rows = [tiny_row(id=f"ssd_fwd/{n}") for n in (1, 2, 3)]
    monkeypatch.setattr(kernels, "cpu_rows", lambda peers: rows)
    out = tmp_path / "kernels-cpu.json"

    def run(*ids, day: int, **given) -> dict:
        monkeypatch.setattr("tamba.bench._command", lambda: f"run of day {day}")
        tamba.bench(device="cpu", rounds=1, rows=ids, out=out, **given)
        record = json.loads(out.read_text())
        record["date"] = f"2026-11-{day:02d}T00:00:00+00:00"  # runs of a test share a second
        out.write_text(json.dumps(record))
        return record

    run("ssd_fwd/1", "ssd_fwd/2", day=1)
    second = run("ssd_fwd/2", "ssd_fwd/3", day=2)
    assert [row["id"] for row in second["rows"]] == ["ssd_fwd/1", "ssd_fwd/2", "ssd_fwd/3"]
    assert [row.get("date", "")[:10] for row in second["rows"]] == ["2026-11-01", "", ""]
    assert {d: r["command"] for d, r in second["kept"].items()} == {
        "2026-11-01T00:00:00+00:00": "run of day 1"
    }
    assert second["kept"]["2026-11-01T00:00:00+00:00"].keys() >= {"machine", "ceilings", "seed"}
    table = tables.render(second)
    assert "- `ssd_fwd/1`: " in table and "2026-11-01; `run of day 1`" in table
    assert "- `ssd_fwd/2`, `ssd_fwd/3`: " in table and "2026-11-02; `run of day 2`" in table
    assert "day 1" not in tables.render(second, ["ssd_fwd/2"])

    # What a run does not come to stays; what it fails at or finds wrong does not, nor what is gone.
    third = run("ssd_fwd/3", day=3, limit_seconds=0.0)
    assert third["rows"] == [
        second["rows"][0],
        *({**row, "date": "2026-11-02T00:00:00+00:00"} for row in second["rows"][1:]),
    ]
    assert third["kept"].keys() == {row["date"] for row in third["rows"]}
    rows[:] = [
        tiny_row(id="ssd_fwd/1", ours=wrong(scale_y=2.0)),
        tiny_row(id="ssd_fwd/3", make=lambda device, seed: 1 // 0),
    ]
    fourth = run(day=4)
    assert "wrong result" in fourth["rows"][0]["void"]
    assert "ZeroDivisionError" in fourth["rows"][1]["not_run"]
    assert len(fourth["rows"]) == 2 and not fourth["kept"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"suite": "model"}, "is a record of 'model'"),
        ({"machine": {"device": "a card"}}, "is a record of 'kernels' on a card"),
        (None, "is no record of a benchmark"),
    ],
)
def test_a_record_of_something_else_is_not_written_over(tmp_path, monkeypatch, changed, said):
    monkeypatch.setattr(kernels, "cpu_rows", lambda peers: [tiny_row()])
    out = tmp_path / "record.json"
    tamba.bench(device="cpu", rounds=1, out=out)
    record = json.loads(out.read_text())
    text = "[1, 2]" if changed is None else json.dumps({**record, **changed})
    out.write_text(text)
    with pytest.raises(UserError, match=said):
        tamba.bench(device="cpu", rounds=1, out=out)
    assert out.read_text() == text


@pytest.mark.usefixtures("quick")
def test_an_error_in_one_row_leaves_the_others(monkeypatch):
    def broken(device, seed):
        raise MemoryError("no room")

    rows = [tiny_row(id="broken/1", make=broken), tiny_row()]
    monkeypatch.setattr(kernels, "cpu_rows", lambda peers: rows)
    record = tamba.bench(device="cpu", rounds=1)
    assert record["rows"][0] == {"id": "broken/1", "not_run": "failed: MemoryError: no room"}
    assert record["rows"][1]["void"] is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"suite": "kernel"}, "did you mean 'kernels'"),
        ({"device": "tpu3"}, "use cpu or cuda"),
        ({"rows": ["sdd_fwd"]}, "no row begins with 'sdd_fwd'"),
        ({"rounds": 0}, "use 1 or more"),
        ({"peers_folder": "/no/such/folder"}, "no such folder"),
        ({"suite": "cold-start", "rounds": 3}, "a new process is measured once"),
        ({"limit_seconds": -1.0}, "limit_seconds: -1 is no time"),
        ({"limit_seconds": math.nan}, "limit_seconds: nan is no time"),
        ({"compile_seconds": -5.0}, "compile_seconds: -5 is no time"),
        ({"out": f"{__file__}/record.json"}, "cannot be written"),
    ],
)
def test_mistakes_are_said_before_anything_runs(given, said):
    with pytest.raises(UserError, match=said):
        tamba.bench(**{"device": "cpu", **given})


def test_a_record_that_could_not_be_kept_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"record\.json: .* may not be written to; name another"):
        tamba.bench(device="cpu", out=tmp_path / "record.json")


def test_ids_are_unique_and_every_bar_names_a_peer_of_its_row():
    device = torch.device("cuda")
    of_gpu = [*kernels.gpu_rows(Peers()), *loss.rows(device, Peers())]
    for rows in (of_gpu, kernels.cpu_rows(Peers())):
        assert len({row.id for row in rows}) == len(rows)
        for row in rows:
            asked = {bar.what.partition(":")[2] for bar in row.bars if ":" in bar.what}
            assert asked <= row.peers.keys(), row.id


def a_record() -> dict:
    fast = measured(tiny_row())
    void = measured(tiny_row(id="ssd_fwd/void", ours=wrong(scale_y=2.0)))
    missing = measured(tiny_row(id="ssd_fwd/alone", peers={"fla": Peers().fla_ssd()}))
    machine = {"device": "a card", "versions": {"torch": "2.11"}}
    return {
        "suite": "kernels",
        "date": "2026-11-22T10:00:00+00:00",
        "command": "tamba bench kernels",
        "machine": machine,
        "rows": [fast, void, missing, {"id": "late/1", "not_run": "60 s were over"}],
    }


def test_tables_come_from_records(tmp_path):
    record = a_record()
    (tmp_path / "kernels-h100.json").write_text(json.dumps(record))
    text = "Before\n\n<!-- bench: kernels-h100.json ssd_fwd -->\nstale\n<!-- /bench -->\n\nAfter\n"
    filled = tables.fill(text, tmp_path)
    assert filled.startswith("Before") and filled.endswith("After\n") and "stale" not in filled
    assert f"**{tables.duration(record['rows'][0]['ours_us'])}**" in filled
    assert "| `ssd_fwd/void` |" in filled and "void, wrong result" in filled
    assert "`ssd_fwd/alone`: fla fla-core is neither installed" in filled
    assert "late/1" not in filled
    assert tables.fill(filled, tmp_path) == filled
    assert "`late/1`: not run, 60 s were over" in tables.render(record)
    for row in record["rows"]:
        assert tables.line(row).startswith(row["id"])
    assert "No record yet." in tables.fill(text.replace("h100", "h200"), tmp_path)


@pytest.mark.parametrize(
    ("us", "text"), [(93.14, "93.1 µs"), (1203.0, "1.2 ms"), (3.5e6, "3.5 s"), (0.5, "0.5 µs")]
)
def test_durations(us, text):
    assert tables.duration(us) == text


def test_memory_of_a_process_is_read():
    measure.reset_resident_peak()
    before = measure.resident("VmRSS")
    block = torch.ones(1 << 26)  # so much that it takes no memory that was freed before
    assert measure.resident("VmHWM") - before > 0.9 * block.nbytes


def test_only_what_the_rows_call_is_compiled():
    kept = "template<int n>\nvoid f() {}\ntemplate void f<at::BFloat16, at::BFloat16>(P &p);\n"
    text = kept + "template void f<float, at::BFloat16>(P &p);\n"
    assert peers._only_bfloat16(text) == kept
    unit = peers._SCAN_UNIT.format(kind="scan_fwd", parameters="P")
    assert '#include "scan_fwd_kernel.cuh"' in unit and "[&] { \\\n" in unit


def test_what_a_peer_was_tuned_to_is_kept_and_what_was_only_compiled_is_not(monkeypatch):
    class Tuner:
        def __init__(self):
            self.configs, self.cache_results, self._do_bench = list("abcdef"), False, None

    tuner = Tuner()
    monkeypatch.setattr(peers, "autotuners", lambda: iter([tuner]))
    peers.keep_share_of_configurations(1, 4)
    assert (tuner.configs, tuner.cache_results) == (["b", "f"], False)
    pytest.importorskip("triton")
    tuner = Tuner()
    peers.tune_briefly()
    assert tuner.cache_results and len(tuner.configs) == 6


def test_the_committed_tables_agree_with_the_records():
    root = Path(__file__).parents[1]
    text = (root / "docs" / "performance.md").read_text()
    assert tables.fill(text, root / "benchmarks" / "results") == text


# Whole models, at sizes of nothing


TINY = model.Sizes(vocab=64, d_model=32, n_layers=2, n_heads=4, head_dim=16, d_state=16)
TINY_HYBRID = model.Sizes(
    vocab=64,
    d_model=128,  # two attention heads of 64
    n_layers=2,
    n_heads=16,
    head_dim=16,
    d_state=16,
    d_mlp=48,
    n_attention=1,
    attention_heads=2,
    kv_heads=1,
)


@pytest.fixture
def stock(monkeypatch):
    """transformers as it is: the kernels of the peer stack need a GPU."""
    monkeypatch.setattr(model, "put_in_kernels", lambda modeling, peers: None)
    return {"measured": H100.to_dict(), "used": H100.to_dict()}


def same_number_of_parameters(sizes: model.Sizes) -> None:
    ours = model.our_model(sizes, CPU, torch.float32)
    theirs = model.peer_model(sizes, CPU, torch.float32, Peers())
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)


@pytest.mark.parametrize("sizes", [TINY, TINY_HYBRID])
def test_both_stacks_have_the_same_size(stock, sizes):
    same_number_of_parameters(sizes)


def test_a_prefill_row(stock):
    row = model.Prefill("prefill_e2e/tiny", TINY, 1, 33, CPU, Peers(), rounds=2)
    found = row.run(stock)
    json.dumps(found, allow_nan=False)
    assert found["void"] is None
    assert found["ratios"].keys() == {model.PEER}
    assert found["tokens_per_second"] > 0 and found["mfu"] > 0
    assert tables.line(found) and tables.render({**a_record(), "rows": [found]})


@pytest.mark.slow
def test_a_training_row(stock):
    row = model.TrainStep("train_step_gpu/tiny", TINY_HYBRID, 2, 17, CPU, Peers(), steps=1)
    found = row.run(stock)
    json.dumps(found, allow_nan=False)
    assert found["void"] is None
    assert found["sides"]["ours"]["loss"] > 0
    assert found["sides"]["ours"]["rounds"] == found["sides"][model.PEER]["rounds"] == 2


def test_a_side_that_does_not_fit_takes_smaller_batches(stock, monkeypatch):
    tried = []

    def train(self, name, parts, steps, seed):
        tried.append((name, parts))
        if parts < 4:
            raise torch.OutOfMemoryError("no room")
        return {"parts": parts, "seconds": [1.0], "peak_bytes": 10}

    monkeypatch.setattr(model.TrainStep, "_train", train)
    row = model.TrainStep("train_step_gpu/tiny", TINY_HYBRID, 8, 16, CPU, Peers())
    found = row.run(stock)
    assert found["sides"]["ours"]["parts"] == found["sides"][model.PEER]["parts"] == 4
    assert tried.count(("ours", 1)) == 1  # what did not fit is not tried again

    tried.clear()
    small = replace(row, batch=2)
    assert "out of memory" in small.run(stock)["void"]


def test_a_training_row_of_a_cpu(monkeypatch):
    (row,) = model.rows(CPU, Peers())
    assert model.our_model(row.sizes, torch.device("meta"), torch.float32).num_parameters() > 130e6
    monkeypatch.setattr(model, "_bfloat16_products", lambda: 1e12)
    found = replace(row, sizes=TINY_HYBRID, batch=2, length=17).run({}, rounds=1)
    assert found["sides"]["ours"]["rounds"] == 1
    json.dumps(found, allow_nan=False)
    assert found["void"] is None
    assert found["ratios"].keys() == {model.PEER_WIDE, model.PEER_SHORT}
    assert len(found["bars"]) == 3 and all(bar["met"] is not None for bar in found["bars"])
    assert tables.line(found)


def test_rounds_and_seed_reach_whole_models(stock, monkeypatch):
    row = model.Prefill("prefill_e2e/tiny", TINY, 1, 17, CPU, Peers())
    monkeypatch.setattr(model, "rows", lambda at, peers: [row])
    monkeypatch.setattr(sys.modules["tamba.bench"], "measure_ceilings", lambda at: stock)
    first, again, other = (
        tamba.bench("model", device="cpu", rounds=rounds, seed=seed)["rows"][0]
        for rounds, seed in ((2, 5), (3, 5), (None, 6))
    )
    turns = [found["sides"]["ours"]["rounds"] for found in (first, again, other)]
    assert turns == [2, 3, row.rounds]
    assert first["error"] == again["error"] != other["error"]


def test_work_of_the_models():
    """A forward pass is two operations a weight and token, and what attention and SSD add."""
    sizes, tokens = model.MAMBA2_2_7B, 8192
    weights = 2.7e9 - 0.13e9
    found = sizes.flops(1, tokens, logits=1)
    ssd_work = 64 * 32.5e9  # a layer of S1
    assert found == pytest.approx(2 * weights * tokens + ssd_work, rel=0.03)
    hybrid = model.HYBRID_1_3B
    assert len(hybrid.attention_layers()) == len(set(hybrid.attention_layers())) == 12
    meta = torch.device("meta")
    assert sum(p.numel() for p in model.our_model(hybrid, meta, torch.float32).parameters()) == (
        pytest.approx(1.33e9, rel=0.03)
    )


def test_cold_start_asks_a_process(monkeypatch, tmp_path):
    answer = {
        "import_seconds": 0.4,
        "first_forward_seconds": 3.0,
        **{f"compiled_for_{kind}": 0 for kind in cold_start.CHANGES},
    }

    def run(command, **_):
        Path(command[-1]).write_text(json.dumps(answer))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    cold, warm = (row.run() for row in cold_start.rows(CPU))
    assert (cold["forward_met"], warm["forward_met"]) == (True, False)
    assert cold["import_met"] and cold["recompiled_met"]
    assert "first forward seconds" in tables.render({**a_record(), "rows": [cold, warm]})

    # Asked for alone, the warm row warms its cache itself.
    took = iter([9.0, 0.5])

    def compiles(command, *, env, **_):
        (Path(env["TRITON_CACHE_DIR"]) / "binary").touch()
        answer["first_forward_seconds"] = next(took)
        return run(command)

    monkeypatch.setattr(subprocess, "run", compiles)
    assert cold_start.rows(torch.device("cuda"))[1].run()["first_forward_seconds"] == 0.5

    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nValueError: no kernel\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="ValueError: no kernel"):
        cold_start.rows(CPU)[0].run()


# The loss of distillation


def loss_row(what: str, **changes) -> loss.LossRow:
    """A row of the GPU's at the size of nothing, on this machine."""
    row = next(
        r for r in loss.rows(torch.device("cuda"), Peers()) if r.id == f"distill_loss/{what}"
    )
    return replace(row, device=CPU, shape={"n": 16, "D": 24, "V": 90}, **changes)


@pytest.mark.parametrize("what", ["kl", "kl+ce", "kl-head", "js", "stored64", "ce"])
def test_a_row_of_the_loss(what):
    row = loss_row(what)
    found = row.run(rounds=2, seed=1)
    json.dumps(found, allow_nan=False)
    assert found["void"] is None
    assert found["error"] < found["error_bound"]
    assert found["floor_us"] > 0 and found["floor_of"] == "products"
    assert found["peers"].keys() == row.peers.keys()
    if "torch" in row.peers:
        assert found["ratios"]["torch"] > 0
    assert tables.line(found) and tables.render({**a_record(), "rows": [found]})


def test_another_loss_voids_its_row():
    row = loss_row("kl", peers={"is another": Peers().torch_loss(ce=0.5)})
    found = row.run(rounds=1, seed=1)
    assert found["void"] is None
    assert "wrong result" in found["peers"]["is another"]
    wrong = replace(row, peers={}, weights=Weights(temperature=1.5))
    wrong.__dict__["truth"] = row.truth
    assert "wrong result" in wrong.run(rounds=1, seed=1)["void"]


def test_memory_of_a_loss_is_held_to_its_bar():
    bar = Bar("extra_mib", 400)
    assert bar.judge({"extra_mib": 399.0})["met"]
    assert not bar.judge({"extra_mib": 401.0})["met"]
    assert "400 MiB" in tables._bar(bar.judge({"extra_mib": None}))
