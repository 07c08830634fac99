"""python m.py LIMIT: SSD in Gluon beside Triton: errors, repeatability, times, kernels. JSON to $OUT/gluon.json."""
import json, os, statistics, sys, time, traceback
T0 = time.time(); LIMIT = float(sys.argv[1]); TINY = "tiny" in sys.argv
import torch
from tamba.ops import ssd
SHAPES = {"S1": (1, 8192, 80, 64, 128, 1), "S2": (8, 2048, 80, 64, 128, 1), "S3": (1, 8192, 32, 128, 128, 32), "H9": (32, 1024, 9, 64, 64, 9), "S4": (1, 131072, 80, 64, 128, 1)}
DEV = "cuda"
def use(what): os.environ["TAMBA_KERNELS"] = what
def case(shape, length=None, seed=0, starts=False, dt=-4.0, gate=False, state=False):
    B, T, H, P, N, G = shape; T = length or T
    g = torch.Generator(DEV).manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, device=DEV)
    w = [H * P, G * N, G * N]
    packed = torch.empty(B, T, sum(w), dtype=torch.bfloat16, device=DEV)
    for t0 in range(0, T, 8192): packed[:, t0:t0 + 8192] = r(B, min(8192, T - t0), sum(w))
    x, b, c = packed.split(w, -1)
    t = {"x": x.unflatten(-1, (H, P)), "dt": r(B, T, H) + dt, "A": -16 * torch.rand(H, generator=g, device=DEV), "B": b.unflatten(-1, (G, N)), "C": c.unflatten(-1, (G, N)), "D": r(H), "dt_bias": r(H)}
    if gate: t["z"] = r(B, T, H, P).bfloat16()
    if state: t["state"] = r(B, H, P, N)
    t = {k: v.detach().requires_grad_() for k, v in t.items()}
    masks = {"starts": torch.rand(B, T, generator=g, device=DEV) < 0.01} if starts else {}
    return t, masks, r(B, T, H, P).bfloat16()
def run(t, masks, dy):
    y, last = ssd(**t, **masks, dt_softplus=True)
    if dy is None: return [y, last]
    return [y, last, *torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))]
rel = lambda a, b: float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
CASES = {"T1000 H80": dict(shape=(1, 1000, 80, 64, 128, 1)), "starts H9 G9 N64": dict(shape=(2, 4097, 9, 64, 64, 9), starts=True), "H8 G8 N128 state": dict(shape=(1, 1000, 8, 64, 128, 8), state=True),
 "P128": dict(shape=(1, 1000, 32, 128, 128, 32), starts=True), "big dt": dict(shape=(1, 500, 8, 64, 128, 2), dt=3.0), "T1": dict(shape=(3, 1, 8, 64, 128, 2)), "T63 gate": dict(shape=(3, 63, 8, 64, 128, 2), gate=True), "N64 G1 gate": dict(shape=(2, 700, 12, 64, 64, 1), gate=True, starts=True)}
out = {"errors": {}, "us": {}, "kernels": {}, "failed": {}}
if TINY: DEV = "cpu"; CASES = {}; SHAPES = {}
def save():
    if os.environ.get("OUT"): json.dump(out, open(os.environ["OUT"] + "/gluon.json", "w"), indent=1)
for name, c in CASES.items():
    t, masks, dy = case(**c)
    names = ["y", "last", *("d_" + k for k in t)]
    use("torch"); exact = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    want = [w.detach() for w in run(exact, masks, dy)]
    for which in ("triton", "gluon"):
        try:
            use(which); got, again = run(t, masks, dy), run(t, masks, dy)
            torch.cuda.synchronize()
            e = {n: rel(a.detach(), b) for n, a, b in zip(names, got, want)}
            same = all(torch.equal(a, b) for a, b in zip(got, again))
            out["errors"][f"{name} {which}"] = {**e, "repeat": same}
            print(f"{name:18} {which:7}", " ".join(f"{k} {v:.1e}" for k, v in e.items()), "repeat", same, flush=True)
        except Exception as error:
            out["failed"][f"{name} {which}"] = traceback.format_exc()[-1500:]
            print(name, which, "FAILED", repr(error)[:300], flush=True)
            if "CUDA" in repr(error): save(); sys.exit(1)
    save()
    if time.time() - T0 > LIMIT - 10: break
def kernels(f):
    from torch.profiler import ProfilerActivity, profile
    f(); torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(4): f()
        torch.cuda.synchronize()
    return {e.key[:34]: [round(e.device_time_total / 4, 1), e.count / 4] for e in prof.key_averages() if e.device_time_total > 8}
for name, shape in SHAPES.items():
    for backward in ((True, False) if name != "S4" else (False,)):
        if time.time() - T0 > LIMIT - 8: print("no time for", name); break
        t, masks, dy = case(shape)
        graphs = {}
        for which in ("triton", "gluon"):
            use(which)
            def f():
                if backward: return run(t, masks, dy)
                with torch.no_grad(): return run(t, masks, None)
            try:
                f(); f(); torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
                got = f(); torch.cuda.synchronize()
                extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(); del got
                inputs = sum(v.numel() * v.element_size() for v in t.values())
                s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(s): f()
                torch.cuda.current_stream().wait_stream(s)
                g = torch.cuda.CUDAGraph()
                with torch.cuda.graph(g): keep = f()
                graphs[which] = (g, keep)
                out["us"].setdefault(f"{name} {'both' if backward else 'forward'}", {})[which + " memory"] = round(extra / inputs, 3)
                if backward or name == "S4": out["kernels"][f"{name} {which}"] = kernels(f)
            except Exception as error:
                out["failed"][f"{name} {which}"] = traceback.format_exc()[-1500:]; print(name, which, "FAILED", repr(error)[:300], flush=True)
        times = {k: [] for k in graphs}
        for i in range(23):
            for k, (g, _) in graphs.items():
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record(); g.replay(); b.record(); b.synchronize(); times[k].append(a.elapsed_time(b) * 1000)
        row = out["us"][f"{name} {'both' if backward else 'forward'}"]
        row.update({k: round(statistics.median(v[3:]), 1) for k, v in times.items()})
        print(name, "both" if backward else "forward", row, flush=True)
        for k in ("triton", "gluon"):
            if f"{name} {k}" in out["kernels"] and backward: print("   ", k, out["kernels"][f"{name} {k}"], flush=True)
        del graphs, t, dy; save(); torch.cuda.empty_cache()
# where the angles' time goes
try:
    use("triton")
    from tamba.ops.directions import compare
    states = [torch.randn(64, 512, 576, device="cuda").bfloat16() for _ in range(31)]
    counts = torch.ones(64, 512, dtype=torch.bool, device="cuda")
    out["kernels"]["compare"] = kernels(lambda: compare(states, counts)); print("compare", out["kernels"]["compare"])
except Exception as error: print("compare FAILED", repr(error)[:300])
save(); print("seconds", round(time.time() - T0, 1))
