"""The drawings of a report, each once: one figure becomes PNG, SVG and the SVG inside the page.

The page swaps the fixed colours for CSS variables, so that a drawing follows the reader's light or
dark theme. Figures are half a text column wide, so their words stay readable on a phone.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from tamba.errors import UserError

try:
    import matplotlib as mpl
    from matplotlib import font_manager
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
except ImportError:
    # The extra `report`; measuring works without it.
    _MISSING = True
else:
    _MISSING = False

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tamba.report import PlanLayer, Point, Record

PALETTE = {
    # name: (light, dark). Told apart in either kind of red-green blindness by lightness too.
    "ink": ("#1c2530", "#e9edf2"),
    "muted": ("#5f6b79", "#9aa6b4"),
    "grid": ("#e3e7ec", "#2b343f"),
    "paper": ("#ffffff", "#181f27"),
    "teacher": ("#8693a5", "#8492a6"),
    "student": ("#0c7a6d", "#3cc5b1"),
    "donor": ("#7557c7", "#a991f0"),
    "fresh": ("#c4841a", "#e3b050"),
    "fifth": ("#2c6fb3", "#6fb0f0"),
    "sixth": ("#b0405a", "#ee8ba2"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}

KINDS = {
    # kind of layer: colour
    "attention": "teacher",
    "converted": "student",
    "transplanted": "donor",
    "reinitialized": "fresh",
}

NAMES = ("frontier", "layers", "repair", "training", "memory")
"""Of the drawings of a run; those of its suites are named by suite and metric."""

_LINES = ("student", "donor", "fresh", "fifth", "sixth", "ink")
"""Colours of models that are compared; with more of them colours come again in dashes."""

_WIDTH = 4.6
"""Inches; 331 units of the SVG, about the width of a phone."""

_FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
_STYLE = {
    # Names of stages and scores are words, whatever signs are in them.
    "text.parse_math": False,
    "font.size": 10,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["grid"],
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.titlesize": 11,
    "axes.titleweight": "semibold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": LIGHT["paper"],
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}


def kind_of(layer: PlanLayer) -> str:
    """The word of `KINDS` for a layer of a plan."""
    return "attention" if layer.origin == "kept" else layer.origin


def draw_all(record: Record, *, titles: bool) -> list[tuple[str, Figure]]:
    """(name, figure) of every drawing the record has data for; `titles` for files that stand alone.

    A figure's label says in words what it shows, for those who do not see it.

    Raises:
        UserError: matplotlib is not installed.
    """
    if _MISSING:
        raise UserError("matplotlib", "is not installed", "pip install 'tamba[report]'")
    drawings: dict[str, tuple[str, Callable[[Record, float], Figure | None]]] = {
        "frontier": ("Perplexity ratio to the teacher, by layers converted", _frontier),
        "layers": ("Layers, bottom first", _layers),
        "repair": ("Perplexity ratio to the teacher, after each step", _repair),
        "training": ("Training loss", _training),
        "memory": ("Cache of one sequence", _memory),
    }
    figures = []
    with drawing():
        for name, (title, draw) in drawings.items():
            figure = draw(record, 0.42 if titles else 0.0)
            if figure is None:
                continue
            if titles:
                _title(figure, title)
            figures.append((name, figure))
        for name, title, axis, lines in suite_curves(record):
            figure = _curve(title, axis, lines, 0.42 if titles else 0.0)
            if titles:
                _title(figure, title)
            figures.append((name, figure))
    return figures


def suite_curves(record: Record) -> Iterator[tuple[str, str, str, dict[str, list[Point]]]]:
    """(name, title, axis, points by model) of every curve that the suites of a run measured."""
    for suite, measured in record.suites.items():
        for metric, curve in measured.curves.items():
            lines = {
                {"student": "hybrid"}.get(role, role) if len(curve.points) > 1 else "model": points
                for role, points in sorted(curve.points.items(), reverse=True)
            }
            yield f"{suite}-{metric}", f"{suite}: {metric.replace('_', ' ')}", curve.axis, lines


def draw_comparison(
    points: dict[str, tuple[int, float]],
    curves: dict[str, tuple[str, str, dict[str, list[Point]]]],
    *,
    titles: bool,
) -> list[tuple[str, Figure]]:
    """(name, figure) of what several runs have in common.

    Args:
        points: by run, layers converted and perplexity ratio.
        curves: by name, title, axis, and by run (or ``teacher``) the points.
        titles: for files that stand alone.

    Raises:
        UserError: matplotlib is not installed.
    """
    if _MISSING:
        raise UserError("matplotlib", "is not installed", "pip install 'tamba[report]'")
    figures = []
    with drawing():
        if len(points) > 1:
            figure = _runs(points, 0.42 if titles else 0.0)
            if titles:
                _title(figure, "Perplexity ratio to the teacher, by layers converted")
            figures.append(("runs", figure))
        for name, (title, axis, lines) in curves.items():
            figure = _curve(title, axis, lines, 0.42 if titles else 0.0)
            if titles:
                _title(figure, title)
            figures.append((name, figure))
    return figures


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a ``png`` or ``svg`` file, the same bytes for the same drawing."""
    out = io.BytesIO()
    with drawing({"svg.hashsalt": "tamba"}):
        dated = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=200, metadata=dated)
    return out.getvalue()


