"""Drawings of an analysis: heat maps of distances, bars of scores, and a plan as a stack of blocks.

Figures stand alone, with a title. Shape letters: `L` layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tamba.errors import UserError
from tamba.plots import KINDS, LIGHT, drawing

try:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        MaxNLocator,
        MultipleLocator,
        NullLocator,
    )
except ImportError:
    # The extra `report`; scores are written without it.
    _MISSING = True
else:
    _MISSING = False

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = ("#f4f7f6", "#9fd0c6", "#2f9486", "#0b5a55", "#0a2230")
"""Of growing distance: darker is further, as in the paper, and lightness alone tells it."""

ACTIONS = {
    # action of a plan: kind of layer in the palette
    "keep": "attention",
    "convert": "converted",
    "transplant": "transplanted",
    "reinitialize": "reinitialized",
}


def heat_maps(tables: Mapping[str, Sequence[Sequence[float]]], title: str) -> Figure:
    """Distances as *E-Tamba*'s figures 1 and 2 show them: x is layer l, y is n, darker is further.

    Args:
        tables: by name, rows [l][n-1] of falling length; all on one scale of colours, side by side.
        title: of the figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    need_matplotlib()
    L = max(len(table) for table in tables.values())
    largest = max(max(map(max, table)) for table in tables.values())
    side = 3.4
    left, gap, bar = 0.55, 0.75, 0.9
    width = left + len(tables) * side + (len(tables) - 1) * gap + bar
    height = side + 1.25
    with drawing():
        figure = Figure(figsize=(width, height))
        shades = LinearSegmentedColormap.from_list("distance", list(_SHADES))
        image: Any = None
        for k, (name, table) in enumerate(tables.items()):
            ax = _axes(figure, left + k * (side + gap), 0.55, side, side)
            image = _triangle(ax, table, largest, shades)
            ax.set_title(name, fontsize=9.5, fontweight="normal", color=LIGHT["muted"], pad=6)
            ax.set_xlabel("layer l")
            ax.set_ylabel("n: compared with the state n layers on" if k == 0 else "n")
        scale = _axes(figure, width - bar + 0.12, 0.55, 0.14, side)
        figure.colorbar(image, cax=scale)
        scale.grid(False)
        scale.set_ylabel("angle, half turns", fontsize=9)
        scale.yaxis.set_major_locator(MaxNLocator(5))
        scale.tick_params(labelsize=8.5)
        for spine in scale.spines.values():
            spine.set_visible(False)
        _title(figure, title)
        far = {name: _furthest(table) for name, table in tables.items()}
        figure.set_label(
            f"{title}: mean angle between the states before layers l and l + n, {L} layers. "
            + "; ".join(
                f"{name}: largest {v:.2f} at l = {i}, n = {n}" for name, (v, i, n) in far.items()
            )
        )
    return figure


def _triangle(ax: Axes, table: Sequence[Sequence[float]], largest: float, shades: Any) -> Any:
    L = len(table)
    rows = [[table[i][n] if n < len(table[i]) else math.nan for i in range(L)] for n in range(L)]
    # One picture also in the SVG: 64 layers as vector rectangles would be large.
    image = ax.imshow(
        rows,
        origin="lower",
        extent=(-0.5, L - 0.5, 0.5, L + 0.5),
        cmap=shades,
        vmin=0.0,
        vmax=largest or 1.0,
        interpolation="nearest",
        aspect="auto",
    )
    step = _step(L)
    ax.xaxis.set_major_locator(MultipleLocator(step))
    # 1 and 2 would touch where every second one is labelled.
    ax.yaxis.set_major_locator(FixedLocator([1, *range(4 if step == 2 else step, L + 1, step)]))
    ax.tick_params(labelsize=8.5)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def _furthest(table: Sequence[Sequence[float]]) -> tuple[float, int, int]:
    return max((v, i, n + 1) for i, row in enumerate(table) for n, v in enumerate(row))


def _step(n_layers: int) -> int:
    """Between labelled layers, so that a dozen or so are labelled."""
    return next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 10**6) if n_layers / s <= 12)


