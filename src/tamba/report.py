"""One record a run, and the page that shows it.

`Record` is the schema of ``report.json``: steps fill the sections they know, and every section is
optional, so a lone evaluation and a whole conversion write the same file. `write_report` puts it
beside a self-contained ``report.html`` (no network, no scripts) and the plots as files. This file
knows nothing about models; `tamba.plots` draws.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jinja2
import pydantic
import torch
from markupsafe import Markup

from tamba import plots
from tamba.artefact import versions, write_file
from tamba.errors import UserError
from tamba.progress import clock

MIXERS = {"attention": "attention", "mamba1": "Mamba-1", "mamba2": "Mamba-2"}


class _Part(pydantic.BaseModel):
    """A part of the record; unknown keys and numbers that are not finite are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Perplexity(_Part):
    """Held-out perplexity; `ratio` is student over teacher, `tokens` those scored.

    Args:
        ratio_error: standard error of `ratio`, from differences block by block.
        length: tokens a window.
        kl: mean KL(teacher, student) of a token, in nats.
        agreement: share of positions where both find the same token likeliest.
        bits_per_byte: of ``teacher`` and ``student``.
    """

    student: float
    teacher: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    tokens: int
    length: int | None = None
    kl: float | None = None
    agreement: float | None = None
    bits_per_byte: dict[str, float] | None = None


class Layers(_Part):
    """How many layers there are, and how many of them were converted from attention."""

    total: int
    converted: int


class PlanLayer(_Part):
    """One student layer: its mixer, how it came about, and the layer of the source it came from."""

    mixer: str
    origin: Literal["kept", "converted", "transplanted", "reinitialized"]
    source: str | None = None
    source_layer: int | None = None


class FrontierPoint(_Part):
    """Perplexity ratio with `converted` layers after a `stage` of repair."""

    converted: int
    ratio: float
    stage: str
    chosen: bool = False


class RepairStep(_Part):
    """Perplexity ratio after a step of the run, e.g. surgery, least squares, align, distil."""

    name: str
    ratio: float


class LossPoint(_Part):
    """A training loss (what it measures is the stage's affair) after `tokens` of that stage."""

    stage: str
    tokens: int
    loss: float


class Chat(_Part):
    """One prompt and the greedy answers to it."""

    prompt: str
    student: str
    teacher: str | None = None


class CachePoint(_Part):
    """Cache bytes of one sequence of `context` tokens."""

    context: int
    student: int
    teacher: int | None = None


class Score(_Part):
    """One number of one model, over `n` items (windows, questions, cases).

    Args:
        error: standard error.
        low, high: 95 % interval: Wilson's for shares, else from the standard error.
    """

    value: float
    n: int
    error: float | None = None
    low: float | None = None
    high: float | None = None


class Point(Score):
    """A score at `x`: a length, a number of entries, the end of a range of positions."""

    x: float


class Paired(_Part):
    """Student minus teacher on the same items.

    Args:
        low, high: 95 % interval of `difference`, by bootstrap over items.
        p: two-sided p-value of `test`.
        student_higher, teacher_higher: items where one has more than the other.
    """

    difference: float
    n: int
    low: float
    high: float
    p: float
    test: Literal["mcnemar", "permutation", "bootstrap"]  # the last in records of before
    student_higher: int
    teacher_higher: int


class Curve(_Part):
    """Scores along an axis, by role (``student``, ``teacher``); `axis` says what `x` counts."""

    axis: str
    points: dict[str, list[Point]]


class Measured(_Part):
    """What one suite found.

    Args:
        about: the suite in a line.
        settings: everything that decides the result beside the model, seeds and digests included.
        scores: by role and metric.
        curves: by metric.
        paired: student against teacher, by metric.
        rows: a table, where the result is one (memory, speed).
        files: what was written for other tools, by name, relative to the record.
        seconds: wall time, items that were finished before not counted.
        problem: why it is not complete; everything else is what was done until then.
    """

    about: str = ""
    settings: dict[str, Any] = {}
    scores: dict[str, dict[str, Score]] = {}
    curves: dict[str, Curve] = {}
    paired: dict[str, Paired] = {}
    rows: list[dict[str, str | int | float | None]] = []
    files: dict[str, str] = {}
    seconds: float = 0.0
    problem: str | None = None


