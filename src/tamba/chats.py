"""Conversations: where they come from, what their rows may look like, and which tokens are answers.

A source is a file of JSON lines (plain, `.gz`, `.xz`), a `.txt` file with a prompt a line, a
`.parquet` file, a folder of such, ``hf://datasets/OWNER/NAME/FILE``, or a data set of the hub,
``OWNER/NAME`` or ``OWNER/NAME/PART:SPLIT``, which is streamed. Rows come in the forms that data
sets of chats have; see `prompt_of`, `conversation_of` and `preference_of`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from tamba.data import Source, file_rows, files_of, from_hub, is_text, streamed, text_lines
from tamba.errors import UserError
from tamba.recipe import data_set

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant" | .., "content": ..}``."""

_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_ANSWERS = ("completion", "response", "output", "answer")


@dataclass(frozen=True)
class Row:
    """A row of a source.

    Args:
        where: file and line, or data set and row; what messages about it begin with.
        fields: its columns.
        source: the name of the file or data set.
    """

    where: str
    fields: Mapping[str, Any]
    source: str = ""


@dataclass(frozen=True)
class Conversation:
    """Messages whose answers are learned.

    Args:
        where: as of its row.
        messages: the last is the assistant's.
        cut: the last answer was cut off, so that its end is not the answer's end.
    """

    where: str
    messages: tuple[Message, ...]
    cut: bool = False


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first was preferred."""

    where: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


# Sources.


def check_chats(sources: Sequence[Source]) -> None:
    """Refuse a source of this machine that is not there or of no kind that is read.

    Raises:
        UserError: as `read_rows`, before anything is read. The hub is not asked.
    """
    if not sources:
        raise UserError("data", "names no source of conversations", "give at least one")
    for source in sources:
        name = os.fspath(source)
        path = Path(name)
        if name.startswith("hf://") or (not path.exists() and data_set(name)):
            continue
        if not path.exists():
            raise UserError(name, "no such file or folder, and no name of a data set")
        if path.is_dir():
            files_of(path)
        elif not is_text(path):
            raise UserError(
                name, "not a kind of file that is read", "known: .jsonl, .json, .txt, .parquet"
            )


def sources_digest(sources: Iterable[Source]) -> list[str]:
    """What sources are, for a digest: files by their content, names of the hub as they stand."""
    found = []
    for source in sources:
        path = Path(source)
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as opened:
                    found.append(hashlib.file_digest(opened, "sha256").hexdigest())
            else:
                found.append(os.fspath(source))
    return found


def read_rows(sources: Source | Sequence[Source], *, limit: int | None = None) -> Iterator[Row]:
    """The rows of sources, in order.

    Args:
        sources: see the head of this file.
        limit: most rows of each source.

    Raises:
        UserError: a source that is missing, empty, damaged or cannot be reached; `datasets` is not
            installed and one needs it.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    check_chats(sources)
    for source in sources:
        n = 0
        for row in _rows(os.fspath(source)):
            if limit is not None and n >= limit:
                break
            n += 1
            yield row
        if n == 0:
            raise UserError(os.fspath(source), "holds no rows", "give a source with at least one")


def _rows(name: str) -> Iterator[Row]:
    if name.startswith("hf://"):
        yield from _file(from_hub(name))
        return
    path = Path(name)
    if path.is_dir():
        for file in files_of(path):
            yield from _file(file)
    elif path.exists():
        yield from _file(path)
    else:
        yield from _data_set(name)


def _file(path: Path) -> Iterator[Row]:
    if ".txt" in path.suffixes:
        for where, line in text_lines(path):
            if line.strip():
                yield Row(where, {"prompt": line.strip()}, path.name)
    else:
        for where, fields in file_rows(path):
            yield Row(where, fields, path.name)


def _data_set(name: str) -> Iterator[Row]:
    found = data_set(name)
    assert found is not None
    place, split = found
    for where, fields in streamed(name, *place, split=split):
        yield Row(where, fields, name)


# What rows hold.


def prompt_of(row: Row) -> tuple[Message, ...]:
    """What is asked in a row: all before the last answer.

    It has one of ``messages``, ``conversations`` (``from``, ``value``), ``prompt`` (text or
    messages), ``instruction`` (with ``input``) or ``question``, the last three with ``system``.

    Raises:
        UserError: no such column, or messages that are none; the prompt may be empty.
    """
    messages = _messages(row) or _asked(row)
    if not messages:
        _unknown(row, "prompt", "messages, conversations, prompt, instruction or question")
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return tuple(messages)


