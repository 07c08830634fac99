"""The teacher writes answers to prompts, as training data for its student.

Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): what a teacher writes is text
from the distribution that the student is to copy. Prompts come from files or the hub, or from the
model itself: given its chat template up to where the user speaks, an instruct model writes what
users ask (Magpie, Xu et al. 2024, arXiv 2406.08464, section 2.1).

Answers are kept one by one in a hidden file beside the output, which gets its name when all are
there. Every answer has draws of its own and the same neighbours in its batch each time, so a run
that was cut off writes what it would have written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tamba import progress
from tamba.artefact import write_file
from tamba.chats import (
    Message,
    check_chats,
    check_template,
    check_words,
    messages_key,
    prompt_of,
    prompt_text,
    read_rows,
    sources_digest,
)
from tamba.checkpoint import load_model, load_tokenizer, open_checkpoint
from tamba.data import Source
from tamba.decoding import Sampling, decode
from tamba.errors import UserError
from tamba.generate import end_tokens
from tamba.store import Store

_SHORT = 64
"""Characters up to which an answer may rightly come twice ("Yes.")."""
_FEW_PLACES, _MANY_PLACES = 16_384, 131_072
"""Places of a batch on a CPU, and the most on a GPU."""
_SLOT = "\x02the user's words\x03"


@dataclass(frozen=True)
class Written:
    """What a run wrote.

    Args:
        rows: answers in the file.
        unfinished: of these, how many were cut off at `new_tokens`.
        left_out: prompts and answers that were not kept, counted by reason.
        tokens: that the model wrote, in all.
    """

    rows: int
    unfinished: int
    tokens: int
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.rows:,} answers, {self.tokens:,} tokens written"
            + (f", {self.unfinished:,} cut off" if self.unfinished else "")
        ]
        lines += [f"left out: {n:,} {why}" for why, n in sorted(self.left_out.items())]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Prompt:
    """A prompt that is asked: its digest, messages, source, text as framed, and tokens."""

    key: str
    messages: tuple[Message, ...]
    source: str
    text: str
    ids: list[int]


def generate_data(
    model: str | Path | Any,
    out: str | Path,
    *,
    prompts: Source | Sequence[Source] = (),
    magpie: int = 0,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: int = 512,
    prompt_tokens: int | None = None,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 0.95,
    magpie_temperature: float = 1.0,
    seed: int = 0,
    tokens_at_once: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Written:
    """Let a model answer prompts, and write the conversations as JSON lines.

    A line is ``{"messages": [.., {"role": "assistant", ..}], "text", "source", "finish"}``: data
    for an ``sft`` stage, and, by ``text`` (the conversation as the model saw it), a text source of
    a recipe. ``finish`` is ``stop``, or ``length`` for an answer that was cut off.

    The same call continues a run that was cut off; on one machine the file comes out the same.

    Args:
        model: a checkpoint folder, GGUF file or hub name; or a loaded model with its `tokenizer`.
        out: the file to make.
        prompts: sources, as `tamba.chats` describes them. Prompts that come twice are asked once.
        magpie: so many prompts that the model writes itself, beside the others.
        limit: most prompts of each source.
        new_tokens: longest answer, and longest prompt of the model's own.
        prompt_tokens: longest prompt; None for what the model's positions leave.
        temperature, top_k, top_p: of the answers; see `tamba.decoding.Sampling`.
        magpie_temperature: of prompts that the model writes.
        seed: of sampling.
        tokens_at_once: places of a batch, prompts and answers; None for 16,384, and on a GPU for as
            many as an eighth of its memory caches, at most 131,072.
        dtype: type to compute in, for a model that is opened here.
        device: where to run it; None for a GPU if there is one.

    Raises:
        UserError: no prompts, a tokenizer without chat template, `out` is there already or belongs
            to an unfinished run with other settings, or a setting that cannot be.
    """
    out = Path(out)
    answering = Sampling(temperature, top_k, top_p, seed)
    asking = Sampling(magpie_temperature, seed=seed)
    _check(out, prompts, magpie, limit, new_tokens, prompt_tokens)
    sources = [prompts] if isinstance(prompts, str | os.PathLike) else list(prompts)
    if sources:
        check_chats(sources)
    settings: dict[str, Any] = {
        "prompts": sources_digest(sources),
        "limit": limit,
        "magpie": magpie,
        "magpie_temperature": magpie_temperature if magpie else None,
        "new_tokens": new_tokens,
        "prompt_tokens": prompt_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model)
        tokenizer, config = load_tokenizer(checkpoint), checkpoint.tamba_config
        settings |= {"model": checkpoint.digest(), "dtype": dtype}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    else:
        checkpoint, config = None, model.config
        settings |= {"model": config.to_json_string()}
        device = str(model.device)
    if tokens_at_once is None:
        tokens_at_once = _places(config, torch.device(device))
    settings["tokens_at_once"] = tokens_at_once
    if tokenizer is None:
        raise UserError("generate-data", "has no tokenizer", "use a model that has one")
    check_template(tokenizer, "generate-data")
    room = _room(config, new_tokens, prompt_tokens)
    asked = _Asked(tokenizer, room, config.vocab_size)
    for row in read_rows(sources, limit=limit) if sources else ():
        source = row.fields.get("source")
        asked.add(prompt_of(row), source if isinstance(source, str) else row.source, row.where)
    if not asked and not magpie:
        asked.refuse()
    store = _unfinished(out, settings)
    if checkpoint is not None:
        model = load_model(checkpoint, dtype, device)
    writer = _Writer(model, tokenizer, store, new_tokens, tokens_at_once)
    if magpie:
        for name, text in writer.own_prompts(magpie, asking).items():
            if text is None:
                asked.left_out["prompts of its own that were cut off"] += 1
            else:
                asked.add(({"role": "user", "content": text},), "magpie", name)
        if not asked:
            asked.refuse()
    answers = writer.answers(asked.prompts, answering)
    rows, left_out = _rows(asked.prompts, answers)
    if not rows:
        raise UserError("generate-data", "no answer can be kept", "look at what the model writes")
    write_file(out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    assert store.path is not None
    store.path.unlink(missing_ok=True)
    unfinished = sum(r["finish"] == "length" for r in rows)
    total = sum(answer["tokens"] for answer in answers.values())
    return Written(len(rows), unfinished, total, dict(asked.left_out + left_out))


def _places(config: Any, device: torch.device) -> int:
    """Places of a batch. A step of decoding costs a GPU nearly the same for one row or hundreds, so
    there rows are as many as memory well has room for: all of the card's, so that a run that goes
    on has the same batches whatever else is there.
    """
    if device.type != "cuda":
        return _FEW_PLACES
    context = 1024
    each = sum(block.cache_bytes(context, 4) for block in config.block_specs) / context
    room = torch.cuda.get_device_properties(device).total_memory / 8
    return max(_FEW_PLACES, min(_MANY_PLACES, int(room / each)))


def _check(
    out: Path,
    prompts: Any,
    magpie: int,
    limit: int | None,
    new_tokens: int,
    prompt_tokens: int | None,
) -> None:
    if out.exists():
        raise UserError(str(out), "already exists", "choose another file or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(str(out.parent), "no such folder", "make it, or choose another")
    if not prompts and not magpie:
        raise UserError("prompts", "there are none", "give files of prompts, or magpie = N")
    for name, value in (
        ("magpie", magpie + 1),
        ("limit", limit),
        ("new_tokens", new_tokens),
        ("prompt_tokens", prompt_tokens),
    ):
        if value is not None and value < 1:
            raise UserError(name, "is not a positive number")


def _unfinished(out: Path, settings: dict[str, Any]) -> Store:
    """The answers that a run with these settings has left, kept in a hidden file beside `out`."""
    path = out.with_name(f".{out.name}.unfinished")
    store = Store(path)
    if "settings" not in store:
        store.add({"settings": settings})
        return store
    other = [k for k in settings if store["settings"].get(k) != settings[k]]
    if other:
        raise UserError(
            str(path),
            f"is of an unfinished run with another {', '.join(other)}",
            "repeat that run, or remove the file to begin anew",
        )
    return store


def _room(config: Any, new_tokens: int, prompt_tokens: int | None) -> int:
    """Most tokens of a prompt."""
    positions = getattr(config, "max_position_embeddings", None)
    left = None if positions is None else positions - new_tokens
    if left is not None and left < 1:
        raise UserError(
            "new_tokens", f"{new_tokens} fill the model's {positions} positions", "ask for fewer"
        )
    return min(n for n in (left, prompt_tokens, 1 << 40) if n is not None)


class _Asked:
    """The prompts that are asked, each once, and why others are not.

    Args:
        room: most tokens of a prompt.
        words: that the model has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int, words: int) -> None:
        self.tokenizer, self.room, self.words = tokenizer, room, words
        self.left_out: Counter[str] = Counter()
        self._prompts: dict[str, _Prompt] = {}
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._begin = str(tokenizer.bos_token) if begins else ""

    @property
    def prompts(self) -> list[_Prompt]:
        return list(self._prompts.values())

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, messages: tuple[Message, ...], source: str, where: str) -> None:
        """Ask this too, or count why not; UserError where the model lacks one of its words."""
        if not messages or not messages[-1]["content"].strip():
            self.left_out["empty prompts"] += 1
            return
        key = hashlib.sha256(messages_key(messages).encode()).hexdigest()
        if key in self._prompts:
            self.left_out["prompts that came before"] += 1
            return
        try:
            text = prompt_text(self.tokenizer, messages, where)
        except UserError:
            self.left_out["prompts that the chat template refuses"] += 1
            return
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > self.room:
            self.left_out[f"prompts of more than {self.room} tokens"] += 1
            return
        check_words(max(ids), self.words, where)
        # Whoever reads the text puts the token that begins a text before it.
        plain = text.removeprefix(self._begin)
        self._prompts[key] = _Prompt(key, messages, source, plain, ids)

    def refuse(self) -> None:
        """Raise UserError: there is nothing to ask."""
        why = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
        raise UserError("prompts", f"none can be asked ({why})", "give others")


