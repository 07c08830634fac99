"""Pictures of the small E-Tamba experiment, from its record alone.

    python experiments/e_tamba_figures.py e-tamba-mini.json --out docs/results/images

Draws what the record has rows for: the heat maps of both models, the ablation by seeds, copying and
phone book by size, and memory of the paper's models by cause.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tamba.artefact import write_file
from tamba.errors import UserError
from tamba.plots import LIGHT, drawing
from tamba.plots.layers import heat_maps, need_matplotlib, score_bars

Row = dict[str, Any]
PUBLISHED = {"pythia-1.4b": 9114, "mamba-1.4b": 3100, "e-tamba 12+12+1": 3082}
"""MiB at batch 1 and 4,096 tokens, table 2 of the paper."""
COLOURS = {
    "base": "teacher",
    "base, tuned": "ink",
    "donor": "donor",
    "donor, tuned": "sixth",
    "hybrid": "student",
    "attention-initialised": "fifth",
    "fresh": "fresh",
    "deleted": "muted",
}


def by_seed(rows: Mapping[str, Row], part: str, system: str) -> list[Row]:
    """Rows of a system, a seed each."""
    return [row for name, row in rows.items() if name.rpartition("/")[0] == f"{part}/{system}"]


def mean_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and its standard error over seeds."""
    values = list(values)
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), spread


def best_group(rows: Mapping[str, Row]) -> str | None:
    """The group of the donor that the final hybrid has."""
    known = {"base", "donor", "converted", "fresh", "none"}
    names = [name.split("/")[1] for name in rows if name.startswith("final/")]
    return next((name for name in names if name not in known), None)


def spoken(system: str, best: str | None) -> str:
    """What a system is called in a picture."""
    words = {"none": "deleted", "converted": "attention-initialised"}
    return "hybrid" if system == best else words.get(system, system)


def maps(rows: Mapping[str, Row]) -> Any:
    """Figures 1 and 2 of the paper."""
    found = rows["analysis"]
    tables = {
        f"{what}, {len(found[role]['all_tokens'])} layers": found[role]["all_tokens"]
        for role, what in (("base", "GPT-NeoX"), ("donor", "Mamba"))
    }
    return heat_maps(tables, "Mean angle between hidden states, all tokens")


