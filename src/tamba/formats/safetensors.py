"""Safetensors files, read and written one tensor at a time with plain file access.

A memory map would do for reading, but the pages it touches count as resident memory until the
kernel wants them back; building an 8B model in 3 GiB needs reads that leave nothing behind.
Format: 8 bytes of header length (little endian), a JSON header, the tensors back to back.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tamba.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the reference implementation
INDEX = "model.safetensors.index.json"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_DAMAGED = "fetch or save the file again"


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """One safetensors file, open for reading.

    Raises:
        UserError: the file is no safetensors file, is cut short, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, start = _read_header(path)
        header.pop("__metadata__", None)
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        end = path.stat().st_size - start
        for name, entry in header.items():
            spec, begin = _entry(path, name, entry)
            if begin + spec.nbytes > end:
                raise UserError(
                    str(path),
                    f"cut short: '{name}' ends at byte {begin + spec.nbytes} of {end} in the file",
                    _DAMAGED,
                )
            self.specs[name] = spec
            self._offsets[name] = start + begin

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in memory of its own."""
        spec = self.specs[name]
        out = torch.empty(spec.shape, dtype=spec.dtype)
        if spec.nbytes == 0:
            return out
        view = out.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[name])
            fill(file, view, self.path, name)
        return out


def fill(file: FileIO, view: memoryview, path: Path, name: str) -> None:
    """Read until `view` is full: the system gives no more than 2 GiB at a time.

    Raises:
        UserError: the file ends inside the tensor `name`.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise UserError(str(path), f"cut short inside '{name}'", _DAMAGED)
        done += count


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
            raise UserError(
                str(path), "not a safetensors file, or cut short in its header", _DAMAGED
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError(str(path), "the safetensors header is damaged", _DAMAGED) from error
    if not isinstance(header, dict):
        raise UserError(str(path), "the safetensors header is damaged", _DAMAGED)
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, int]:
    """Shape, type and first byte of one tensor of the header, checked against each other."""
    try:
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        kind = entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"the header entry of '{name}' is damaged", _DAMAGED) from error
    if kind not in _DTYPES:
        raise UserError(str(path), f"'{name}' is of type {kind}, which is not supported")
    spec = TensorSpec(shape, _DTYPES[kind])
    if min(shape, default=0) < 0 or begin < 0 or end - begin != spec.nbytes:
        raise UserError(str(path), f"the header entry of '{name}' contradicts itself", _DAMAGED)
    return spec, begin


class SafetensorsWriter:
    """One safetensors file, written tensor by tensor in any order.

    All names, shapes and types are given at the start: they make the header, and the room on disk
    is taken before anything is computed.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._offsets: dict[str, int] = {}
        self._specs = dict(specs)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, begin + spec.nbytes],
            }
            self._offsets[name] = begin
            begin += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8 bytes
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        self._file = path.open("wb", buffering=0)
        try:
            _reserve(self._file.fileno(), start + begin)
            self._put(0, len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put `tensor` in its place; it must be of the shape and type announced."""
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not as announced, {spec}"
            )
        if spec.nbytes:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._put(self._offsets[name], flat.numpy().data)

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._file.seek(offset)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0

    def close(self, *, durable: bool) -> None:
        """Close the file; `durable` waits until it is on the disk."""
        if durable:
            os.fsync(self._file.fileno())
        self._file.close()


def _reserve(descriptor: int, size: int) -> None:
    """Take `size` bytes on disk now, so that a full disk shows before the work and not after it."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        # Some file systems cannot reserve; there the check of free space beforehand must do.
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        os.truncate(descriptor, size)
