"""What a step leaves on disk appears under its name when complete, or never, and says what made it.

Checkpoints, which are written tensor by tensor, have a writer of their own in formats/.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tamba

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "triton")


def write_file(
    path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]
) -> None:
    """Write one file, whole or not at all; what stood under its name stays until then.

    Args:
        path: the file to make or replace.
        content: its bytes, its text, or what writes it to the path that it is given.

    Raises:
        OSError: it cannot be written; also whatever `content` raises.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside, a hidden folder beside `out` to write into; at the end it takes the name `out`.

    An exception leaves nothing. `out` may be there if it is an empty folder.

    Raises:
        OSError: it cannot be made, or something else stands there.
    """
    out = Path(out).absolute()
    partial = out.parent / f".{out.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of the packages it rests on that are installed."""
    found = {"python": platform.python_version(), "tamba": tamba.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
