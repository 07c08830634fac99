"""Variants of the SSD kernels beside one another. See run.sh."""
from __future__ import annotations

import argparse, importlib.util, json, os, statistics, sys, tempfile, time, traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

START = time.time()
HERE = Path(__file__).parent
P64 = {"chunk": 64, "head_dim": 64, "states": 60, "per_sm": 2, "warps": 4, "stages": 3}
ST = {"head_dim": 64, "per_sm": 1, "warps": 4, "stages": 4}
GRADS, STATES = "ssd_grads half N128 P64", "ssd_states half N128 P64"
MAIN = {"ssd_segments": {"head_dim": 64, "warps": 4, "stages": 4}, GRADS: {**P64, "stages": 2}}
# name -> (file, overrides of the table of tiles)
VARIANTS = json.loads((HERE / "variants.json").read_text())
VARIANTS = {k: (v[0], MAIN if v[1] == "MAIN" else v[1]) for k, v in VARIANTS.items()}
SHAPES = {"S1": (1, 8192, 80, 64, 128, 1), "S2": (8, 2048, 80, 64, 128, 1),
          "S3": (1, 8192, 32, 128, 128, 32), "S4": (1, 131072, 80, 64, 128, 1)}
ERRORS = {"H80 G1 N128 P64": (1, 1000, 80, 64, 128, 1), "H9 G9 N64 P64": (1, 1000, 9, 64, 64, 9),
          "H32 G32 N128 P128": (1, 1000, 32, 128, 128, 32)}
TINY = False


def setup():
    global torch
    os.environ["TAMBA_KERNELS"] = "triton"
    import torch
    torch.set_num_threads(1)
    if TINY:
        sys.path.insert(0, "tests")
        import interpreter  # noqa: F401 - its patches of Triton's interpreter


def device():
    return "cpu" if TINY else "cuda"


def load(name):
    """The variant's file as a module whose operators have names of their own."""
    file, tiles_ = VARIANTS[name]
    tag = "v_" + file.removesuffix(".py")
    if tag in sys.modules:  # variants of the table of tiles alone share a module
        return sys.modules[tag]
    # One path for all processes, so that Triton's cache (keyed by source and line) is shared.
    folder = Path(tempfile.gettempdir()) / "ssd9variants"
    folder.mkdir(exist_ok=True)
    path = folder / f"{tag}.py"
    text = (HERE / file).read_text().replace('"tamba::', f'"tamba_{tag}::')
    if not path.exists() or path.read_text() != text:
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(text)
        new.rename(path)
    spec = importlib.util.spec_from_file_location(tag, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[tag] = module
    spec.loader.exec_module(module)
    return module


def case(shape, seed=0, grad=True, length=None):
    B, T, H, P, N, G = shape
    T = length or T
    g = torch.Generator(device()).manual_seed(seed)
    rand = lambda *s: torch.randn(s, generator=g, device=device())
    w = [H * P, G * N, G * N]
    packed = torch.empty(B, T, sum(w), dtype=torch.bfloat16, device=device())
    for t0 in range(0, T, 8192):
        packed[:, t0:t0 + 8192] = rand(B, min(8192, T - t0), sum(w))
    x, b, c = packed.split(w, -1)
    t = {"x": x.unflatten(-1, (H, P)), "dt": rand(B, T, H) - 4, "A": -16 * torch.rand(H, generator=g, device=device()),
         "B": b.unflatten(-1, (G, N)), "C": c.unflatten(-1, (G, N)), "D": rand(H), "dt_bias": rand(H)}
    t = {k: v.detach().requires_grad_(grad) for k, v in t.items()}
    dy = rand(*t["x"].shape).bfloat16() if grad else None
    return t, dy


FIXED = {"z": None, "dt_softplus": True, "dt_limit": None, "state": None, "starts": None, "padding": None}


def both(module, t, dy):
    y, last = module.ssd(**t, **FIXED)
    return (y, last, *torch.autograd.grad(y, list(t.values()), dy))


def with_tiles(name):
    import tamba.ops.kernels.tiles as tiles
    return tiles.using(VARIANTS[name][1])


def compile_one(name, shape_name, tiny):
    """In a process of its own: fills Triton's cache, and shows a kernel that fails where it harms nobody."""
    global TINY
    TINY = tiny
    began = time.time()
    setup()
    try:
        module = load(name)
        shape = {**SHAPES, **ERRORS}[shape_name]
        with with_tiles(name):
            t, dy = case(shape, length=200)
            both(module, t, dy)
            if not tiny:
                torch.cuda.synchronize()
        return name, shape_name, None, time.time() - began
    except Exception:
        return name, shape_name, traceback.format_exc()[-1500:], time.time() - began


def capture(fn):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fn(); fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = fn()
    return graph, kept


def timed(runs, repeats):
    """Median microseconds by name; one replay of each in turn. With what came of the capture."""
    if TINY:
        out = {}
        for n, f in runs.items():
            a = time.time(); f(); out[n] = (time.time() - a) * 1e6
        return out
    graphs, found = {}, {n: [] for n in runs}
    for n, f in runs.items():
        try:
            graphs[n] = capture(f)
        except Exception as e:
            print("capture failed", n, repr(e)[:200])
    for i in range(repeats + 2):
        for n, (graph, _) in graphs.items():
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); graph.replay(); b.record(); b.synchronize()
            if i >= 2:
                found[n].append(a.elapsed_time(b) * 1000)
    out = {n: round(statistics.median(v), 1) for n, v in found.items() if v}
    del graphs
    torch.cuda.empty_cache()
    return out


