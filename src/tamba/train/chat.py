"""Stages on conversations: supervised fine-tuning, preferences, and the student's own answers.

Rows are framed, masked and checked here, before the first step; `chat_steps` makes the steps.

Shape letters: `B` rows of a batch, `T` tokens of a row.
"""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tamba import progress
from tamba.chats import (
    Conversation,
    Preference,
    Row,
    answer_tokens,
    check_template,
    check_words,
    conversation_of,
    preference_of,
    prompt_of,
    prompt_tokens,
)
from tamba.data import Batch
from tamba.errors import UserError
from tamba.generate import end_tokens
from tamba.model.modeling import TambaForCausalLM
from tamba.recipe import ChatStage, Dpo, OnPolicy, Sft
from tamba.train.chat_steps import IGNORED, check_library, kind_of, padding, running
from tamba.train.log import StageLog
from tamba.train.trainer import NOWHERE, Place

_BETAS = {"forward": 0.0, "js": 0.5, "reverse": 1.0}
"""Divergences, as TRL counts them."""


def sft(
    student: TambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    stage: Sft,
    rows: Iterable[Row] | Framed,
    *,
    teacher: TambaForCausalLM | None = None,
    moving: Collection[str] | None = None,
    seed: int = 0,
    place: Place = NOWHERE,
) -> StageLog:
    """Train a student on the answers of conversations, by TRL's `SFTTrainer`.

    The loss is a mean over the answers' tokens of a step, however it is divided.

    Args:
        student: changed in place.
        rows: as `tamba.chats.conversation_of` reads them, or what `frame` made of them.
        teacher: for ``stage.kl``.
        moving: names of the parameters that move, which are float32 at least; None for all.
        seed: of the choice and order of rows.
        place: where checkpoints are kept, from the last of which the stage goes on.

    Raises:
        UserError: TRL is not installed; no rows; a row that cannot be used, by its place; a teacher
            with another vocabulary; no chat template; steps that come to nothing, or a full disk.
    """
    where = "train: sft"
    _check_models(student, tokenizer, teacher if stage.kl else None, where)
    framed = _framed(student, tokenizer, stage, rows, seed)
    examples = _packed(framed.rows, stage.length) if stage.packed else framed.rows
    filling = padding(tokenizer, student.config.vocab_size)
    with running(student, teacher, moving, stage, seed, place) as run:
        trainer = run.trainer(
            _Collate(filling, stage.length if stage.packed else None),
            examples,
            tokenizer,
            framed.tokens,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        )
        trainer.learn_from(teacher, stage)
        return run.log(trainer)


def dpo(
    student: TambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    stage: Dpo,
    rows: Iterable[Row] | Framed,
    *,
    teacher: TambaForCausalLM | None = None,
    moving: Collection[str] | None = None,
    seed: int = 0,
    place: Place = NOWHERE,
) -> StageLog:
    """Train a student on preferences, by TRL's `DPOTrainer` with the sigmoid loss.

    Log-probabilities of the reference are computed once, before the first step.

    Args:
        student: changed in place; where it is the reference, as it is given.
        rows: as `tamba.chats.preference_of` reads them.
        teacher: the reference of ``stage.reference = "teacher"``.

    Other arguments and errors are those of `sft`; besides, a pair whose answers do not differ.
    """
    where = "train: dpo"
    if stage.reference == "teacher" and teacher is None:
        raise UserError(where, "has no teacher for its reference", "give one, or use 'student'")
    _check_models(student, tokenizer, teacher if stage.reference == "teacher" else None, where)
    framed = _framed(student, tokenizer, stage, rows, seed)
    with running(student, teacher, moving, stage, seed, place) as run:
        trainer = run.trainer(
            _CollatePairs(padding(tokenizer, student.config.vocab_size)),
            framed.rows,
            tokenizer,
            framed.tokens,
            # Only asked before the first step, so the student itself can stand for its beginning.
            ref_model=teacher if stage.reference == "teacher" else copy.copy(student),
            beta=stage.beta,
            loss_type=["sigmoid"],
            max_length=None,
        )
        trainer.ask_reference()
        return run.log(trainer)


def on_policy(
    student: TambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    stage: OnPolicy,
    rows: Iterable[Row] | Framed,
    *,
    teacher: TambaForCausalLM | None,
    moving: Collection[str] | None = None,
    seed: int = 0,
    place: Place = NOWHERE,
) -> StageLog:
    """Train a student on the teacher's distribution along its own answers, by TRL's
    `DistillationTrainer`.

    Args:
        student: changed in place.
        rows: as `tamba.chats.prompt_of` reads them.
        teacher: in process.

    Other arguments and errors are those of `sft`.
    """
    where = "train: on_policy"
    if teacher is None:
        raise UserError(where, "has no teacher", "give one")
    _check_models(student, tokenizer, teacher, where)
    framed = _framed(student, tokenizer, stage, rows, seed)
    with running(student, teacher, moving, stage, seed, place) as run:
        trainer = run.trainer(
            None,
            framed.rows,
            tokenizer,
            framed.tokens,
            teacher_model=teacher,
            beta=_BETAS[stage.divergence],
            temperature=stage.temperature,
            max_completion_length=stage.new_tokens,
        )
        return run.log(trainer)


