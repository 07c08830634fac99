"""Text in, blocks of tokens out: where text comes from, how it is split, packed and served.

Sources need no network: files and folders of the user, the documentation that every Python
installation carries, and text that a model writes itself. Packing keeps documents apart: each block
says where documents start, and nothing reads across a start. This file knows nothing about training
or scoring.

Shape letters: `B` batch, `T` tokens of a block.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tamba.artefact import write_file
from tamba.errors import UserError, nearest
from tamba.recipe import data_set

Source = str | os.PathLike[str]

WORDS = ("python-docs", "teacher-written")
"""Sources that are neither a place nor an address."""
_PACKAGE = "package-docs:"
_OPENERS: dict[str, Any] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_ENDINGS = (".txt", ".jsonl", ".json")
_TABLE = ".parquet"
_KINDS = (*(kind + packed for kind in _ENDINGS for packed in _OPENERS), _TABLE)


def read_texts(
    sources: Source | Sequence[Source],
    *,
    key: str = "text",
    max_bytes: int | None = None,
    limit: int | None = None,
) -> list[str]:
    """Documents of one or several sources, in a fixed order.

    A source is one of
    - a `.txt` file, one document;
    - a `.jsonl` or `.json` file, one JSON object a line with a document under `key`;
    - either packed as `.gz` or `.xz`;
    - a `.parquet` file with documents in the column `key`;
    - a folder: all such files in it, sorted by path;
    - ``python-docs``: prose of the Python manual's topics and of the standard library's docstrings;
    - ``package-docs:NAME``: prose of the docstrings of an installed package, which is not imported;
    - ``hf://datasets/OWNER/NAME/FILE``: such a file of a data set on the hub (``NAME@REVISION``);
    - ``OWNER/NAME``, ``OWNER/NAME/PART`` or either with ``:SPLIT``: a data set of the hub, which is
      streamed, with documents under `key`; only with a `limit`, for there may be no end of it.

    Args:
        limit: most documents of each source.
        max_bytes: stop after the document that reaches this many UTF-8 bytes in all.

    Raises:
        UserError: a missing, empty, undecodable or damaged file, a line without text, by number, or
            a `.parquet` file without the package that reads it.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    check_sources(sources, limit)
    texts: list[str] = []
    size = 0
    for source in sources:
        before = len(texts)
        for text in islice(_documents(source, key), limit):
            texts.append(text)
            size += len(text.encode())
            if max_bytes is not None and size >= max_bytes:
                return texts
        if len(texts) == before:
            raise UserError(
                str(source), "holds no text", "give a source with at least one document"
            )
    return texts


def check_sources(sources: Iterable[Source], limit: int | None = None) -> None:
    """Refuse a source of this machine that is not there or of no kind that is read.

    Args:
        limit: most documents of each.

    Raises:
        UserError: as `read_texts`, before any text is read. What lies on the hub is not asked for.
    """
    for source in sources:
        name = os.fspath(source)
        if name in WORDS or name.startswith("hf://") or (limit and _on_hub(name)):
            continue
        if name.startswith(_PACKAGE):
            _package_folder(name.removeprefix(_PACKAGE))
            continue
        path = Path(name)
        if not path.exists():
            hint = nearest(name, ["python-docs"])
            raise UserError(name, "no such file or folder", hint if hint.startswith("did") else "")
        if path.is_dir():
            files_of(path)
        elif not is_text(path):
            raise UserError(
                name, "not a kind of text file that is read", f"known: {', '.join(_KINDS)}"
            )


