"""Text to measure on: as much as is needed, from files or, row by row, from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from tamba.data import Source, read_texts, streamed
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
        if address.startswith("hf://") and left is not None and find_spec("datasets"):
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


def _stream(address: str, key: str) -> Iterator[str]:
    file = address.rpartition("/")[2]
    kind = "text" if ".txt" in file else "parquet" if file.endswith(".parquet") else "json"
    options = {"sample_by": "document"} if kind == "text" else {}
    name = "text" if kind == "text" else key
    for _, row in streamed(address, kind, data_files=address, split="train", **options):
        if name not in row:
            raise UserError(address, f"no field '{name}'", nearest(name, map(str, row)))
        if isinstance(row[name], str) and row[name].strip():
            yield row[name]
