"""Pictures of the distillation of SmolLM2, from its record alone.

    python experiments/mamba_in_llama_figures.py distill-smollm2.json --out docs/results/images

Draws the quality of hybrids by the share of attention that they keep, a line a budget of tokens,
beside what the paper reports of a model of seven billion; and, where the record holds them, the
short rows that ask the paper's other questions, a dot a seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tamba.artefact import write_file
from tamba.errors import UserError
from tamba.plots import LIGHT, drawing
from tamba.plots.layers import need_matplotlib

Row = dict[str, Any]
PAPER = {50.0: 1.03, 25.0: 1.09, 6.25: 1.22, 0.0: 1.66}
"""Ratio of perplexities by percent of attention (arXiv 2408.15237), on the paper's own text."""
QUESTIONS = {
    "Where weights come from": {
        "short": "attention's projections, closed form",
        "attention-start": "attention's projections",
        "random-start": "random projections",
        "random-conv": "attention's, convolution at random",
        "paper-decay": "attention's, decays as published",
        "paper-start": "attention's, both as published",
        "no-gate": "attention's, no gate and no norm",
    },
    "Stages before distillation": {
        "short": "closed form and alignment",
        "attention-start": "alignment",
        "no-align": "closed form",
        "distil-alone": "none",
        "removed": "none, and layers left out",
    },
    "What moves": {
        "short": "everything",
        "all-but-mlp": "all but the MLPs",
        "frozen-mlp": "mixers",
    },
    "Which attention stays": {
        "short": "by score",
        "interleaved": "at even distances",
        "block": "one block",
    },
    "In how many steps": {
        "short": "all layers at once",
        "progressive": "quarter by quarter",
        "one-by-one": "layer by layer",
        "theseus": "now and then (Theseus)",
    },
    "What is learned": {
        "short": "forward KL",
        "jensen-shannon": "Jensen-Shannon",
        "reverse-kl": "reverse KL",
        "paper-loss": "cross-entropy + 0.1 KL",
        "cross-entropy": "cross-entropy",
    },
    "Which recurrence, no closed form": {
        "attention-start": "Mamba-2",
        "mamba1": "Mamba-1, whole heads",
        "mamba1-legacy": "Mamba-1, slices as published",
    },
}
"""Rows that differ in one thing, by what it is: names in the record and in the picture."""
LOOKS = {"student": "o-", "donor": "s-", "fresh": "^-", "fifth": "D-"}


