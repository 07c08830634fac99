"""The Triton loss on this GPU: every variant against float64, then what sizes are fastest.

    python benchmarks/loss_kernels.py --out benchmarks/results/loss-kernels-h100.json

Variants are compiled by several processes first. The truth is the plain-torch path in float64 on
the logits that the kernel was given, which the tests hold to the definition. Timed are candidates
for the tile table and for the slices, at 8,192 positions of 4,096 numbers and 128,256 words.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamba.artefact import command_without_folders
from tamba.ops import losses
from tamba.ops.kernels import losses as kernels
from tamba.ops.kernels.tiles import tile, using
from tamba.ops.losses import Top, Weights, next_token_loss

# The last is no multiple of anything.
WORDS = (49_152, 128_256, 50_277)
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-3}
SIZES = [
    {"block": block, "warps": warps, "stages": stages}
    for block, warps, stages in (
        (4096, 16, 1),
        (4096, 16, 3),
        (2048, 8, 1),
        (2048, 8, 3),
        (4096, 8, 1),
        (4096, 8, 2),
        (8192, 16, 1),
        (8192, 32, 1),
        (8192, 32, 2),
    )
]
# Rows of the student's logits, and of the teacher's, that exist at once.
SLICES = [(1024, 256), (1024, 512), (896, 448), (768, 384), (768, 768), (512, 512), (2048, 1024)]


def cases() -> Iterator[dict[str, Any]]:
    """Every divergence, dense and by its most likely tokens, warm and not; words in turn."""
    parts = [(1.0, 0.0), (0.5, 2.0)]
    turn = 0
    for dtype, divergence, top_k, temperature, (kl, ce) in itertools.product(
        BOUNDS, ("forward", "reverse", "js"), (None, 64), (1.0, 2.0), parts
    ):
        given = Weights(kl, ce, temperature, divergence, 0.3, top_k)  # type: ignore[arg-type]
        for words in WORDS if temperature == 1 and ce else (WORDS[turn % 3],):
            turn += 1
            yield {"dtype": dtype, "V": words, "weights": given}
    for words in WORDS:
        yield {"dtype": "bfloat16", "V": words, "weights": Weights(0.0, 1.0)}


def logits_of(case: dict[str, Any], n: int, seed: int) -> dict[str, Any]:
    """Logits of n rows as products leave them: rows apart by more than V."""
    random = torch.Generator("cuda").manual_seed(seed)
    dtype, words = getattr(torch, case["dtype"]), case["V"]

    def draw() -> Tensor:
        room = torch.full((n, -(-words // 64) * 64), torch.nan, dtype=dtype, device="cuda")
        room[:, :words] = 3 * torch.randn((n, words), generator=random, device="cuda")
        return room[:, :words]

    targets = torch.randint(words, (n,), generator=random, device="cuda")
    return {"student": draw(), "teacher": draw(), "targets": targets}


def checked(case: dict[str, Any], n: int = 24, seed: int = 0) -> dict[str, Any]:
    """Relative RMS error of losses and of gradients of one case."""
    w: Weights = case["weights"]
    given = logits_of(case, n, seed)
    exact = [given[name].double() for name in ("student", "teacher")]
    targets = given["targets"] if w.ce else None
    found = torch.full((n,), torch.nan, device="cuda")
    want = found.double()
    errors, top = {}, None
    teachers: list[Tensor | None] = [exact[1], given["teacher"]]
    if w.top_k is not None:
        # Which of equal logits are the k-th is open: both sides take the same.
        top = losses._top_of(exact[1], w.top_k, w.temperature, torch.float64, False)
        rest = kernels.rest(given["teacher"], top.indices, w.temperature)
        errors["rest"] = _error(rest, top.log_rest)
    if top is not None or not w.kl:
        teachers = [None, None]
    losses._by_torch(exact[0], teachers[0], top, targets, want, 0, w, True)
    if top is not None:
        top = Top(top.indices.int(), top.log_probs.float(), top.log_rest.float())
    losses._by_kernel(given["student"], teachers[1], top, targets, found, 0, w, True)
    errors |= {"loss": _error(found, want), "gradient": _error(given["student"], exact[0])}
    bound = BOUNDS[case["dtype"]]
    fine = max(errors["loss"], errors.get("rest", 0.0)) < 1e-5 and errors["gradient"] < bound
    return {**case, "weights": str(w), **errors, "bound": bound, "fine": fine}


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def arguments(d: int, words: int, n: int = 8192) -> dict[str, Tensor]:
    """Of a whole loss in bfloat16."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16()

    return {
        "hidden": draw(n, d).requires_grad_(),
        "head": draw(words, d) * 2.5 * d**-0.5,
        "teacher_hidden": draw(n, d),
        "teacher_head": draw(words, d) * 2.5 * d**-0.5,
    }


