"""Scores of layers that look at hidden states alone, in one pass that keeps none of them.

`x^(l)` is the residual stream before layer l and `x^(L)` what the last layer gives, before the
final norm: layer l turns `x^(l)` into `x^(l+1)`. Every score is a function of directions `x / |x|`.
The states of a batch are compared, each with all others (`tamba.ops.directions`); only sums over
rows and over products of row means are kept, so memory does not grow with text.

What counts is text: not padding, and not the separator that closes a document. A row of tokens is a
sequence: means are over its tokens first, then over rows, and errors are those of the mean over
rows.

Shape letters: `B` rows of a batch, `T` tokens of a row, `S` states, `D` d_model.
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
from tamba.ops.directions import compare, faulty
from tamba.trace import computing

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
            or is zero (which layer, which row; a GPU tells when all text has been read); no token
            that counts.
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
        # Of every batch its first row, its rows and what `compare` says, a number that a GPU is
        # asked for at the end: asked sooner, it would have to be waited for.
        self.faults: list[tuple[int, int, Tensor]] = []
        self.tokens = 0

    def add(self, states: list[Tensor], counts: Tensor) -> None:
        """Take in a batch: L + 1 states and the normed last one [B, T, D], and what counts."""
        first_row = self.all_tokens.n
        # On a GPU nothing here waits for the layers.
        counts = counts.cpu()
        empty = (~counts.any(1)).nonzero()
        if len(empty):
            raise UserError(
                f"row {first_row + int(empty[0])} of the text",
                "has no token that counts",
                "give rows of text",
            )
        found = compare(states, counts)
        self.faults.append((first_row, len(counts), found.fault))
        if states[0].device.type == "cpu":
            self._check()
        self.all_tokens.add(found.angles)
        self.last_token.add(found.last)
        self.apart.add(found.apart[:, : self.n_layers])
        rows = torch.arange(first_row, first_row + len(counts), device=states[0].device)
        folds = torch.arange(_FOLDS, device=rows.device)[:, None] == rows % _FOLDS
        self.kernels += torch.tensordot(folds.double(), found.dependence, dims=1)
        self.tokens += int(counts.sum())

    def _check(self) -> None:
        """Refuse states that have no direction. Raises UserError."""
        if not self.faults:
            return
        read = torch.stack([fault for _, _, fault in self.faults]).tolist()
        for (first_row, n_rows, _), number in zip(self.faults, read, strict=True):
            if (fault := faulty(number, n_rows)) is not None:
                index, row, zero = fault
                what = "zero and has no direction" if zero else "not a finite number"
                if index == 0:
                    source = "the embedding"
                else:
                    source = f"layer {index - 1}" if index <= self.n_layers else "the final norm"
                raise UserError(
                    source,
                    f"gives a hidden state that is {what}, in row {first_row + row}",
                    "check the weights, or compute in a wider type",
                )
        self.faults.clear()

    def result(self) -> StateScores:
        if not self.tokens:
            raise UserError("text", "holds no token to score", "give more text")
        self._check()
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

    low = torch.arange(n_layers)[:, None]
    high = low + 1 + torch.arange(n_layers)

    def shifted(square: Tensor) -> Tensor:
        return square[low, high.clamp_max(n_layers)].masked_fill(high > n_layers, math.nan)

    return Estimate(shifted(table.mean), shifted(table.error))


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