def kernels(module, t, dy):
    from torch.profiler import ProfilerActivity, profile
    both(module, t, dy); torch.cuda.synchronize()
    count = 4
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(count):
            both(module, t, dy)
        torch.cuda.synchronize()
    path = Path(tempfile.gettempdir()) / f"trace{os.getpid()}.json"
    prof.export_chrome_trace(str(path))
    sums = {}
    events = json.loads(path.read_text())["traceEvents"]
    mine = [e for e in events if e.get("cat") == "kernel"]
    for e in sorted(mine, key=lambda e: e["ts"]):
        key = e["name"][:40].replace("_kernel", "").strip("_")
        if key in ("states", "segments", "scan", "grads"):
            key += f" {e['args']['grid'][0]}"
        a = sums.setdefault(key, [0.0, 0])
        a[0] += e["dur"] / count
        a[1] += 1 / count
    span = 0
    return {k: [round(v[0], 1), round(v[1], 2)] for k, v in sums.items()}


def relative(a, b):
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def main():
    global TINY
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=20)
    asked = parser.parse_args()
    TINY = asked.tiny
    names = [n for n in VARIANTS if not asked.only or n in asked.only.split(",")]
    if asked.only and len(names) != len(asked.only.split(",")):
        sys.exit(f"--only knows {list(VARIANTS)}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    left = lambda: asked.limit - 8 - (time.time() - START)
    record = {"variants": VARIANTS, "failed": {}, "us": {}, "kernels": {}, "memory": {}, "errors": {}, "repeat": {}, "seconds": {}}

    def save(stage):
        record["seconds"][stage] = round(time.time() - START, 1)
        asked.out.write_text(json.dumps(record, indent=1))

    # What differs in numbers of programs or slices alone needs no compiling of its own.
    distinct = {}
    for n in names:
        file, sizes = VARIANTS[n]
        bare = {k: {a: b for a, b in v.items() if a not in ("states", "per_sm")} for k, v in sizes.items()}
        for known in [k for k in bare if k == GRADS and bare[k] == {a: b for a, b in P64.items() if a not in ("states", "per_sm")}]:
            del bare[known]
        for known in [k for k in bare if k == STATES and bare[k] == {a: b for a, b in ST.items() if a != "per_sm"}]:
            del bare[known]
        distinct.setdefault((file, str(bare)), n)
    files = {VARIANTS[n][0]: n for n in reversed(names)}
    wanted = [(n, "S1") for n in distinct.values()] + [(n, s) for s in ("S3", "H9 G9 N64 P64") for n in files.values()]
    print("compiles", wanted, flush=True)
    if TINY:
        SHAPES.update(S1=(1, 70, 3, 16, 16, 1), S2=(2, 40, 3, 16, 16, 1), S3=(1, 40, 2, 16, 16, 2), S4=(1, 90, 3, 16, 16, 1))
        ERRORS.clear(); ERRORS.update(tiny=(1, 40, 3, 16, 16, 1))
        wanted = []
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_one, n, s, TINY) for n, s in wanted]
        for job in as_completed(jobs):
            try:
                n, s, error, seconds = job.result()
            except Exception as e:
                print("a process died:", repr(e)[:200]); continue
            if error:
                record["failed"][f"{n} {s}"] = error
                print(f"FAILED {n} {s}: {error.strip().splitlines()[-1][:200]}", flush=True)
    save("compile")
    setup()
    if not TINY:
        record["gpu"] = torch.cuda.get_device_name()
        record["torch"] = torch.__version__
    bad = {k.split(" ", 1)[0] for k in record["failed"]}
    names = [n for n in names if n not in bad]
    modules = {n: load(n) for n in names}

    def run(n, t, dy):
        with with_tiles(n):
            if dy is None:
                with torch.no_grad():
                    return modules[n].ssd(**t, **FIXED)
            return both(modules[n], t, dy)

    # errors and repeatability
    for label, shape in ERRORS.items():
        t, dy = case(shape, seed=1)
        os.environ["TAMBA_KERNELS"] = "torch"
        from tamba.ops import ssd
        exact = {k: v.detach().double().requires_grad_() for k, v in t.items()}
        y, last = ssd(**exact, dt_softplus=True)
        want = (y, last, *torch.autograd.grad(y, list(exact.values()), dy.double()))
        want = [w.detach() for w in want]
        os.environ["TAMBA_KERNELS"] = "triton"
        for n in names:
            try:
                got, again = run(n, t, dy), run(n, t, dy)
                record["errors"].setdefault(n, {})[label] = {
                    k: float(f"{relative(g.detach(), w):.2e}")
                    for k, g, w in zip(("y", "last", *("d_" + k for k in t)), got, want)}
                record["repeat"].setdefault(n, {})[label] = all(torch.equal(a, b) for a, b in zip(got, again))
            except Exception:
                record["failed"][f"{n} {label}"] = traceback.format_exc()[-1500:]
                print("FAILED", n, label, record["failed"][f"{n} {label}"].strip().splitlines()[-1][:200])
        del exact, want
    save("errors")
    wrong = {n for n, e in record["errors"].items() for m in e.values()
             if not all(v < 0.02 for k, v in m.items() if k not in ("d_A", "d_dt_bias"))}
    print("wrong results:", wrong or "none", flush=True)

    # S1 first in full, then the rest
    plan = [("S1", True), ("S1", False), ("S2", True), ("S2", False), ("S3", False), ("S3", True), ("S4", False)]
    for shape, backward in plan:
        if left() < 6:
            print("no time for", shape, backward); continue
        t, dy = case(SHAPES[shape], grad=backward)
        inputs = sum(v.numel() * v.element_size() for v in t.values())
        row = f"{shape} {'both' if backward else 'forward'}"
        record["us"][row] = timed({n: (lambda n=n: run(n, t, dy)) for n in names}, asked.repeats)
        if backward and not TINY:
            for n in names:
                try:
                    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    got = run(n, t, dy)
                    torch.cuda.synchronize()
                    made = torch.cuda.memory_allocated() - before
                    extra = torch.cuda.max_memory_allocated() - before - made
                    record["memory"].setdefault(n, {})[shape] = round(extra / inputs, 3)
                    a = [g.detach().clone() for g in got]; del got
                    b = run(n, t, dy)
                    record["repeat"].setdefault(n, {})[shape] = all(torch.equal(p, q) for p, q in zip(a, b))
                    del a, b
                    if shape == "S1" and left() > 10:
                        with with_tiles(n):
                            record["kernels"][n] = kernels(modules[n], t, dy)
                except Exception:
                    record["failed"][f"{n} {row}"] = traceback.format_exc()[-1500:]
                    print("FAILED", n, row, record["failed"][f"{n} {row}"].strip().splitlines()[-1][:200])
        save(row)
        del t, dy
        if not TINY:
            torch.cuda.empty_cache()
    rows = list(record["us"])
    print(f"{'variant':22}" + "".join(f"{r:>12}" for r in rows) + "  mem S1/S2/S3      repeat")
    for n in names:
        m = record["memory"].get(n, {})
        print(f"{n:22}" + "".join(f"{record['us'][r].get(n, float('nan')):12.1f}" for r in rows)
              + "  " + "/".join(str(v) for v in m.values()) + "  " + str(all(record["repeat"].get(n, {}).values())))
    for n, k in record["kernels"].items():
        print(f"{n:22}", " | ".join(f"{a} {v[0]}" + (f" x{v[1]:g}" if v[1] != 1 else "") for a, v in k.items() if v[0] >= 3))
    for label in ERRORS:
        for n in names:
            e = record["errors"].get(n, {}).get(label)
            if e:
                print(f"{label:18} {n:22}", " ".join(f"{k} {v:.1e}" for k, v in e.items()))
    save("end")
    print("seconds", record["seconds"])


if __name__ == "__main__":
    main()
