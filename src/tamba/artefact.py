"""What a step leaves on disk appears under its name when complete, or never, and says what made it.

Checkpoints are written tensor by tensor by a writer in formats/, into a folder made here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tamba
from tamba.errors import UserError

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


def refuse_existing(out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a place where something stands; an empty folder is no loss.

    Args:
        overwrite: a folder may stand there, a file may not.

    Raises:
        UserError: something stands there.
    """
    out = Path(out)
    if not os.path.lexists(out) or (out.is_dir() and (overwrite or not any(out.iterdir()))):
        return
    raise UserError(str(out), "already exists", "choose another folder or remove it")


def partial_of(out: str | os.PathLike[str]) -> Path:
    """The hidden folder beside `out` that `new_folder` hands out."""
    out = Path(out).absolute()
    return out.parent / f".{out.name}.partial"


@contextmanager
def new_folder(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Inside, a hidden folder beside `out` to write into; at the end it takes the name `out`.

    An exception, an interrupt included, leaves nothing. What a killed process left is replaced,
    what a living one is writing is not.

    Args:
        overwrite: replace a folder that stands there, at the very end.

    Raises:
        UserError: something stands there, or another process is writing it.
        OSError: it cannot be made.
    """
    refuse_existing(out, overwrite=overwrite)
    partial = partial_of(out)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(str(out), "another process is writing it", "wait for it") from error
        except OSError:
            pass  # a file system without locks; two writers there are the user's care
        try:
            for left in partial.iterdir():
                _remove(left)
            yield partial
            _rename(partial, Path(out).absolute(), overwrite)
        finally:
            # Unless it was renamed, and another has its name by now.
            if partial.exists() and os.path.samestat(os.fstat(lock), partial.stat()):
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rename(partial: Path, out: Path, overwrite: bool) -> None:
    old = out.parent / f".{out.name}.replaced"
    if overwrite and out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        partial.rename(out)
    except OSError as error:
        if old.exists():
            old.rename(out)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(str(out), "was made by another process meanwhile") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def command_without_folders(program: str, arguments: Sequence[str]) -> str:
    """A command line for records that are shared: absolute paths are told by their last name."""
    named = [Path(a).name if os.path.isabs(a) else a for a in arguments]
    return shlex.join([*shlex.split(program), *named])


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of the packages it rests on that are installed."""
    found = {"python": platform.python_version(), "tamba": tamba.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
