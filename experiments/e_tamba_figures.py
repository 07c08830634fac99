"""Pictures of the small E-Tamba experiment, from its record alone.

    python experiments/e_tamba_figures.py e-tamba-mini.json --out docs/results/images

Draws what the record has rows for: the heat maps of both models, the ablation by seeds, copying and
phone book by size, as tuned and as taught, and memory of the paper's models by cause.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from e_tamba_tables import PUBLISHED, mean_error, paired, read_rows, seeds

from tamba.artefact import write_file
from tamba.errors import UserError
from tamba.plots import LIGHT, drawing
from tamba.plots.layers import heat_maps, need_matplotlib, score_bars

Row = dict[str, Any]
TASKS = ("copy", "phonebook")
COLOURS = {
    "base": "teacher",
    "base, tuned": "ink",
    "donor": "donor",
    "donor, tuned": "sixth",
    "hybrid": "student",
    "attention-initialised": "fifth",
    "attention-initialised, unfitted": "fifth",
    "fresh": "fresh",
    "deleted": "muted",
}


WORDS = {
    "none": "deleted",
    "fitted": "attention-initialised",
    "converted": "attention-initialised, unfitted",
}


_FAR = 0.05
"""Nats beyond which a row of the ablation is not drawn to scale."""


def best_group(rows: Mapping[str, Row]) -> str | None:
    """The group of the donor that the final hybrid has."""
    known = {"base", "donor", "converted", "fitted", "fresh", "none"}
    names = [name.split("/")[1] for name in rows if name.startswith("final/")]
    return next((name for name in names if name not in known), None)


def spoken(system: str, best: str | None) -> str:
    """What a system is called in a picture."""
    return "hybrid" if system == best else WORDS.get(system, system)


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
        # The first records have no errors of these.
        doubt = found.get("drop_loss_error", [None] * len(costs))
        scores["loss without the layer, nats"] = (costs, doubt)
        chosen = rows["analysis"]["replaced"] if role == "base" else ()
        figures[f"layers-{role}"] = score_bars(scores, f"{what}: what its layers do", chosen)
    return figures


def ablation(rows: Mapping[str, Row]) -> Any:
    """Table 1 beside fresh layers: a dot a seed, the mean with its standard error.

    The order of the text moves all rows of a seed together, by more than they differ.
    """
    from matplotlib.figure import Figure

    found = seeds(rows, "grid")
    apart = {s: paired(found[s], found["fresh"]) for s in found if s != "fresh"}
    kinds = {"none": "muted", "fitted": "fifth", "converted": "fifth", "shuffled": "donor"}
    # What lies far out would leave no room for the rest: it is told in words.
    near = {s: values for s, values in apart.items() if abs(mean_error(values)[0]) < _FAR}
    with drawing():
        figure = Figure(figsize=(6.6, 1.0 + 0.4 * len(apart)))
        w, h = figure.get_size_inches()
        ax = figure.add_axes((2.2 / w, 0.5 / h, (w - 3.5) / w, (h - 1.0) / h))
        ax.axvline(0, color=LIGHT["fresh"], lw=1.6, zorder=1)
        bound = 1.15 * max(abs(v) for values in near.values() for v in values)
        said = []
        for k, (system, values) in enumerate(apart.items()):
            y, kind = len(apart) - 1 - k, LIGHT[kinds.get(system, "student")]
            mean, error = mean_error(values)
            if system in near:
                ax.plot(values, [y] * len(values), "o", ms=5, mew=0, color=kind, alpha=0.45)
                ax.errorbar(mean, y, xerr=error or 0.0, fmt="D", ms=6, color=kind, capsize=3)
            else:
                side = math.copysign(bound, mean)
                ax.annotate(
                    f"{mean:+.3f}".replace("-", "\u2212"), (side, y), (0.6 * side, y), va="center",
                    ha="right" if mean > 0 else "left", fontsize=8.5, color=kind,
                    arrowprops={"arrowstyle": "->", "color": kind},
                )  # fmt: skip
            ppl, spread = mean_error(row["ppl"] for row in found[system].values())
            label = f"{ppl:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
            ax.annotate(
                label, (1.04, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5,
                color=LIGHT["ink"],
            )  # fmt: skip
            said.append(f"{system} {mean:+.4f}")
        ax.set_yticks(
            range(len(apart)),
            [WORDS.get(s, f"donor {s}" if s[0].isdigit() else s) for s in reversed(apart)],
        )
        ax.set_ylim(-0.6, len(apart) - 0.4)
        ax.set_xlim(-bound, bound)
        ax.grid(axis="x")
        ax.set_xlabel("nats a token more than fresh Mamba layers, seed by seed")
        ax.annotate(
            "perplexity", (1.04, len(apart) - 0.35), xycoords=("axes fraction", "data"),
            fontsize=8.5, color=LIGHT["muted"], annotation_clip=False,
        )  # fmt: skip
        figure.suptitle(
            "What stands in the place of the layers that go",
            x=0.03, y=1 - 0.1 / h, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Nats a token beside fresh layers: " + ", ".join(said))
    return figure


def taught_lines(rows: Mapping[str, Row]) -> dict[str, Row]:
    """A line a model that was taught: those of the first seed that has any."""
    best, lines = best_group(rows), dict[str, Row]()
    found = [name.split("/") for name in rows if name.startswith("recall/taught/")]
    for _, _, system, seed in found:
        if seed == found[0][3]:
            lines[spoken(system, best)] = rows[f"recall/taught/{system}/{seed}"]
    return lines


def recall_lines(rows: Mapping[str, Row]) -> dict[str, Row]:
    """A line a model, tuned or not, that was not taught."""
    best, lines = best_group(rows), dict[str, Row]()
    for name, row in rows.items():
        if name.startswith("recall/") and not name.startswith("recall/taught/"):
            parts = name.split("/")
            tuned = len(parts) > 2
            system = spoken(parts[2] if tuned else parts[1], best)
            lines[f"{system}, tuned" if system in ("base", "donor") and tuned else system] = row
    return lines


def recall(lines: Mapping[str, Row], what: str) -> Any:
    """Figures 4 and 5: copying and phone book, a line a model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with drawing():
        figure = Figure(figsize=(9.2, 3.9))
        for k, (task, axis) in enumerate(
            zip(TASKS, ("words to copy, exactly", "entries in the phone book"), strict=True)
        ):
            ax = figure.add_axes((0.065 + 0.49 * k, 0.14, 0.43, 0.62))
            for name, row in lines.items():
                x = [p["size"] for p in row[task]]
                color = LIGHT[COLOURS.get(name, "ink")]
                ax.plot(x, [p["acc"] for p in row[task]], "o-", ms=3.5, color=color, label=name)
                low, high = ([p[side] for p in row[task]] for side in ("low", "high"))
                ax.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
            longest = next(iter(lines.values())).get("longest")
            if longest:
                ax.axvline(longest[task], color=LIGHT["muted"], lw=1, ls=(0, (4, 3)), zorder=1)
                ax.annotate(
                    "taught up to here", (longest[task], 0.5), (-4, 0), ha="right", va="center",
                    textcoords="offset points", fontsize=8.5, color=LIGHT["muted"], rotation=90,
                )  # fmt: skip
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
            ax.set_xscale("log", base=2)
            ax.xaxis.set_minor_locator(NullLocator())
            # Sizes whose numbers would touch on this scale are left unnamed.
            shown = x[:1]
            for size in x:
                if size >= 1.4 * shown[-1]:
                    shown.append(size)
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
            f"{what}: right answers, {n} cases a point, 95 % intervals",
            x=0.02, y=0.985, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label(f"Copying and phone book, {what.lower()}: " + ", ".join(lines))
    return figure


