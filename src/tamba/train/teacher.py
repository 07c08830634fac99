"""What a teacher says of a text, kept on disk or computed from short weights.

A large teacher beside its student costs memory and a third of every step. `write_top` asks it once
and stores, for every position of every block, its most likely tokens with their log-probabilities
and the logarithm of what is left; `StoredTop` gives any rows of that back, as
`tamba.ops.losses.next_token_loss` takes them. `shorten` keeps a teacher in process at one byte a
weight.

A store is a folder: ``top.json`` (what it was made of) and shards ``rows-NNNNNN.safetensors``, each
named by its first row, with ``indices`` [rows, T, K] int32, ``log_probs`` [rows, T, K] float16 and
``log_rest`` [rows, T] float32. The loss from a store equals the loss with ``Weights.top_k`` from
the teacher itself, but for float16's eleven bits.

Shape letters: `B` rows of a batch, `T` tokens of a row, `K` tokens kept, `n` positions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tamba import progress
from tamba.artefact import versions, write_file
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.formats.safetensors import NO_ROOM
from tamba.model.modeling import TambaForCausalLM
from tamba.ops.losses import Top, most_likely
from tamba.trace import climb, computing, enter, finish
from tamba.train.pieces import Piece

_ABOUT = "top.json"
_SHARD_BYTES = 256 << 20
_MIB = 1 << 20


@dataclass(frozen=True)
class About:
    """What a store holds, and what it was made of.

    Args:
        rows: blocks.
        length: tokens a block.
        vocab: the teacher's words.
        k: tokens kept of each position.
        temperature: of the distribution; what uses the store must be at the same.
        shard_rows: blocks a shard.
        teacher: digest of the teacher (`Checkpoint.digest`), or any name that tells it apart.
        text: `blocks_digest` of the blocks.
        products: type of the teacher's matrix products, ``""`` for its weights' own.
    """

    rows: int
    length: int
    vocab: int
    k: int
    temperature: float
    shard_rows: int
    teacher: str
    text: str
    products: str

    def shards(self) -> Iterator[slice]:
        """Rows of each shard, in order."""
        for first in range(0, self.rows, self.shard_rows):
            yield slice(first, min(first + self.shard_rows, self.rows))


def blocks_digest(blocks: TokenBlocks) -> str:
    """SHA-256 of tokens and document starts, as hexadecimal digits."""
    digest = hashlib.sha256(repr(tuple(blocks.tokens.shape)).encode())
    for tensor in (blocks.tokens.int(), blocks.starts.to(torch.uint8)):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def write_top(
    teacher: TambaForCausalLM,
    blocks: TokenBlocks,
    out: str | os.PathLike[str],
    *,
    digest: str,
    k: int = 64,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    shard_rows: int | None = None,
) -> StoredTop:
    """Store a teacher's most likely next tokens at every position of `blocks`.

    The folder appears under its name when complete. Until then finished shards lie in a hidden
    folder beside it, ``.NAME.partial``, and the same call after an interruption writes what is
    missing. Where `out` holds the same already, nothing is computed.

    Args:
        out: the folder to make.
        digest: of the teacher: `Checkpoint.digest`, or any name that tells it from others.
        k: tokens of each position.
        temperature: of the distribution.
        dtype: of matrix products; None for the weights' own.
        batch_size: rows at a time.
        shard_rows: blocks a file; by default what makes a file of 256 MiB.

    Raises:
        UserError: `k` is not below the vocabulary, `out` holds something else, another process is
            writing it, or the disk has no room. Finished shards stay.
    """
    words, out = teacher.config.vocab_size, Path(out).absolute()
    if not 0 < k < words:
        raise UserError("top_k", f"{k} of {words} words", f"use 1 to {words - 1}")
    if not temperature > 0:
        raise UserError("temperature", f"is {temperature:g}", "use more than 0")
    about = About(
        rows=len(blocks),
        length=blocks.length,
        vocab=words,
        k=k,
        temperature=float(temperature),
        shard_rows=shard_rows or max(1, _SHARD_BYTES // _row_bytes(blocks.length, k)),
        teacher=digest,
        text=blocks_digest(blocks),
        products="" if dtype is None else str(dtype).removeprefix("torch."),
    )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = StoredTop(out)
        if found.about != about:
            raise UserError(
                str(out),
                f"holds another store ({_difference(found.about, about)})",
                "choose another folder or remove it",
            )
        return found
    with _workroom(out, about) as partial:
        todo = [rows for rows in about.shards() if not (partial / _name(rows)).is_file()]
        size = _row_bytes(about.length, k) * sum(rows.stop - rows.start for rows in todo)
        _check_room(partial, out.parent, size)
        with progress.task("teacher's top tokens", sum(r.stop - r.start for r in todo)) as advance:
            for rows in todo:
                tensors = _shard(teacher, blocks, rows, about, dtype, batch_size, advance)
                _save(partial / _name(rows), tensors)
        text = json.dumps({**asdict(about), "versions": versions()}, indent=1)
        write_file(partial / _ABOUT, text + "\n")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    return StoredTop(out)


def _partial(out: Path) -> Path:
    """Where a store lies until it is complete."""
    return out.parent / f".{out.name}.partial"


def _name(rows: slice) -> str:
    return f"rows-{rows.start:06d}.safetensors"


def _difference(found: About, wanted: About) -> str:
    old, new = asdict(found), asdict(wanted)
    return ", ".join(f"{n} {old[n]}, not {new[n]}" for n in old if old[n] != new[n])


@contextlib.contextmanager
def _workroom(out: Path, about: About) -> Iterator[Path]:
    """The hidden folder, locked; what another teacher, text or setting left there is removed."""
    partial = _partial(out)
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(str(out), "another process is writing it", "wait for it") from error
        except OSError:
            pass  # a file system without locks; two writers there are the user's care
        mine = json.dumps(asdict(about), sort_keys=True)
        plan = partial / "plan.json"
        if not plan.is_file() or plan.read_text() != mine:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            write_file(plan, mine)
        yield partial
    finally:
        os.close(lock)


def check_room(out: str | os.PathLike[str], blocks: TokenBlocks, k: int) -> None:
    """Refuse a store that the disk has no room for, before anything is done for it.

    What `write_top` left of one that was interrupted is not looked at.

    Raises:
        UserError: how much is needed and how much is free.
    """
    out = Path(out).absolute()
    if out.exists() or _partial(out).exists():
        return
    home = next(folder for folder in out.parents if folder.exists())
    _check_room(home, out.parent, len(blocks) * _row_bytes(blocks.length, k))


def _row_bytes(length: int, k: int) -> int:
    """Of one block on disk."""
    return length * (6 * k + 4)


def _check_room(folder: Path, where: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _full(where, needed, free)


def _full(where: Path, needed: int, free: int) -> UserError:
    return UserError(
        str(where),
        f"not enough room on disk: {needed / _MIB:,.0f} MiB needed, {free / _MIB:,.0f} MiB free",
        "free some, keep fewer tokens (top_k), or choose another folder",
    )


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        write_file(path, lambda to: save_file(tensors, to))
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        needed = sum(t.nbytes for t in tensors.values())
        if free < needed or getattr(error, "errno", None) in NO_ROOM:
            raise _full(path.parent.parent, needed, free) from error
        raise


@torch.no_grad()
def _shard(
    teacher: TambaForCausalLM,
    blocks: TokenBlocks,
    rows: slice,
    about: About,
    dtype: torch.dtype | None,
    batch_size: int,
    advance: Any,
) -> dict[str, Tensor]:
    """The tensors of one file."""
    count = rows.stop - rows.start
    indices = torch.empty(count, about.length, about.k, dtype=torch.int32)
    log_probs = torch.empty(count, about.length, about.k, dtype=torch.float16)
    log_rest = torch.empty(count, about.length, dtype=torch.float32)
    with computing(teacher, dtype):
        for first in range(0, count, batch_size):
            here = slice(first, min(first + batch_size, count))
            there = slice(rows.start + here.start, rows.start + here.stop)
            batch = Batch(blocks.tokens[there].long(), blocks.starts[there]).to(teacher.device)
            hidden, where = enter(teacher, batch)
            hidden = finish(teacher, climb(teacher, hidden, where, 0)).flatten(0, 1)
            top = most_likely(hidden, teacher.lm_head.weight, about.k, about.temperature)
            for kept, found in zip((indices, log_probs, log_rest), top, strict=True):
                kept[here] = found.view(kept[here].shape).to("cpu", kept.dtype)
            advance(here.stop - here.start)
    return {"indices": indices, "log_probs": log_probs, "log_rest": log_rest}


class StoredTop:
    """A store of `write_top`, open for reading; a teacher signal for a stage.

    Args:
        folder: what `write_top` made.

    Raises:
        UserError: it is no such folder, or a file of it is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            facts = json.loads((self.folder / _ABOUT).read_text())
            facts.pop("versions", None)
            self.about = About(**facts)
        except FileNotFoundError as error:
            raise UserError(str(folder), "holds no stored teacher") from error
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{folder}/{_ABOUT}", "is damaged", "store it again") from error
        wanted = (self.about.length, self.about.k)
        for rows in self.about.shards():
            found = self._file(rows).get_slice("indices").get_shape()
            if tuple(found) != (rows.stop - rows.start, *wanted):
                raise self._damaged(rows)

    def check(self, blocks: TokenBlocks, *, digest: str, k: int, temperature: float = 1.0) -> None:
        """Refuse a store of another text, teacher, number of tokens or temperature.

        Raises:
            UserError: with the first that differs.
        """
        about = self.about
        for what, here, there in (
            ("the rows", about.rows, len(blocks)),
            ("the tokens of a row", about.length, blocks.length),
            ("the text", about.text, blocks_digest(blocks)),
            ("the teacher", about.teacher, digest),
            ("the words of a place", about.k, k),
            ("the temperature", about.temperature, float(temperature)),
        ):
            if here != there:
                raise UserError(
                    str(self.folder),
                    f"{what}: it was made for {here}, not {there}",
                    "name another folder, or remove this one",
                )

    def read(self, rows: Tensor) -> Top:
        """What the teacher says at all positions of some rows [B], in that order, as [B·T]."""
        parts: list[list[Tensor]] = [[], [], []]
        for row in rows.tolist():
            if not 0 <= row < self.about.rows:
                raise IndexError(f"row {row} of {self.about.rows}")
            first = row - row % self.about.shard_rows
            shard = slice(first, min(first + self.about.shard_rows, self.about.rows))
            file = self._file(shard)
            try:
                for part, name in zip(parts, Top._fields, strict=True):
                    part.append(file.get_slice(name)[row - first : row - first + 1].flatten(0, 1))
            except SafetensorError as error:
                raise self._damaged(shard) from error
        return Top(*(torch.cat(part) for part in parts))

    def __call__(self, piece: Piece) -> dict[str, Any]:
        """`teacher_top` for the places of a piece, on their device."""
        places = piece.places
        top = self.read(piece.rows)
        here = places.cpu()
        return {"teacher_top": Top(*(part[here].to(places.device) for part in top))}

    @cached_property
    def _files(self) -> dict[int, Any]:
        return {}

    def _file(self, rows: slice) -> Any:
        if rows.start not in self._files:
            path = self.folder / _name(rows)
            try:
                self._files[rows.start] = safe_open(path, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise self._damaged(rows) from error
        return self._files[rows.start]

    def _damaged(self, rows: slice) -> UserError:
        return UserError(
            str(self.folder / _name(rows)), "is missing or damaged", "store the teacher again"
        )


def shorten(model: TambaForCausalLM) -> TambaForCausalLM:
    """Keep the projections of a model's layers in 8 bits: int8 with one scale a row, in place.

    Embeddings, norms and the head stay as they are. For a model that is asked and does not learn.

    Raises:
        UserError: torchao is not installed.
    """
    need_int8("a teacher in 8 bits")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model.requires_grad_(False)
    quantize_(
        model.model.layers, Int8WeightOnlyConfig(), lambda module, _: type(module) is nn.Linear
    )
    return model


def need_int8(where: str) -> None:
    """Refuse 8 bits without the library that knows them.

    Raises:
        UserError: torchao is not installed.
    """
    if find_spec("torchao") is None:
        raise UserError(where, "torchao is not installed", "pip install 'tamba[int8]'")
