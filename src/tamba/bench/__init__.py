"""Benchmarks with a record: what a suite measured, on what, with what, and against whom.

`bench` is the verb. Suites: ``kernels`` (the recurrent operators beside every library that has
them), ``cold-start`` (what a new process waits for, and what is compiled again when shapes change)
and ``model`` (a whole prefill and a whole training step). See docs/performance.md for how to read
the records.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tamba import artefact
from tamba.bench import cold_start, kernels, loss, model, peers
from tamba.bench.ceilings import Ceilings, measure_ceilings
from tamba.bench.measure import reason
from tamba.bench.tables import fill, line, render
from tamba.errors import UserError, nearest
from tamba.progress import task

__all__ = ["SUITES", "bench", "fill", "line", "render"]

SUITES = ("kernels", "cold-start", "model")
_ROUNDS = {"cuda": 50, "cpu": 15}
# Rows whose peers have many configurations; the other rows use the same ones.
_TUNED = (
    "ssd_fwd_bwd/S1",
    "ssd_fwd_bwd/S3",
    "ssd_fwd/S1",
    "ssd_fwd_gated/S1",
    "ssd_fwd_packed/S1",
    "conv_fwd_bwd/C4096",
)


def bench(
    suite: str = "kernels",
    *,
    device: str | torch.device | None = None,
    rows: Sequence[str] = (),
    rounds: int | None = None,
    limit_seconds: float | None = None,
    peers_folder: str | os.PathLike[str] | None = None,
    compile_seconds: float = 120.0,
    seed: int | None = None,
    out: str | os.PathLike[str] | None = None,
    report: Callable[[dict[str, Any]], object] = lambda row: None,
) -> dict[str, Any]:
    """Run a suite and give its record.

    Args:
        suite: one of `SUITES`.
        device: ``cuda`` or ``cpu``; a GPU if there is one.
        rows: ids, or what ids begin with; all rows without any.
        rounds: how often the sides take turns; 50 on a GPU, 15 on a CPU, and a few for whole
            models, each row as many as it says.
        limit_seconds: rows that would begin later are left out, and the record says so.
        peers_folder: unpacked archives of peers that are not installed.
        compile_seconds: how long peers' kernels may be compiled beforehand; 0 to compile each when
            its turn comes.
        seed: of the random arguments; by default from the clock, and in the record.
        out: file to write the record to. Where it holds a record of this suite on this device, rows
            that are not measured now stay in it, each with the date of its run and, under
            ``kept``, that run's command, machine and ceilings.
        report: called with every row as soon as it is measured.

    Returns:
        The record: ``suite``, ``date``, ``command``, ``machine``, ``ceilings``, ``rows``, ``kept``.

    Raises:
        UserError: no such suite, row or device, nothing to measure, a time below 0, or `out` is
            something else or cannot be written.
    """
    if suite not in SUITES:
        raise UserError("suite", f"unknown suite '{suite}'", nearest(suite, SUITES))
    at = _device(device)
    if rounds is not None and rounds < 1:
        raise UserError("rounds", f"{rounds} rounds measure nothing", "use 1 or more")
    if rounds is not None and suite == "cold-start":
        raise UserError("rounds", "a new process is measured once", "leave it out")
    if rounds is None and suite == "kernels":
        rounds = _ROUNDS[at.type]
    for name, given in (("limit_seconds", limit_seconds), ("compile_seconds", compile_seconds)):
        if given is not None and not given >= 0:
            raise UserError(name, f"{given:g} is no time", "give seconds, 0 or more")
    folder = None if peers_folder is None else Path(peers_folder).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise UserError(str(folder), "no such folder", "unpack the peers' archives there")
    target = None if out is None else Path(out)
    earlier: dict[str, Any] = {}
    if target is not None and target.is_dir():
        raise UserError(str(target), "is a folder", "name a file for the record")
    if target is not None:
        earlier = _earlier(target, suite, _device_name(at))
    seed = time.time_ns() % (1 << 31) if seed is None else seed
    begun = time.monotonic()
    record: dict[str, Any] = {
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": {},
        "seed": seed,
        "rounds": rounds,
        "ceilings": None,
        "rows": [],
        "kept": {},
    }
    done: dict[str, dict[str, Any]] = {}
    late = f"{limit_seconds or 0:g} s were over"

    def add(row: dict[str, Any]) -> None:
        if not (row.get("not_run") == late and row["id"] in _measured_before(earlier)):
            done[row["id"]] = row
        # After every row, so that what was measured survives whatever comes next.
        record["machine"] = _machine(at)
        record["seconds"] = time.monotonic() - begun
        record["rows"], record["kept"] = _with_earlier(done, earlier, [r.id for r in known])
        if target is not None:
            artefact.write_file(target, json.dumps(record, indent=1) + "\n")
        report(row)

    found = peers.Peers(folder)
    known: Sequence[Any]
    if suite == "kernels":
        known = _kernel_rows(at, found)
    elif suite == "model":
        known = model.rows(at, found)
    else:
        known = cold_start.rows(at)
    chosen = _choose(known, rows)
    if target is not None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise UserError(str(target), problem, "name another file") from error
        # Before a minute of measuring, not after it.
        if not os.access(target.parent, os.W_OK | os.X_OK):
            problem = f"{target.parent} may not be written to"
            raise UserError(str(target), problem, "name another file")
    if suite != "cold-start":
        record["ceilings"] = measure_ceilings(at)
        report({"id": "ceilings", **record["ceilings"]})
        if at.type == "cuda":
            _make_peers_ready(suite, [row.id for row in chosen], found, compile_seconds)
    with contextlib.closing(found), task(suite, total=len(chosen)) as advance:
        for row in chosen:
            if limit_seconds is not None and time.monotonic() - begun > limit_seconds:
                add({"id": row.id, "not_run": late})
            else:
                add(_measured(row, at, record, rounds, seed))
            advance(note=row.id)
    return record


_HEADER = ("date", "command", "machine", "seed", "rounds", "ceilings")


def _earlier(target: Path, suite: str, device: str) -> dict[str, Any]:
    """The record that lies at `target`; empty where there is none."""
    if not target.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(target.read_text())
        is_of = found["suite"], found["machine"]["device"]
        _ = found["rows"], [found[name] for name in _HEADER]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(str(target), "is no record of a benchmark", "name another file") from None
    if is_of != (suite, device):
        raise UserError(
            str(target), f"is a record of '{is_of[0]}' on {is_of[1]}", "name another file"
        )
    return found


def _with_earlier(
    done: dict[str, dict[str, Any]], earlier: Mapping[str, Any], known: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of this run and those an earlier record has besides, and by date what those ran under.

    An earlier row goes where this run failed at it, found it wrong, or the suite knows it no more.
    Rows are in the order of `known`.
    """
    found = _measured_before(earlier) | done
    rows = [found[name] for name in known if name in found]
    runs = dict(earlier.get("kept", {}))
    if earlier:
        runs[earlier["date"]] = {name: earlier[name] for name in _HEADER}
    used = {row["date"] for row in rows if "date" in row}
    return rows, {date: run for date, run in runs.items() if date in used}