def files_of(folder: Path) -> list[Path]:
    """Text files in a folder, sorted by path; UserError if there are none."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p) is not None)
    if not files:
        raise UserError(str(folder), f"the folder holds no file of {', '.join(_KINDS)}")
    return files


def _documents(source: Source, key: str) -> Iterator[str]:
    name = os.fspath(source)
    if name == "python-docs":
        yield from _python_docs()
        return
    if name.startswith(_PACKAGE):
        yield from _modules(_package_folder(name.removeprefix(_PACKAGE)), set())
        return
    if found := _on_hub(name):
        place, split = found
        for where, row in streamed(name, *place, split=split):
            yield _json_text(row, where, key)
        return
    path = from_hub(name) if name.startswith("hf://") else Path(name)
    if path.is_dir():
        for file in files_of(path):
            yield from _file(file, key)
        return
    yield from _file(path, key)


def _on_hub(name: str) -> tuple[tuple[str, ...], str] | None:
    """Place and split of a data set of the hub; None for a source of another kind."""
    return None if name.startswith("hf://") or Path(name).exists() else data_set(name)


def from_hub(address: str) -> Path:
    """A file of a data set on the hub, fetched to this machine. Raises UserError."""
    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", address)
    if found is None:
        raise UserError(address, "not an address of a file", "write hf://datasets/OWNER/NAME/FILE")
    repository, revision, file = found.groups()
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(address, problem, "check the address and the network") from error


def is_text(path: Path) -> bool:
    """Whether a file's name is one of a kind that `read_texts` reads."""
    return _kind(path) is not None


def _kind(path: Path) -> tuple[str, str] | None:
    """(ending, how it is packed) by the end of the name; None for files that are not text."""
    if path.name.startswith("."):
        return None
    if path.name.endswith(_TABLE):
        return _TABLE, ""
    for packed in sorted(_OPENERS, key=len, reverse=True):
        stem = path.name.removesuffix(packed)
        for kind in _ENDINGS:
            if path.name.endswith(packed) and stem.endswith(kind):
                return kind, packed
    return None


def _file(path: Path, key: str) -> Iterator[str]:
    kind, _ = _kind(path) or ("", "")
    if kind == ".txt":
        text = "".join(line for _, line in text_lines(path))
        if not text.strip():
            raise UserError(str(path), "the file is empty")
        yield text
        return
    for where, row in file_rows(path):
        yield _json_text(row, where, key)


def file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of a `.parquet` file stands, or line of a `.jsonl` file, plain or packed, and
    its columns.

    Raises:
        UserError: an empty or damaged file, or a line that is no JSON object, by number.
    """
    empty = True
    if path.name.endswith(_TABLE):
        yield from streamed(str(path), "parquet", data_files=str(path), split="train")
        return
    for where, line in text_lines(path):
        empty = False
        yield where, _json_object(line, where)
    if empty:
        raise UserError(str(path), "the file is empty")


def streamed(name: str, *place: str, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row of what `datasets.load_dataset` finds at a place stands, and its columns.

    Raises:
        UserError: that package is not installed, or finds nothing; its message begins with `name`.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(name, "needs the package 'datasets'", "pip install 'tamba[chat]'") from None
    try:
        for number, row in enumerate(load_dataset(*place, streaming=True, **options)):
            yield f"{name}, row {number}", row
    except UserError:
        raise
    except Exception as error:  # the network, the hub's client and readers raise many kinds
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(name, problem, "check the name and the network") from error


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line of a file stands, plain or packed, and its text.

    Raises:
        UserError: a file that cannot be read, is damaged or not UTF-8.
    """
    _, packed = _kind(path) or ("", "")
    try:
        with _OPENERS[packed](path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", _decode(line, path, number)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            str(path), f"the packed file is damaged ({error})", "fetch it again"
        ) from error
    except OSError as error:
        raise UserError(str(path), error.strerror or str(error)) from error


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}", "not UTF-8", "convert the file to UTF-8") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            where, f"not JSON ({error.msg})", "one JSON object a line is expected"
        ) from error
    if not isinstance(row, dict):
        raise UserError(where, f"expected a JSON object, got {type(row).__name__}")
    return row


def _json_text(row: dict[str, Any], where: str, key: str) -> str:
    if key not in row:
        raise UserError(where, f"no field '{key}'", nearest(key, map(str, row)) if row else "")
    text = row[key]
    if not isinstance(text, str):
        raise UserError(where, f"field '{key}' holds {type(text).__name__}, expected a string")
    if not text.strip():
        raise UserError(where, f"field '{key}' is empty", "remove the line")
    return text


# Markup of docstrings that would teach a model reStructuredText instead of English.
_MARKUP = (
    (re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^>]*>`_{0,2}"), r"\1"),
    (re.compile(r"``?([^`]*)``?_{0,2}"), r"\1"),
    (re.compile(r"(?<!\w)\*{1,2}([^*\s][^*]*?)\*{1,2}(?!\w)"), r"\1"),
    (re.compile(r"^([-*•]|\(?\d+[.)])\s+"), ""),
)
_UNDERLINE = re.compile(r"^\s*([-=~^\"'`#*+])\1{2,}\s*$", re.MULTILINE)
_NOT_DOCUMENTATION = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}
)


