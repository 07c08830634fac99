"""Text as windows of tokens: perplexity, divergence from the teacher, loss by position.

The suites `ppl`, `kl` and `position`. An item is a window; its result is sums over its tokens, so
that any mean can be formed afterwards, with windows as the independent draws.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamba import progress
from tamba.data import Batch, TokenBlocks, text_digest
from tamba.errors import UserError
from tamba.evaluate.measure import ItemMeasure, Items, Models, Request, Role, Stores, Subject
from tamba.evaluate.perplexity import token_scores
from tamba.evaluate.statistics import exponential, paired_bootstrap, permutation, ratio_score
from tamba.evaluate.texts import read_enough
from tamba.report import Curve, Measured, Paired, Point, Score
from tamba.store import Store

BUCKET = 1024
"""Tokens of a range of positions."""
_LONGEST = 32_768


@dataclass(frozen=True)
class Windows:
    """Rows of tokens, and which of them are scored.

    Args:
        blocks: the rows; a window shorter than its row is filled as in `TokenBlocks`.
        scored: [n, T-1] bool, whether the token that t predicts counts; None for all of them.
    """

    blocks: TokenBlocks
    scored: Tensor | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def digest(self) -> str:
        """SHA-256 of tokens, document starts and what is scored."""
        found = hashlib.sha256(self.blocks.tokens.numpy().tobytes())
        found.update(self.blocks.starts.numpy().tobytes())
        if self.scored is not None:
            found.update(self.scored.numpy().tobytes())
        return found.hexdigest()

    def pick(self, indices: Sequence[int]) -> Windows:
        """Some of the windows."""
        blocks = self.blocks
        index = torch.tensor(list(indices), dtype=torch.long)
        part = TokenBlocks(
            blocks.tokens[index], blocks.starts[index], blocks.n_tokens, blocks.bytes_per_token
        )
        return Windows(part, None if self.scored is None else self.scored[index])


def sliding(blocks: TokenBlocks, stride: int) -> Windows:
    """Windows that begin every `stride` tokens of the same text; each token is scored once.

    A token is scored in the first window that holds it, so it has seen ``length - stride`` tokens
    at least, or all of its document.

    Raises:
        UserError: a stride that is not between 1 and the length.
    """
    length = blocks.length
    if not 1 <= stride <= length:
        raise UserError("stride", f"{stride} is not between 1 and the length {length}")
    flat = blocks.tokens.flatten()[: blocks.n_tokens]
    # Forced starts at the beginning of rows are not those of documents, which follow a separator.
    starts = blocks.starts.flatten()[: blocks.n_tokens].clone()
    first = torch.arange(0, blocks.n_tokens, length)
    separator = _separator(blocks)
    starts[first] = torch.cat([torch.tensor([True]), flat[first[1:] - 1] == separator])
    count = max(1, math.ceil((len(flat) - length) / stride) + 1)
    at = torch.arange(count)[:, None] * stride + torch.arange(length)
    inside = at < len(flat)
    at = at.clamp_max(len(flat) - 1)
    tokens = torch.where(inside, flat[at], max(separator, 0))
    begins = torch.where(inside, starts[at], True)
    begins[:, 0] = True
    new = torch.ones(count, length, dtype=torch.bool)
    new[1:] = torch.arange(length) >= length - stride
    # A document that began before the window goes on in it: its first token here is no start.
    scored = new[:, 1:] & ~begins[:, 1:]
    return Windows(TokenBlocks(tokens, begins, len(flat), blocks.bytes_per_token), scored)


def joined(blocks: TokenBlocks) -> Windows:
    """The same rows as one text each: documents follow one another and are all seen."""
    whole = blocks.n_tokens // blocks.length
    if whole == 0:
        raise UserError(
            "data",
            f"{blocks.n_tokens} tokens of text, less than one window of {blocks.length}",
            f"give more text, or --lengths position={max(2, blocks.n_tokens)} or less",
        )
    starts = torch.zeros(whole, blocks.length, dtype=torch.bool)
    starts[:, 0] = True
    part = blocks.take(whole)
    return Windows(TokenBlocks(part.tokens, starts, part.n_tokens, part.bytes_per_token))


def _separator(blocks: TokenBlocks) -> int:
    """The token before the first document start inside a row; -1 where there is none."""
    places = blocks.starts[:, 1:].nonzero()
    if not len(places):
        return -1
    row, column = places[0].tolist()
    return int(blocks.tokens[row, column])


def _read(
    request: Request, length: int, stride: int | None = None
) -> tuple[TokenBlocks, dict[str, Any]]:
    options = request.options
    if not request.data:
        raise UserError(f"suite {request.suite}", "needs text and was given none", "--data FILE")
    request.check_length(length)
    # So much and no more: bytes a token are those of the text that is measured.
    enough = None if options.limit is None else length + (options.limit - 1) * (stride or length)
    texts = read_enough(request.data, options.text_key, enough)
    blocks = TokenBlocks.from_texts(texts, request.tokenizer, length, fill=True, max_tokens=enough)
    settings = {
        "length": length,
        "data": list(request.data),
        "text": text_digest(texts),
        "limit": options.limit,
    }
    return blocks, settings


class _WindowMeasure(ItemMeasure):
    """What the suites over windows share: which are still to do, in batches of as many tokens."""

    def __init__(self, windows: Windows, settings: dict[str, Any]) -> None:
        self.windows = windows
        self.settings = settings | {"windows": len(windows), "tokens": windows.digest()}
        if bool(windows.blocks.starts[:, 1:].all()):
            raise UserError("data", "no token to score", "give longer documents")

    def sums(
        self,
        models: Sequence[Any],
        tokens_at_once: int,
        store: Store,
        label: str,
        of: Callable[[Tensor, Tensor], dict[str, Any]],
    ) -> Items:
        """Results of all windows; `of` makes one from scores [k, T-1] and what counts [T-1]."""
        length = self.windows.blocks.length
        todo = [i for i in range(len(self.windows)) if str(i) not in store]
        part = self.windows.pick(todo)
        size = max(1, tokens_at_once // length)
        at = iter(todo)
        with progress.task(label, len(self.windows)) as advance:
            advance(len(self.windows) - len(todo))
            if todo:
                rows = 0
                for batch, scores in token_scores(models, part.blocks, batch_size=size):
                    counts = self._counts(batch, part, rows)
                    rows += len(batch.tokens)
                    store.add(
                        {
                            str(next(at)): of(scores[:, b].cpu(), counts[b].cpu())
                            for b in range(len(batch.tokens))
                        }
                    )
                    advance(len(batch.tokens))
        return {str(i): store[str(i)] for i in range(len(self.windows))}

    def _counts(self, batch: Batch, part: Windows, first: int) -> Tensor:
        if part.scored is None:
            return batch.predicted
        return part.scored[first : first + len(batch.tokens)].to(batch.tokens.device)


class _Perplexity(_WindowMeasure):
    metrics = ()

    def answer(self, subject: Subject, store: Store) -> Items:
        def of(scores: Tensor, counts: Tensor) -> dict[str, Any]:
            return {"nll": float(scores[0][counts].sum()), "tokens": int(counts.sum())}

        label = f"perplexity, {subject.role}"
        return self.sums([subject.model], subject.tokens_at_once, store, label, of)

    def scores(self, items: Items) -> dict[str, Score]:
        pairs = _pairs(items, "nll")
        nats = ratio_score(pairs)
        found = {"nll": nats, "perplexity": exponential(nats)}
        density = self.windows.blocks.bytes_per_token
        if density is not None:
            scale = 1 / math.log(2) / density
            found["bits_per_byte"] = Score(
                **{
                    k: v * scale for k, v in nats.model_dump().items() if k != "n" and v is not None
                },
                n=nats.n,
            )
        return found

    def finish(self, found: Measured, items: Mapping[Role, Items], models: Models) -> Measured:
        tokens = sum(i["tokens"] for i in items["student"].values())
        settings = found.settings | {"scored_tokens": tokens}
        if "teacher" not in items:
            return found.model_copy(update={"settings": settings})
        # Differences on the same windows: what both find hard cancels.
        pairs = [
            (items["student"][name]["nll"] - items["teacher"][name]["nll"], row["tokens"])
            for name, row in items["student"].items()
            if row["tokens"]
        ]
        ratio = exponential(ratio_score(pairs))
        paired = _paired_nll(pairs) if len(pairs) > 1 else {}
        scores = found.scores | {"student": found.scores["student"] | {"ratio": ratio}}
        return found.model_copy(
            update={"settings": settings, "scores": scores, "paired": found.paired | paired}
        )


def _paired_nll(pairs: list[tuple[float, float]]) -> dict[str, Paired]:
    """Of nats a window, student minus teacher, and its tokens; long windows weigh more."""
    nats, tokens = zip(*pairs, strict=True)
    low, high = paired_bootstrap(nats, tokens)
    return {
        "nll": Paired(
            difference=math.fsum(nats) / math.fsum(tokens),
            n=len(nats),
            low=low,
            high=high,
            p=permutation(nats),
            test="permutation",
            student_higher=sum(d > 0 for d in nats),
            teacher_higher=sum(d < 0 for d in nats),
        )
    }


class _Divergence(_WindowMeasure):
    """Teacher and student side by side: one pass over both."""

    def run(self, models: Models, stores: Stores) -> Measured:
        begun = time.monotonic()
        student, teacher = models.student, models.teacher
        assert teacher is not None, "prepare refuses a run without a teacher"

        def of(scores: Tensor, counts: Tensor) -> dict[str, Any]:
            _, _, kl, agree = scores[:, counts].sum(1).tolist()
            return {"kl": kl, "agree": agree, "tokens": int(counts.sum())}

        items = self.sums(
            [teacher.model, student.model],
            student.tokens_at_once,
            stores(student, teacher),
            "divergence from the teacher",
            of,
        )
        scores = {
            "kl": ratio_score(_pairs(items, "kl")),
            "agreement": ratio_score(_pairs(items, "agree")),
        }
        return Measured(
            settings=self.settings,
            scores={"student": scores},
            seconds=round(time.monotonic() - begun, 3),
        )


class _ByPosition(_WindowMeasure):
    metrics = ()

    def answer(self, subject: Subject, store: Store) -> Items:
        def of(scores: Tensor, counts: Tensor) -> dict[str, Any]:
            # Place t predicts the token at position t + 1.
            ranges = list(_ranges(self.windows.blocks.length))
            parts = [slice(max(a - 1, 0), b - 1) for a, b in ranges]
            return {
                "nll": [float(scores[0][p][counts[p]].sum()) for p in parts],
                "tokens": [int(counts[p].sum()) for p in parts],
            }

        label = f"loss by position, {subject.role}"
        return self.sums([subject.model], subject.tokens_at_once, store, label, of)

    def scores(self, items: Items) -> dict[str, Score]:
        return {"nll": ratio_score([(sum(i["nll"]), sum(i["tokens"])) for i in items.values()])}

    def curves(self, items: Mapping[Role, Items]) -> dict[str, Curve]:
        ends = [end for _, end in _ranges(self.windows.blocks.length)]
        points: dict[str, list[Point]] = {}
        for role, results in items.items():
            points[role] = []
            for k, end in enumerate(ends):
                pairs = [(i["nll"][k], i["tokens"][k]) for i in results.values() if i["tokens"][k]]
                points[role].append(Point(x=end, **ratio_score(pairs).model_dump()))
        return {"nll": Curve(axis="position, tokens (end of range)", points=points)}


def _ranges(length: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions [a, b): thousands, as in 0-1k, 1-2k; the last may be shorter."""
    for first in range(0, length, BUCKET):
        yield first, min(first + BUCKET, length)