def layers(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Scores of each layer beside what leaving it out costs."""
    figures = {}
    for role, what in (("base", "GPT-NeoX"), ("donor", "Mamba")):
        found = rows["analysis"][role]
        scores = {n: (found["scores"][n], found["errors"][n]) for n in ("own_turn", "column_mean")}
        costs = found["drop_loss"]
        scores["loss without the layer, nats"] = (costs, [0.0] * len(costs))
        chosen = rows["analysis"]["replaced"] if role == "base" else ()
        figures[f"layers-{role}"] = score_bars(scores, f"{what}: what its layers do", chosen)
    return figures


def ablation(rows: Mapping[str, Row]) -> Any:
    """Table 1: a dot a seed, the mean with its standard error."""
    from matplotlib.figure import Figure

    systems = list(dict.fromkeys(n.split("/")[1] for n in rows if n.startswith("grid/")))
    kinds = {"none": "muted", "fresh": "fresh", "converted": "fifth", "shuffled": "donor"}
    with drawing():
        figure = Figure(figsize=(5.4, 0.9 + 0.34 * len(systems)))
        w, h = figure.get_size_inches()
        ax = figure.add_axes((1.75 / w, 0.5 / h, (w - 1.95) / w, (h - 0.95) / h))
        said = []
        for k, system in enumerate(systems):
            values = [row["report"]["ppl"] for row in by_seed(rows, "grid", system)]
            mean, error = mean_error(values)
            y = len(systems) - 1 - k
            kind = kinds.get(system, "student")
            ax.plot(values, [y] * len(values), "o", ms=4, mew=0, color=LIGHT[kind], alpha=0.45)
            ax.errorbar(
                mean, y, xerr=error or 0.0, fmt="D", ms=6, color=LIGHT[kind], capsize=3, zorder=3
            )
            ax.annotate(
                f"{mean:.2f}", (mean, y), (0, 6), textcoords="offset points", fontsize=8.5,
                ha="center", color=LIGHT["ink"],
            )  # fmt: skip
            said.append(f"{system} {mean:.2f}")
        names = {"none": "deleted", "fresh": "reinitialised", "converted": "attention-initialised"}
        ax.set_yticks(
            range(len(systems)),
            [names.get(s, f"donor {s}" if s[0].isdigit() else s) for s in reversed(systems)],
        )
        ax.set_ylim(-0.6, len(systems) - 0.2)
        ax.grid(axis="x")
        ax.set_xlabel("perplexity; mean and standard error over seeds")
        figure.suptitle(
            "What stands in the place of the layers that go",
            x=0.03, y=1 - 0.1 / h, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Perplexity by what is put in: " + ", ".join(said))
    return figure


def recall(rows: Mapping[str, Row]) -> Any:
    """Figures 4 and 5: copying and phone book."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    best = best_group(rows)
    lines = {}
    for name, row in rows.items():
        if name.startswith("recall/"):
            parts = name.split("/")
            tuned = len(parts) > 2
            system = spoken(parts[2] if tuned else parts[1], best)
            lines[f"{system}, tuned" if system in ("base", "donor") and tuned else system] = row
    with drawing():
        figure = Figure(figsize=(9.2, 3.9))
        for k, (task, axis) in enumerate(
            (("copy", "tokens to copy, exactly"), ("phonebook", "entries in the phone book"))
        ):
            ax = figure.add_axes((0.065 + 0.49 * k, 0.14, 0.43, 0.62))
            for name, row in lines.items():
                x = [p["size"] for p in row[task]]
                color = LIGHT[COLOURS.get(name, "ink")]
                ax.plot(x, [p["acc"] for p in row[task]], "o-", ms=3.5, color=color, label=name)
                low, high = ([p[side] for p in row[task]] for side in ("low", "high"))
                ax.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
            ax.set_xscale("log", base=2)
            ax.xaxis.set_minor_locator(NullLocator())
            # Sizes whose numbers would touch on this scale are left unnamed.
            shown = [v for i, v in enumerate(x) if not i or v >= 1.4 * x[i - 1]]
            ax.xaxis.set_major_locator(FixedLocator(shown))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}"))
            ax.set_xlabel(axis)
        n = next(iter(lines.values()))["cases"]
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.055, 0.92), ncols=len(labels),
            frameon=False, fontsize=9,
        )  # fmt: skip
        figure.suptitle(
            f"Right answers, {n} cases a point, 95 % intervals",
            x=0.02, y=0.985, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Copying and phone book, a line a model: " + ", ".join(lines))
    return figure


def memory(rows: Mapping[str, Row]) -> Any:
    """Memory of the true shapes by cause, with the floor and the published figure."""
    from matplotlib.figure import Figure

    found = {
        n.partition("/")[2]: r["memory"][0] for n, r in rows.items() if n.startswith("shapes/")
    }
    found = {name: row for name, row in found.items() if row.get("peak")}
    parts = {
        "weights": "teacher", "kv": "donor", "state": "sixth", "logits": "fresh",
        "activations": "fifth",
    }  # fmt: skip
    with drawing():
        figure = Figure(figsize=(6.6, 1.35 + 0.42 * len(found)))
        w, h = figure.get_size_inches()
        ax = figure.add_axes((2.1 / w, 0.5 / h, (w - 2.3) / w, (h - 1.2) / h))
        for k, (name, row) in enumerate(found.items()):
            y, left = len(found) - 1 - k, 0.0
            for part, colour in parts.items():
                size = row[part] / 2**20
                ax.barh(y, size, left=left, height=0.56, color=LIGHT[colour],
                        label=part if not k else None)  # fmt: skip
                left += size
            floor = row["floor"] / 2**20
            ax.plot([floor] * 2, [y - 0.4, y + 0.4], color=LIGHT["ink"], lw=1.6,
                    label="floor" if not k else None)  # fmt: skip
            note = f"{left:,.0f}"
            if name in PUBLISHED:
                note += f" (published {PUBLISHED[name]:,})"
            ax.annotate(note, (left, y), (5, 0), textcoords="offset points", va="center",
                        fontsize=8.5, color=LIGHT["ink"])  # fmt: skip
        ax.set_yticks(range(len(found)), list(reversed(found)))
        ax.set_xlim(0, 1.38 * max(row["peak"] for row in found.values()) / 2**20)
        ax.grid(axis="x")
        ax.set_xlabel("MiB")
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.02, 1 - 0.3 / h),
                      ncols=len(labels), frameon=False, fontsize=8.5)  # fmt: skip
        context = next(iter(found.values()))["context"]
        figure.suptitle(
            f"Memory of a prompt of {context:,} tokens, batch 1",
            x=0.03, y=1 - 0.08 / h, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Memory by cause: " + ", ".join(found))
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Write a PNG of each picture that the record has rows for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    need_matplotlib()
    try:
        rows = json.loads(args.record.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(str(args.record), f"is no record of the experiment ({error})") from error
    figures: dict[str, Any] = {}
    if "analysis" in rows:
        figures |= {"distances": maps(rows), **layers(rows)}
    if any(name.startswith("grid/") for name in rows):
        figures["ablation"] = ablation(rows)
    if any(name.startswith("recall/") for name in rows):
        figures["recall"] = recall(rows)
    if any(n.startswith("shapes/") and r["memory"][0].get("peak") for n, r in rows.items()):
        figures["memory"] = memory(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = args.out / f"e-tamba-{name}.png"
        with drawing():
            write_file(path, lambda to, figure=figure: figure.savefig(to, format="png", dpi=130))
        print(path)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