def conversation_of(row: Row) -> Conversation:
    """A row's messages with its answers.

    ``messages`` or ``conversations`` whose last is the assistant's, or a prompt as in `prompt_of`
    with ``completion``, ``response``, ``output`` or ``answer`` (text or messages). A row whose
    ``finish`` is ``length``, as `generate_data` writes it, was cut off.

    Raises:
        UserError: no such columns, or an answer that is missing or empty.
    """
    messages = _messages(row)
    if not messages:
        messages = _asked(row)
        answers = [k for k in _ANSWERS if k in row.fields]
        if not messages or not answers:
            _unknown(row, "conversation", "messages, conversations, or prompt and completion")
        messages += _said(row, answers[0], "assistant")
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(row.where, "does not end with an answer of the assistant", "remove the row")
    if not messages[-1]["content"].strip():
        raise UserError(row.where, "the answer is empty", "remove the row")
    return Conversation(row.where, tuple(messages), row.fields.get("finish") == "length")


def preference_of(row: Row) -> Preference:
    """A row's prompt, ``chosen`` and ``rejected`` answer.

    Answers are text or messages; messages that begin with the prompt are cut there, and where there
    is no column for the prompt it is what both begin with.

    Raises:
        UserError: no such columns, an answer that is missing or empty, or two that do not differ.
    """
    if "chosen" not in row.fields or "rejected" not in row.fields:
        _unknown(row, "preference", "prompt, chosen and rejected")
    chosen, rejected = _said(row, "chosen", "assistant"), _said(row, "rejected", "assistant")
    same = 0
    while same < min(len(chosen), len(rejected)) and _alike(chosen[same], rejected[same]):
        same += 1
    if same == len(chosen) == len(rejected):
        raise UserError(
            row.where, "the chosen and the rejected answer do not differ", "remove the row"
        )
    # Both may repeat the prompt, whole or without a system message.
    while same and chosen[same - 1]["role"] == "assistant":
        same -= 1
    prompt = max(_asked(row), chosen[:same], key=len)
    chosen, rejected = chosen[same:], rejected[same:]
    if not prompt:
        _unknown(row, "prompt", "prompt, chosen and rejected")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side or side[-1]["role"] != "assistant" or not side[-1]["content"].strip():
            raise UserError(row.where, f"the {name} answer is empty", "remove the row")
    return Preference(row.where, tuple(prompt), tuple(chosen), tuple(rejected))


def _alike(one: Message, other: Message) -> bool:
    return messages_key([one]) == messages_key([other])


def _messages(row: Row) -> list[Message]:
    for key in ("messages", "conversations"):
        if row.fields.get(key) is not None:
            return _said(row, key, "user")
    return []


def _asked(row: Row) -> list[Message]:
    system = row.fields.get("system") or row.fields.get("system_prompt")
    before = [{"role": "system", "content": system}] if isinstance(system, str) else []
    for key in ("prompt", "instruction", "question"):
        if row.fields.get(key) is None:
            continue
        messages = _said(row, key, "user")
        more = row.fields.get("input")
        if key == "instruction" and isinstance(more, str) and more.strip():
            messages[-1]["content"] += "\n\n" + more
        return [*before, *messages]
    return []


def _said(row: Row, key: str, role: str) -> list[Message]:
    """A column that holds text or messages, as messages."""
    value = row.fields[key]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(m, Mapping) for m in value):
        raise UserError(
            row.where, f"'{key}' is neither text nor messages", "give role and content of each"
        )
    found = []
    for message in value:
        who = message.get("role") or message.get("from")
        what = message.get("content") if "content" in message else message.get("value")
        if not isinstance(who, str) or not isinstance(what, str):
            raise UserError(row.where, f"a message of '{key}' lacks role or content, as text")
        found.append({"role": _NAMES.get(who, who), "content": what})
    return found


def _unknown(row: Row, what: str, known: str) -> NoReturn:
    columns = ", ".join(f"'{c}'" for c in row.fields) or "none"
    raise UserError(row.where, f"holds no {what}; its columns are {columns}", f"known: {known}")


