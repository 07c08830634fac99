"""Scores of layers that look at hidden states alone, in one pass that keeps none of them.

`x^(l)` is the residual stream before layer l and `x^(L)` what the last layer gives, before the
final norm: layer l turns `x^(l)` into `x^(l+1)`. Every score is a function of directions `x / |x|`.
A batch of states gives one Gram matrix a token over the L + 1 states; only sums over rows and over
products of row means are kept, so memory does not grow with text.

What counts is text: not padding, and not the separator that closes a document. A row of tokens is a
sequence: means are over its tokens first, then over rows, and errors are those of the mean over
rows.

Shape letters: `B` rows of a batch, `T` tokens of a row, `S` states, `D` d_model, `n` tokens that
count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamba import progress
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.trace import computing

_NEAR = 0.999
"""Cosines beyond which an angle is taken from a difference: arccos loses half the digits there."""
_KERNEL_TOKENS = 64
"""Tokens of one kernel matrix, all of one row; its estimate is unbiased for any number."""
_FOLDS = 16
"""Parts of the rows that the error of a ratio is told from by leaving out one at a time."""
_VALUES_AT_ONCE = 1 << 25
"""Numbers of the states held at once beside the model's own."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Means and their standard errors, float64 of one shape; NaN where there is nothing."""

    mean: Tensor
    error: Tensor

    def __getitem__(self, index: Any) -> Estimate:
        return Estimate(self.mean[index], self.error[index])


@dataclass(frozen=True, eq=False)
class StateScores:
    """What the hidden states of some text say about each layer.

    Tables are [L, L]: row l, column n - 1 compares `x^(l)` with `x^(l+n)`; NaN beyond the last.

    Args:
        all_tokens: mean angle in half turns, from 0 to 1 (*E-Tamba*, equation 1).
        last_token: the same of the last token of each row (Gromov et al. 2024, arXiv 2403.17887,
            equation 7).
        block_influence: [L], one minus the mean cosine of `x^(l)` and `x^(l+1)` (*ShortGPT*, arXiv
            2403.03853, equation 1).
        kernel_similarity: centred kernel alignment, 1 for representations that are rotations of
            one another (Kornblith et al. 2019, arXiv 1905.00414), of the cosine kernel, between
            tokens of a row.
        after_norm: [L], mean angle of `x^(l)` and `x^(L)` after the final norm: what reading the
            last state there would add.
        sequences: rows read.
        tokens: tokens that counted.
    """

    all_tokens: Estimate
    last_token: Estimate
    block_influence: Estimate
    kernel_similarity: Estimate
    after_norm: Estimate
    sequences: int
    tokens: int

    @property
    def own_turn(self) -> Estimate:
        """[L], the angle that each layer turns the stream by, d(l, 1)."""
        return self.all_tokens[:, 0]

    @property
    def last_turn(self) -> Estimate:
        """[L], the same of the last token of each row."""
        return self.last_token[:, 0]

    @property
    def column_mean(self) -> Estimate:
        """[L], the mean of d(l, n) over n: how dark a column of the heat map is.

        The error is an upper bound: the cells of a column are taken to err together.
        """
        return Estimate(self.all_tokens.mean.nanmean(1), self.all_tokens.error.nanmean(1))

    def distances(self) -> dict[str, list[list[float]]]:
        """The angular distances [l][n-1], rows of falling length, by name."""
        return {
            "all_tokens": triangle(self.all_tokens.mean),
            "last_token": triangle(self.last_token.mean),
        }

    @property
    def kernel_change(self) -> Estimate:
        """[L], one minus the kernel similarity of the states before and after each layer."""
        first = self.kernel_similarity[:, 0]
        return Estimate(1.0 - first.mean, first.error)


def triangle(table: Tensor) -> list[list[float]]:
    """The cells of a table of `StateScores` that compare two states, row by row."""
    L = len(table)
    return [table[low, : L - low].tolist() for low in range(L)]


