"""One record a run, and the page that shows it.

`Record` is the schema of ``report.json``: steps fill the sections they know, and every section is
optional, so a lone evaluation and a whole conversion write the same file. `write_report` puts it
beside a self-contained ``report.html`` (no network, no scripts) and the plots as files. This file
knows nothing about models; `tamba.plots` draws.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from datetime import UTC, datetime
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


class Record(_Part):
    """Everything one run is remembered by.

    Args:
        parameters: of ``teacher`` and ``student``.
        scores: harm done by replacing each layer, bottom first; None where not measured.
        seconds: wall time by step, in the order of the run.
        digests: SHA-256 of what went in, by name.
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

    @classmethod
    def begin(cls, name: str, **sections: Any) -> Record:
        """A record that knows the time, the command, the machine and the versions in use."""
        known: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
        raise UserError(str(path), error.strerror or str(error)) from error
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
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
    except OSError as error:
        raise UserError(str(folder), error.strerror or str(error)) from error
    return folder / "report.json"


def render(record: Record) -> str:
    """The page of a record, as one HTML text that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tamba", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "bytes": plots.byte_size, "clock": clock}
    figures: dict[str, Markup | None] = dict.fromkeys(plots.NAMES)
    figures |= {
        # The drawings are ours; texts of the record inside them were escaped when they were drawn.
        name: Markup(plots.to_inline(figure, name))
        for name, figure in plots.draw_all(record, titles=False)
    }
    return environment.get_template("report.html.j2").render(
        record=record,
        figures=figures,
        palette=plots.PALETTE,
        mixers=MIXERS,
        kinds=_kinds(record),
        becomes=_becomes(record),
        savings=_savings(record),
        total_seconds=sum(record.seconds.values()),
    )


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, thousands apart, never in scientific notation."""
    if value == int(value) and abs(value) >= 10 ** (digits - 1):
        return f"{int(value):,}"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(digits - before, 0)}f}"


def _kinds(record: Record) -> list[str]:
    """The kinds of layer in the plan, each once, in the order of the palette."""
    present = {plots.kind_of(layer) for layer in record.plan}
    return [kind for kind in plots.KINDS if kind in present]


def _becomes(record: Record) -> str:
    """What the changed layers are now, in words."""
    names = sorted({MIXERS.get(p.mixer, p.mixer) for p in record.plan if p.origin != "kept"})
    return " and ".join(names)


def _savings(record: Record) -> dict[int, CachePoint]:
    """Cache at 8k and 32k, or at the longest context there is, by context."""
    known = {p.context: p for p in record.memory if p.teacher}
    return {c: known[c] for c in (8192, 32768) if c in known} or dict(list(known.items())[-1:])


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
