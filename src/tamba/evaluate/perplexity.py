"""How well a causal language model predicts text, alone and beside its teacher.

Every token of a window is scored but the first of each document, which nothing precedes. Logits are
held for a slice of positions at a time, so memory does not grow with window times vocabulary; only
where a model does more than a linear map to its logits, they are held for one window.
Works for any Hugging Face causal LM. This file knows nothing about files or recipes.

Shape letters: `B` batch, `T` tokens of a window, `D` d_model, `V` vocabulary, `n` scored positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tamba import progress
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError

_LOGITS_AT_ONCE = 2**24
"""Logits held at once: 64 MiB in float32, a few hundred positions of a usual vocabulary."""


@dataclass(frozen=True)
class PerplexityResult:
    """Scores of one model on some blocks.

    Args:
        nll: mean negative log likelihood of a scored token, in nats.
        tokens: scored tokens.
        standard_error: of `nll`, over blocks; None for a single block.
        bits_per_byte: of the text, where its bytes are known; the few unscored tokens are charged
            the mean.
    """

    nll: float
    tokens: int
    standard_error: float | None
    bits_per_byte: float | None

    @property
    def ppl(self) -> float:
        """Perplexity, ``exp(nll)``."""
        return math.exp(self.nll)


@dataclass(frozen=True)
class Comparison:
    """Scores of a teacher and a student on the same tokens.

    Args:
        ratio: student's perplexity divided by the teacher's.
        ratio_error: its standard error, from the differences block by block (paired); None for a
            single block.
        kl: mean KL(teacher ‖ student) of the next-token distributions, in nats.
        agreement: share of positions where both find the same token likeliest.
    """

    teacher: PerplexityResult
    student: PerplexityResult
    ratio: float
    ratio_error: float | None
    kl: float
    agreement: float


def perplexity(
    model: Any,
    blocks: TokenBlocks,
    *,
    batch_size: int = 4,
    autocast: torch.dtype | None = None,
    label: str = "perplexity",
) -> PerplexityResult:
    """Score a causal LM on `blocks`.

    Args:
        model: a Hugging Face causal LM, on the device to use.
        autocast: run matrix products in this type (bfloat16 on CPUs that are fast at it); losses
            are computed in float32 at least and added in float64 whatever it is.
        label: what the progress bar says.

    Raises:
        UserError: tokens beyond the model's vocabulary, a model that does not keep packed documents
            apart, or blocks without a token to score.
    """
    sums: list[tuple[float, ...]] = []
    with progress.task(label, len(blocks)) as advance:
        for batch, nll in token_scores([model], blocks, batch_size=batch_size, autocast=autocast):
            sums += _by_block(batch, nll)
            advance(len(batch.tokens))
    return _result(sums, 0, blocks)


def compare(
    teacher: Any,
    student: Any,
    blocks: TokenBlocks,
    *,
    batch_size: int = 4,
    autocast: torch.dtype | None = None,
    label: str = "teacher and student",
) -> Comparison:
    """Score a teacher and a student on the same tokens in one pass. See `perplexity`.

    Raises:
        UserError: as `perplexity`, or models of different vocabularies.
    """
    sums: list[tuple[float, ...]] = []
    both = [teacher, student]
    with progress.task(label, len(blocks)) as advance:
        for batch, scores in token_scores(both, blocks, batch_size=batch_size, autocast=autocast):
            sums += _by_block(batch, scores)
            advance(len(batch.tokens))
    first, second = _result(sums, 0, blocks), _result(sums, 1, blocks)
    difference = [(s[1] - s[0], s[-1]) for s in sums]
    error = _standard_error(difference)
    ratio = math.exp(second.nll - first.nll)
    return Comparison(
        teacher=first,
        student=second,
        ratio=ratio,
        # Delta method: d exp(x) = exp(x) dx.
        ratio_error=None if error is None else ratio * error,
        kl=math.fsum(s[2] for s in sums) / first.tokens,
        agreement=math.fsum(s[3] for s in sums) / first.tokens,
    )


def token_scores(
    models: Sequence[Any],
    blocks: TokenBlocks,
    *,
    batch_size: int = 4,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Score every token of `blocks`, a batch at a time, in order.

    Args:
        models: one model, or a teacher and a student.

    Yields:
        The batch and its scores [k, B, T-1], float64, at the place of the token that predicts; 0
        where none does (`Batch.predicted`). For one model k = 1, the negative log-likelihood in
        nats; for two k = 4: that of the teacher, of the student, KL(teacher ‖ student), and 1
        where both find the same token likeliest.

    Raises:
        UserError: as `perplexity` and `compare`.
    """
    with _ready(models, blocks, autocast):
        heads = [(model, _head(model, blocks)) for model in models]
        for batch in blocks.batches(batch_size):
            batch = batch.to(models[0].device)
            found = _slices(heads, batch)
            if len(models) == 1:
                yield batch, _scatter(batch, (_nll(logits, t) for (logits,), t in found))
            else:
                yield batch, _scatter(batch, (_pair(t, s, y) for (t, s), y in found))


