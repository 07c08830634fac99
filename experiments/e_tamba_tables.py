"""The numbers of the small E-Tamba experiment as Markdown tables, from its record alone.

    python experiments/e_tamba_tables.py e-tamba-mini.json

Rows that share a seed saw the same text in the same order, so what two systems differ by is taken
seed by seed: that is far steadier than either of them. `t` is the mean difference in standard
errors; with three seeds it has two degrees of freedom, and 4.3 is what 95 % takes (with two, 12.7).
`docs/results/e-tamba.md` holds these tables as they are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tamba.errors import UserError

Row = dict[str, Any]
MIB = 1 << 20
PUBLISHED = {"pythia-1.4b": 9114, "mamba-1.4b": 3100, "e-tamba 12+12+1": 3082}
"""MiB at batch 1 and 4,096 tokens, table 2 of the paper."""


def seeds(rows: Mapping[str, Row], part: str, stream: str = "report") -> dict[str, dict[str, Row]]:
    """{system: {seed: its score on a stream}} of ``grid`` or ``final``."""
    found: dict[str, dict[str, Row]] = {}
    for name, row in rows.items():
        if name.startswith(f"{part}/") and stream in row:
            _, system, seed = name.split("/")
            found.setdefault(system, {})[seed] = row[stream]
    return found


def mean_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None of a single value."""
    values = list(values)
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), spread


def paired(ours: Mapping[str, Row], theirs: Mapping[str, Row]) -> list[float]:
    """Differences in nats a token, of the seeds that both have."""
    return [ours[s]["nll"] - theirs[s]["nll"] for s in sorted(ours.keys() & theirs.keys())]


def said(values: Sequence[float], digits: int, sign: str = "") -> str:
    """``mean ± standard error``, the latter where there is one."""
    if not values:
        return "–"
    mean, error = mean_error(values)
    text = f"{mean:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _t(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "–"
    mean, error = mean_error(values)
    return f"{mean / error:+.1f}" if error else "–"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _size(row: Row) -> str:
    return f"{row['parameters']['outside_tables'] / 1e6:.1f}"


def ablation(rows: Mapping[str, Row]) -> str:
    """Table 1, beside fresh layers and beside none."""
    found = seeds(rows, "grid")
    body = []
    for system, ours in found.items():
        first = rows[f"grid/{system}/{min(ours)}"]
        cells = [f"`grid/{system}/*`", str(len(ours)), _size(first), f"{first['lr']:g}"]
        cells.append(said([r["ppl"] for r in ours.values()], 2))
        for other in ("fresh", "none"):
            apart = paired(ours, found[other]) if system != other and other in found else []
            cells += [said(apart, 4, "+"), _t(apart)]
        body.append(cells)
    head = ["rows", "seeds", "M outside tables", "rate", "perplexity"]
    return table([*head, "− fresh, nats", "t", "− none, nats", "t"], body)


def end_to_end(rows: Mapping[str, Row]) -> str:
    """Table 2 without memory, and the pair before tuning."""
    found, general = seeds(rows, "final"), seeds(rows, "final", "general")
    body = []
    for role in ("base", "donor"):
        row = rows[f"untuned/{role}"]
        ppl = [f"{row[s]['ppl']:.1f}" for s in ("report", "general")]
        size = _size(rows[f"pretrain/{role}"])
        body.append([f"`untuned/{role}`", "1", size, "–", *ppl, "–", "–"])
    for system, ours in found.items():
        first = rows[f"final/{system}/{min(ours)}"]
        apart = paired(ours, found["base"]) if system != "base" else []
        body.append(
            [
                f"`final/{system}/*`",
                str(len(ours)),
                _size(first),
                f"{first['lr']:g}",
                said([r["ppl"] for r in ours.values()], 1),
                said([r["ppl"] for r in general[system].values()], 1),
                said(apart, 3, "+"),
                _t(apart),
            ]
        )
    head = ["rows", "seeds", "M outside tables", "rate", "perplexity, tuned for"]
    return table([*head, "perplexity, pretrained on", "− base, nats", "t"], body)


RECALL = (("copy", "copy"), ("phonebook", "phone book"))
"""Tasks of recall, as rows of the record and as people call them."""


def teaching(rows: Mapping[str, Row]) -> str:
    """The rates that models were taught at: their answers in documents that are not scored."""
    body = []
    for name, row in rows.items():
        if name.startswith("teaching/"):
            judged = row["held_out"]
            share = row.get("mixers", 1.0)
            slower = "" if share == 1 else f", mixers × {share:g}"
            cells = [f"`{name}`{slower}", str(row["steps"])]
            for task, _ in RECALL:
                cells += [f"{judged[task]['nll']:.3f}", f"{100 * judged[task]['exact']:.0f} %"]
            body.append([*cells, *(f"{row[s]['ppl']:.1f}" for s in ("report", "general"))])
    first = next(row for name, row in rows.items() if name.startswith("teaching/"))["held_out"]
    head = ["row", "steps"]
    for task, what in RECALL:
        head += [f"{what} of {first[task]['size']}, nats", "right"]
    return table([*head, "perplexity, tuned for", "perplexity, pretrained on"], body)


