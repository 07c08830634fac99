"""What five converted layers begin with: as they are converted, and after the closed-form fit.

    python experiments/converted_starts.py SmolLM2-135M-Instruct.Q4_1.gguf --layers 18 19 20 21 22

Perplexity on the Python manual of the model, of the model without those layers, and of the model
with their attention turned into Mamba-2 (`tamba.plan.ConvertOptions` as it stands), unfitted and
fitted to what the attention gives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from tamba.build import build_student
from tamba.checkpoint import load_model, load_tokenizer, open_checkpoint
from tamba.data import TokenBlocks, read_texts
from tamba.errors import UserError
from tamba.evaluate import perplexity
from tamba.plan import LayerPlan, PlanEntry
from tamba.recipe import LeastSquares
from tamba.train.closed_form import least_squares


def main(arguments: list[str] | None = None) -> None:
    """Print a line a start."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint, as tamba.load takes it")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="to convert")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--fit", type=int, default=16, help="rows to fit on")
    parser.add_argument("--score", type=int, default=8, help="other rows, to score on")
    args = parser.parse_args(arguments)
    checkpoint = open_checkpoint(args.model)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(args.model, "has no tokenizer", "put tokenizer.json beside the weights")
    n_layers = checkpoint.tamba_config.num_hidden_layers
    rows = args.fit + args.score + 2  # two between what is fitted on and what is scored on
    blocks = TokenBlocks.from_texts(
        read_texts(["python-docs"], max_bytes=8 * rows * args.length),
        tokenizer,
        args.length,
        max_tokens=rows * args.length,
    )
    fit, last = blocks.take(args.fit), slice(args.fit + 2, None)
    score = TokenBlocks(blocks.tokens[last], blocks.starts[last], args.score * args.length)
    teacher = load_model(checkpoint, torch.float32, "cpu")
    print(f"base {perplexity(teacher, score).ppl:.4g}", flush=True)
    kept = tuple(PlanEntry("keep", i) for i in range(n_layers) if i not in args.layers)
    converted = tuple(
        PlanEntry("convert" if i in args.layers else "keep", i) for i in range(n_layers)
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, entries in (("none", kept), ("converted", converted)):
            build_student(checkpoint, LayerPlan(entries, name=name), Path(folder) / name)
        for name, fitted in (("none", False), ("converted", False), ("converted", True)):
            student = load_model(open_checkpoint(Path(folder) / name), torch.float32, "cpu")
            if fitted:
                tokens = args.fit * args.length
                stage = LeastSquares(stage="least_squares", tokens=tokens, fit="mixer")
                least_squares(student, teacher, {i: i for i in args.layers}, fit, stage)
            print(
                f"{'fitted' if fitted else name} {perplexity(student, score).ppl:.4g}", flush=True
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
