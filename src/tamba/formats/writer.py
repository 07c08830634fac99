"""Writing a checkpoint folder that appears under its name when complete, or never.

Knows tensors, files and disks, and nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tamba.artefact import new_folder, partial_of, refuse_existing
from tamba.errors import UserError
from tamba.formats.safetensors import INDEX, NO_ROOM, SafetensorsWriter, TensorSpec

GiB = 1 << 30


class CheckpointWriter:
    """Writes a checkpoint folder that appears under its name when complete, or never.

    Use it as a context manager: leaving the block normally commits, an exception (an interrupt
    included) removes everything. Tensors may come in any order, each once. Work goes into a hidden
    sibling folder, `.NAME.partial`; one that a killed process left behind is replaced.

    Args:
        out: the folder to make.
        specs: name -> shape and type of every tensor that will be written.
        config: the content of `config.json`.
        overwrite: replace an existing folder, at the very end.
        shard_bytes: largest weights file; a larger tensor gets a file of its own.

    Raises:
        UserError: `out` exists, another process is writing it, or the disk is too full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        shard_bytes: int = 4 * GiB,
    ) -> None:
        self.out = Path(out)
        self._overwrite = overwrite
        self._config = dict(config)
        self._specs = dict(specs)
        self._todo = set(specs)
        self._shards = _shards(self._specs, shard_bytes)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = contextlib.ExitStack()
        self.folder = partial_of(out)
        needed = sum(spec.nbytes for spec in specs.values())
        made: list[Path] = []
        try:
            refuse_existing(out, overwrite=overwrite)
            made = _make_parents(self.folder)
            _check_room(self.folder.parent, needed)
        except BaseException as error:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError) and error.errno not in NO_ROOM:
                raise self._cannot_be_made(error) from error
            raise

    def _cannot_be_made(self, error: OSError) -> UserError:
        return UserError(
            str(self.out), f"cannot be made ({error.strerror})", "choose another folder"
        )

    def __enter__(self) -> CheckpointWriter:
        try:
            self._stack.enter_context(new_folder(self.out, overwrite=self._overwrite))
        except OSError as error:
            if error.errno in NO_ROOM:
                self._explain(error)
            raise self._cannot_be_made(error) from error
        self._stack.callback(self._close)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the announced tensors, which must have the shape and type announced."""
        if name not in self._todo:
            raise ValueError(f"{name} was not announced, or is written already")
        shard = next(file for file, names in self._shards.items() if name in names)
        try:
            if shard not in self._writers:
                specs = {n: self._specs[n] for n in self._shards[shard]}
                self._writers[shard] = SafetensorsWriter(self.folder / shard, specs)
            self._writers[shard].write(name, tensor)
        except OSError as error:
            self._explain(error)
        self._todo.discard(name)
        if not self._todo & self._shards[shard].keys():
            self._writers[shard].close(durable=True)

    def add_file(self, name: str, content: bytes | str | Path) -> None:
        """Put a further file into the folder: its bytes, its text, or a file to copy."""
        if Path(name).name != name:
            raise ValueError(f"{name} is not a plain file name")
        data = content if isinstance(content, bytes) else None
        if isinstance(content, str):
            data = content.encode()
        try:
            if data is not None:
                (self.folder / name).write_bytes(data)
            elif isinstance(content, Path):
                shutil.copyfile(content, self.folder / name)
        except OSError as error:
            self._explain(error)

    def _explain(self, error: OSError) -> None:
        """Raise UserError for a full disk, and `error` itself for anything else."""
        if error.errno in NO_ROOM:
            needed = sum(self._specs[name].nbytes for name in self._todo)
            free = shutil.disk_usage(_existing(self.folder)).free
            raise _full(self.out.absolute().parent, needed, free) from error
        raise error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Lets go of the files, then renames the folder or removes it.
        if kind is None:
            with self._stack:
                self._finish()
        else:
            self._stack.__exit__(kind, error, trace)

    def _finish(self) -> None:
        """Write what belongs beside the tensors, all of which must be there."""
        if self._todo:
            raise ValueError(f"announced but not written: {', '.join(sorted(self._todo)[:8])}")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(s.nbytes for s in self._specs.values())},
                "weight_map": {n: f for f, names in self._shards.items() for n in names},
            }
            self.add_file(INDEX, json.dumps(index, indent=2) + "\n")
        self.add_file("config.json", json.dumps(self._config, indent=2, sort_keys=True) + "\n")

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close(durable=False)


def _shards(specs: Mapping[str, TensorSpec], limit: int) -> dict[str, dict[str, None]]:
    """File name -> names of its tensors, in order, filled up to `limit` bytes each."""
    groups: list[dict[str, None]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = None
        filled += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _make_parents(folder: Path) -> list[Path]:
    """Make the folders above `folder`. Returns those that were not there, innermost first."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise _full(folder, needed, free)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _full(folder: Path, needed: int, free: int) -> UserError:
    def human(size: int) -> str:
        return f"{size / GiB:.2f} GiB" if size >= GiB // 10 else f"{math.ceil(size / 1024)} KiB"

    return UserError(
        str(folder),
        f"not enough room on disk: {human(needed)} needed, {human(free)} free",
        "free some or choose another folder",
    )