# Rows.


@dataclass(frozen=True)
class Framed:
    """The rows that a stage can use, framed, masked and checked.

    Args:
        rows: columns of TRL's, by name.
        tokens: in all of them.
    """

    rows: list[dict[str, Any]]
    tokens: int


def frame(
    stage: Sft | Dpo | OnPolicy,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    ends: Collection[int],
    words: int,
    seed: int = 0,
) -> Framed:
    """Choose rows for a stage and make tokens of them.

    Args:
        ends: tokens that end an answer.
        words: that the models have.
        seed: of the choice and order; as many as the stage's budget asks for are taken.

    Raises:
        UserError: no rows, or one that cannot be used, by its place.
    """
    where = f"train: {stage.stage}"
    check_template(tokenizer, where)
    if isinstance(stage, OnPolicy) and tokenizer.eos_token_id is None:
        raise UserError(
            where,
            "the tokenizer names no token that ends a text",
            "give tokenizer_config.json an eos_token",
        )
    framing: Callable[[Any], dict[str, Any] | None]
    match stage:
        case Sft():
            items: list[Any] = [conversation_of(row) for row in rows]
            framing = partial(_frame_conversation, stage, tokenizer, ends)
        case Dpo():
            items = [preference_of(row) for row in rows]
            framing = partial(_frame_preference, stage, tokenizer, ends)
        case OnPolicy():
            items = list(rows)
            framing = partial(_frame_prompt, stage, tokenizer)

    def encode(item: Any) -> dict[str, Any] | None:
        row = framing(item)
        if row is not None:
            check_words(row.pop("largest"), words, item.where)
        return row

    found = _picked(items, encode, stage, seed, where)
    return Framed(found, sum(row.pop("size") for row in found))


def _framed(
    student: TambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    stage: Sft | Dpo | OnPolicy,
    rows: Iterable[Row] | Framed,
    seed: int,
) -> Framed:
    if isinstance(rows, Framed):
        return rows
    ends = end_tokens(student, tokenizer)
    return frame(stage, tokenizer, rows, ends, student.config.vocab_size, seed)


def _frame_conversation(
    stage: Sft, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], chat: Conversation
) -> dict[str, Any] | None:
    ids, mask = answer_tokens(tokenizer, chat, ends)
    ids, mask = ids[: stage.length], mask[: stage.length]
    labels = [token if masked else IGNORED for token, masked in zip(ids, mask, strict=True)]
    labels[:1] = [IGNORED]  # nothing predicts the first token
    if not any(label != IGNORED for label in labels):
        _check_room(stage, chat.where)
        return None
    return {
        "input_ids": ids,
        "labels": labels,
        "lengths": [len(ids)],
        "size": len(ids),
        "largest": max(ids),
    }


def _frame_preference(
    stage: Dpo, tokenizer: PreTrainedTokenizerBase, ends: Collection[int], pair: Preference
) -> dict[str, Any] | None:
    prompt = prompt_tokens(tokenizer, pair.prompt, pair.where)
    room = stage.length - len(prompt)
    if room < 1:
        _check_room(stage, pair.where)
        return None
    sides: list[list[int]] = []
    masks: list[list[int]] = []
    for said in (pair.chosen, pair.rejected):
        whole = Conversation(pair.where, (*pair.prompt, *said))
        ids, mask = answer_tokens(tokenizer, whole, ends)
        if ids[: len(prompt)] != prompt:
            raise UserError(
                pair.where,
                "the prompt has other tokens when an answer follows",
                "remove the row, or use another chat template",
            )
        # What the template writes after an answer is not the answer's.
        stop = max((i + 1 for i, masked in enumerate(mask) if masked), default=0)
        sides.append(ids[len(prompt) : stop][:room])
        masks.append([int(m) for m in mask[len(prompt) : stop][:room]])
    if sides[0] == sides[1]:
        if stage.too_long == "skip":
            return None
        raise UserError(
            pair.where,
            f"the answers do not differ within length = {stage.length}",
            "remove the row, make length larger, or set too_long = 'skip'",
        )
    return {
        "prompt_ids": prompt,
        "chosen_ids": sides[0],
        "rejected_ids": sides[1],
        "chosen_mask": masks[0],
        "rejected_mask": masks[1],
        "size": 2 * len(prompt) + len(sides[0]) + len(sides[1]),
        "largest": max([*prompt, *sides[0], *sides[1]]),
    }


def _frame_prompt(
    stage: OnPolicy, tokenizer: PreTrainedTokenizerBase, row: Row
) -> dict[str, Any] | None:
    messages = prompt_of(row)
    if not messages or not messages[-1]["content"].strip():
        raise UserError(row.where, "the prompt is empty", "remove the row")
    ids = prompt_tokens(tokenizer, messages, row.where)
    if len(ids) > stage.length - stage.new_tokens:
        _check_room(stage, row.where)
        return None
    return {"prompt": list(messages), "size": len(ids) + stage.new_tokens, "largest": max(ids)}