class Record(_Part):
    """Everything one run is remembered by.

    Args:
        parameters: of ``teacher`` and ``student``.
        scores: harm done by replacing each layer, bottom first; None where not measured.
        seconds: wall time by step, in the order of the run.
        digests: SHA-256 of what went in, by name.
        suites: what each suite of an evaluation found, by its name.
    """

    schema_version: Literal[1] = 1
    name: str
    teacher: str | None = None
    command: str = ""
    date: str = ""
    perplexity: Perplexity | None = None
    layers: Layers | None = None
    parameters: dict[str, int] | None = None
    plan: list[PlanLayer] = []
    scores: list[float | None] = []
    score_name: str = "harm"
    frontier: list[FrontierPoint] = []
    repair: list[RepairStep] = []
    training: list[LossPoint] = []
    memory: list[CachePoint] = []
    chat: list[Chat] = []
    answer: str | None = None
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    hardware: dict[str, str] = {}
    digests: dict[str, str] = {}
    recipe: str | None = None
    suites: dict[str, Measured] = {}

    @classmethod
    def begin(cls, name: str, **sections: Any) -> Record:
        """A record that knows the time, the command, the machine and the versions in use."""
        known: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": _command(sys.argv),
            "versions": versions(),
            "hardware": _hardware(),
        }
        return cls(name=name, **(known | sections))

    def updated(self, **sections: Any) -> Record:
        """The same record with sections replaced, checked anew."""
        return Record.model_validate(self.model_dump() | sections)

    @property
    def quality_kept(self) -> float | None:
        """Teacher's perplexity over the student's, in percent."""
        ratio = self.perplexity.ratio if self.perplexity else None
        return None if ratio is None else 100 / ratio


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a ``report.json``. Raises UserError where it is missing or not a record."""
    try:
        return Record.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            str(path),
            error.strerror or str(error),
            "name the folder of a run or an evaluation, or its report.json",
        ) from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: {place}", f"not a record ({first['msg']})") from error


def write_report(record: Record, out: str | os.PathLike[str], *, html: bool = True) -> Path:
    """Write ``report.json``, ``report.html`` and ``plots/*.png, *.svg`` into the folder `out`.

    Each file appears whole or not at all, the record last. Returns the path of the record.

    Args:
        html: write the page and the plots too, which takes matplotlib.

    Raises:
        UserError: `out` cannot be a folder, the disk is full, or matplotlib is not installed.
    """
    folder = Path(out)
    files: dict[str, bytes] = {}
    if html:
        # All of it is drawn before any of it is written.
        for name, figure in plots.draw_all(record, titles=True):
            for ending in ("png", "svg"):
                files[f"plots/{name}.{ending}"] = plots.to_bytes(figure, ending)
        files["report.html"] = render(record).encode()
    files["report.json"] = (record.model_dump_json(indent=2) + "\n").encode()
    _write_all(folder, files)
    return folder / "report.json"


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
    except OSError as error:
        raise UserError(
            str(folder), error.strerror or str(error), "choose another --out, or make room"
        ) from error


def report(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Draw the page of a run again, or one that compares several.

    Args:
        runs: folders with a ``report.json``, or such files. One is drawn as `write_report` does;
            of several the folder's name is the run's, and `out` gets ``report.html``,
            ``comparison.json`` (`Comparison`) and the plots.
        out: the folder.

    Returns:
        The page.

    Raises:
        UserError: there is no record, a run is given twice, or `out` cannot be written.
    """
    if not runs:
        raise UserError("report", "no run was given", "name folders that hold a report.json")
    found: dict[str, Record] = {}
    folders: set[Path] = set()
    for path in map(Path, runs):
        folder = (path if path.is_dir() else path.parent).resolve()
        if folder in folders:
            raise UserError(str(path), "is given twice", "name every run once")
        folders.add(folder)
        name = _run_name(folder, found)
        found[name] = read_record(path / "report.json" if path.is_dir() else path)
    if len(found) == 1:
        return write_report(next(iter(found.values())), out).with_name("report.html")
    comparison = compare(found)
    files: dict[str, bytes] = {}
    for name, figure in _comparing(found, titles=True):
        for ending in ("png", "svg"):
            files[f"plots/{name}.{ending}"] = plots.to_bytes(figure, ending)
    files["report.html"] = _render_comparison(found, comparison).encode()
    files["comparison.json"] = (comparison.model_dump_json(indent=2) + "\n").encode()
    _write_all(Path(out), files)
    return Path(out) / "report.html"


def _run_name(folder: Path, taken: Container[str]) -> str:
    """A short name that no other run has: the folder's, with those above it where it must."""
    names = ("/".join(folder.parts[-k:]) for k in range(1, len(folder.parts) + 1))
    return next(name for name in names if name not in taken)


class Row(_Part):
    """One quantity of a comparison.

    Args:
        name: what it is; `suite` says where it was measured, if by a suite.
        values: by run, and of the ``teacher`` where it was measured too.
        best: the run that is best, where more or less is better and it is ahead of the next by
            more than both standard errors.
        alike: whether it was measured on the same items in the same way in all runs that have it;
            where not, none is best.
        share: whether it is a share, shown in percent.
    """

    name: str
    suite: str | None = None
    values: dict[str, Score]
    best: str | None = None
    share: bool = False
    alike: bool = True


class Comparison(_Part):
    """Several runs side by side."""

    runs: list[str]
    rows: list[Row]


def compare(runs: Mapping[str, Record]) -> Comparison:
    """Every quantity that at least one of the runs has, and which run is best at it."""
    rows: list[Row] = []

    def add(
        name: str,
        values: dict[str, Score],
        *,
        suite: str | None = None,
        sign: int = 0,
        alike: bool = True,
    ) -> None:
        if any(run in values for run in runs):
            share = sign > 0 and is_share(name, values.values())
            known = {run: v for run, v in values.items() if run in runs}
            best = _best(known, sign if alike else 0)
            row = Row(name=name, suite=suite, values=values, best=best, share=share, alike=alike)
            rows.append(row)

    def of(part: Callable[[Record], float | None]) -> dict[str, Score]:
        found = {run: part(record) for run, record in runs.items()}
        return {run: Score(value=v, n=1) for run, v in found.items() if v is not None}

    # Held-out text that is not the same gives perplexities that say nothing of the models.
    on = {
        (p.tokens, p.length, _what_decides(r.suites["ppl"]))
        if "ppl" in r.suites
        else (p.tokens, p.length, f"{p.teacher:.3g}" if p.teacher else "")
        for r in runs.values()
        if (p := r.perplexity)
    }
    same = len(on) < 2
    add("layers converted", of(lambda r: r.layers.converted if r.layers else None))
    add(
        "perplexity ratio to the teacher",
        {
            run: Score(value=p.ratio, n=p.tokens, error=p.ratio_error)
            for run, record in runs.items()
            if (p := record.perplexity) and p.ratio
        },
        sign=-1,
        alike=same,
    )
    perplexity = of(lambda r: r.perplexity.student if r.perplexity else None)
    teachers = {r.perplexity.teacher for r in runs.values() if r.perplexity} - {None}
    if len(teachers) == 1 and (known := next(iter(teachers))) is not None:
        perplexity["teacher"] = Score(value=known, n=1)
    add("perplexity", perplexity, sign=-1, alike=same)
    add(
        "KL from the teacher, nats",
        of(lambda r: r.perplexity.kl if r.perplexity else None),
        sign=-1,
        alike=same,
    )
    for context in (8192, 32768):
        name = f"cache at {context // 1024}k tokens, MiB"
        add(name, of(partial(_cache_mib, context=context)), sign=-1)
    add("seconds, all steps", of(lambda r: sum(r.seconds.values()) or None))
    for suite in dict.fromkeys(s for record in runs.values() for s in record.suites):
        parts = {run: r.suites[suite] for run, r in runs.items() if suite in r.suites}
        alike = len({_what_decides(part) for part in parts.values()}) == 1
        for metric in dict.fromkeys(
            m for part in parts.values() for m in part.scores.get("student", {})
        ):
            values = {
                run: part.scores["student"][metric]
                for run, part in parts.items()
                if metric in part.scores.get("student", {})
            }
            beside = [
                part.scores["teacher"][metric]
                for part in parts.values()
                if metric in part.scores.get("teacher", {})
            ]
            # Runs of one teacher on the same items agree to the last digit or so.
            if beside and all(math.isclose(t.value, beside[0].value, rel_tol=1e-3) for t in beside):
                values["teacher"] = beside[0]
            add(metric, values, suite=suite, sign=direction(metric), alike=alike)
    return Comparison(runs=list(runs), rows=rows)


_TELLING = frozenset({"judge_usage", "left_out", "data", "scored_tokens"})
"""Settings that tell where items came from or what they cost; digests decide what they are."""


def _what_decides(measured: Measured) -> str:
    """The settings of a suite that decide its figures, as a text."""
    settings = measured.settings
    if "tokens" not in settings and "text" not in settings:  # windows have `tokens`, recall `text`
        return json.dumps({k: v for k, v in settings.items() if k != "judge_usage"}, sort_keys=True)
    return json.dumps({k: v for k, v in settings.items() if k not in _TELLING}, sort_keys=True)


def _cache_mib(record: Record, context: int) -> float | None:
    return next((p.student / 2**20 for p in record.memory if p.context == context), None)


_HIGHER = (
    "acc",
    "exact_match",
    "agreement",
    "right",
    "win",
    "per_second",
    "score",
    "likelihood",
)
_LOWER = ("perplexity", "nll", "loss", "kl", "bits", "break_even")


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where nobody can say."""
    if any(word in metric for word in _LOWER):
        return -1
    return int(any(word in metric for word in _HIGHER))


def is_share(metric: str, scores: Iterable[Score]) -> bool:
    """Whether a metric's scores are shares of cases; grades of a judge never are."""
    graded = metric.startswith("score") or "likelihood" in metric
    return not graded and direction(metric) > 0 and all(0 <= s.value <= 1 for s in scores)


def _best(values: dict[str, Score], sign: int) -> str | None:
    if not sign or len(values) < 2:
        return None
    first, second = sorted(values, key=lambda run: -sign * values[run].value)[:2]
    a, b = values[first], values[second]
    noise = (a.error or 0.0) + (b.error or 0.0)
    return first if abs(a.value - b.value) > noise else None


def _comparing(runs: Mapping[str, Record], *, titles: bool) -> list[tuple[str, Any]]:
    """The drawings of a comparison."""
    points = {
        run: (record.layers.converted, record.perplexity.ratio)
        for run, record in runs.items()
        if record.layers and record.perplexity and record.perplexity.ratio
    }
    curves: dict[str, tuple[str, str, dict[str, list[Point]]]] = {}
    for run, record in runs.items():
        for name, title, axis, lines in plots.suite_curves(record):
            _, _, found = curves.setdefault(name, (title, axis, {}))
            for model, line in lines.items():
                # The teacher is drawn once, as the first run saw it.
                found.setdefault("teacher" if model == "teacher" else run, line)
    return plots.draw_comparison(points, curves, titles=titles)


def _render_comparison(runs: Mapping[str, Record], comparison: Comparison) -> str:
    figures = {
        name: Markup(plots.to_inline(figure, name))
        for name, figure in _comparing(runs, titles=False)
    }
    return (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            runs=runs,
            figures=figures,
            palette=plots.PALETTE,
            teacher=any("teacher" in row.values for row in comparison.rows),
        )
    )


def render(record: Record) -> str:
    """The page of a record, as one HTML text that needs nothing else."""
    figures: dict[str, Markup | None] = dict.fromkeys(plots.NAMES)
    figures |= {
        # The drawings are ours; texts of the record inside them were escaped when they were drawn.
        name: Markup(plots.to_inline(figure, name))
        for name, figure in plots.draw_all(record, titles=False)
    }
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            record=record,
            figures=figures,
            curves={name: title for name, title, *_ in plots.suite_curves(record)},
            palette=plots.PALETTE,
            mixers=MIXERS,
            kinds=_kinds(record),
            becomes=_becomes(record),
            savings=_savings(record),
            speed=_speed(record),
            total_seconds=sum(record.seconds.values()),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tamba", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "bytes": plots.byte_size,
        "clock": clock,
        "score": score_text,
        "p_value": _p_value,
        "columns": _columns,
    }
    environment.globals |= {"is_share": is_share, "direction": direction, "cell": cell}
    return environment


def score_text(score: Score, share: bool = False) -> str:
    """A score with its standard error: ``41.2 % ± 0.7``, ``19.7 ± 0.3``."""
    scale, sign = (100.0, " %") if share else (1.0, "")
    if not share and not score.error and score.value == int(score.value):
        return f"{int(score.value):,}"
    value = number(scale * score.value, 3)
    if share and len(value.partition(".")[2]) > 1:
        value = f"{scale * score.value:.1f}"  # no share of cases is known to a hundredth
    if not score.error:
        return f"{value}{sign}"
    digits = len(value.partition(".")[2])
    return f"{value}{sign} ± {scale * score.error:.{digits}f}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _speed(record: Record) -> tuple[float, float, int] | None:
    """(student over teacher, tokens a second of the student, context) of decoding, where both ran.

    At the longest context that was measured.
    """
    measured = record.suites.get("speed")
    curve = measured.curves.get("decode_tokens_per_second") if measured else None
    if curve is None or len(curve.points) < 2:
        return None
    by_role = {role: {p.x: p.value for p in line} for role, line in curve.points.items()}
    shared = set(by_role["student"]) & set(by_role["teacher"])
    if not shared:
        return None
    x = max(shared)
    return by_role["student"][x] / by_role["teacher"][x], by_role["student"][x], int(x)


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, thousands apart, never in scientific notation."""
    if value == int(value) and abs(value) >= 10 ** (digits - 1):
        return f"{int(value):,}".replace("-", "−")
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(digits - before, 0)}f}".replace("-", "−")


def _kinds(record: Record) -> list[str]:
    """The kinds of layer in the plan, each once, in the order of the palette."""
    present = {plots.kind_of(layer) for layer in record.plan}
    return [kind for kind in plots.KINDS if kind in present]


def _becomes(record: Record) -> str:
    """What the changed layers are now, in words; nothing where none is."""
    names = sorted({MIXERS.get(p.mixer, p.mixer) for p in record.plan if p.origin != "kept"})
    if not names and record.layers and record.layers.converted:
        return "Mamba"  # a record that names no layers
    return " and ".join(names)


_BYTES = frozenset(
    [
        "floor",
        "weights",
        "logits",
        "kv",
        "state",
        "activations",
        "peak",
        "resident_peak",
        "slack",
        "driver",
    ]
)
"""Columns of the suite `memory`."""


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, each once: a row may lack some, or hold a note."""
    return list(dict.fromkeys(key for row in rows for key in row))


def cell(key: str, value: str | float | None) -> str:
    """A value of a table of rows, in the unit that its column has."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if key in _BYTES:
        return plots.byte_size(value)
    return f"{value:,}" if isinstance(value, int) else number(value, 4)


def _savings(record: Record) -> dict[int, CachePoint]:
    """Cache at 8k and 32k, or at the longest context there is, by context."""
    known = {p.context: p for p in record.memory if p.teacher}
    return {c: known[c] for c in (8192, 32768) if c in known} or dict(list(known.items())[-1:])


def _command(argv: Sequence[str]) -> str:
    """The command line in words that a shell takes again."""
    program = Path(argv[0])
    # `python -m tamba` names a file of the package.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *argv[1:]])


def _hardware() -> dict[str, str]:
    found = {"system": f"{platform.system()} {platform.machine()}"}
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        cpu = None
    found["cpu"] = cpu.group(1) if cpu else platform.processor() or "unknown"
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["cores"] = str(allowed)
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory"] = plots.byte_size(memory)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