def _prose(text: str) -> Iterator[str]:
    """The paragraphs of words in `text`, each on one line: no code, tables, headings or markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" in paragraph or _UNDERLINE.search(paragraph):
            continue
        line = " ".join(paragraph.split())
        for pattern, plain in _MARKUP:
            line = pattern.sub(plain, line)
        letters = sum(c.isalpha() or c == " " for c in line)
        if len(line.split()) < 8 or letters < 0.85 * len(line):
            continue
        if line[0].isalpha() and line[-1] in ".!?)":
            yield line


def _python_docs() -> Iterator[str]:
    seen: set[str] = set()
    for name in sorted(topics):
        yield from _document(_prose(topics[name]), seen)
    yield from _modules(Path(sysconfig.get_path("stdlib")), seen)


def _package_folder(name: str) -> Path:
    # Only a top-level name: looking up a.b would import a.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"package-docs:{name}", "no such installed package", f"pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def _modules(root: Path, seen: set[str]) -> Iterator[str]:
    """One document a module below `root`, by path; paragraphs in `seen` are left out and added."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            f for f in folders if f not in _NOT_DOCUMENTATION and not f.startswith("config-")
        )
        for file in sorted(f for f in files if f.endswith(".py")):
            try:
                tree = ast.parse((Path(folder) / file).read_bytes())
            except (SyntaxError, ValueError, OSError):
                # Templates and files for other Pythons lie there too; they are no documentation.
                continue
            yield from _document((p for text in _docstrings_in(tree) for p in _prose(text)), seen)


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and of what it defines, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    # Definitions stand in bodies of statements, never in expressions, which are most of a tree.
    for name in ("body", "orelse", "handlers", "finalbody"):
        for inner in getattr(node, name, ()) if not isinstance(node, ast.expr) else ():
            yield from _docstrings_in(inner)


def _document(paragraphs: Iterable[str], seen: set[str]) -> Iterator[str]:
    """The unseen paragraphs as one document, or nothing where fewer than 40 words are left."""
    kept = []
    for paragraph in paragraphs:
        mark = _normal(paragraph)
        if mark not in seen:
            seen.add(mark)
            kept.append(paragraph)
    text = "\n\n".join(kept)
    if len(text.split()) >= 40:
        yield text


_PIECE = 24_000
"""Characters from which a document may be cut before splitting, at the end of a paragraph."""


