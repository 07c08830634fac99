"""What scoring every pair of layers costs beside reading the text at all.

    python benchmarks/analyze_overhead.py MODEL --out benchmarks/results/analyze-overhead.json

Row `analyze_overhead`: the model reads rows of text, plainly (forward pass with logits, and without
the head) and with all scores of hidden states (`tamba.analyze.state_scores`: both angular
distances of every pair of layers, block influence, kernel similarity). Sides take turns on the same
rows, in an order that flips every round; the overhead is the median over rounds of the ratio of
neighbours, less one. On a CPU seconds are those that the process computed, not those that it waited
for others, so run it with one thread. The bar is 15 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch

import tamba
from tamba.analyze import state_scores
from tamba.data import TokenBlocks, read_texts
from tamba.model.modeling import TambaForCausalLM
from tamba.trace import computing

BAR = 0.15


def sides(
    model: TambaForCausalLM, blocks: TokenBlocks, dtype: torch.dtype | None, batch_size: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    def plain(head: bool) -> None:
        with computing(model, dtype):
            for batch in blocks.batches(batch_size):
                inputs = batch.to(model.device).inputs
                (model if head else model.model)(**inputs, use_cache=False)
        wait(model)

    def scored() -> None:
        state_scores(model, blocks, batch_size=batch_size, dtype=dtype)
        wait(model)

    return {"forward": lambda: plain(True), "without head": lambda: plain(False), "scored": scored}


def wait(model: TambaForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default=None, help="of matrix products, e.g. bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()

    model, tokenizer = tamba.load(arguments.model, device=arguments.device)
    n = arguments.rows * arguments.length
    texts = read_texts("python-docs", max_bytes=16 * n)
    blocks = TokenBlocks.from_texts(texts, tokenizer, arguments.length, max_tokens=n)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    timed = sides(model, blocks, dtype, arguments.batch)
    for run in timed.values():
        run()
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(arguments.rounds):
        for name in list(timed)[:: 1 if turn % 2 else -1]:
            begun = clock()
            timed[name]()
            seconds[name].append(clock() - begun)
    overhead = {}
    for name in ("forward", "without head"):
        ratios = [s / p - 1 for s, p in zip(seconds["scored"], seconds[name], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        overhead[name] = {"median": median(ratios), "quartiles": [low, high]}
    record = {
        "row": "analyze_overhead",
        "model": Path(arguments.model).name,
        "layers": model.config.num_hidden_layers,
        "d_model": model.config.hidden_size,
        "dtype": arguments.dtype or str(model.dtype).removeprefix("torch."),
        "rows": arguments.rows,
        "length": arguments.length,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "clock": clock.__name__,
        "seconds": {name: median(times) for name, times in seconds.items()},
        "overhead_over": overhead,
        "bar": BAR,
        "held": all(found["median"] <= BAR for found in overhead.values()),
        "machine": machine(arguments.device),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(record, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
