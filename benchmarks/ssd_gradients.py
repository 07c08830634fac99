"""Every output and gradient of the SSD kernels on this GPU against float64, as a table in JSON.

    python benchmarks/ssd_gradients.py --out benchmarks/results/ssd-gradients-h100.json

The truth is the plain-torch operator in float64, which the tests hold against the recurrence. Fresh
memory is NaN, so that what a kernel leaves unwritten shows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamba.artefact import command_without_folders
from tamba.ops import ssd

SIZES = (16, 32, 64, 128)
LENGTHS = (1, 63, 500, 1000, 4097)
HEADS = 4
# Added to dt before softplus: steps near 0.02 as trained models have them, tiny, large, huge.
SHIFTS = (-4.0, -30.0, 1.0, 100.0)
BOUNDS = {"bfloat16": 5e-3, "float32": 1e-5}
# Sums over all tokens of terms that cancel, so that the terms' rounding says little about them.
SUMS = ("d_A", "d_dt_bias", "d_D")


def cases(lengths_each: int, few_sizes: bool = False) -> Iterator[dict[str, Any]]:
    """All sizes, groups and dtypes, each with some of the lengths and steps in turn."""
    turn = 0
    for dtype, n, p in product(BOUNDS, SIZES, SIZES):
        if few_sizes and (n, p) not in ((16, 16), (32, 128), (64, 64), (128, 64), (128, 128)):
            continue
        for groups, _ in product((1, 2, HEADS), range(lengths_each)):
            turn += 1
            yield {
                **{"dtype": dtype, "N": n, "P": p, "G": groups},
                "T": LENGTHS[turn % len(LENGTHS)],
                "dt": SHIFTS[turn // 2 % len(SHIFTS)],
            }


def arguments(case: dict[str, Any], seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, as views of one projection where they would be, and the rest."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, length, n, p, groups = 2, case["T"], case["N"], case["P"], case["G"]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    dtype = getattr(torch, case["dtype"])
    widths = [HEADS * p, HEADS * p, groups * n, groups * n]
    x, z, B, C = random(batch, length, sum(widths)).to(dtype).split(widths, dim=-1)
    tensors = {
        "x": x.unflatten(-1, (HEADS, p)),
        "dt": random(batch, length, HEADS) + case["dt"],
        "A": -16 * torch.rand(HEADS, generator=generator, device="cuda"),
        "B": B.unflatten(-1, (groups, n)),
        "C": C.unflatten(-1, (groups, n)),
        "D": random(HEADS),
        "z": z.unflatten(-1, (HEADS, p)),
        "dt_bias": random(HEADS),
        "state": random(batch, HEADS, p, n),
    }
    starts = torch.rand(batch, length, generator=generator, device="cuda") < 0.01
    padding = torch.tensor([0, length // 3], device="cuda")
    return tensors, {"starts": starts, "padding": padding, "dt_softplus": True}


def measure(case: dict[str, Any], seed: int = 0, ours: str = "triton") -> dict[str, float]:
    """RMS of the error over RMS of the truth, by name; d_ for gradients."""
    tensors, options = arguments(case, seed)
    real = torch.arange(case["T"], device="cuda") >= options["padding"][:, None]
    generator = torch.Generator("cuda").manual_seed(seed + 1)
    weights: list[Tensor] = []
    results = []
    for kernels, dtype in ((ours, None), ("torch", torch.float64)):
        os.environ["TAMBA_KERNELS"] = kernels
        leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_() for k, t in tensors.items()}
        y, last = ssd(**leaves, **options)
        if not weights:
            weights = [
                torch.randn(t.shape, generator=generator, device="cuda").to(t.dtype)
                for t in (y, last)
            ]
            weights[0] *= real[..., None, None]
        grads = torch.autograd.grad(
            [y, last], list(leaves.values()), [w.to(dtype or w.dtype) for w in weights]
        )
        named = dict(zip((f"d_{k}" for k in leaves), grads, strict=True))
        results.append({"y": y[real], "state": last, **named})
    got, want = results
    return {
        k: float(((got[k] - want[k]).norm() / want[k].norm().clamp_min(1e-30)).detach())
        for k in got
    }


def _rows(todo: list[tuple[int, dict[str, Any]]], until: float, ours: str) -> list[dict[str, Any]]:
    """Cases with their errors; a case's number is its seed. None is begun after `until`."""
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows = []
    for seed, case in todo:
        if time.time() > until:
            break
        rows.append({**case, "errors": measure(case, seed, ours)})
    return rows


def _record(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    def over(row: dict[str, Any]) -> dict[str, float]:
        bound = BOUNDS[row["dtype"]]
        return {k: e for k, e in row["errors"].items() if not e <= bound and k not in SUMS}

    import triton

    short = [
        {**row, "errors": {k: float(f"{e:.2g}") for k, e in row["errors"].items()}} for row in rows
    ]
    return {
        "command": command_without_folders("python benchmarks/ssd_gradients.py", sys.argv[1:]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "bounds": BOUNDS,
        "sums_reported_not_bounded": SUMS,
        "cases": f"{len(rows)} of {count}",
        "over_bounds": [
            {**{k: v for k, v in row.items() if k != "errors"}, **over(row)}
            for row in rows
            if over(row)
        ],
        "worst": {
            dtype: {
                k: max(row["errors"][k] for row in short if row["dtype"] == dtype)
                for k in rows[0]["errors"]
            }
            for dtype in BOUNDS
            if any(row["dtype"] == dtype for row in rows)
        },
        "rows": short,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="written as rows come")
    parser.add_argument("--lengths", type=int, default=5, help="lengths for each size and group")
    parser.add_argument("--few-sizes", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later")
    parser.add_argument("--workers", type=int, default=1, help="processes to compile and run with")
    parser.add_argument("--kernels", choices=["triton", "gluon"], default="triton")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to compare kernels on")
    until = time.time() + asked.seconds
    todo = list(enumerate(cases(asked.lengths, asked.few_sizes)))
    # What is compiled together; groups of one head have kernels of their own.
    variants: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
    for seed, case in todo:
        variant = case["dtype"], case["N"], case["P"], case["G"] == HEADS
        variants.setdefault(variant, []).append((seed, case))
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        # float32 first: it takes longest.
        running = [
            pool.submit(_rows, some, until, asked.kernels) for some in reversed(variants.values())
        ]
        for finished in as_completed(running):
            found += finished.result()
            if found:
                asked.out.write_text(
                    json.dumps(_record(found, len(todo))).replace('{"dtype"', '\n{"dtype"') + "\n"
                )
    if not found:
        sys.exit("no case was begun in time")
    record = _record(found, len(todo))
    failed = record["over_bounds"]
    print(f"{record['cases']} cases, {len(failed)} over bounds; worst {record['worst']}")
    for one in failed[:10]:
        print("over:", one)


if __name__ == "__main__":
    main()
