"""Checks, times and records of the analysis pass on a GPU; see run.sh."""
import argparse, json, math, os, sys, time, traceback
from pathlib import Path
from statistics import median

BEGUN = time.monotonic()
LIMIT = float(sys.argv[1])
TINY = len(sys.argv) > 2
OUT = Path(os.environ["OUT"])
if TINY:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("TAMBA_KERNELS", "triton")

import torch
if TINY:
    import interpreter  # noqa: F401  numpy's indices
import analyze_overhead as bench
from tamba.analyze import distances
from tamba.ops import directions
from tamba.ops.kernels import directions as kernels
from tamba.ops.kernels import tiles
from tamba.trace import computing

DEV = "cpu" if TINY else "cuda"
if TINY:  # events that a CPU has, so that all of this runs
    class Event:
        def __init__(self, **_): pass
        def record(self): self.t = time.perf_counter()
        def elapsed_time(self, other): return 1e3 * (other.t - self.t)
    torch.cuda.Event, torch.cuda.synchronize, torch.cuda._sleep = Event, lambda: None, lambda n: None
RESULT = {}


def left():
    return LIMIT - (time.monotonic() - BEGUN)


def say(*words):
    print(f"[{time.monotonic() - BEGUN:5.1f} s]", *words, flush=True)


def keep():
    (OUT / "angles.json").write_text(json.dumps(RESULT, indent=1) + "\n")


def states(S, n, D, dtype):
    """Random walks of states; some nearly parallel, some nearly opposite, by steps of many sizes."""
    g = torch.Generator(DEV).manual_seed(0)
    x = torch.randn(n, D, generator=g, device=DEV, dtype=torch.float64)
    found = [x]
    for i in range(1, S):
        size = (0.3, 1e-5, 0.1, 1e-3, 0.5, 1.0, 1e-2, 3.0)[i % 8]
        sign = -1.0 if i % 7 == 3 else 1.0
        x = sign * (x + size * x.norm(dim=-1, keepdim=True) / math.sqrt(D)
                    * torch.randn(n, D, generator=g, device=DEV, dtype=torch.float64))
        found.append(x / x.norm(dim=-1, keepdim=True) * (10.0 + i))
    return [s.to(dtype) for s in found]


def truth(given):
    """[n, S, S] angles in float64, by chords."""
    wide = torch.stack([s.double() for s in given], dim=1)
    u = wide / wide.norm(dim=-1, keepdim=True)
    parts = []
    for some in u.split(64):
        minus = (some[:, :, None] - some[:, None]).norm(dim=-1)
        plus = (some[:, :, None] + some[:, None]).norm(dim=-1)
        parts.append(2 / math.pi * torch.atan2(minus, plus))
    return torch.cat(parts)


def check():
    rows = []
    S, B, T, D = (5, 2, 16, 64) if TINY else (32, 2, 512, 576)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for d in (D, 2048) if dtype == torch.bfloat16 and not TINY else (D,):
            given = states(S, B * T, d, dtype)
            want = truth(given)
            one = directions.compare([s[:, None] for s in given], torch.ones(B * T, 1, dtype=torch.bool))
            single = (one.angles - want).abs()
            shaped = [s.view(B, T, d) for s in given]
            counts = torch.ones(B, T, dtype=torch.bool)
            counts[0, 3::7] = False
            got = directions.compare(shaped, counts)
            again = directions.compare(shaped, counts)
            here = counts.to(DEV)
            mean = torch.stack([want.view(B, T, S, S)[b][here[b]].mean(0) for b in range(B)])
            off = got.angles - mean
            exact = directions._by_torch([s.double() for s in shaped], counts)
            own = exact.dependence.diagonal(0, 1, 2)
            scale = (own[:, :, None] * own[:, None]).abs().sqrt()
            near = (want < 0.01) & (want > 0)
            opposite = want > 0.99
            row = {
                "dtype": str(dtype)[6:], "D": d, "S": S, "tokens": B * T,
                "single_max": float(single.max()), "single_mean": float(single.mean()),
                "near_pairs": int(near.sum()), "near_max": float((single * near).max()),
                "opposite_pairs": int(opposite.sum()), "opposite_max": float((single * opposite).max()),
                "row_mean_max": float(off.abs().max()), "bias": float(off.mean()),
                "apart_max": float((got.apart - exact.apart).abs().max()),
                "hsic_relative": float(((got.dependence - exact.dependence).abs() / scale).max()),
                "same_twice": all(torch.equal(getattr(got, k), getattr(again, k))
                                  for k in ("angles", "last", "apart", "dependence")),
            }
            row["held"] = row["row_mean_max"] < 1e-6 and row["single_max"] < 1e-6 and row["same_twice"]
            rows.append(row)
            say("exactness", json.dumps({k: (f"{v:.1e}" if isinstance(v, float) else v) for k, v in row.items()}))
    RESULT["exactness"] = rows
    keep()


