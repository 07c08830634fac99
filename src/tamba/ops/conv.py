"""Causal depthwise convolution over channel-last inputs, on any device that torch knows.

A window of W taps is W shifted products, each along whole rows of channels. They are done on tiles
of tokens small enough to stay in cache, in float32 (float64 for float64 inputs) whatever the inputs
are, and the activation in the same pass. The gradient recomputes a tile from the inputs, so that
nothing but the inputs is kept.

Shape letters: `B` batch, `T` tokens, `C` channels, `W` taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tamba.ops.backend import kernels_run, rows_for_cpu
from tamba.ops.discretize import (
    compute_dtype,
    dense,
    outside_autocast,
    real_starts,
    shaped,
    shapes,
)

# Numbers of one [t, C] buffer of a tile: a few such buffers should fit a core's cache. Elsewhere
# the only concern is memory.
_TILE = 1 << 17
_TILE_ELSEWHERE = 1 << 25


@outside_autocast
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y[t, c] = act(bias[c] + Σ_k weight[c, k] x[t - (W - 1) + k, c])``.

    Before token 0 the window holds `state`; where a document starts it is emptied; padding is
    skipped, so that the state meets the first real token. Any split of the tokens over several
    calls, each given the state that the last one returned, equals one call. Differentiable in every
    tensor but `starts` and `padding`.

    Args:
        x: [B, T, C] inputs.
        weight: [C, W]; the last tap meets the current token.
        bias: [C], or None.
        activation: ``"silu"`` or None.
        state: [B, C, W - 1], the inputs before token 0, oldest first; None for zeros.
        starts: [B, T] bool, True where a document starts and nothing before is seen, or None.
        padding: [B] int, leading positions that are no tokens, at most T, or None.

    Returns:
        y [B, T, C] and the window after the last token [B, C, W - 1], both in the dtype of `x`.

    Raises:
        ValueError: the shapes do not fit together, or the activation is unknown.
    """
    _check(x, weight, bias, activation, state, starts, padding)
    batch, length, channels = x.shape
    width = weight.shape[1]
    unusual = None if 2 <= width <= 4 else f"a window of {width} tokens"
    if length > 0 and kernels_run(
        "causal_conv1d", x, weight, bias, state, starts, padding, unusual=unusual
    ):
        from tamba.ops.kernels import conv as kernels

        silu = activation == "silu"
        return kernels.causal_conv1d(x, weight, dense(bias), silu, state, starts, dense(padding))
    if length == 1 and starts is None and padding is None:
        return _one_token(x, weight, bias, activation, state)
    before = width - 1
    given = x
    if state is not None or padding is not None:
        past = x.new_zeros(batch, before, channels) if state is None else state.to(x.dtype).mT
        given = torch.cat([past, x], dim=1)
        if padding is not None:  # the window follows the state right up to the first real token
            places = padding[:, None] + torch.arange(before, device=x.device)
            given = given.scatter(1, places[..., None].expand(-1, -1, channels), past)
    last = given[:, max(0, given.shape[1] - before) :]
    if last.shape[1] < before:
        last = F.pad(last, (0, 0, before - last.shape[1], 0))
    visible = None
    starts = real_starts(starts, padding)
    if starts is not None:
        document = F.pad(starts.cumsum(1), (before, 0))  # of each place in the window, 0 at first
        visible = torch.stack(
            [document[:, k : k + length] == document[:, before:] for k in range(before)], dim=-1
        )
        live = document[:, length:] == document[:, -1:]
        last = last.masked_fill(~live[..., None], 0)
    if visible is None and given is x and x.dtype == torch.bfloat16 and rows_for_cpu(x):
        from tamba.ops.kernels import rows_cpu

        y = rows_cpu.causal_conv1d(x, weight, bias, activation == "silu")
        return y, last.mT.contiguous()
    y = _Convolution.apply(given, weight, bias, visible, activation == "silu", length)
    return y, last.mT.contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> None:
    batch, length, channels = x.shape
    width = weight.shape[-1]
    fits = (
        weight.shape == (channels, width)
        and shaped(bias, channels)
        and shaped(state, batch, channels, width - 1)
        and shaped(starts, batch, length)
        and shaped(padding, batch)
    )
    if not fits:
        given = shapes(x=x, weight=weight, bias=bias, state=state, starts=starts, padding=padding)
        raise ValueError(
            "causal_conv1d: expected x [B,T,C], weight [C,W], bias [C], state [B,C,W-1], starts "
            f"[B,T], padding [B]; got {given}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation {activation!r}; expected 'silu' or None")