def interval(point: Row, few: bool = False) -> str:
    """``share [low, high]`` in hundredths: of all cases, or of the first few."""
    keys = ("few", "few_low", "few_high") if few else ("acc", "low", "high")
    mid, low, high = (100 * point[key] for key in keys)
    return f"{mid:.0f} [{low:.0f}, {high:.0f}]"


def taught(rows: Mapping[str, Row], task: str) -> str:
    """Right answers in a hundred by size, with Wilson intervals; sizes never taught in italics.

    The second line of a model is the first few of the same cases, as many as the paper has.
    """
    found = {n: row for n, row in rows.items() if n.startswith("recall/taught/")}
    first = next(iter(found.values()))
    head = [
        f"{p['size']}" if p["size"] <= first["longest"][task] else f"*{p['size']}*"
        for p in first[task]
    ]
    body = []
    for name, row in found.items():
        body.append([f"`{name}`", str(row["cases"]), *(interval(p) for p in row[task])])
        if name.endswith("/0"):
            body.append(["", str(row["few"]), *(interval(p, few=True) for p in row[task])])
    return table([dict(RECALL)[task], "cases", *head], body)


def _rate(name: str) -> str:
    """`0.001`, or `0.001, mixers x 0.1` of a search in which new mixers learn more slowly."""
    rate, _, mixers = name.partition(" mixers ")
    return f"{float(rate):g}" + (f", mixers × {float(mixers):g}" if mixers else "")


def rates(rows: Mapping[str, Row]) -> str:
    """The search of the learning rate."""
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if name.startswith("search/"):
            _, system, rate = name.split("/")
            found.setdefault(system, {})[rate] = row["choice"]["ppl"]
    tried = list(dict.fromkeys(rate for by_rate in found.values() for rate in by_rate))
    body = []
    for system, by_rate in found.items():
        best = min(by_rate, key=by_rate.__getitem__)
        shown = [f"{by_rate[r]:.1f}" if r in by_rate else "–" for r in tried]
        body.append(
            [
                f"`search/{system}/*`",
                *(f"**{s}**" if r == best else s for r, s in zip(tried, shown, strict=True)),
            ]
        )
    return table(["rows", *(_rate(r) for r in tried)], body)


def layers(rows: Mapping[str, Row]) -> str:
    """How each score of layers agrees with the loss when a layer is left out."""
    found = rows["analysis"]
    names = [n for n in found["base"]["agreement"] if n != "drop_loss"]
    body = []
    for role in ("base", "donor"):
        agree = found[role]["agreement"]["drop_loss"]
        halves = found[role]["halves_agree"]
        cells = [f"{agree[name]:.2f} ({halves[name]:.2f})" for name in names]
        body.append([f"`analysis` {role}", str(len(found[role]["drop_loss"])), *cells])
    return table(["row", "layers", *(f"`{name}`" for name in names)], body)


def memory(rows: Mapping[str, Row]) -> str:
    """Memory at batch 1 by cause, in MiB."""
    body = []
    for name, row in rows.items():
        part, _, system = name.partition("/")
        if part not in ("shapes", "memory") or not row["memory"][0].get("peak"):
            continue
        m = row["memory"][0]
        sizes = [m[k] / MIB for k in ("weights", "kv", "state", "activations", "logits")]
        body.append(
            [
                f"`{name}`",
                row["dtype"],
                *(f"{s:,.1f}" if 0 < s < 100 else f"{s:,.0f}" for s in sizes),
                f"**{m['peak'] / MIB:,.0f}**",
                f"{m['floor'] / MIB:,.0f}",
                f"{m['over_floor']:.2f}",
                f"{PUBLISHED[system]:,}" if part == "shapes" and system in PUBLISHED else "",
            ]
        )
    head = ["row", "type", "weights", "KV", "state", "activations", "logits", "peak", "floor"]
    return table([*head, "peak / floor", "published"], body)


def tables(rows: Mapping[str, Row]) -> dict[str, str]:
    """All that the record has rows for, by name."""
    have = {name.partition("/")[0] for name in rows}
    makers = {
        "search": rates, "analysis": layers, "grid": ablation, "final": end_to_end,
        "teaching": teaching, "shapes": memory,
    }  # fmt: skip
    found = {part: make(rows) for part, make in makers.items() if part in have}
    if any(name.startswith("recall/taught/") for name in rows):
        found |= {f"taught, {what}": taught(rows, task) for task, what in RECALL}
    return found


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of a record. Raises UserError where it is none."""
    try:
        rows: dict[str, Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(str(path), f"is no record of the experiment ({error})") from error
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print each table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    args = parser.parse_args(arguments)
    for name, text in tables(read_rows(args.record)).items():
        print(f"{name}\n\n{text}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