class Timed:
    """A kernel whose launches are between events."""
    def __init__(self, kernel, name, marks):
        self.kernel, self.name, self.marks = kernel, name, marks

    def __getitem__(self, grid):
        def launch(*a, **k):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            self.kernel[grid](*a, **k)
            last.record()
            self.marks.append((self.name, first, last))
        return launch


def seen_states(model, blocks, rows, dtype=None):
    batch = next(blocks.batches(rows))
    found = []
    hooks = [l.register_forward_pre_hook(lambda _, a: found.append(a[0])) for l in model.model.layers]
    hooks.append(model.model.layers[-1].register_forward_hook(lambda _, a, o: found.append(o)))
    with computing(model, dtype):
        normed = model.model(**batch.to(model.device).inputs, use_cache=False).last_hidden_state
    for h in hooks:
        h.remove()
    return [*found, normed], distances.counted(batch), batch


def calls(run):
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            Count.n += 1
            return f(*args, **(kwargs or {}))
    with Count():
        run()
    return Count.n


def parts(name, model, blocks, rows):
    """Milliseconds of one batch on the GPU by part, medians of 7."""
    given, counts, batch = seen_states(model, blocks, rows)
    L = model.config.num_hidden_layers
    names = ("lengths_kernel", "chords_kernel", "sums_kernel", "centred_kernel")
    right = {k: getattr(kernels, k) for k in names}
    table, wall = {}, []
    class Nothing:
        def __getitem__(self, grid):
            return lambda *a, **k: None
    for k in names:
        setattr(kernels, k, Nothing())
    sums = distances._Sums(L, model.device)
    check_, sums._check = sums._check, lambda: None
    try:
        n_calls = calls(lambda: sums.add(given, counts))
    finally:
        for k in names:
            setattr(kernels, k, right[k])
    for turn in range(9):
        marks = []
        sums = distances._Sums(L, model.device)
        for k in names:
            setattr(kernels, k, Timed(right[k], k, marks))
        ev = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        bmm = torch.bmm
        def timed_bmm(a, b):
            f, l = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            f.record(); out = bmm(a, b); l.record()
            marks.append(("hsic products", f, l))
            return out
        torch.bmm = timed_bmm
        try:
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # all is asked for before the card begins
            ev[0].record()
            begun = time.perf_counter()
            with torch.no_grad():
                sums.add(given, counts)
            wall.append(1e3 * (time.perf_counter() - begun))
            ev[1].record()
            torch.cuda.synchronize()
        finally:
            torch.bmm = bmm
            for k in names:
                setattr(kernels, k, right[k])
        if turn < 2:
            continue
        for n, f, l in marks:
            table.setdefault(n, []).append(f.elapsed_time(l))
        table.setdefault("whole batch of scoring", []).append(ev[0].elapsed_time(ev[1]))
    inputs = batch.to(model.device).inputs
    for turn in range(5):
        torch.cuda.synchronize()
        f, l = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        f.record()
        with computing(model, None):
            model.model(**inputs, use_cache=False)
        l.record()
        torch.cuda.synchronize()
        table.setdefault("forward pass, with what its launches take", []).append(f.elapsed_time(l))
    ms = {k: median(v) for k, v in table.items()}
    absent = [k for k in names[:3] if k not in ms]
    if absent:
        raise SystemExit(f"not launched: {absent}: plain torch was measured")
    known = sum(v for k, v in ms.items() if k in names or k == "hsic products")
    ms["rest of scoring"] = ms["whole batch of scoring"] - known
    ms["time of the CPU to ask for scoring"] = median(wall[2:])
    ms["operators of torch a batch of scoring (kernels aside)"] = n_calls
    RESULT.setdefault("parts_ms", {})[f"{name}, {rows} rows"] = ms
    keep()
    say(f"{name}, {rows} rows, one batch, ms:")
    for k, v in ms.items():
        print(f"    {k:55s} {v:8.3f}")
    return given, counts