def milliseconds(run: Any, repeats: int = 5) -> float:
    """Median over some runs, by events, after one that does not count."""
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))[repeats // 2]


def loss_and_gradient(given: dict[str, Tensor], w: Weights) -> Any:
    def run() -> None:
        torch.autograd.grad(next_token_loss(**given, weights=w), given["hidden"])

    return run


def products(given: dict[str, Tensor]) -> float:
    """The floor: three products in one call each."""
    hidden, head = given["hidden"].detach(), given["head"]
    logits, teacher = hidden @ head.mT, hidden @ head.mT
    grad = torch.empty_like(hidden)

    def run() -> None:
        torch.mm(given["teacher_hidden"], given["teacher_head"].mT, out=teacher)
        torch.mm(hidden, head.mT, out=logits)
        torch.mm(logits, head, out=grad)

    return milliseconds(run)


def timed(report: Any) -> dict[str, Any]:
    """Candidates for tiles at the loss alone, then slices for the whole, and their memory."""
    found: dict[str, Any] = {"tiles": [], "slices": []}
    for what, w in (("loss_dense", Weights()), ("loss_top", Weights(top_k=64))):
        case = {"dtype": "bfloat16", "V": 128_256, "weights": w}
        given = logits_of(case, 512, 1)
        top = None
        if w.top_k is not None:
            top = _stored(512, w.top_k)
        row_losses = torch.empty(512, device="cuda")
        for sizes in SIZES:
            with using({what: sizes}):
                try:
                    ms = milliseconds(
                        lambda g=given, t=top, w=w, out=row_losses: losses._by_kernel(
                            g["student"], None if t else g["teacher"], t, None, out, 0, w, True
                        ),
                        9,
                    )
                except Exception as error:
                    ms = f"{type(error).__name__}: {str(error)[:80]}"
            found["tiles"].append({"kernel": what, **sizes, "ms_of_512_rows": ms})
            report(found["tiles"][-1])
    torch.cuda.empty_cache()
    given = arguments(4096, 128_256)
    floor = products(given)
    best = min(
        (t for t in found["tiles"] if t["kernel"] == "loss_dense"),
        key=lambda t: t["ms_of_512_rows"] if isinstance(t["ms_of_512_rows"], float) else 1e9,
    )
    with using({"loss_dense": {name: best[name] for name in ("block", "warps", "stages")}}):
        for ours, other in SLICES:
            each = 128_256 * 2
            losses._STUDENT_BYTES, losses._TEACHER_BYTES = ours * each, other * each
            run = loss_and_gradient(given, Weights())
            run()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
            ms = milliseconds(run)
            line = {"rows": (ours, other), "ms": ms, "floor_ms": floor, "over": ms / floor}
            found["slices"].append({**line, "peak_mib": extra})
            report(found["slices"][-1])
    return found


def _stored(n: int, k: int) -> Top:
    index = torch.stack([torch.randperm(128_256, device="cuda")[:k] for _ in range(n)]).int()
    return Top(index, torch.randn(n, k, device="cuda"), torch.zeros(n, device="cuda"))


def _compile(part: int, parts: int) -> None:
    """One process's share of what the others will find in Triton's cache."""
    torch.cuda.set_per_process_memory_fraction(1.0 / parts)
    for case in list(cases())[part::parts]:
        checked(case, n=1)
    for index, sizes in enumerate(SIZES):
        if index % parts != part:
            continue
        given = logits_of({"dtype": "bfloat16", "V": 128_256}, 1, 0)
        with using({"loss_dense": sizes, "loss_top": sizes}):
            for w in (Weights(), Weights(top_k=64)):
                out = torch.empty(1, device="cuda")
                losses._by_kernel(given["student"], given["teacher"], None, None, out, 0, w, True)
    torch.cuda.synchronize()


def main() -> int:
    arguments_ = argparse.ArgumentParser(description=__doc__)
    arguments_.add_argument("--out", type=Path, required=True)
    arguments_.add_argument("--seconds", type=float, default=45)
    arguments_.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    options = arguments_.parse_args()
    begun = time.monotonic()
    command = command_without_folders("python benchmarks/loss_kernels.py", sys.argv[1:])
    record: dict[str, Any] = {"command": command, "torch": torch.__version__}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        shares = [pool.submit(_compile, i, options.processes) for i in range(options.processes)]
        for share in shares:
            if share.exception() is not None:
                print("compiling:", repr(share.exception())[:300], flush=True)
    record["compiled_after"] = time.monotonic() - begun
    record["device"] = torch.cuda.get_device_name()
    record["cases"] = []
    for seed, case in enumerate(cases()):
        if time.monotonic() - begun > 0.6 * options.seconds:
            record["cut_short"] = True
            break
        record["cases"].append(checked(case, seed=seed))
    record["checked_after"] = time.monotonic() - begun
    bad = [c for c in record["cases"] if not c["fine"]]
    print(f"{len(record['cases'])} cases, {len(bad)} bad", *bad, sep="\n", flush=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    if time.monotonic() - begun < options.seconds:
        record |= timed(lambda line: print(line, flush=True))
    record["seconds"] = time.monotonic() - begun
    record["tile"] = dict(tile("loss_dense", device=torch.device("cuda")))
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"compiled after {record['compiled_after']:.1f} s, all after {record['seconds']:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