def to_inline(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page that defines the palette as CSS variables.

    `name` keeps its ids apart from those of other drawings on the page.
    """
    out = io.BytesIO()
    with drawing({"svg.hashsalt": name}):
        unsigned = {"Date": None, "Creator": None}
        figure.savefig(out, format="svg", transparent=True, metadata=unsigned)
    svg = out.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="(?!tamba)', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, hex_ in LIGHT.items():
        svg = svg.replace(hex_, f"var(--{color})")
    # The page gives size and font; here they would win over it.
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]+", _font, svg)
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    label = escape(str(figure.get_label()), quote=True)
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None
    box = re.search(r'viewBox="[^"]+"', head.group())
    assert box is not None
    opening = (
        f'<svg role="img" aria-label="{label}" {box.group()} xmlns="http://www.w3.org/2000/svg"'
    )
    opening += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    return opening + svg[head.end() :]


@contextmanager
def drawing(more: dict[str, str] | None = None) -> Iterator[None]:
    """Our settings, and silence about letters and weights that no installed font has."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    installed = set(font_manager.get_font_names())
    fonts = {"font.family": [name for name in _FONTS if name in installed]}
    with warnings.catch_warnings(), mpl.rc_context(_STYLE | fonts | (more or {})):
        warnings.simplefilter("ignore", UserWarning)
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def byte_size(size: float) -> str:
    """Bytes as people read them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}px" + (f"; font-weight: {weight}" if weight else "")


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height))


def _title(figure: Figure, title: str) -> None:
    top = 1 - 0.1 / figure.get_figheight()
    # The widest font takes 0.63 of its size a letter: long titles are set smaller, not cut off.
    size = min(11, 0.95 * _WIDTH * 72 / (0.63 * len(title)))
    figure.suptitle(title, x=0.03, y=top, ha="left", fontsize=size, fontweight="semibold")


def _place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h))


def _short(value: float) -> str:
    """1,024 as 1k, 1,500,000 as 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _context(tokens: float) -> str:
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else f"{tokens:g}"


def _ratio(value: float) -> str:
    """Near 1, where good students lie, to a thousandth."""
    if abs(value - 1) < 0.1:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _digits(ticks: Iterable[float]) -> int:
    """Decimals that tell the ticks of an axis apart: two, or as many as it takes."""
    shown = list(ticks)
    enough = (n for n in range(2, 9) if all(abs(round(t, n) - t) < 1e-9 for t in shown))
    return next(enough, 9)


def _ratio_axis(ax: Axes, values: list[float]) -> None:
    """A ratio's axis: linear where all are near 1, logarithmic where surgery alone is far off."""
    low, high = min([1.0, *values]), max(values)
    ax.axhline(1, color=LIGHT["teacher"], linewidth=1.2, dashes=(3, 3))
    if high <= 3:
        room = 0.16 * (high - low) or 0.05
        ax.set_ylim(low - room / 2, high + room)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        digits = _digits(ax.get_yticks())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.{digits}f}"))
        return
    ax.set_yscale("log")
    ax.set_ylim(low * 0.85, high * (high / low) ** 0.16)
    within = (1, 2, 5) if high < 200 else (1,)
    steps = [s * 10.0**k for k in range(12) for s in within]
    ax.yaxis.set_major_locator(FixedLocator([s for s in steps if s <= high * 2]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))


