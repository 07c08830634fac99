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
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def measure(case: dict[str, Any], seed: int = 0) -> dict[str, float]:
    """RMS of the error over RMS of the truth, by name; d_ for gradients."""
    tensors, options = arguments(case, seed)
    real = torch.arange(case["T"], device="cuda") >= options["padding"][:, None]
    generator = torch.Generator("cuda").manual_seed(seed + 1)
    weights: list[Tensor] = []
    results = []
    for kernels, dtype in (("triton", None), ("torch", torch.float64)):
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


def _compile(case: dict[str, Any]) -> None:
    measure({**case, "T": 500})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, default=5, help="lengths for each size and group")
    parser.add_argument("--few-sizes", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--workers", type=int, default=1, help="processes to compile with")
    asked = parser.parse_args()
    begun = time.monotonic()
    todo = list(cases(asked.lengths, asked.few_sizes))
    variants = list({(c["dtype"], c["N"], c["P"]): c for c in todo}.values())
    if asked.workers > 1:
        # float32 first: it takes longest.
        with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(_compile, reversed(variants)))
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows, failed = [], []
    for i, case in enumerate(todo):
        if time.monotonic() - begun > asked.seconds:
            break
        errors = measure(case, seed=i)
        bound = BOUNDS[case["dtype"]]
        over = [k for k, e in errors.items() if not e <= bound and k not in SUMS]
        rows.append({**case, "errors": {k: float(f"{e:.2g}") for k, e in errors.items()}})
        if over:
            failed.append({**case, **{k: errors[k] for k in over}})
    worst = {
        dtype: {
            k: max((r["errors"][k] for r in rows if r["dtype"] == dtype), default=None)
            for k in rows[0]["errors"]
        }
        for dtype in BOUNDS
    }
    import triton

    asked.out.write_text(
        json.dumps(
            {
                "command": "python benchmarks/ssd_gradients.py " + " ".join(sys.argv[1:]),
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "bounds": BOUNDS,
                "sums_reported_not_bounded": SUMS,
                "cases": f"{len(rows)} of {len(todo)}",
                "over_bounds": failed,
                "worst": worst,
                "rows": rows,
            }
        ).replace('{"dtype"', '\n{"dtype"')
        + "\n"
    )
    print(f"{len(rows)} of {len(todo)} cases, {len(failed)} over bounds; worst {worst}")
    for one in failed[:10]:
        print("over:", one)


if __name__ == "__main__":
    main()
