"""The findings of *The Mamba in the Llama* (arXiv 2408.15237) at a scale that fits one GPU.

    python experiments/mamba_in_llama.py attention-25 \\
        --train train.jsonl.xz --heldout valid.jsonl --out runs --record distil-smollm2.json

Each row is `recipes/distil-smollm2.toml` with a few keys changed, run from text to report by
`tamba.run`, so a row that was cut off goes on where it was. `--list` shows all rows. A row's result
is added to the record, a JSON list, in place of an older one of the same row and seed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import tamba
from tamba.artefact import versions, write_file
from tamba.checkpoint import load_model, load_tokenizer, open_checkpoint
from tamba.errors import UserError
from tamba.evaluate.scoring import loglikelihoods
from tamba.recipe import read_recipe
from tamba.report import read_record

RECIPE = Path(__file__).parent.parent / "recipes" / "distil-smollm2.toml"
LAYERS = 30
LEAST_SQUARES, ALIGN, DISTIL = range(3)
"""Stages of the recipe."""


@dataclass(frozen=True)
class Row:
    """A variant of the recipe.

    Args:
        finding: what of the paper it looks at.
        changes: ``key=value``, as for ``--set``.
    """

    finding: str
    changes: tuple[str, ...] = ()


def _every(n: int, *, block: bool = False) -> str:
    """A plan that keeps `n` of the layers by position: at even distances, or the last of them."""
    kept = range(LAYERS - n, LAYERS) if block else [round((i + 0.5) * LAYERS / n) for i in range(n)]
    lines = [f"{'keep' if i in set(kept) else 'convert'} {i}" for i in range(LAYERS)]
    return f"build.plan={json.dumps(lines)}"


_MAMBA1 = (
    "build.convert.mixer=mamba1",
    "build.convert.norm=none",
    f"train.{LEAST_SQUARES}.fit=output",
)
SHORT = (f"train.{ALIGN}.tokens=2000000", f"train.{DISTIL}.tokens=15000000")
ROWS = {
    **{
        f"attention-{name}": Row("share of attention (Tables 1, 2, 4)", (f"analyze.convert={n}",))
        for name, n in (("50", 15), ("25", 23), ("12.5", 26), ("0", 30))
    },
    # Short runs at a quarter of the attention, for several seeds each.
    "short": Row("what the rows below are compared with", SHORT),
    "interleaved": Row("placement: even distances", (*SHORT, _every(7))),
    "block": Row("placement: one block", (*SHORT, _every(7, block=True))),
    "frozen-mlp": Row("only mixers move (Table 7)", (*SHORT, f"train.{DISTIL}.train=mixers")),
    "no-align": Row("no layer-wise stage", (*SHORT, f"train.{ALIGN}.tokens=32768")),
    "paper-start": Row(
        "convolution, gate and decays as the paper draws them",
        (
            *SHORT,
            "build.convert.conv=random",
            "build.convert.decay=paper",
            f"train.{LEAST_SQUARES}.fit=output",
        ),
    ),
    "cross-entropy": Row(
        "the text instead of the teacher", (*SHORT, f"train.{DISTIL}.kl=0", f"train.{DISTIL}.ce=1")
    ),
    "paper-loss": Row(
        "the paper's weights", (*SHORT, f"train.{DISTIL}.kl=0.1", f"train.{DISTIL}.ce=1")
    ),
    "reverse-kl": Row("the other direction of KL", (*SHORT, f"train.{DISTIL}.divergence=reverse")),
    "jensen-shannon": Row("between the directions", (*SHORT, f"train.{DISTIL}.divergence=js")),
    "all-but-mlp": Row(
        "frozen MLPs alone (Table 7)", (*SHORT, f"train.{DISTIL}.train=all-but-mlp")
    ),
    **{
        name.replace("_", "-"): Row("stepwise", (*SHORT, f"train.{DISTIL}.replacement={name}"))
        for name in ("progressive", "one_by_one", "theseus")
    },
    "mamba1": Row("Mamba-1 with whole heads kept together", (*SHORT, *_MAMBA1)),
    "mamba1-legacy": Row(
        "Mamba-1 with slices as published", (*SHORT, *_MAMBA1, "build.convert.slices=legacy")
    ),
}


def overrides(row: Row, asked: argparse.Namespace, seed: int) -> list[str]:
    """What is changed in the recipe, in order; what the caller sets wins."""
    data = [
        f"data.{key}={json.dumps([str(Path(p).resolve()) for p in paths])}"
        for key, paths in (("train", asked.train), ("heldout", asked.heldout))
        if paths
    ]
    teacher = [f"teacher.path={json.dumps(asked.teacher)}"] if asked.teacher else []
    return [*data, *teacher, f"seed={seed}", *row.changes, *asked.set]


def run_row(name: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """One row, from text to figures."""
    recipe = read_recipe(RECIPE, overrides(ROWS[name], asked, seed))
    out = Path(asked.out) / f"{name}-{seed}"
    tamba.run(recipe, out, report=lambda step, what: print(f"{name}: {step}: {what}", flush=True))
    record = read_record(out / "report.json")
    stages = json.loads((out / "student" / "train.json").read_text())["stages"]
    tokens = sum(stage["tokens"] for stage in stages)
    found, layers = record.perplexity, record.layers
    assert found is not None and layers is not None
    row = {
        "row": name,
        "finding": ROWS[name].finding,
        "seed": seed,
        "attention_kept": 1 - layers.converted / layers.total,
        "converted": layers.converted,
        "ratio": found.ratio,
        "ratio_error": found.ratio_error,
        "kl": found.kl,
        "teacher_ppl": found.teacher,
        "student_ppl": found.student,
        "heldout_tokens": found.tokens,
        "tokens": tokens,
        "seconds": sum(
            record.seconds[step] for step in ("analyze", "build", "train") if step in record.seconds
        ),
        "seconds_of": record.seconds,
        "tokens_per_second": tokens / record.seconds["train"],
        "stages": [{k: s[k] for k in s if k not in ("losses", "layers")} for s in stages],
        "losses": [s["losses"][-1] for s in stages if s["losses"]],
        "plan": [p.origin for p in record.plan],
        "answer": (record.answer or "")[:200],
    }
    return row


def beyond_perplexity(name: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """LAMBADA (last word by greedy choice) and the phone book, of both."""
    recipe = read_recipe(RECIPE, overrides(ROWS[name], asked, seed))
    teacher, student = recipe.model_path("teacher"), Path(asked.out) / f"{name}-{seed}" / "student"
    found: dict[str, Any] = {}
    if asked.lambada:
        lines = Path(asked.lambada).read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        found["lambada"] = {
            who: lambada(path, texts) for who, path in (("teacher", teacher), ("student", student))
        }
    if asked.phonebook:
        record = tamba.evaluate(
            student, suites=["phonebook"], against=teacher, lengths=asked.phonebook, cases=300
        )
        found["phonebook"] = {
            metric: {role: [p.model_dump() for p in points] for role, points in by_role.items()}
            for metric, by_role in _curves(record).items()
        }
    return found


def _curves(record: Any) -> dict[str, Any]:
    return {name: curve.points for name, curve in record.suites["phonebook"].curves.items()}


def lambada(path: str | Path, texts: list[str]) -> float:
    """Share of texts whose last word is the greedy choice, token by token."""
    checkpoint = open_checkpoint(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(checkpoint, "bfloat16", device), load_tokenizer(checkpoint)
    pairs = []
    for text in texts:
        context = text.rsplit(" ", 1)[0]
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        head = tokenizer(context, add_special_tokens=False)["input_ids"]
        pairs.append((whole[: len(head)], whole[len(head) :]))
    found = loglikelihoods(model, pairs, tokens_at_once=4096 if device == "cpu" else 65_536)
    return sum(item.greedy for batch in found for item in batch.values()) / len(pairs)


def main() -> None:
    """Run the rows that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows; --list shows them")
    parser.add_argument("--list", action="store_true", help="what rows there are")
    parser.add_argument("--train", nargs="+", default=[], help="text to train on")
    parser.add_argument("--heldout", nargs="+", default=[], help="text to measure on")
    parser.add_argument("--teacher", help="checkpoint; by default what the recipe names")
    parser.add_argument("--out", default="runs", help="folder of the runs")
    parser.add_argument("--record", type=Path, help="JSON list to add the results to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--lambada", help="JSON lines with `text`, the last word to be guessed")
    parser.add_argument("--phonebook", type=int, nargs="+", help="lengths in entries")
    asked = parser.parse_args()
    if asked.list or not asked.rows:
        for name, row in ROWS.items():
            print(f"{name:16} {row.finding}")
        return
    if unknown := [name for name in asked.rows if name not in ROWS]:
        parser.error(f"no row called {', '.join(unknown)}; --list shows them")
    command = shlex.join(["python", "experiments/mamba_in_llama.py", *sys.argv[1:]])
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for name in asked.rows:
        for seed in asked.seeds:
            try:
                row = run_row(name, seed, asked)
            except UserError as error:
                sys.exit(f"error: {error}")
            row |= {
                "command": command,
                "hardware": hardware,
                "versions": versions(),
                "date": datetime.now(UTC).date().isoformat(),
            }
            print(f"{name}: ratio {row['ratio']:.4f}, {row['tokens_per_second']:,.0f} tokens/s")
            keep(row, asked.record)
            if asked.lambada or asked.phonebook:
                keep(row | beyond_perplexity(name, seed, asked), asked.record)


def keep(row: dict[str, Any], record: Path | None) -> None:
    """Add a row to the record, in place of an older one."""
    if record is None:
        return
    rows = json.loads(record.read_text()) if record.exists() else []
    rows = [r for r in rows if (r["row"], r["seed"]) != (row["row"], row["seed"])] + [row]
    write_file(record, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