def _pairs(items: Items, name: str) -> list[tuple[float, float]]:
    return [(i[name], i["tokens"]) for i in items.values() if i["tokens"]]


def prepare_ppl(request: Request) -> _Perplexity:
    """Perplexity and bits per byte on windows of 1,024 tokens, or sliding ones with `stride`."""
    return _Perplexity(*_windows(request))


def prepare_kl(request: Request) -> _Divergence:
    """KL(teacher, student) and how often both find the same token likeliest, as `prepare_ppl`."""
    if "teacher" not in request.configs:
        raise UserError("suite kl", "compares with a teacher and there is none", "--against MODEL")
    return _Divergence(*_windows(request))


def _windows(request: Request) -> tuple[Windows, dict[str, Any]]:
    request.check_vocabulary()
    length, stride = request.length, request.options.stride
    if stride is not None and not 1 <= stride <= length:
        raise UserError("stride", f"{stride} is not between 1 and the length {length}")
    blocks, settings = _read(request, length, stride)
    return Windows(blocks) if stride is None else sliding(blocks, stride), settings | {
        "stride": stride
    }


def prepare_position(request: Request) -> _ByPosition:
    """Loss by position in long windows, which documents fill one after another."""
    request.check_vocabulary()
    most = _LONGEST if request.positions is None else min(request.positions, _LONGEST)
    length = max(request.options.sizes("position"), default=most)
    if length < 2:
        raise UserError("--lengths", f"{length} leaves nothing to predict", "use 2 or more")
    blocks, settings = _read(request, length)
    return _ByPosition(joined(blocks), settings)