def split_texts(texts: Sequence[str], held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Split documents into (training, held-out) text that share no paragraph.

    The choice depends on the text of each document alone, not on order or on a seed, so both sides
    of a run that is repeated or resumed see the same split. Documents longer than 24,000 characters
    are first cut at paragraph ends, so that one book can be split too. A paragraph that is on both
    sides (compared without case and spacing) is taken out of the training side.

    Args:
        held_out: share of the characters to hold out, above 0 and below 1.

    Raises:
        UserError: a share that cannot be, or text too short to give both sides something.
    """
    if not 0 < held_out < 1:
        raise UserError("held_out", f"{held_out} is not between 0 and 1")
    pieces = [piece for text in texts for piece in _cut(text)]
    by_hash = sorted(range(len(pieces)), key=lambda i: (_hash(pieces[i]), i))
    wanted = held_out * sum(map(len, pieces))
    taken: set[int] = set()
    size = 0
    for index in by_hash:
        # Never the whole text, however large the share.
        if size >= wanted or len(taken) + 1 == len(pieces):
            break
        taken.add(index)
        size += len(pieces[index])
    held = [pieces[i] for i in range(len(pieces)) if i in taken]
    marks = {_normal(p) for text in held for p in _paragraphs(text)}
    train = [_without(pieces[i], marks) for i in range(len(pieces)) if i not in taken]
    train = [text for text in train if text.strip()]
    if not train or not held:
        raise UserError(
            "data",
            "too little text to hold some of it out",
            "give several documents or a longer one",
        )
    return train, held


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 of the documents in order, as hex; what a record keeps to say which text was used."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _bytes_of_last(
    text: str, tokens: Sequence[int], n: int, tokenizer: PreTrainedTokenizerBase
) -> int:
    """UTF-8 bytes that the last `n` tokens of a document with its closing token stand for."""
    kept = len(tokens) - n
    if not tokenizer.is_fast:  # knows no places; its tokens count as equally long
        return round(len(text.encode()) * n / len(tokens))
    places = tokenizer(text, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    return len(text[places[kept - 1][1] :].encode())


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.casefold().split())


def _paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n[ \t]*\n", text) if p.strip()]


def _without(text: str, marks: set[str]) -> str:
    paragraphs = _paragraphs(text)
    kept = [p for p in paragraphs if _normal(p) not in marks]
    return text if len(kept) == len(paragraphs) else "\n\n".join(kept)


def _cut(text: str) -> list[str]:
    if len(text) <= _PIECE:
        return [text]
    pieces: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in _paragraphs(text):
        if current and size + len(paragraph) > _PIECE:
            pieces.append("\n\n".join(current))
            current, size = [], 0
        current.append(paragraph)
        size += len(paragraph)
    return [*pieces, "\n\n".join(current)]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some blocks: `tokens` [B, T] int64 and `starts` [B, T] bool, True where a document begins."""

    tokens: Tensor
    starts: Tensor

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each token in its document, [B, T] int64, counted from 0 at each start."""
        index = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)
        return index - torch.where(self.starts, index, 0).cummax(dim=1).values

    @cached_property
    def predicted(self) -> Tensor:
        """[B, T-1] bool: whether t predicts token t+1, so not where t+1 begins a document."""
        return ~self.starts[:, 1:]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a causal LM; restarting positions tell it where documents begin."""
        return {"input_ids": self.tokens, "position_ids": self.position_ids}

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(self.tokens.to(device), self.starts.to(device))


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Tokens packed into blocks of one length.

    Documents follow one another, each closed by the separator, and run on into the next block where
    one is full; a block always begins a document, since it cannot see the block before.

    Args:
        tokens: [n, T] int32.
        starts: [n, T] bool, True where a document begins (the first column always).
        n_tokens: tokens that are text or separators. Filling at the end of the last block is not
            counted: each filling token starts a document of its own, so nothing predicts or sees
            it.
        bytes_per_token: UTF-8 bytes of the text divided by its tokens, where the text is known.
    """

    tokens: Tensor
    starts: Tensor
    n_tokens: int
    bytes_per_token: float | None = None

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        separator: int | None = None,
        fill: bool = False,
        max_tokens: int | None = None,
    ) -> TokenBlocks:
        """Tokenize documents and pack them.

        Args:
            length: tokens a block, T.
            separator: token that closes a document; the tokenizer's end-of-sequence token if None.
            fill: keep the last, partly filled block (for measuring) instead of dropping it.
            max_tokens: stop once there are this many.

        Raises:
            UserError: no text, a tokenizer without a separator, or too few tokens for one block.
        """
        if not texts:
            raise UserError("data", "no text", "give at least one document")
        if separator is None:
            separator = tokenizer.eos_token_id
        if not isinstance(separator, int):
            raise UserError("tokenizer", "has no end-of-sequence token", "name a separator token")
        documents: list[list[int]] = []
        size = n_bytes = 0
        for first in range(0, len(texts), 64):
            chunk = list(texts[first : first + 64])
            encoded = tokenizer(chunk, verbose=False, return_attention_mask=False)["input_ids"]
            for text, ids in zip(chunk, encoded, strict=True):
                documents.append(ids if ids and ids[-1] == separator else [*ids, separator])
                size += len(documents[-1])
                n_bytes += len(text.encode())
                if max_tokens is not None and size >= max_tokens:
                    cut = size - max_tokens
                    n_bytes -= _bytes_of_last(text, documents[-1], cut, tokenizer) if cut else 0
                    size = max_tokens
                    break
            if max_tokens is not None and size >= max_tokens:
                break
        return cls.from_tokens(
            documents,
            length,
            separator=separator,
            fill=fill,
            max_tokens=max_tokens,
            bytes_per_token=n_bytes / size,
        )

    @classmethod
    def from_tokens(
        cls,
        documents: Iterable[Sequence[int]],
        length: int,
        *,
        separator: int,
        fill: bool = False,
        max_tokens: int | None = None,
        bytes_per_token: float | None = None,
    ) -> TokenBlocks:
        """Pack documents that are tokens already, with their closing tokens. See `from_texts`."""
        if length < 2:
            raise UserError("length", f"{length} tokens leave nothing to predict", "use 2 or more")
        parts = [torch.tensor(d, dtype=torch.int32) for d in documents if len(d)]
        flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        starts = torch.zeros(len(flat), dtype=torch.bool)
        begins = torch.tensor([0, *(len(p) for p in parts)]).cumsum(0)[:-1]
        starts[begins[begins < len(flat)]] = True
        if max_tokens is not None:
            flat, starts = flat[:max_tokens], starts[:max_tokens]
        n_tokens = len(flat)
        n_blocks = -(-n_tokens // length) if fill else n_tokens // length
        if n_blocks == 0 or n_tokens < 2:
            raise UserError(
                "data",
                f"{n_tokens} tokens of text, less than one block of {length}",
                "give more text or a smaller length",
            )
        filling = n_blocks * length - n_tokens
        if filling > 0:
            flat = torch.cat([flat, torch.full((filling,), separator, dtype=torch.int32)])
            starts = torch.cat([starts, torch.ones(filling, dtype=torch.bool)])
        tokens = flat[: n_blocks * length].view(n_blocks, length)
        starts = starts[: n_blocks * length].view(n_blocks, length).clone()
        starts[:, 0] = True
        return cls(tokens, starts, min(n_tokens, n_blocks * length), bytes_per_token)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens a block, T."""
        return self.tokens.shape[1]

    def take(self, n_blocks: int) -> TokenBlocks:
        """The first `n_blocks` blocks, or all where there are fewer."""
        n = min(n_blocks, len(self))
        n_tokens = min(self.n_tokens, n * self.length)
        return TokenBlocks(self.tokens[:n], self.starts[:n], n_tokens, self.bytes_per_token)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        epochs: int | None = 1,
        skip: int = 0,
    ) -> Iterator[Batch]:
        """Serve the blocks in batches.

        The blocks of all epochs form one stream, so only the very last batch may be smaller. The
        order depends on seed and epoch alone: a run that stopped after n batches goes on with
        ``skip=n`` and sees what it would have seen.

        Args:
            shuffle_seed: a new order each epoch; None for the order of the text.
            epochs: passes over the blocks; None for no end.
            skip: batches to leave out at the start.
        """
        n = len(self)
        at = skip * batch_size
        order, epoch_of_order = torch.arange(n), -1
        while epochs is None or at < epochs * n:
            picked: list[int] = []
            while len(picked) < batch_size and (epochs is None or at < epochs * n):
                epoch, index = divmod(at, n)
                if shuffle_seed is not None and epoch != epoch_of_order:
                    order, epoch_of_order = _order(n, shuffle_seed, epoch), epoch
                picked.append(int(order[index]))
                at += 1
            yield Batch(self.tokens[picked].long(), self.starts[picked])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the blocks to one safetensors file, whole or not at all.

        Raises:
            UserError: it cannot be written; a full disk, most often.
        """
        tensors = {"tokens": self.tokens.contiguous(), "starts": self.starts.contiguous()}
        facts = {"n_tokens": self.n_tokens, "bytes_per_token": self.bytes_per_token}
        try:
            metadata = {"token_blocks": json.dumps(facts)}
            write_file(path, lambda partial: save_file(tensors, partial, metadata=metadata))
        except (OSError, SafetensorError) as error:  # the library wraps a full disk in its own
            raise UserError(
                os.fspath(path), f"cannot be written ({error})", "make room, or write elsewhere"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenBlocks:
        """Read what `save` wrote. Raises UserError for a missing or damaged file."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["token_blocks"])
                return cls(file.get_tensor("tokens"), file.get_tensor("starts"), **facts)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise UserError(str(path), f"not a file of token blocks ({error})") from error


def _order(n: int, seed: int, epoch: int) -> Tensor:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
    return torch.randperm(n, generator=generator)