Head = Callable[[Batch], Callable[[Tensor], Tensor]]
"""Runs the model on a batch; the result turns chosen positions (n indices into B·T) into logits."""


def _head(model: Any, blocks: TokenBlocks) -> Head:
    """The cheap way to this model's logits, or the sure way where the cheap one gives others.

    Most models are a backbone and a linear head. Some scale or cap what the head gives, or hide it;
    a few tokens tell.
    """

    def slices(batch: Batch) -> Callable[[Tensor], Tensor]:
        hidden = model.base_model(**batch.inputs, use_cache=False)[0].flatten(0, 1)
        head = model.get_output_embeddings()
        return lambda index: head(hidden[index])

    def whole(batch: Batch) -> Callable[[Tensor], Tensor]:
        T = batch.tokens.shape[1]
        held: dict[int, Tensor] = {}

        def at(index: Tensor) -> Tensor:
            found = []
            for row in index.div(T, rounding_mode="floor").unique().tolist():
                if row not in held:
                    held.clear()
                    one = Batch(batch.tokens[row : row + 1], batch.starts[row : row + 1])
                    held[row] = model(**one.inputs, use_cache=False).logits[0]
                found.append(held[row][index[index.div(T, rounding_mode="floor") == row] % T])
            return torch.cat(found)

        return at

    few = Batch(blocks.tokens[:1, :8].long(), blocks.starts[:1, :8]).to(model.device)
    index = torch.arange(few.tokens.shape[1], device=model.device)
    try:
        ours, want = slices(few)(index), whole(few)(index)
        # One code path twice: only the last bits may differ.
        bound = 1e-3 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-5
        same = ours.shape == want.shape and _distance(ours, want) < bound
    except (AttributeError, TypeError, KeyError):
        same = False
    return slices if same else whole