def state_scores(
    model: TambaForCausalLM,
    blocks: TokenBlocks,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    label: str = "hidden states",
) -> StateScores:
    """Score every layer of a model of any mix of layers in one pass over text.

    Args:
        blocks: rows of equal length; documents in a row do not see one another, and neither
            separators nor filling count.
        batch_size: rows at a time; None for as many as fit a small buffer.
        dtype: of the model's matrix products; None for its own type. Angles are float32 at least.
        label: of the progress bar.

    Raises:
        UserError: one layer alone, which nothing can be compared with; a state that is not finite
            or is zero (which layer, which row); no token that counts.
    """
    size = batch_size or _batch_size(model, blocks.length)

    def inputs() -> Iterable[tuple[Mapping[str, Any], Tensor]]:
        with progress.task(label, len(blocks)) as advance:
            for batch in blocks.batches(size):
                # What counts stays on the CPU: a GPU is not waited for to know it.
                yield batch.to(model.device).inputs, counted(batch)
                advance(len(batch.tokens))

    return scores_of_inputs(model, inputs(), dtype=dtype)


def counted(batch: Batch) -> Tensor:
    """[B, T] bool: tokens of text, not those that close a document, nor filling."""
    closes = batch.starts.roll(-1, dims=1)
    # Filling tokens are documents of their own; the last one of a row can only be told by that.
    closes[:, -1] = batch.starts[:, -1]
    return ~closes