def _rows(
    prompts: Sequence[_Prompt], answers: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The lines of the file in the order of the prompts, and which answers are left out."""
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    rows = []
    for prompt in prompts:
        text: str = answers[prompt.key]["text"]
        plain = " ".join(text.split())
        if not plain:
            left_out["empty answers"] += 1
        elif len(plain) > _SHORT and plain in seen:
            left_out["answers that came before"] += 1
        else:
            seen.add(plain)
            said = {"role": "assistant", "content": text}
            rows.append(
                {
                    "messages": [*prompt.messages, said],
                    "text": prompt.text + text,
                    "source": prompt.source,
                    "finish": answers[prompt.key]["finish"],
                }
            )
    return rows, left_out


class _Writer:
    """A model that writes, and what it has written.

    Args:
        store: answers by the digest of their prompt, and prompts of the model's own by number.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        store: Store,
        new_tokens: int,
        tokens_at_once: int,
    ) -> None:
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.new_tokens, self.tokens_at_once = new_tokens, tokens_at_once
        self.ends = end_tokens(model, tokenizer)

    def answers(self, prompts: Sequence[_Prompt], sampling: Sampling) -> dict[str, dict[str, Any]]:
        """By digest: text, tokens and finish of each answer."""
        names = [p.key for p in prompts]
        self._write([p.ids for p in prompts], names, sampling, self.ends, "answers")
        return {name: self.store[name] for name in names}

    def own_prompts(self, n: int, sampling: Sampling) -> dict[str, str | None]:
        """By number, what the model writes where the user would; None where it was cut off."""
        before, after = _around(self.tokenizer)
        ids: list[int] = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        check_words(max(ids, default=0), self.model.config.vocab_size, "chat template")
        closing: list[int] = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        ends = list(self.ends)
        if closing and closing[0] in set(self.tokenizer.all_special_ids):
            ends.append(closing[0])
        names = [f"prompt {i}" for i in range(n)]
        self._write([ids] * n, names, sampling, ends, "prompts of its own")
        found: dict[str, str | None] = {}
        for name in names:
            said = self.store[name]
            text, closed, _ = said["text"].partition(after.strip() or _SLOT)
            found[name] = text.strip() if closed or said["finish"] == "stop" else None
        return found

    def _write(
        self,
        prompts: Sequence[list[int]],
        names: Sequence[str],
        sampling: Sampling,
        ends: Sequence[int],
        label: str,
    ) -> None:
        known = {i for i, name in enumerate(names) if name in self.store}
        with progress.task(label, len(prompts)) as advance:
            advance(len(known))
            for batch in decode(
                self.model,
                prompts,
                [self.new_tokens] * len(prompts),
                ends=ends,
                choose=sampling.chooser(names),
                tokens_at_once=self.tokens_at_once,
                known=known,
            ):
                new = {names[i]: self._read(t, ends) for i, t in batch.items() if i not in known}
                self.store.add(new)
                written = sum(self.store[name]["tokens"] for name in new)
                advance(len(new), note=f"{written / max(1, len(new)):.0f} tokens each")

    def _read(self, tokens: list[int], ends: Sequence[int]) -> dict[str, Any]:
        stopped = bool(tokens) and tokens[-1] in ends
        text = self.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
        finish = "stop" if stopped else "length"
        return {"text": text.strip(), "tokens": len(tokens), "finish": finish}


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before the first words of the user, and after them."""
    framed: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=False
    )
    before, slot, after = framed.partition(_SLOT)
    if not slot:
        raise UserError("chat template", "does not write what the user says", "leave out magpie")
    return before, after