def _note(
    ax: Axes, text: str, at: tuple[float, float], by: tuple[float, float], **style: Any
) -> None:
    """Words beside a point, `by` so many units of the drawing."""
    ax.annotate(text, at, by, textcoords="offset points", **style)


def _frontier(record: Record, top: float) -> Figure | None:
    points = record.frontier
    if not points:
        return None
    figure = _figure(2.95 + top)
    ax = _place(figure, 0.52, 0.5, 3.9, 2.35)
    _ratio_axis(ax, [p.ratio for p in points])
    stages = list(dict.fromkeys(p.stage for p in points))
    chosen = [p for p in points if p.chosen]
    bright = {p.stage for p in chosen} or {stages[-1]}
    for stage in stages:
        line = sorted((p for p in points if p.stage == stage), key=lambda p: p.converted)
        color, words = ("student", "student") if stage in bright else ("teacher", "muted")
        x, y = [p.converted for p in line], [p.ratio for p in line]
        ax.plot(x, y, color=LIGHT[color], marker="o", markersize=4.5, markeredgewidth=0)
        # A line is named where it ends; a point alone, below the lines that rise to its right.
        place, side = ((4, 8), "right") if len(line) > 1 else ((12, -3), "left")
        _note(ax, stage.replace("_", " "), (x[-1], y[-1]), place, ha=side, color=LIGHT[words])
    for p in chosen:
        ax.plot(
            p.converted,
            p.ratio,
            color=LIGHT["student"],
            marker="o",
            markersize=12,
            fillstyle="none",
            markeredgewidth=1.8,
        )
    # A corner is free of lines: ratios rise to the right.
    choice = "\n".join(f"{p.converted} layers chosen, ratio {_ratio(p.ratio)}" for p in chosen)
    style: dict[str, Any] = {"va": "top", "color": LIGHT["student"], "weight": "semibold"}
    ax.text(0.02, 0.98, choice, transform=ax.transAxes, **style)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.set_xlabel("layers converted")
    ax.margins(x=0.04)
    figure.set_label(
        "Perplexity ratio by layers converted. "
        + "; ".join(f"{p.stage}, {p.converted} layers: {_ratio(p.ratio)}" for p in points)
    )
    return figure


def _layers(record: Record, top: float) -> Figure | None:
    n = len(record.plan) or len(record.scores)
    if n == 0:
        return None
    kinds = [kind_of(layer) for layer in record.plan] or ["attention"] * n
    scored = any(score is not None for score in record.scores)
    # As tall as the two figures beside it on the page, where the number of layers allows.
    row = min(0.218, max(6.55 / n, 0.1))
    figure = _figure(n * row + 0.5 + top)
    figure.set_label(
        "Layers, bottom first: " + ", ".join(f"{i} {kind}" for i, kind in enumerate(kinds))
    )
    width = 0.62 if scored else 1.6
    stack = _place(figure, 0.34, 0.45, width, n * row)
    stack.set_xlim(0, width)
    stack.set_ylim(-0.5, n - 0.5)
    stack.set_axis_off()
    for i, kind in enumerate(kinds):
        box = FancyBboxPatch(
            (0, i - 0.38),
            width,
            0.76,
            boxstyle="round,pad=0,rounding_size=0.03",
            mutation_aspect=1 / row,
            linewidth=0,
            facecolor=LIGHT[KINDS[kind]],
            alpha=0.5 if kind == "attention" else 1.0,
            clip_on=False,
        )
        stack.add_patch(box)
        if i % max(1, math.ceil(n / 40)) == 0:
            stack.text(-0.07, i, str(i), ha="right", va="center", size=7.5, color=LIGHT["muted"])
    if not scored:
        return figure
    bars = _place(figure, 0.34 + width + 0.1, 0.45, 4.42 - 0.44 - width, n * row)
    values = [0.0 if s is None else s for s in record.scores][:n]
    values += [0.0] * (n - len(values))
    bars.barh(range(n), values, height=0.46, color=[LIGHT[KINDS[k]] for k in kinds])
    bars.set_ylim(-0.5, n - 0.5)
    positive = [v for v in values if v > 0]
    if positive and min(values) >= 0 and max(positive) > 60 * min(positive):
        bars.set_xscale("log")
        bars.set_xlim(min(positive) / 1.6, max(positive) * 1.15)
        bars.xaxis.set_minor_locator(NullLocator())
    bars.spines["bottom"].set_visible(False)
    bars.grid(axis="x")
    bars.grid(axis="y", visible=False)
    bars.tick_params(axis="y", labelleft=False)
    bars.tick_params(axis="x", labelsize=8.5)
    bars.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    bars.set_xlabel(record.score_name)
    return figure