def scores_of_inputs(
    model: TambaForCausalLM,
    inputs: Iterable[tuple[Mapping[str, Any], Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> StateScores:
    """`state_scores` of batches given as arguments of the model, padded wherever they like.

    Args:
        inputs: (keyword arguments for the model, [B, T] bool: which tokens count).
    """
    layers = model.model.layers
    if len(layers) < 2:
        raise UserError(
            model.config.name_or_path or "model",
            f"has {len(layers)} layer, and layers are compared with one another",
            "analyse a model of two layers or more",
        )
    sums = _Sums(len(layers), model.device)
    states: list[Tensor] = []

    def before(_: Any, args: tuple[Any, ...]) -> None:
        states.append(args[0])

    def after(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        states.append(output)

    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    training = model.training
    try:
        model.eval()
        with computing(model, dtype):
            for arguments, counts in inputs:
                states.clear()
                normed = model.model(**arguments, use_cache=False).last_hidden_state
                with torch.autocast(model.device.type, enabled=False):
                    sums.add([*states, normed], counts)
    finally:
        states.clear()
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sums.result()


def _batch_size(model: TambaForCausalLM, length: int) -> int:
    row = length * (len(model.model.layers) + 2) * model.config.hidden_size
    limit = _VALUES_AT_ONCE * (1 if model.device.type == "cpu" else 16)
    return max(1, min(limit // row, 16))


class _Moments:
    """Mean and standard error of a table over rows, from sums. float64, where the model is."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.total = torch.zeros(*shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)
        self.n = 0

    def add(self, rows: Tensor) -> None:
        """[k, *shape], a value a row."""
        rows = rows.double()
        self.total += rows.sum(0)
        self.squares += rows.square().sum(0)
        self.n += len(rows)

    def estimate(self) -> Estimate:
        mean = self.total.cpu() / self.n
        if self.n < 2:
            return Estimate(mean, torch.full_like(mean, math.nan))
        spread = (self.squares.cpu() - self.n * mean.square()).clamp_min(0.0) / (self.n - 1)
        return Estimate(mean, (spread / self.n).sqrt())


class _Sums:
    """All that is remembered of the text: tables of the size of the number of states squared."""

    def __init__(self, n_layers: int, device: torch.device) -> None:
        self.n_layers = n_layers
        S = n_layers + 2
        self.all_tokens = _Moments(S, S, device=device)
        self.last_token = _Moments(S, S, device=device)
        self.apart = _Moments(n_layers, device=device)
        self.kernels = torch.zeros(_FOLDS, S, S, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, states: list[Tensor], counts: Tensor) -> None:
        """Take in a batch: L + 1 states and the normed last one [B, T, D], and what counts."""
        first_row = self.all_tokens.n
        device = states[0].device
        # All that only depends on which tokens count is worked out on the CPU: every question to
        # a GPU would have to wait for the layers.
        counts = counts.cpu()
        empty = (~counts.any(1)).nonzero()
        if len(empty):
            raise UserError(
                f"row {first_row + int(empty[0])} of the text",
                "has no token that counts",
                "give rows of text",
            )
        rows = counts.nonzero()[:, 0]
        per_row = counts.sum(1)
        unit, lengths = _directions(states, counts)
        angle = _angles(unit, unit @ unit.mT)
        # Not before: angles wait for the GPU in any case, and one wait is enough.
        _check_lengths(lengths, rows, first_row)
        # [B, n], the mean over the tokens of a row as a product: no additions in turns.
        share = (torch.arange(len(counts))[:, None] == rows).double() / per_row[:, None]
        share = share.to(device)
        means = share @ angle.double().flatten(1)
        self.all_tokens.add(means.unflatten(1, angle.shape[1:]))
        self.last_token.add(angle[(per_row.cumsum(0) - 1).to(device)])
        # 1 - cos t = 2 sin(t/2)^2 keeps its digits where the layer hardly turns.
        own = angle.diagonal(1, 1, 2)[:, : self.n_layers].double()
        self.apart.add(share @ (2.0 * torch.sin(own * (math.pi / 2)).square()))
        for numbers, groups in _groups(per_row):
            folds = ((first_row + numbers) % _FOLDS).to(device)
            self.kernels.index_add_(0, folds, groups.shape[-1] * _dependence(unit, groups))
        self.tokens += len(rows)

    def result(self) -> StateScores:
        if not self.tokens:
            raise UserError("text", "holds no token to score", "give more text")
        L = self.n_layers
        every = self.all_tokens.estimate()
        return StateScores(
            _by_distance(every, L),
            _by_distance(self.last_token.estimate(), L),
            self.apart.estimate(),
            _by_distance(_alignment(self.kernels.cpu()), L),
            every[:L, L + 1],
            self.all_tokens.n,
            self.tokens,
        )


def _by_distance(table: Estimate, n_layers: int) -> Estimate:
    """[S, S] by pairs of states as [L, L] by state and how many layers on."""

    def shifted(square: Tensor) -> Tensor:
        out = torch.full((n_layers, n_layers), math.nan, dtype=torch.float64)
        for low in range(n_layers):
            out[low, : n_layers - low] = square[low, low + 1 : n_layers + 1]
        return out

    return Estimate(shifted(table.mean), shifted(table.error))


def _directions(states: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    """States of tokens that count, [n, S, D] of length one, and their lengths [n, S]."""
    flat = [state.flatten(0, 1) for state in states]
    if not bool(counts.all()):
        where = counts.flatten().nonzero()[:, 0].to(flat[0].device)
        flat = [state.index_select(0, where) for state in flat]
    seen = torch.stack(flat, dim=1)
    wide = torch.promote_types(seen.dtype, torch.float32)
    lengths = torch.linalg.vector_norm(seen, dim=-1, dtype=wide)
    scale = lengths[..., None]
    # What was stacked is a copy, which a wide type lets be written over.
    unit = seen.div_(scale) if seen.dtype == wide else seen / scale
    return unit, lengths


def _check_lengths(lengths: Tensor, rows: Tensor, first_row: int) -> None:
    """Refuse states [n, S] that have no direction, of tokens in these rows. Raises UserError."""
    good = torch.isfinite(lengths) & (lengths > 0)
    if bool(good.all()):
        return
    # The lowest state at fault: those above it only inherit it.
    index, token = (int(i) for i in (~good).T.nonzero()[0])
    what = "zero and has no direction" if lengths[token, index] == 0 else "not a finite number"
    n_layers = lengths.shape[1] - 2
    if index == 0:
        source = "the embedding"
    else:
        source = f"layer {index - 1}" if index <= n_layers else "the final norm"
    raise UserError(
        source,
        f"gives a hidden state that is {what}, in row {first_row + int(rows[token])}",
        "check the weights, or compute in a wider type",
    )


def _angles(unit: Tensor, cosine: Tensor) -> Tensor:
    """[n, S, S] angles in half turns.

    arccos where it is well conditioned; 2 asin(|u - v| / 2) for directions that nearly agree, and
    the same from |u + v| where they are nearly opposite.
    """
    angle = torch.acos(cosine.clamp(-1.0, 1.0)) / math.pi
    near = (cosine.abs() > _NEAR).triu(1)  # the other half is its mirror image
    angle.diagonal(0, 1, 2).zero_()
    where = near.nonzero()
    step = max(1, _VALUES_AT_ONCE // (4 * unit.shape[-1]))
    for some in where.split(step):
        token, low, high = some.unbind(1)
        opposite = cosine[token, low, high] < 0
        u, v = unit[token, low], unit[token, high]
        apart = torch.linalg.vector_norm(torch.where(opposite[:, None], u + v, u - v), dim=-1)
        turn = 2.0 * torch.asin((apart / 2.0).clamp_max(1.0)) / math.pi
        turn = torch.where(opposite, 1.0 - turn, turn)
        angle[token, low, high] = turn
        angle[token, high, low] = turn
    return angle


def _groups(per_row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Tokens that are compared with one another: (rows [R], token numbers [R, k, size]) for rows
    that have as many groups of one size.

    Groups lie in one row, so that what they say does not depend on how rows are batched and rows
    can be left out one by one; far apart in it, since neighbours are not independent.

    Args:
        per_row: [B], tokens that count, which are numbered through.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for row, n in enumerate(per_row.tolist()):
        size = min(_KERNEL_TOKENS, n)
        if size >= 4:
            alike.setdefault((n // size, size), []).append(row)
    before = per_row.cumsum(0) - per_row
    found = []
    for (k, size), some in alike.items():
        rows = torch.tensor(some)
        places = torch.arange(k * size).view(size, k).T
        found.append((rows, before[rows, None, None] + places))
    return found


def _dependence(unit: Tensor, groups: Tensor) -> Tensor:
    """[R, S, S] float64 for `groups` [R, k, size]: sums over k of the unbiased HSIC of every two
    states.

    HSIC of linear kernels, estimator 5 of Song et al. (2012, JMLR 13): unbiased in groups of any
    size, so that groups can be added up (Nguyen et al. 2021, arXiv 2010.15327, section 3.1).
    """
    R, k, size = groups.shape
    some = unit.transpose(0, 1)[:, groups.flatten().to(unit.device)]
    some = some.view(-1, size, some.shape[-1])
    kernels = torch.bmm(some, some.mT).view(-1, R, k, size, size)
    kernels.diagonal(0, -2, -1).zero_()
    kernels = kernels.transpose(0, 1).double()
    sums = kernels.sum(-1)
    whole = sums.sum(-1)
    # Products of flattened groups are sums over groups.
    flat, ends = kernels.flatten(2), sums.flatten(2)
    found = (
        flat @ flat.mT
        + whole @ whole.mT / ((size - 1) * (size - 2))
        - 2.0 / (size - 2) * (ends @ ends.mT)
    )
    return found / (size * (size - 3))


def _alignment(folds: Tensor) -> Estimate:
    """Centred kernel alignment from sums of HSIC [folds, S, S]; its error by the jackknife."""

    def ratio(hsic: Tensor) -> Tensor:
        own = hsic.diagonal(0, -2, -1).clamp_min(0.0).sqrt()
        return hsic / (own[..., :, None] * own[..., None, :])

    used = folds[folds.diagonal(0, 1, 2).any(1)]
    whole = ratio(used.sum(0))
    if len(used) < 2:
        return Estimate(whole, torch.full_like(whole, math.nan))
    parts = ratio(used.sum(0) - used)
    spread = (parts - parts.mean(0)).square().sum(0)
    return Estimate(whole, (spread * (len(used) - 1) / len(used)).sqrt())
