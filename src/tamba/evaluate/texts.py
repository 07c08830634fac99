"""Text to measure on: as much as is needed, from files or, row by row, from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from tamba.data import Source, read_texts
from tamba.errors import UserError, nearest

NAMED = {
    # The shard on which E-Tamba reports perplexity (Tables 1 and 2).
    "c4-validation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
}
"""Data sets of the papers, by a name of ours."""

_BYTES_A_TOKEN = 8
"""More than any usual text has, so that enough is read."""


def read_enough(sources: Sequence[Source], key: str, tokens: int | None) -> list[str]:
    """Documents of the sources in order, enough for `tokens` tokens, or all.

    Files of the hub are streamed where some of them is enough and `datasets` is installed;
    everything else is read by `tamba.data.read_texts`.

    Raises:
        UserError: as `read_texts`, or the hub cannot be reached.
    """
    texts: list[str] = []
    most = None if tokens is None else tokens * _BYTES_A_TOKEN
    for source in sources:
        left = None if most is None else most - sum(len(t.encode()) for t in texts)
        if left is not None and left <= 0:
            break
        address = NAMED.get(os.fspath(source), os.fspath(source))
        if address.startswith("hf://") and left is not None and _datasets() is not None:
            size = 0
            for text in _stream(address, key):
                texts.append(text)
                size += len(text.encode())
                if size >= left:
                    break
        else:
            texts += read_texts(address, key=key, max_bytes=left)
    return texts


def check_sources(sources: Sequence[Source], key: str) -> None:
    """Look whether each source that is on this machine begins with a document. Raises UserError."""
    for source in sources:
        if not NAMED.get(os.fspath(source), os.fspath(source)).startswith("hf://"):
            read_texts(source, key=key, max_bytes=1)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        return None
    return datasets


def _stream(address: str, key: str) -> Iterator[str]:
    kind = "text" if ".txt" in address.rpartition("/")[2] else "json"
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        rows = _datasets().load_dataset(
            kind, data_files=address, split="train", streaming=True, **options
        )
        for row in rows:
            name = "text" if kind == "text" else key
            if name not in row:
                raise UserError(address, f"no field '{name}'", nearest(name, map(str, row)))
            if isinstance(row[name], str) and row[name].strip():
                yield row[name]
    except UserError:
        raise
    except Exception as error:  # the network, the hub's client and readers raise many kinds
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(address, problem, "check the address and the network") from error