def _repair(record: Record, top: float) -> Figure | None:
    steps = record.repair
    if not steps:
        return None
    figure = _figure(2.85 + top)
    ax = _place(figure, 0.52, 0.5, 3.9, 2.25)
    ratios = [s.ratio for s in steps]
    _ratio_axis(ax, ratios)
    x = range(len(steps))
    ax.plot(x, ratios, color=LIGHT["student"], marker="o", markersize=6, markeredgewidth=0)
    for i, ratio in enumerate(ratios):
        weight = "semibold" if i == len(ratios) - 1 else "normal"
        # To the upper right, where a falling line has left.
        _note(ax, _ratio(ratio), (i, ratio), (5, 6), ha="left", weight=weight, color=LIGHT["ink"])
    ax.set_xticks(list(x), [s.name.replace(" ", "\n", 1) for s in steps])
    ax.set_xlim(-0.4, len(steps) - 0.4)
    figure.set_label(
        "Perplexity ratio after each step. "
        + "; ".join(f"{s.name}: {_ratio(s.ratio)}" for s in steps)
    )
    return figure


def _training(record: Record, top: float) -> Figure | None:
    stages = list(dict.fromkeys(p.stage for p in record.training))
    if not stages:
        return None
    # Two beside each other at most, so that numbers have room on a phone.
    columns = min(len(stages), 2)
    rows = math.ceil(len(stages) / columns)
    left, gap, height, step = 0.56, 0.54, (1.98 if rows == 1 else 1.3), 2.15
    figure = _figure(0.87 + height + (rows - 1) * step + top)
    width = (4.45 - left - gap * (columns - 1)) / columns
    words = []
    for i, stage in enumerate(stages):
        row, column = divmod(i, columns)
        bottom = 0.5 + (rows - 1 - row) * step
        ax = _place(figure, left + column * (width + gap), bottom, width, height)
        line = [p for p in record.training if p.stage == stage]
        x, y = [p.tokens for p in line], [p.loss for p in line]
        words.append(f"{stage}: from {y[0]:.3g} to {y[-1]:.3g} in {x[-1]:,} tokens")
        ax.plot(x, y, color=LIGHT["student"], linewidth=0.9, alpha=0.3)
        # A stage of one step is a point.
        alone = len(y) == 1
        ax.plot(x, _smooth(y), color=LIGHT["student"], marker="o" if alone else "", markersize=4.5)
        ax.set_title(stage, fontsize=9.5, fontweight="normal", color=LIGHT["muted"], pad=8)
        if min(y) > 0 and max(y) > 20 * min(y):
            ax.set_yscale("log")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        else:
            ax.yaxis.set_major_locator(MaxNLocator(5))
            ax.ticklabel_format(axis="y", useOffset=False)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        if alone:
            ax.set_ylim(0, 1.6 * y[0] if y[0] > 0 else 1)
            ax.xaxis.set_major_locator(FixedLocator(x))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
        ax.margins(x=0.02)
        ax.set_xlabel("tokens")
    figure.set_label("Training loss. " + "; ".join(words))
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Mean over a window of a twelfth of the points, centred, narrower at the ends."""
    half = len(values) // 24
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _memory(record: Record, top: float) -> Figure | None:
    points = record.memory
    if len(points) < 2:
        return None
    figure = _figure(2.85 + top)
    ax = _place(figure, 0.5, 0.5, 3.2, 2.05)
    x = [p.context for p in points]
    lines = [("hybrid", "student", "student", [p.student for p in points])]
    teacher = [p.teacher for p in points if p.teacher is not None]
    if len(teacher) == len(points):
        lines.insert(0, ("teacher", "teacher", "muted", teacher))
    unit, size = ("GiB", 2**30) if max(max(y) for *_, y in lines) >= 2**30 else ("MiB", 2**20)
    for label, color, words, y in lines:
        ax.plot(x, [v / size for v in y], color=LIGHT[color])
        text = f"{label}\n{y[-1] / size:.3g} {unit}"
        style = {"ha": "left", "va": "center", "color": LIGHT[words], "weight": "semibold"}
        _note(ax, text, (x[-1], y[-1] / size), (7, 0), **style)
    ax.set_ylim(0, None)
    ax.set_xlim(0, max(x))
    ax.xaxis.set_major_locator(FixedLocator([max(x) * k / 4 for k in range(5)]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _context(v)))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    _note(ax, unit, (0, 1), (-6, 12), ha="right", color=LIGHT["muted"], xycoords="axes fraction")
    ax.set_xlabel("context, tokens")
    figure.set_label(
        "Cache of one sequence by context. "
        + "; ".join(
            f"{p.context:,} tokens: hybrid {byte_size(p.student)}"
            + (f", teacher {byte_size(p.teacher)}" if p.teacher else "")
            for p in points
        )
    )
    return figure


def _curve(title: str, axis: str, lines: dict[str, list[Point]], top: float) -> Figure:
    """Scores along an axis, a line a model, with their intervals."""
    columns = max(1, 56 // (max(map(len, lines), default=1) + 8))
    rows = math.ceil(len(lines) / columns) if len(lines) > 1 else 0
    figure = _figure(2.85 + 0.2 * rows + top)
    ax = _place(figure, 0.55, 0.5, 3.85, 2.2)
    values = [p.value for points in lines.values() for p in points]
    shares = all(0 <= p.value <= 1 and p.low is not None for ps in lines.values() for p in ps)
    for (name, points), (color, dashes) in zip(lines.items(), _looks(lines), strict=True):
        x, y = [p.x for p in points], [p.value for p in points]
        ax.plot(
            x, y, color=LIGHT[color], marker="o", markersize=4, markeredgewidth=0, dashes=dashes,
            label=name,
        )  # fmt: skip
        low = [p.low for p in points if p.low is not None]
        high = [p.high for p in points if p.high is not None]
        if len(low) == len(high) == len(points):
            ax.fill_between(x, low, high, color=LIGHT[color], alpha=0.14, linewidth=0)
    if shares:
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f} %"))
    else:
        if min(values, default=0) >= 0 and max(values, default=0) > 1.5 * min(values, default=0):
            ax.set_ylim(0, None)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    places = sorted({p.x for points in lines.values() for p in points})
    if len(places) > 2 and places[0] > 0 and places[-1] >= 8 * places[0]:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
    # Where it was measured, and nowhere else.
    shown = places if len(places) <= 8 else places[:: math.ceil(len(places) / 8)]
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _context(v)))
    ax.set_xlabel(axis)
    if len(lines) > 1:
        height = figure.get_figheight()
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.55 / _WIDTH - 0.02, 1 - top / height),
            ncols=columns, frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.4,
            borderaxespad=0.0,
        )  # fmt: skip
    ends = (f"{n}: {ps[0].value:.3g} to {ps[-1].value:.3g}" for n, ps in lines.items() if ps)
    figure.set_label(f"{title}, along {axis}. " + "; ".join(ends))
    return figure


def _looks(lines: dict[str, Any]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """A colour and dashes for each line: the teacher's own, the others in the order they come."""
    k = 0
    for name in lines:
        if name == "teacher":
            yield "teacher", (1, 0)
            continue
        yield _LINES[k % len(_LINES)], (1, 0) if k < len(_LINES) else (3, 2)
        k += 1


def _runs(points: dict[str, tuple[int, float]], top: float) -> Figure:
    """Runs by layers converted and perplexity ratio."""
    figure = _figure(2.95 + top)
    ax = _place(figure, 0.52, 0.5, 3.9, 2.35)
    _ratio_axis(ax, [ratio for _, ratio in points.values()])
    most = max(n for n, _ in points.values())
    for (name, (n, ratio)), (color, _) in zip(points.items(), _looks(points), strict=True):
        ax.plot(n, ratio, color=LIGHT[color], marker="o", markersize=8, markeredgewidth=0)
        side = "right" if n > 0.6 * most else "left"
        _note(
            ax, name, (n, ratio), (-9 if side == "right" else 9, -3), ha=side, color=LIGHT["muted"]
        )
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.set_xlabel("layers converted")
    ax.margins(x=0.12)
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, most - 2), max(high, most + 2))  # layers are whole, also where all agree
    figure.set_label(
        "Perplexity ratio by layers converted. "
        + "; ".join(f"{name}, {n} layers: {_ratio(ratio)}" for name, (n, ratio) in points.items())
    )
    return figure