def score_bars(
    scores: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    title: str,
    chosen: Sequence[int] = (),
    limits: Mapping[str, float] | None = None,
) -> Figure:
    """One row of bars a score, a bar a layer, with two standard errors either way.

    Args:
        scores: by name, values and standard errors; None where there is nothing.
        chosen: layers drawn in the colour of what is replaced.
        limits: by name, the value at which a score was cut off. Such bars end at the top under a
            mark, so that they do not flatten the others.

    Raises:
        UserError: matplotlib is not installed.
    """
    need_matplotlib()
    n = max(len(values) for values, _ in scores.values())
    width = max(4.6, min(9.2, 0.9 + n * 0.13))
    row, gap, left, bottom = 0.95, 0.5, 0.72, 0.5
    height = bottom + len(scores) * (row + gap) + 0.3
    with drawing():
        figure = Figure(figsize=(width, height))
        for k, (name, (values, errors)) in enumerate(scores.items()):
            y = height - 0.3 - (k + 1) * (row + gap) + 0.02
            ax = _axes(figure, left, y, width - left - 0.15, row)
            here = [i for i, v in enumerate(values) if v is not None]
            shown = [v for v in values if v is not None]
            bounds = [2 * (errors[i] or 0.0) for i in here]
            colors = [LIGHT["student" if i in chosen else "teacher"] for i in here]
            ax.bar(here, shown, width=0.74, color=colors)
            style: dict[str, Any] = {
                "fmt": "none",
                "ecolor": LIGHT["ink"],
                "elinewidth": 0.8,
                "capsize": 0,
            }
            ax.errorbar(here, shown, yerr=bounds, **style)
            said = name.replace("_", " ")
            ax.set_xlim(-0.7, n - 0.3)
            limit = (limits or {}).get(name, math.inf)
            beyond = [i for i, v in zip(here, shown, strict=True) if v >= limit]
            if beyond and len(beyond) < len(here):
                inside = [(v, e) for v, e in zip(shown, bounds, strict=True) if v < limit]
                shown = [v for v, _ in inside]
                top = max(v + e for v, e in inside)
                low = min(0.0, *(v - e for v, e in inside))
                ax.set_ylim(1.25 * low, 1.25 * top if top > 0 else limit)
                marks: dict[str, Any] = {
                    "marker": "^",
                    "s": 16,
                    "color": LIGHT["ink"],
                    "clip_on": False,
                }
                ax.scatter(beyond, [1.0] * len(beyond), transform=ax.get_xaxis_transform(), **marks)
                said += f", marked: {limit:g} or more"
            positive = [v for v in shown if v > 0]
            if positive and len(positive) == len(shown) and max(positive) > 40 * min(positive):
                ax.set_yscale("log")
                said += ", log scale"
                # A bar of nothing would stretch the axis beyond what can be told apart.
                ax.set_ylim(max(min(positive) / 1.6, max(positive) / 1e4), max(positive) * 1.6)
                ax.yaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            else:
                ax.yaxis.set_major_locator(MaxNLocator(3))
            ax.set_title(said, fontsize=9.5, fontweight="normal", pad=5)
            ax.xaxis.set_major_locator(MultipleLocator(_step(n)))
            ax.tick_params(labelsize=8.5)
        ax.set_xlabel("layer" + (" (coloured: to be replaced)" if chosen else ""))
        _title(figure, title)
        highest = {
            name: max((v, i) for i, v in enumerate(values) if v is not None)[1]
            for name, (values, _) in scores.items()
            if any(v is not None for v in values)
        }
        figure.set_label(
            f"{title}. "
            + "; ".join(f"{name} is highest at layer {i}" for name, i in highest.items())
        )
    return figure


def plan_stack(entries: Sequence[tuple[str, int]], title: str) -> Figure:
    """A plan as a stack of blocks, bottom first, each with the layer that it comes from.

    Args:
        entries: (action, source layer) of each student layer.

    Raises:
        UserError: matplotlib is not installed.
    """
    need_matplotlib()
    n = len(entries)
    row = min(0.2, max(7.2 / n, 0.115))
    height = n * row + 0.95
    used = [action for action in ACTIONS if any(action == a for a, _ in entries)]
    with drawing():
        figure = Figure(figsize=(3.3, height))
        ax = _axes(figure, 0.5, 0.3, 1.5, n * row)
        ax.set_xlim(0, 1.5)
        ax.set_ylim(-0.5, n - 0.5)
        ax.set_axis_off()
        size = min(7.5, row * 52)
        for i, (action, source) in enumerate(entries):
            kind = ACTIONS[action]
            box = FancyBboxPatch(
                (0, i - 0.41),
                1.5,
                0.82,
                boxstyle="round,pad=0,rounding_size=0.03",
                mutation_aspect=1 / row,
                linewidth=0,
                facecolor=LIGHT[KINDS[kind]],
                alpha=0.5 if kind == "attention" else 1.0,
                clip_on=False,
            )
            ax.add_patch(box)
            color = LIGHT["ink"] if kind == "attention" else LIGHT["paper"]
            ax.text(0.75, i, str(source), ha="center", va="center", fontsize=size, color=color)
            if i % _step(n) == 0:
                style: dict[str, Any] = {"ha": "right", "va": "center", "color": LIGHT["muted"]}
                ax.text(-0.08, i, str(i), fontsize=7.5, **style)
        for k, action in enumerate(used):
            y = n - 1 - k * 0.24 / row
            mark = FancyBboxPatch(
                (1.66, y - 0.07 / row),
                0.14,
                0.14 / row,
                boxstyle="square,pad=0",
                linewidth=0,
                facecolor=LIGHT[KINDS[ACTIONS[action]]],
                alpha=0.5 if action == "keep" else 1.0,
                clip_on=False,
            )
            ax.add_patch(mark)
            count = sum(a == action for a, _ in entries)
            ax.text(1.88, y, f"{action} {count}", va="center", fontsize=9)
        _title(figure, title)
        figure.set_label(
            f"{title}, bottom first: "
            + ", ".join(f"{action} {source}" for action, source in entries)
        )
    return figure


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def _title(figure: Figure, words: str) -> None:
    top = 1 - 0.1 / figure.get_figheight()
    figure.suptitle(words, x=0.03, y=top, ha="left", fontsize=11, fontweight="semibold")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return not _MISSING


def need_matplotlib() -> None:
    """Raise UserError where nothing can be drawn, for steps to ask before they work."""
    if _MISSING:
        raise UserError("matplotlib", "is not installed", "pip install 'tamba[report]'")