def _measured_before(earlier: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """An earlier record's rows by id, each with the date of its run."""
    return {
        row["id"]: {**row, "date": row.get("date", earlier["date"])}
        for row in earlier.get("rows", ())
        if "not_run" not in row
    }


def _make_peers_ready(
    suite: str, ids: Sequence[str], found: peers.Peers, compile_seconds: float
) -> None:
    """Start the compilers that peers need, and wait for the kernels that are autotuned."""
    needed = {"scan1": "selective_scan_cuda", "conv": "causal_conv1d_cuda"}
    needed |= dict.fromkeys(("prefill", "train"), "causal_conv1d_cuda")
    found.start_builds(*(ext for op, ext in needed.items() if any(op in i for i in ids)))
    tuned = [i for i in ids if i in _TUNED] if suite == "kernels" else list(ids)
    if tuned and compile_seconds > 0:
        arguments = [str(found.folder or "-"), ",".join(tuned)]
        peers.compile_in_parallel(f"tamba.bench.{suite}", arguments, compile_seconds)


def _kernel_rows(at: torch.device, found: peers.Peers) -> list[kernels.Row | loss.LossRow]:
    recurrent = kernels.gpu_rows(found) if at.type == "cuda" else kernels.cpu_rows(found)
    return [*recurrent, *loss.rows(at, found)]


def _measured(
    row: Any, at: torch.device, record: dict[str, Any], rounds: int | None, seed: int
) -> dict[str, Any]:
    """One row; whatever goes wrong is said in its place, and the next row has its turn."""
    try:
        if isinstance(row, cold_start.Row):
            return row.run()
        if not isinstance(row, kernels.Row | loss.LossRow):
            return row.run(record["ceilings"], rounds, seed)
        assert rounds is not None
        if isinstance(row, loss.LossRow):
            return row.run(rounds, seed)
        ceilings = Ceilings(**record["ceilings"]["used"])
        return kernels.run_row(row, at, ceilings, rounds=rounds, seed=seed)
    except Exception as error:
        return {"id": row.id, "not_run": reason(error)}
    finally:
        if at.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def _choose(rows: Sequence[Any], wanted: Sequence[str]) -> list[Any]:
    ids = [row.id for row in rows]
    for want in wanted:
        if not any(i.startswith(want) for i in ids):
            raise UserError("rows", f"no row begins with '{want}'", nearest(want, ids))
    return [row for row in rows if not wanted or row.id.startswith(tuple(wanted))]


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        at = torch.device(name)
    except RuntimeError:
        raise UserError("device", f"no device '{name}'", "use cpu or cuda") from None
    if at.type not in _ROUNDS:
        raise UserError("device", f"nothing is measured on '{at.type}'", "use cpu or cuda")
    if at.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "there is no CUDA device", "use cpu")
    return at


def _device_name(at: torch.device) -> str:
    return torch.cuda.get_device_name(at) if at.type == "cuda" else _cpu_name()


def _machine(at: torch.device) -> dict[str, Any]:
    """What the figures were taken on and with."""
    found: dict[str, Any] = {
        "device": _device_name(at),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if at.type == "cuda":
        found["cuda"] = torch.version.cuda
    else:
        flags = _cpu_line("flags")
        found["isa"] = [
            flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags
        ]
        found["load_average"] = os.getloadavg()
    found["versions"] = artefact.versions() | peers.versions()
    return found


def _cpu_line(name: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return ""


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.processor() or "unknown CPU"


def _command() -> str:
    program, *arguments = sys.argv or ["python"]
    name = Path(program).name.replace("__main__.py", "tamba")
    return artefact.command_without_folders(shlex.quote(name), arguments)
