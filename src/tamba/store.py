"""Finished items on disk, so that interrupted work goes on where it stopped.

One JSON object a line. Evaluation names the file by a digest of everything that decides an item's
result, so what is found in it can be taken as it is; other work keeps that digest as an item.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tamba.errors import UserError


def digest(**what: Any) -> str:
    """SHA-256 of plain data, as hexadecimal digits; the order of keys does not count."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Store(Mapping[str, Any]):
    """Results by item, in memory and, given a path, in a file that grows with them.

    Args:
        path: the file, read if it is there; None keeps results in memory alone.

    Raises:
        UserError: the file cannot be read or written to.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, results: Mapping[str, Any]) -> None:
        """Remember results that are final; on disk when this returns."""
        self._known.update(results)
        if self.path is None or not results:
            return
        lines = "".join(
            json.dumps({"id": name, "result": result}) + "\n" for name, result in results.items()
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise UserError(
                str(self.path), f"cannot be written ({error.strerror})", "make room, and go on"
            ) from error

    def _read(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(str(path), error.strerror or str(error)) from error
        whole = raw[: raw.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._known[row["id"]] = row["result"]
            except (ValueError, KeyError, TypeError):
                continue  # damaged: that item is done again
        if len(whole) < len(raw):
            # A line that was cut short by the end of the process; the next one needs its own.
            path.write_bytes(whole)

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
