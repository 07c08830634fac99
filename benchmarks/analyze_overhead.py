"""What scoring every pair of layers costs beside reading the text at all.

    python benchmarks/analyze_overhead.py MODEL --out benchmarks/results/analyze-overhead.json
    python benchmarks/analyze_overhead.py random:smollm2-135m random:llama-1b --out ...

Row `analyze_overhead`: a model reads rows of text, plainly (forward pass with logits, and without
the head) and with all scores of hidden states (`tamba.analyze.state_scores`: both angular
distances of every pair of layers, block influence, kernel similarity). Sides take turns on the same
rows, in an order that flips every round; the overhead is the median over rounds of the ratio of
neighbours, less one. On a CPU seconds are those that the process computed, not those that it waited
for others, so run it with one thread. The bar is 15 %. `angle_error` is the largest difference
of a mean angle of one row from the same states compared in float64, in half turns.

`--dtype` computes matrix products in another type than the weights have, as that of the verb does;
`--weights` opens the checkpoint in a type, as one that was stored so.

A random model has the shape that it is named after. What a score costs depends on weights only
where states nearly agree; random layers of these shapes turn the stream as far as trained ones do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch

import tamba
from tamba.analyze.distances import _batch_size, counted, state_scores
from tamba.data import TokenBlocks, read_texts
from tamba.errors import UserError
from tamba.model.config import AttentionSpec, BlockSpec, MLPSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.trace import computing

BAR = 0.15
TYPES = ("float32", "bfloat16", "float16")
SHAPES = {
    # d_model, layers, heads, heads of keys and values, width of the MLP, vocabulary
    "smollm2-135m": (576, 30, 9, 3, 1536, 49_152),
    "llama-1b": (2048, 16, 32, 8, 8192, 128_256),
    "tiny": (64, 4, 4, 2, 128, 256),
}


def random_model(shape: str, dtype: torch.dtype, device: str) -> TambaForCausalLM:
    """A Llama of some shape with tied embeddings."""
    d_model, layers, heads, kv_heads, d_mlp, vocabulary = SHAPES[shape]
    head_dim = d_model // heads
    block = BlockSpec(
        mixer=AttentionSpec(
            n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim
        ),
        mlp=MLPSpec(d_mlp=d_mlp),
    )
    config = TambaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        blocks={"block": block},
        layers=["block"] * layers,
        tie_word_embeddings=True,
    )
    config.name_or_path = f"random {shape}"
    torch.manual_seed(0)
    with torch.device(device):
        return TambaForCausalLM(config).to(dtype).eval()


def random_blocks(vocabulary: int, rows: int, length: int) -> TokenBlocks:
    """Rows of two documents each."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (rows, length), generator=generator).int()
    starts = torch.zeros(rows, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[torch.arange(rows), torch.randint(1, length - 1, (rows,), generator=generator)] = True
    return TokenBlocks(tokens, starts, tokens.numel())


def opened(
    name: str, rows: int, length: int, weights: torch.dtype | None, device: str
) -> tuple[TambaForCausalLM, TokenBlocks]:
    """A model and what it reads."""
    word, colon, shape = name.partition(":")
    if word == "random" and colon:
        model = random_model(shape, weights or torch.float32, device)
        return model, random_blocks(model.config.vocab_size, rows, length)
    model, tokenizer = tamba.load(name, weights, device)
    texts = read_texts("python-docs", max_bytes=16 * rows * length)
    return model, TokenBlocks.from_texts(texts, tokenizer, length, max_tokens=rows * length)


def angle_error(model: TambaForCausalLM, blocks: TokenBlocks, dtype: torch.dtype | None) -> float:
    """Largest difference from float64 of a mean angle of the first row, in half turns."""
    row = blocks.take(1)
    batch = next(row.batches(1))
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: states.extend((args[0], out)))
        for layer in model.model.layers
    ]
    with computing(model, dtype):
        model.model(**batch.to(model.device).inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    here = counted(batch)[0].to(model.device)
    wide = torch.stack([x[0, here] for x in (*states[::2], states[-1])], dim=1).double()
    unit = wide / wide.norm(dim=-1, keepdim=True)
    want = (torch.acos((unit @ unit.mT).clamp(-1.0, 1.0)) / torch.pi).mean(0).cpu()
    found = state_scores(model, row, dtype=dtype).all_tokens.mean
    L = len(found)
    cells = ((low, n) for low in range(L) for n in range(1, L - low + 1))
    return max(abs(float(found[low, n - 1] - want[low, low + n])) for low, n in cells)


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


def measured(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """The record of one model."""
    device = arguments.device
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    weights = None if arguments.weights is None else getattr(torch, arguments.weights)
    model, blocks = opened(name, arguments.rows, arguments.length, weights, device)
    batch_size = arguments.batch or _batch_size(model, arguments.length)
    timed = sides(model, blocks, dtype, batch_size)
    for run in timed.values():
        run()
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {side: [] for side in timed}
    for turn in range(arguments.rounds):
        for side in list(timed)[:: 1 if turn % 2 else -1]:
            wait(model)
            begun = clock()
            timed[side]()
            seconds[side].append(clock() - begun)
    overhead = {}
    for side in ("forward", "without head"):
        ratios = [s / p - 1 for s, p in zip(seconds["scored"], seconds[side], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        overhead[side] = {"median": median(ratios), "quartiles": [low, high]}
    return {
        "row": "analyze_overhead",
        "model": model.config.name_or_path if name.startswith("random:") else Path(name).name,
        "layers": model.config.num_hidden_layers,
        "d_model": model.config.hidden_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": str(model.dtype).removeprefix("torch."),
        "dtype": arguments.dtype or str(model.dtype).removeprefix("torch."),
        "rows": len(blocks),
        "length": arguments.length,
        "batch": batch_size,
        "rounds": arguments.rounds,
        "clock": clock.__name__,
        "seconds": {side: median(times) for side, times in seconds.items()},
        "overhead_over": overhead,
        "angle_error": angle_error(model, blocks, dtype),
        "bar": BAR,
        "held": all(found["median"] <= BAR for found in overhead.values()),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="or random:SHAPE")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--batch", type=int, default=None, help="the scorer's own if not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=TYPES, help="of matrix products; the weights' if none")
    parser.add_argument("--weights", choices=TYPES, help="of the weights; as stored if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    shapes = [name.partition(":")[2] for name in arguments.models if name.startswith("random:")]
    if unknown := set(shapes) - set(SHAPES):
        parser.error(f"no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")

    records = []
    for name in arguments.models:
        records.append(measured(name, arguments))
        print(json.dumps(records[-1], indent=1), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