def _slices(
    models: Sequence[tuple[Any, Head]], batch: Batch
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Logits [n, V] of each model and the tokens [n] they predict, some positions at a time."""
    B, T = batch.tokens.shape
    here = torch.arange(B * T, device=batch.tokens.device).view(B, T)[:, :-1][batch.predicted]
    targets = batch.tokens.flatten()[here + 1]
    logits = [head(batch) for _, head in models]
    step = max(1, _LOGITS_AT_ONCE // _vocabulary(models[0][0]))
    for index, target in zip(here.split(step), targets.split(step), strict=True):
        yield [_full(at(index)) for at in logits], target


def _full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[1, n] float64."""
    return F.cross_entropy(logits, targets, reduction="none").double()[None]


def _pair(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    """[4, n] float64: nll of the teacher, nll of the student, KL(teacher ‖ student), agreement."""
    agree = teacher.argmax(-1) == student.argmax(-1)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    nll = [-x.gather(-1, targets[:, None])[:, 0] for x in (log_p, log_q)]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([x.double() for x in (*nll, kl, agree)])


def _scatter(batch: Batch, scores: Iterator[Tensor]) -> Tensor:
    """Scores [k, n] of all slices back at their places, [k, B, T-1], zero where none is."""
    found = list(scores)
    if not found:
        return torch.zeros(1, *batch.predicted.shape, dtype=torch.float64)
    every = torch.cat(found, dim=1)
    out = every.new_zeros(len(every), *batch.predicted.shape)
    out[:, batch.predicted] = every
    return out


def _by_block(batch: Batch, scores: Tensor) -> list[tuple[float, ...]]:
    """Sums of a batch's scores a block, each row closed by the number of its scored tokens."""
    rows = torch.cat([scores.sum(-1), batch.predicted.sum(-1)[None].to(scores)]).T
    return [tuple(row) for row in rows.tolist() if row[-1] > 0]


def _result(sums: list[tuple[float, ...]], which: int, blocks: TokenBlocks) -> PerplexityResult:
    tokens = round(math.fsum(s[-1] for s in sums))
    nll = math.fsum(s[which] for s in sums) / tokens
    density = blocks.bytes_per_token
    return PerplexityResult(
        nll=nll,
        tokens=tokens,
        standard_error=_standard_error([(s[which], s[-1]) for s in sums]),
        bits_per_byte=None if density is None else nll / math.log(2) / density,
    )


def _standard_error(sums: list[tuple[float, float]]) -> float | None:
    """Of the ratio of sums, blocks being the independent draws (Cochran 1977, section 6.4)."""
    n = len(sums)
    if n < 2:
        return None
    total = math.fsum(count for _, count in sums)
    mean = math.fsum(value for value, _ in sums) / total
    spread = math.fsum((value - mean * count) ** 2 for value, count in sums)
    return math.sqrt(spread * n / (n - 1)) / total


@contextmanager
def _ready(
    models: Sequence[Any], blocks: TokenBlocks, autocast: torch.dtype | None
) -> Iterator[None]:
    """Evaluation mode, no gradients, autocast; after checking that scores will mean something."""
    sizes = [_vocabulary(model) for model in models]
    if len(set(sizes)) > 1:
        raise UserError(
            "vocabulary",
            f"teacher and student have {sizes[0]} and {sizes[1]} tokens",
            "compare models that share a tokenizer",
        )
    highest = int(blocks.tokens.max())
    if highest >= sizes[0]:
        raise UserError(
            "data",
            f"token {highest} is beyond the model's vocabulary of {sizes[0]}",
            "tokenize with the model's own tokenizer",
        )
    if bool(blocks.starts[:, 1:].all()):
        raise UserError("data", "no token to score", "give longer documents")
    modes = [model.training for model in models]
    device = models[0].device.type
    try:
        for model in models:
            model.eval()
        enabled = autocast is not None
        with torch.no_grad(), torch.autocast(device, dtype=autocast, enabled=enabled):
            if bool(blocks.starts[:, 1:].any()):
                for model in models:
                    _check_documents_apart(model)
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _check_documents_apart(model: Any) -> None:
    """Refuse a model in which a document of a packed block sees the one before.

    Stock state-space models take no notice of restarting positions. Two packings that differ only
    in the first document must give the second one the same logits.
    """
    V = _vocabulary(model)
    first, second = torch.arange(6) % V, (torch.arange(6) * 5 + 3) % V
    tokens = torch.stack([torch.cat([first, second]), torch.cat([(first + V // 2) % V, second])])
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[:, [0, 6]] = True
    batch = Batch(tokens, starts).to(model.device)
    seen = model(**batch.inputs, use_cache=False).logits[:, 6:].float()
    # Half precision alone moves logits by less than a hundredth.
    if _distance(seen[0], seen[1]) > 0.02:
        raise UserError(
            f"model of type '{model.config.model_type}'",
            "lets packed documents see one another",
            "open it with tamba.load, or measure on blocks of one document each",
        )


def _distance(got: Tensor, want: Tensor) -> float:
    """Relative root mean square of the difference."""
    got, want = got.double(), want.double()
    scale = want.square().mean().sqrt().clamp_min(1e-30)
    return float((got - want).square().mean().sqrt() / scale)


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)