def _one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What decoding runs: as few operations as there can be."""
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    window = torch.cat([state.to(x.dtype), x.mT], dim=-1)
    dtype = compute_dtype(x)
    y = torch.linalg.vecdot(window.to(dtype), weight.to(dtype))
    if bias is not None:
        y = y + bias
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype)[:, None], window[..., 1:]


class _Convolution(torch.autograd.Function):
    """The shifted products, tile by tile.

    Arguments: given [B, T or W - 1 + T, C], the tokens alone or after the window before them;
    weight [C, W]; bias or None; visible [B, T, W - 1], which of the earlier taps a token sees, or
    None for all; whether silu follows; T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        visible: Tensor | None,
        silu: bool,
        length: int,
    ) -> Tensor:
        tiles = _Tiles(given, weight, bias, visible, length)
        y = given.new_empty(given.shape[0], length, given.shape[2])
        for rows, tokens in tiles:
            out = tiles.convolve(rows, tokens)
            y[rows, tokens] = F.silu(out, inplace=True) if silu else out
        ctx.save_for_backward(given, weight, bias, visible)
        ctx.silu, ctx.length = silu, length
        return y

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        given, weight, bias, visible = ctx.saved_tensors
        tiles = _Tiles(given, weight, bias, visible, ctx.length)
        before, width = tiles.before, weight.shape[1]
        grad = given.new_empty(given.shape[0], before + ctx.length, given.shape[2])
        taps = torch.zeros_like(tiles.weight)
        total = torch.zeros_like(taps[0])
        halo = None
        for rows, tokens in reversed(list(tiles)):
            d_out = grad_y[rows, tokens].to(tiles.dtype)
            if ctx.silu:
                d_out = torch.ops.aten.silu_backward(d_out, tiles.convolve(rows, tokens))
            window = tiles.window(rows, tokens)
            count = d_out.shape[1]
            # What the inputs of this tile and of the window before it get from this tile.
            d_window = d_out.new_zeros(d_out.shape[0], before + count, d_out.shape[2])
            for k in range(width):
                d_tap = tiles.seen(d_out, rows, tokens, k)
                d_window[:, k : k + count].addcmul_(d_tap, tiles.weight[k])
                taps[k] += (d_tap * window[:, k : k + count]).sum((0, 1))
            total += d_out.sum((0, 1))
            if tokens.stop < ctx.length and halo is not None:
                d_window[:, count:] += halo
            halo = d_window[:, :before].clone()
            grad[rows, tokens.start + before : tokens.stop + before] = d_window[:, before:]
            if tokens.start == 0:
                grad[rows, :before] = halo
        if given.shape[1] == ctx.length:
            grad = grad[:, before:]
        grad_bias = None if bias is None else total.to(bias.dtype)
        return grad, taps.mT.to(weight.dtype), grad_bias, None, None, None


class _Tiles:
    """Spans of rows and tokens, in the order of time within each span of rows."""

    def __init__(
        self,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        visible: Tensor | None,
        length: int,
    ) -> None:
        self._given, self._visible, self._length = given, visible, length
        self.dtype = compute_dtype(given)
        self.before = weight.shape[1] - 1
        self.weight = weight.mT.to(self.dtype).contiguous()  # [W, C]
        self._bias = self.weight.new_zeros(()) if bias is None else bias.to(self.dtype)
        self._offset = given.shape[1] - length  # of token 0: 0, or W - 1 after a window

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        batch, _, channels = self._given.shape
        size = _TILE if self._given.device.type == "cpu" else _TILE_ELSEWHERE
        tokens = max(16, size // channels)
        rows = max(1, min(batch, size // (channels * max(1, self._length))))
        for row in range(0, batch, rows):
            for token in range(0, self._length, tokens):
                yield (
                    slice(row, min(row + rows, batch)),
                    slice(token, min(token + tokens, self._length)),
                )

    def window(self, rows: slice, tokens: slice) -> Tensor:
        """[rows, W - 1 + t, C]: the tile's inputs after those before it."""
        first = tokens.start - self.before + self._offset
        part = self._given[rows, max(0, first) : tokens.stop + self._offset].to(self.dtype)
        return F.pad(part, (0, 0, -first, 0)) if first < 0 else part

    def seen(self, values: Tensor, rows: slice, tokens: slice, k: int) -> Tensor:
        """`values` [rows, t, C], 0 where a token does not see tap k."""
        if self._visible is None or k == self.before:
            return values
        return values * self._visible[rows, tokens, k, None]

    def convolve(self, rows: slice, tokens: slice) -> Tensor:
        """[rows, t, C] before the activation."""
        window, count = self.window(rows, tokens), tokens.stop - tokens.start
        out = torch.addcmul(self._bias, window[:, self.before :], self.weight[self.before])
        for k in range(self.before):
            part = self.seen(window[:, k : k + count], rows, tokens, k)
            out.addcmul_(part, self.weight[k])
        return out
