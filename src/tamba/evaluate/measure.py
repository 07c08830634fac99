"""What a suite is made of: models to measure, and a measure that turns them into results.

A suite checks what the user gave (`prepare`) and hands back a `Measure`. Most measures ask one
model at a time about items; `ItemMeasure` does what these share: items that are done are not asked
again, scores get their errors, and student and teacher are paired item by item.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from tamba.errors import UserError
from tamba.evaluate.statistics import mean_score, pair
from tamba.model.config import TambaConfig
from tamba.report import Curve, Measured, Score
from tamba.store import Store

Role = Literal["student", "teacher"]
Items = dict[str, dict[str, Any]]
"""Results by item: the metrics by name, and whatever else belongs to the item."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, on its device and in evaluation mode.

    Args:
        digest: SHA-256 of the checkpoint and the type it is computed in.
        tokens_at_once: tokens of a batch, padding included.
    """

    role: Role
    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    digest: str
    tokens_at_once: int


@dataclass(frozen=True)
class Models:
    """The model, and its teacher if there is one."""

    student: Subject
    teacher: Subject | None = None

    def __iter__(self) -> Iterator[Subject]:
        yield self.student
        if self.teacher is not None:
            yield self.teacher


@dataclass(frozen=True)
class Options:
    """What the user may set beside suites and data.

    Args:
        length: tokens a window of text; if None 1,024, or as many as models have positions for.
        stride: slide windows by so many tokens instead of cutting the text.
        lengths: sizes of the recall tasks, for all or by suite (``""`` for the others).
        cases: of a recall task at each size.
        limit: most windows, questions or items of a suite.
        seed: of recall tasks.
        chat: frame lm-eval's prompts by the chat template.
        allow_code: run what the model writes, for tasks that are scored so.
        text_key: of JSON lines of text.
        new_tokens: longest answer in chat; 1,024 if None.
        contexts, batches: of memory and speed.
        judge, judge_model: address and model of a judge; `judge_key` names the environment variable
            with its key, `judge_price` is dollars for a million tokens in and out.
    """

    length: int | None = None
    stride: int | None = None
    lengths: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    cases: int = 30
    limit: int | None = None
    seed: int = 0
    chat: bool = False
    allow_code: bool = False
    text_key: str = "text"
    new_tokens: int | None = None
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    judge: str | None = None
    judge_model: str | None = None
    judge_key: str | None = None
    judge_price: tuple[float, float] | None = None

    def sizes(self, suite: str) -> tuple[int, ...]:
        """Lengths that were asked for in this suite; none where it chooses itself."""
        if isinstance(self.lengths, Mapping):
            return self.lengths.get(suite, self.lengths.get("", ()))
        return self.lengths


@dataclass(frozen=True)
class Request:
    """What a suite sees before any weights are read.

    Args:
        suite: its name.
        data: files or sources that were given for it.
        configs: by role.
        tokenizer: the student's.
        others: of other models, where they have their own.
        folder: where files for other tools may be written; None for nowhere.
    """

    suite: str
    data: tuple[str, ...]
    configs: Mapping[Role, TambaConfig]
    tokenizer: PreTrainedTokenizerBase
    options: Options
    folder: Path | None = None
    shots: int | None = None
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[PreTrainedTokenizerBase, ...] = ()

    @property
    def positions(self) -> int | None:
        """Tokens that all models with attention have positions for; None where none has."""
        known = (config.positions for config in self.configs.values())
        return min((n for n in known if n is not None), default=None)

    @property
    def length(self) -> int:
        """Tokens a window of text."""
        return self.options.length or min(1024, self.positions or 1024)

    def check_length(self, tokens: int, where: str = "length") -> None:
        """Refuse more tokens than attention has positions for. Raises UserError."""
        if self.positions is not None and tokens > self.positions:
            raise UserError(
                where,
                f"{tokens} is beyond the model's {self.positions} positions",
                f"use {self.positions} at most",
            )

    def check_vocabulary(self) -> None:
        """Refuse models whose tokens do not mean the same. Raises UserError."""
        sizes = {role: config.vocab_size for role, config in self.configs.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(
                "vocabulary",
                f"teacher and student have {sizes['teacher']} and {sizes['student']} tokens",
                "compare models that share a tokenizer",
            )
        ours = self.tokenizer.get_vocab() if self.others else {}
        for theirs in self.others:
            differing = [(t, i) for t, i in theirs.get_vocab().items() if ours.get(t, i) != i]
            if differing:
                token, index = min(differing, key=lambda pair: pair[1])
                raise UserError(
                    "vocabulary",
                    f"'{token}' is token {index} of the teacher and {ours[token]} of the student",
                    "compare models that share a tokenizer",
                )

    def one_file(self, what: str) -> Path:
        """The only file that was given for this suite.

        Raises:
            UserError: none or several, or it is not there.
        """
        if len(self.data) != 1:
            count = f"{len(self.data)} files" if self.data else "no file"
            raise UserError(
                f"suite {self.suite}",
                f"takes one file of {what} and was given {count}",
                f"--data {self.suite}=FILE",
            )
        path = Path(self.data[0]).expanduser()
        if not path.is_file():
            raise UserError(f"--data {self.suite}", f"no such file: {path}")
        return path


Stores = Callable[..., Store]
"""``stores(*subjects)``: the finished items of the suite at hand for a model; where an item
compares models, for all of them."""


class Measure(Protocol):
    """One suite, ready to run. `settings` are plain data and decide the result."""

    settings: dict[str, Any]

    def run(self, models: Models, stores: Stores) -> Measured: ...


class ItemMeasure:
    """A measure that asks each model about items, one model at a time.

    A subclass gives `answer`, and where the mean over items is not the score, `scores`.

    Attributes:
        metrics: results of an item that are scored and paired.
    """

    settings: dict[str, Any]
    metrics: Sequence[str] = ()

    def answer(self, subject: Subject, store: Store) -> Items:
        """All items in their own order, from the store or newly done and stored."""
        raise NotImplementedError

    def scores(self, items: Items) -> dict[str, Score]:
        """Scores of one model."""
        return {
            metric: mean_score(values)
            for metric in self.metrics
            if (values := [float(i[metric]) for i in items.values() if metric in i])
        }

    def curves(self, items: Mapping[Role, Items]) -> dict[str, Curve]:
        """Scores along an axis, by metric."""
        return {}

    def finish(self, found: Measured, items: Mapping[Role, Items], models: Models) -> Measured:
        """Add what belongs to this suite alone."""
        return found

    def run(self, models: Models, stores: Stores) -> Measured:
        begun = time.monotonic()
        items: dict[Role, Items] = {
            subject.role: self.answer(subject, stores(subject)) for subject in models
        }
        found = Measured(
            settings=self.settings,
            scores={role: self.scores(results) for role, results in items.items()},
            curves=self.curves(items),
            paired=pair(items["student"], items["teacher"], self.metrics)
            if "teacher" in items
            else {},
            seconds=round(time.monotonic() - begun, 3),
        )
        return self.finish(found, items, models)
