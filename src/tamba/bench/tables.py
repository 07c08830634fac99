"""Records as Markdown tables, so that the documents cannot drift from what was measured.

A record is the JSON file that a run writes: ``suite``, ``date``, ``command``, ``machine``,
``ceilings`` and ``rows``. `render` makes its table; `fill` puts tables into a document between

    <!-- bench: kernels-h100.json -->
    <!-- /bench -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

_MARK = re.compile(
    r"(<!-- bench: (?P<file>[\w.-]+)(?: (?P<rows>[^>]*?))? -->\n)(?P<old>.*?)(<!-- /bench -->)",
    re.DOTALL,
)


def fill(text: str, folder: Path) -> str:
    """A document with the tables between its marks made again from the records in `folder`.

    A mark names a record and, after it, what the rows' ids begin with (all when nothing follows).
    Where there is no such record the document says so.
    """

    def one(match: re.Match[str]) -> str:
        path = folder / match["file"]
        table = "No record yet.\n"
        if path.is_file():
            table = render(json.loads(path.read_text()), (match["rows"] or "").split())
        return f"{match[1]}{table}{match[5]}"

    return _MARK.sub(one, text)


def render(record: Record, beginnings: Iterable[str] = ()) -> str:
    """One record as Markdown: a line about the machine, the table, and peers without a time."""
    wanted = tuple(beginnings)
    found = [row for row in record["rows"] if not wanted or row["id"].startswith(wanted)]
    rows = [row for row in found if "not_run" not in row]
    lines = [*_about(record, rows), "", *_table(rows), ""]
    reasons = [
        f"- `{row['id']}`: {name} {reason}"
        for row in rows
        for name, reason in row.get("peers", {}).items()
        if isinstance(reason, str)
    ]
    reasons += [f"- `{row['id']}`: void, {row['void']}" for row in rows if row.get("void")]
    reasons += [f"- `{row['id']}`: not run, {row['not_run']}" for row in found if "not_run" in row]
    if reasons:
        lines += ["Without a time:", "", *_merged(reasons), ""]
    return "\n".join(lines)


def line(row: Mapping[str, Any]) -> str:
    """One row for a terminal."""
    if "not_run" in row:
        return f"{row['id']}: not run, {row['not_run']}"
    if "ours_us" not in row:
        figures = ", ".join(f"{n} {_figure(v)}" for n, v in row.items() if _is_figure(n, v))
        if row["id"] == "ceilings":
            figures = ", ".join(f"{name} {rate:.4g}/s" for name, rate in row["measured"].items())
        return f"{row['id']}: {figures}"
    if row["void"]:
        said = [f"void, {row['void']}"]
    else:
        spread = f"{duration(row['ours_p20_us'])} to {duration(row['ours_p80_us'])}"
        said = [f"{duration(row['ours_us'])} ({spread})"]
        said.append(f"floor {duration(row['floor_us'])} = {row['floor_share']:.0%}")
    for name, us in row["peers"].items():
        ratio = row["ratios"].get(name)
        said.append(
            f"{name}: {us}"
            if isinstance(us, str)
            else f"{name} {duration(us)}" + (f" x{ratio:.2f}" if ratio else "")
        )
    if row["error"] is not None:
        said.append(f"error {row['error']:.1e}")
    if isinstance(row["extra_bytes"], int):
        said.append(f"memory {_memory(row)}")
    if row["repeatable"] is False:
        said.append("not the same bits twice")
    said += [_bar(bar).replace("**", "") for bar in row["bars"]]
    return f"{row['id']}: " + ", ".join(said)


def _about(record: Record, rows: list[Mapping[str, Any]]) -> list[str]:
    """What rows were measured on, with and by: one line a run, with its rows if there are more."""
    of_run: dict[str, list[str]] = {}
    for row in rows:
        of_run.setdefault(row.get("date", record["date"]), []).append(row["id"])
    lines = []
    for date in sorted(of_run or [record["date"]], reverse=True):
        run = record["kept"][date] if date in record.get("kept", {}) else record
        versions = ", ".join(f"{name} {v}" for name, v in run["machine"]["versions"].items())
        which = ", ".join(f"`{name}`" for name in of_run[date]) + ": " if len(of_run) > 1 else ""
        said = f"{run['machine']['device']}; {versions}; {date[:10]}; `{run['command']}`."
        lines.append(f"- {which}{said}" if which else said)
    return lines


def _table(rows: list[Mapping[str, Any]]) -> list[str]:
    if rows and "ours_us" not in rows[0]:
        return _plain_table(rows)
    lines = [
        "| row | floor | ours (p20 to p80) | floor/ours | peers, and their time over ours | error "
        "| extra memory | same bits | bars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"`{row['id']}`",
            duration(row["floor_us"]),
            _ours(row),
            _share(row["floor_share"]),
            _peers(row),
            "-" if row["error"] is None else f"{row['error']:.1e}",
            _memory(row),
            {True: "yes", False: "no", None: "-"}[row["repeatable"]],
            "<br>".join(_bar(bar) for bar in row["bars"]) or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plain_table(rows: list[Mapping[str, Any]]) -> list[str]:
    """Rows of other suites: every figure by its name."""
    names = list(dict.fromkeys(n for row in rows for n, v in row.items() if _is_figure(n, v)))
    lines = [
        "| row | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        cells = [_figure(row.get(name)) for name in names]
        lines.append(f"| `{row['id']}` | {' | '.join(cells)} |")
    return lines


def _is_figure(name: str, value: Any) -> bool:
    return name != "id" and (value is None or isinstance(value, int | float | str))


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _ours(row: Mapping[str, Any]) -> str:
    if row["ours_us"] is None:
        return "void"
    low, high = duration(row["ours_p20_us"]), duration(row["ours_p80_us"])
    rate = ""
    if row.get("mfu") is not None:
        rate = f"<br>{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}"
    return f"**{duration(row['ours_us'])}** ({low} to {high}){rate}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _peers(row: Mapping[str, Any]) -> str:
    parts = []
    for name, us in row["peers"].items():
        if isinstance(us, str):
            parts.append(f"{name}: see below")
        else:
            ratio = row["ratios"].get(name)
            parts.append(f"{name} {duration(us)}" + (f" ({ratio:.2f}x)" if ratio else ""))
    return "<br>".join(parts) or "-"


def _memory(row: Mapping[str, Any]) -> str:
    extra = row["extra_bytes"]
    if not isinstance(extra, int):
        return "-" if extra is None else str(extra)
    over = row["extra_over_inputs"]
    return f"{extra / 2**20:.0f} MiB" + ("" if over is None else f" ({over:.2f} of the inputs)")


def _bar(bar: Mapping[str, Any]) -> str:
    kind, _, peer = bar["what"].partition(":")
    match kind:
        case "us":
            text = f"≤ {duration(bar['value'])}"
        case "times":
            text = f"≥ {bar['value']:g}x {peer}"
        case "floor_share":
            text = f"≥ {bar['value']:.0%} of the floor"
        case "mfu":
            text = f"MFU ≥ {bar['value']:.0%}"
        case "extra_mib":
            text = f"memory ≤ {bar['value']:g} MiB"
        case "peak_over_peer":
            text = f"memory ≤ {bar['value']:g} of the peer's"
        case _:
            text = f"memory ≤ {bar['value']:g} of the inputs"
    return f"{text}: " + {True: "met", False: "**missed**", None: "not measured"}[bar["met"]]


def duration(us: float) -> str:
    """Microseconds as people read them: ``93.1 µs``, ``1.20 ms``, ``3.5 s``."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def _merged(lines: list[str]) -> list[str]:
    """Lines that differ only in the row, as one."""
    rows: dict[str, list[str]] = {}
    for line in lines:
        row, _, rest = line.removeprefix("- ").partition(": ")
        rows.setdefault(rest, []).append(row)
    return [f"- {', '.join(dict.fromkeys(ids))}: {rest}" for rest, ids in rows.items()]