def memory(rows: Mapping[str, Row]) -> Any:
    """Memory of the true shapes by cause, with the floor and the published figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

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
            ax.annotate(f"{left:,.0f}", (left, y), (5, 0), textcoords="offset points",
                        va="center", fontsize=8.5, color=LIGHT["ink"])  # fmt: skip
            if name in PUBLISHED:
                # A small gap would hide the number: the marks of those two stand above the bar.
                x = PUBLISHED[name]
                ax.plot(x, y + (0 if x > 1.5 * left else 0.4), "v", ms=6, color=LIGHT["sixth"],
                        label="published" if not k else None)  # fmt: skip
        ax.set_yticks(range(len(found)), list(reversed(found)))
        ax.set_xlim(0, 1.12 * max(row["peak"] for row in found.values()) / 2**20)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.grid(axis="x")
        ax.set_xlabel("MiB")
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.02, 1 - 0.3 / h),
                      ncols=len(labels), frameon=False, fontsize=8.5,
                      columnspacing=1.2, handlelength=1.4)  # fmt: skip
        context = next(iter(found.values()))["context"]
        figure.suptitle(
            f"Memory of a prompt of {context:,} tokens, batch 1",
            x=0.03, y=1 - 0.08 / h, ha="left", fontsize=11, fontweight="semibold",
        )  # fmt: skip
        figure.set_label("Memory by cause: " + ", ".join(found))
    return figure


def drawn(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Each picture that there are rows for, by name."""
    figures: dict[str, Any] = {}
    if "analysis" in rows:
        figures |= {"distances": maps(rows), **layers(rows)}
    compared = seeds(rows, "grid")
    if len(compared) > 1 and "fresh" in compared:
        figures["ablation"] = ablation(rows)
    for name, what, lines in (
        ("recall", "As tuned", recall_lines(rows)),
        ("taught", "As taught", taught_lines(rows)),
    ):
        points = [point for row in lines.values() for task in TASKS for point in row[task]]
        if any(point["acc"] for point in points):
            figures[name] = recall(lines, what)
        elif points:
            print(f"{what.lower()}, no right answer at any of {len(points)} points: not drawn")
    if any(n.startswith("shapes/") and r["memory"][0].get("peak") for n, r in rows.items()):
        figures["memory"] = memory(rows)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Write a PNG of each picture that the record has rows for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    need_matplotlib()
    rows = read_rows(args.record)
    figures = drawn(rows)
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