def budgets(rows: list[Row]) -> dict[int, list[Row]]:
    """Rows of shares of attention by the tokens that they were given, most attention first."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        kind, _, share = row["row"].partition("-")
        if kind == "attention" and share.replace(".", "").isdigit():
            found.setdefault(row["tokens"], []).append(row)
    return {
        tokens: sorted(found[tokens], key=lambda r: -r["attention_kept"])
        for tokens in sorted(found)
    }


def shares(rows: list[Row]) -> Any:
    """Ratio of perplexities and KL to the teacher by share of attention."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    panels = (
        ("perplexity, student over teacher", lambda r: (r["ratio"], r["ratio_error"])),
        ("KL from the teacher, nats a token", lambda r: (r["kl"], 0.0)),
    )
    with drawing():
        figure = Figure(figsize=(9.2, 3.7))
        for k, (title, value) in enumerate(panels):
            ax = figure.add_axes((0.06 + 0.49 * k, 0.15, 0.43, 0.6))
            for place, ((colour, look), (tokens, some)) in enumerate(
                zip(LOOKS.items(), budgets(rows).items(), strict=False)
            ):
                x = [100 * row["attention_kept"] for row in some]
                y, error = zip(*map(value, some), strict=True)
                said = f"{tokens / 1e6:.0f} M tokens"
                ax.errorbar(x, y, error, fmt=look, ms=5, color=LIGHT[colour], label=said)
                for at, number in zip(x, y, strict=True):
                    ax.annotate(
                        f"{number:.3f}", (at, number), (-6, -12) if place % 2 else (4, -13),
                        textcoords="offset points", fontsize=8.5, color=LIGHT["ink"],
                        ha="right" if place % 2 else "left",
                    )  # fmt: skip
            if not k:
                ax.plot(
                    [*PAPER], [*PAPER.values()], "x--", color=LIGHT["muted"], lw=1.2,
                    label="the paper, 7 billion parameters, its own text",
                )  # fmt: skip
                ax.axhline(1.0, color=LIGHT["teacher"], lw=1)
            ax.set_title(title, fontsize=9.5, fontweight="normal", color=LIGHT["muted"])
            ax.set_ylim(bottom=0.95 if not k else 0.0)
            ax.set_xlim(54, -6)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
            ax.set_xlabel("layers that are still attention")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.015, 0.93), ncols=len(labels),
            frameon=False, fontsize=9,
        )  # fmt: skip
        figure.suptitle(
            "SmolLM2-135M-Instruct with less and less attention",
            x=0.02, y=0.985, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Perplexity ratio and KL by share of attention")
    return figure


def findings(rows: list[Row]) -> Any | None:
    """Ratio of perplexities and KL of the short rows, question by question; None without any."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["row"], []).append(row)
    asked = {
        question: {name: said for name, said in names.items() if name in found}
        for question, names in QUESTIONS.items()
    }
    asked = {question: names for question, names in asked.items() if len(names) > 1}
    if not asked:
        return None
    lines = sum(len(names) + 1.6 for names in asked.values())
    tall = 0.235 * lines + 1.0
    panels = ("perplexity, student over teacher", "ratio"), ("KL from the teacher, nats", "kl")
    with drawing():
        figure = Figure(figsize=(9.2, tall))
        for k, (title, key) in enumerate(panels):
            ax = figure.add_axes((0.3 + 0.36 * k, 0.5 / tall, 0.31, 1 - 1.25 / tall))
            every = sorted(row[key] for names in asked.values() for n in names for row in found[n])
            # What is far off all others would press them together: an arrow at the edge.
            end = max(v for v in every if v <= 3 * every[len(every) // 2])
            at, ticks, words = 0.0, [], []
            for question, names in asked.items():
                if not k:
                    ax.text(
                        -0.86, at, question, transform=ax.get_yaxis_transform(), fontsize=9,
                        fontweight="semibold", va="center", color=LIGHT["ink"],
                    )  # fmt: skip
                for name, said in names.items():
                    at += 1
                    values = [row[key] for row in found[name]]
                    mean, first = sum(values) / len(values), name == next(iter(names))
                    colour = LIGHT["teacher" if first else "student"]
                    edge = max(v for v in values if v <= end) if mean <= end else end
                    look, size = ("|", 11) if mean <= end else (">", 6)
                    ax.plot(values, [at] * len(values), "o", ms=4, mew=0, alpha=0.45, color=colour)
                    ax.plot([min(mean, end)], [at], look, ms=size, mew=2, color=colour)
                    ax.annotate(
                        f"{mean:.2f}", (edge, at), (8, 0), textcoords="offset points",
                        fontsize=8, va="center", color=LIGHT["ink"],
                    )  # fmt: skip
                    ticks.append(at)
                    words.append(said)
                at += 1.6
            ax.set_ylim(at - 1.0, -0.6)
            ax.set_yticks(ticks, words if not k else [""] * len(ticks), fontsize=8.5)
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="y", visible=False)
            # Starts differ by factors, losses by hundredths: a ratio's room is logarithmic.
            ax.set_xscale("log")
            ax.set_xlim(every[0] * (every[0] / end) ** 0.06, end * (end / every[0]) ** 0.2)
            ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.set_title(title, fontsize=9.5, fontweight="normal", color=LIGHT["muted"])
        seeds = max(len(found[name]) for names in asked.values() for name in names)
        some = [row for names in asked.values() for name in names for row in found[name]]
        kept = some[0]["attention_kept"]
        figure.suptitle(
            f"One thing changed at a time, {100 * kept:.0f} % of attention kept: "
            + ("one seed" if seeds == 1 else f"a dot a seed (up to {seeds}), a bar their mean"),
            x=0.02, y=1 - 0.12 / tall, ha="left", va="top", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Perplexity ratio and KL of short rows by question")
    return figure


def read(path: Path) -> list[Row]:
    """The rows of a record. Raises UserError where it is none."""
    made = "make it with mamba_in_llama.py"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read as JSON ({error})", made) from error
    try:
        if budgets(rows):
            return rows
    except (TypeError, KeyError) as error:
        raise UserError(str(path), "is no record of rows", made) from error
    raise UserError(str(path), "holds no row of a share of attention", made)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results/images"))
    asked = parser.parse_args()
    try:
        need_matplotlib()
        rows = read(asked.record)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("attention-shares", shares(rows)), ("paper-findings", findings(rows))):
        if figure is None:
            continue
        path = asked.out / f"{name}.png"
        write_file(path, lambda to, of=figure: of.savefig(to, format="png", dpi=110))
        print(path)


if __name__ == "__main__":
    main()