# Tokens.


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise UserError where a tokenizer cannot frame conversations."""
    if not tokenizer.chat_template:
        raise UserError(where, "the tokenizer has no chat template", "use an instruct model's")


def check_words(largest: int, words: int, where: str) -> None:
    """Raise UserError where a row has a token that a model of so many words does not have."""
    if largest >= words:
        raise UserError(
            where,
            f"holds token number {largest}, and the model has {words} words",
            "use the model's own tokenizer",
        )


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """A conversation as the template frames it, up to where the assistant speaks.

    Raises:
        UserError: the template refuses such messages.
    """
    return _framed(tokenizer, messages, where, add_generation_prompt=True)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str
) -> list[int]:
    """The same as tokens."""
    return _tokens(tokenizer, prompt_text(tokenizer, messages, where))


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, ends: Collection[int]
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them the assistant is to write.

    Where the template marks what the assistant generates, the marks decide. Otherwise the text is
    tokenized whole, where each prompt has the tokens with which the model is asked; else it is cut
    where an answer begins and ends, and the pieces are tokenized apart. Either way no token spans a
    cut, so the mask is exact. Of what follows an answer, the token that ends it is part of it and
    the rest is the template's. Both are left out after an answer that was cut off.

    Args:
        ends: tokens that end an answer.

    Raises:
        UserError: the template refuses these messages, or writes earlier ones anew when more
            follow and marks no answers.
    """
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\b", template):
        encoded = _call(
            tokenizer,
            conversation.messages,
            conversation.where,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids = list(encoded["input_ids"])
        mask = [bool(m) for m in encoded["assistant_masks"]]
    else:
        ids, mask = _by_prefix(tokenizer, conversation, ends)
    if conversation.cut:
        last = max((i for i, m in enumerate(mask) if m), default=-1)
        if last >= 0 and ids[last] in ends:
            ids, mask = ids[:last], mask[:last]
        else:
            ids, mask = ids[: last + 1], mask[: last + 1]
    return ids, mask


def _by_prefix(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, ends: Collection[int]
) -> tuple[list[int], list[bool]]:
    messages, where = conversation.messages, conversation.where
    whole = _framed(tokenizer, messages, where)
    spans: list[tuple[int, int]] = []  # where answers begin and end in it
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_text(tokenizer, messages[:i], where)
        through = _framed(tokenizer, messages[: i + 1], where)
        at = spans[-1][1] if spans else 0
        if not (whole.startswith(through) and through.startswith(before) and len(before) >= at):
            raise UserError(
                where,
                f"the chat template writes message {i} otherwise when others follow",
                "mark answers in the template with {% generation %}",
            )
        spans.append((len(before), len(through)))
    ids, answers = _cut_whole(tokenizer, whole, spans) or _cut_apart(tokenizer, whole, spans)
    mask = [False] * len(ids)
    for first, stop in answers:
        last = max((k for k in range(first, stop) if ids[k] in ends), default=stop - 1)
        mask[first : last + 1] = [True] * (last + 1 - first)
    return ids, mask


def _cut_whole(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Tokens of a text and where spans of characters lie among them.

    None where a token is partly of a span, or what comes before one has other tokens by itself.
    """
    if not tokenizer.is_fast:
        return None
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = made["input_ids"], made["offset_mapping"]
    begins = [begin for begin, _ in places]
    found = []
    for begin, end in spans:
        first, stop = bisect.bisect_left(begins, begin), bisect.bisect_left(begins, end)
        cut = any(reach > begin for _, reach in places[:first])
        cut = cut or any(reach > end for _, reach in places[:stop])
        if cut or ids[:first] != _tokens(tokenizer, text[:begin]):
            return None
        found.append((first, stop))
    return ids, found


def _cut_apart(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The same from tokens of each piece."""
    ids: list[int] = []
    found = []
    at = 0
    for begin, end in spans:
        ids += _tokens(tokenizer, text[at:begin])
        first = len(ids)
        ids += _tokens(tokenizer, text[begin:end])
        found.append((first, len(ids)))
        at = end
    return ids + _tokens(tokenizer, text[at:]), found


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template has put in what special tokens there are.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _framed(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, **options: Any
) -> str:
    text: str = _call(tokenizer, messages, where, tokenize=False, **options)
    return text


def _call(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # damaged, or it refuses such messages
        if not type(error).__module__.startswith("jinja2."):  # templates need it, we do not
            raise
        raise UserError(
            where, f"the tokenizer's chat template says: {error}", "remove the row"
        ) from error


def messages_key(messages: Sequence[Message]) -> str:
    """What tells conversations apart: roles and contents without the space around them."""
    return json.dumps([[m["role"], m["content"].strip()] for m in messages], ensure_ascii=False)