def _check_models(
    student: TambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: TambaForCausalLM | None,
    where: str,
) -> None:
    check_library(where)
    if tokenizer is None:
        raise UserError(where, "the student has no tokenizer", "put tokenizer.json beside it")
    check_template(tokenizer, where)
    if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
        raise UserError(
            where,
            f"the teacher has {teacher.config.vocab_size} words and the student "
            f"{student.config.vocab_size}",
            "use models that share a tokenizer",
        )


def _check_room(stage: ChatStage, where: str) -> None:
    """What becomes of a row whose prompt is too long: UserError, or nothing."""
    if stage.too_long == "refuse":
        raise UserError(
            where,
            f"the prompt leaves no room for an answer in length = {stage.length}",
            "remove the row, make length larger, or set too_long = 'skip'",
        )


def _picked(
    items: Sequence[Any],
    encode: Callable[[Any], dict[str, Any] | None],
    stage: ChatStage,
    seed: int,
    where: str,
) -> list[dict[str, Any]]:
    """As many rows as the stage can use, or all, in an order of the seed's."""
    if not items:
        raise UserError(where, "there are no rows", "give data with at least one")
    most_rows, most_tokens = math.inf, math.inf
    if stage.steps is not None and isinstance(stage, Sft) and stage.packed:
        most_tokens = stage.steps * stage.batch * stage.length
    elif stage.steps is not None:
        most_rows = stage.steps * stage.batch
    elif stage.tokens is not None:
        most_tokens = stage.tokens
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    found: list[dict[str, Any]] = []
    tokens = skipped = 0
    with progress.task(f"{kind_of(stage)}: frame rows", len(order)) as advance:
        for i in order:
            try:
                row = encode(items[i])
            except UserError:
                for item in items[:i]:  # whoever mends rows goes through them in their order
                    encode(item)
                raise
            if row is None:
                skipped += 1
                advance(1, note=f"{skipped} too long, left out")
                continue
            advance()
            found.append(row)
            tokens += row["size"]
            if len(found) >= most_rows or tokens >= most_tokens:
                break
    if not found:
        raise UserError(
            where, f"all {skipped} rows are too long", "make length larger, or give others"
        )
    return found


def _packed(rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """Rows of up to `length` tokens of several conversations each: the longest first, each into the
    fullest row that has room."""
    room: list[tuple[int, int]] = []  # (left, which), sorted
    packs: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        size = len(row["input_ids"])
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, which = room.pop(at)
        else:
            left, which = length, len(packs)
            packs.append([])
        packs[which].append(row)
        bisect.insort(room, (left - size, which))
    return [{key: [x for r in pack for x in r[key]] for key in pack[0]} for pack in packs]


class _CollatePairs:
    """Preferences as one batch: B chosen answers behind their prompts, then the B rejected ones.

    TRL's own takes all that follows a prompt for the answer, which may be several turns.

    Args:
        padding: the token that fills rows.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        sides = [(row, side) for side in ("chosen", "rejected") for row in rows]
        texts = [[*row["prompt_ids"], *row[f"{side}_ids"]] for row, side in sides]
        counted = [[0] * len(row["prompt_ids"]) + [*row[f"{side}_mask"]] for row, side in sides]
        batch = {
            "input_ids": _filled(texts, self.padding),
            "attention_mask": _filled([[1] * len(text) for text in texts], 0),
            "completion_mask": _filled(counted, 0),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def _filled(rows: Sequence[Sequence[int]], filling: int) -> Tensor:
    """Rows of several lengths as [B, T]."""
    made = torch.full((len(rows), max(map(len, rows))), filling)
    for i, row in enumerate(rows):
        made[i, : len(row)] = torch.tensor(row)
    return made


class _Collate:
    """Rows of several lengths as one batch [B, T].

    Args:
        padding: the token that fills rows.
        length: of packed rows; None for rows of one conversation, which are padded to the longest
            and masked.
    """

    def __init__(self, padding: int, length: int | None) -> None:
        self.padding, self.length = padding, length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width = self.length or max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), width), self.padding)
        labels = torch.full((len(rows), width), IGNORED)
        # Filling tokens are documents of their own: nothing sees them.
        starts = torch.ones(len(rows), width, dtype=torch.bool)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[i, :size] = torch.tensor(row["input_ids"])
            labels[i, :size] = torch.tensor(row["labels"])
            mask[i, :size] = 1
            starts[i, :size] = False
            begins = torch.tensor([0, *row["lengths"]]).cumsum(0)[:-1]
            starts[i, begins] = True
        if self.length is None:
            return {"input_ids": ids, "labels": labels, "attention_mask": mask}
        return {**Batch(ids, starts).inputs, "labels": labels}