def sweep(given, counts):
    """Other tiles of the chords' kernel, all four kernels' time."""
    rows = []
    for c in ({"states": 8, "tokens": 8, "width": 16, "warps": 4},
              {"states": 8, "tokens": 16, "width": 8, "warps": 4},
              {"states": 8, "tokens": 4, "width": 16, "warps": 2},
              {"states": 8, "tokens": 16, "width": 16, "warps": 8},
              {"states": 8, "tokens": 8, "width": 16, "warps": 2}):
        if left() < 15:
            break
        found = tiles.tune("chords", [c], lambda: directions.compare(given, counts), repeats=7)
        us = found[0][0] if found else None
        rows.append({**c, "us": us})
        say("tiles", c, None if us is None else f"compare {us / 1000:.3f} ms")
    RESULT["tiles"] = rows
    keep()


def arguments(**given):
    base = dict(length=512, rows=64, batch=None, rounds=15, dtype=None, weights="bfloat16", device=DEV)
    return argparse.Namespace(**{**base, **given})


def tried(what):
    """What is wrong with one part does not keep the others from being measured."""
    try:
        what()
    except Exception:
        traceback.print_exc()


def main():
    launched = []
    whole = kernels.compared
    def seen(*a, **k):
        launched.append(1)
        return whole(*a, **k)
    kernels.compared = seen
    tried(check)
    RESULT["kernels_launched"] = len(launched)
    keep()
    if not launched:
        raise SystemExit("kernels.compared was never called: plain torch was measured")
    small = os.environ.get("GGUF") or "random:smollm2-135m"
    jobs = [(small, dict(batch=None, rounds=15)), (small, dict(batch=64, rounds=15)),
            ("random:llama-1b", dict(batch=None, rounds=15))]
    if TINY:
        jobs = [("random:tiny", dict(rows=2, batch=2, rounds=2, length=16))]
    records = []
    known = {}
    opened = bench.opened
    # A model is opened once.
    def once(name, rows, length, weights, device):
        if name not in known:
            known.clear()
            known[name] = opened(name, rows, length, weights, device)
        return known[name]
    bench.opened = once
    for name, given in jobs:
        if left() < 15 and not TINY:
            say("no time for", name, given)
            continue
        record = bench.measured(name, arguments(**given))
        records.append(record)
        (OUT / "analyze-overhead.json").write_text(json.dumps(records, indent=1) + "\n")
        o = record["overhead_over"]
        say(record["model"], "batch", record["batch"], *(
            f"| over {s}: {100 * o[s]['median']:+.1f} % ({100 * o[s]['quartiles'][0]:+.0f} to {100 * o[s]['quartiles'][1]:+.0f})" for s in o),
            "| seconds", {k: round(v, 4) for k, v in record["seconds"].items()},
            f"| angle error {record['angle_error']:.1e} | held {record['held']}")
        if left() > 12:
            tried(lambda: parts(record["model"], *known[name], record["batch"]))
    if left() > 30:
        def tiles_of():
            name = "random:tiny" if TINY else small
            model, blocks = once(name, 2 if TINY else 64, 16 if TINY else 512, torch.bfloat16, DEV)
            given, counts, _ = seen_states(model, blocks, 64)
            sweep(given, counts)
        tried(tiles_of)
    say("done")


main()
