# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment,var-annotated,misc"
"""The causal convolution of a Mamba layer in training as Triton kernels: tiles, all in flight.

A program owns a tile of channels and tokens of one row of x. A tile is `R` runs of `K` tokens, run
beside run, so that its `K + W - 1` inputs are loads of [R, channels] each, up to 16 bytes a lane
and all independent; the W - 1 inputs before a run are those of the run before it and come from the
first-level cache. The backward pass recomputes what the activation saw, W - 1 tokens further than
its tile, and goes through several tiles with the sums for taps and bias in registers; the sums of
programs are added up by a kernel of their own in a fixed order. Nothing is exchanged otherwise.

Only for what `suits` says; `tamba.ops.kernels.conv` has the rest.

Shape letters: `B` batch, `T` tokens, `C` channels, `W` taps, `S` spans of a row, each the tokens
of one program; `K`, `R` as above.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tamba.ops.kernels.selective_scan import row_at, rows_of, sigmoid, token_stride
from tamba.ops.kernels.tiles import tile


@triton.jit
def taps_of(weight, c, w_c, w_w, C: tl.constexpr, W: tl.constexpr):
    """The W columns [1, channels] of the weights, oldest first, float32.

    Read as they lie, four to a channel, and then dealt out: a lane has several channels, and
    loads of one tap would be a stride apart.
    """
    k = tl.arange(0, 4)[None, :]
    at = weight + c[:, None] * w_c + k * w_w
    all_ = tl.load(at, mask=(c < C)[:, None] & (k < W), other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(all_, [c.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    taps = (first[None, :], second[None, :])
    if W > 2:
        taps += (third[None, :],)
    if W > 3:
        taps += (fourth[None, :],)
    return taps


@triton.jit
def bias_of(bias, c, C: tl.constexpr):
    """The bias [1, channels] in float32."""
    return tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def inputs_of(x, t, T, live, STRIDE: tl.constexpr, BEFORE: tl.constexpr, N: tl.constexpr):
    """N rows from t - BEFORE in float32; 0 where there is no token."""
    rows = ()
    for k in tl.static_range(N):
        here = t + (k - BEFORE)
        mask = live & (here >= 0) & (here < T)
        rows += (tl.load(x + here.to(tl.int64) * STRIDE, mask=mask, other=0.0),)
    inputs = ()
    for k in tl.static_range(N):
        inputs += (rows[k].to(tl.float32),)
    return inputs


@triton.jit
def sum_of_taps(inputs, taps, bias, k: tl.constexpr, W: tl.constexpr):
    """What the activation of the k-th token sees."""
    out = bias + taps[W - 1] * inputs[k + W - 1]
    for j in tl.static_range(1, W):
        out += taps[W - 1 - j] * inputs[k + W - 1 - j]
    return out


@triton.jit(do_not_specialize=["T", "x_b"])
def forward_kernel(
    x, weight, bias, y,
    T, x_b, w_c, w_w,
    X_T: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y of one tile."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (c < C)[None, :]
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(2) * (R * K) + (tl.arange(0, R) * K)[:, None]
    x = row_at(x, row, x_b, X_T) + c[None, :]
    y += row * T * C + c[None, :]
    inputs = inputs_of(x, t, T, live, X_T, W - 1, K + W - 1)
    taps = taps_of(weight, c, w_c, w_w, C, W)
    bias_ = bias_of(bias, c, C)
    for k in tl.static_range(K):
        out = sum_of_taps(inputs, taps, bias_, k, W)
        out = out * sigmoid(out, ASM)
        to = y + (t + k).to(tl.int64) * C
        tl.store(to, out.to(y.dtype.element_ty), mask=live & (t + k < T))


@triton.jit(do_not_specialize=["T", "tiles", "x_b", "dy_b"])
def backward_kernel(
    x, weight, bias, dy, dx, shares,
    T, tiles, x_b, w_c, w_w, dy_b,
    X_T: tl.constexpr, DY_T: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """dx of `tiles` tiles of a row, and their share of taps and bias [B, S, W + 1, C]."""
    N: tl.constexpr = K + W - 1  # tokens that a run's inputs reach
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (c < C)[None, :]
    row = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    x = row_at(x, row, x_b, X_T) + c[None, :]
    dy = row_at(dy, row, dy_b, DY_T) + c[None, :]
    dx += row * T * C + c[None, :]
    taps = taps_of(weight, c, w_c, w_w, C, W)
    bias_ = bias_of(bias, c, C)
    totals = ()
    for _ in tl.static_range(W + 1):
        totals += (tl.zeros([R, BLOCK], tl.float32),)
    for i in range(tiles):
        t = (which * tiles + i) * (R * K) + (tl.arange(0, R) * K)[:, None]
        inputs = inputs_of(x, t, T, live, X_T, W - 1, N + W - 1)
        rows = inputs_of(dy, t, T, live, DY_T, 0, N)
        grads = ()
        for k in tl.static_range(N):
            out = sum_of_taps(inputs, taps, bias_, k, W)
            s = sigmoid(out, ASM)
            grads += (rows[k] * s * (1.0 + out * (1.0 - s)),)
        for k in tl.static_range(K):
            given = taps[W - 1] * grads[k]
            for j in tl.static_range(1, W):
                given += taps[W - 1 - j] * grads[k + j]
            to = dx + (t + k).to(tl.int64) * C
            tl.store(to, given.to(dx.dtype.element_ty), mask=live & (t + k < T))
        grown = ()
        for j in tl.static_range(W):  # the tap that meets the input W - 1 - j before a token
            sum_ = totals[j]
            for k in tl.static_range(K):
                sum_ += grads[k] * inputs[k + j]
            grown += (sum_,)
        sum_ = totals[W]
        for k in tl.static_range(K):
            sum_ += grads[k]
        totals = grown + (sum_,)  # noqa: RUF005
    share = shares + (row * tl.num_programs(2) + which) * (W + 1) * C + c
    for j in tl.static_range(W + 1):
        tl.store(share + j * C, tl.sum(totals[j], 0), mask=c < C)


@triton.jit(do_not_specialize=["n_shares"])
def add_up_kernel(
    shares, dweight, dbias, n_shares,
    W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Shares [n, W + 1, C] added up into dweight [C, W] and dbias [C]."""
    j = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(0, n_shares, ROWS):
        which = i + tl.arange(0, ROWS)[:, None]
        at = shares + (which * (W + 1) + j).to(tl.int64) * C + c[None, :]
        total += tl.load(at, mask=(which < n_shares) & (c < C)[None, :], other=0.0)
    sum_ = tl.sum(total, 0)
    tl.store(dweight + c * W + j, sum_.to(dweight.dtype.element_ty), mask=(c < C) & (j < W))
    tl.store(dbias + c, sum_.to(dbias.dtype.element_ty), mask=(c < C) & (j == W))


def suits(
    operation: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    *others: Tensor | None,
) -> bool:
    """Whether a call is a Mamba layer's own in training.

    That is: bfloat16, four taps, a bias, SiLU, whole blocks of channels; no document starts, no
    padding, no states (`others`).
    """
    return (
        x.dtype == torch.bfloat16
        and weight.shape[1] == 4
        and bias is not None
        and silu
        and x.shape[2] % tile(operation, device=x.device)["channels"] == 0
        and all(other is None for other in others)
    )


def _constants(x: Tensor, width: int, operation: str) -> tuple[dict[str, Any], int, int]:
    """What kernels are compiled for, the blocks of channels, and the tiles of a row."""
    sizes = tile(operation, device=x.device)
    constants = dict(
        X_T=token_stride(x),
        W=width,
        C=x.shape[2],
        BLOCK=sizes["channels"],
        R=sizes["runs"],
        K=sizes["tokens"],
        ASM=x.is_cuda,
        num_warps=sizes["warps"],
        num_stages=1,
    )
    n_tiles = -(-x.shape[1] // (sizes["tokens"] * sizes["runs"]))
    return constants, -(-x.shape[2] // sizes["channels"]), n_tiles


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and the window after the last token [B, C, W - 1], in the dtype of x."""
    x = rows_of(x)
    batch, length, _ = x.shape
    before = weight.shape[1] - 1
    constants, blocks, n_tiles = _constants(x, weight.shape[1], "conv_tile_forward")
    y = x.new_empty(x.shape)
    forward_kernel[blocks, batch, n_tiles](
        x, weight, bias, y, length, x.stride(0), *weight.stride(), **constants
    )
    window = x[:, max(0, length - before) :].mT
    return y, F.pad(window, (before - window.shape[2], 0)).contiguous()


def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, dy = rows_of(x), rows_of(dy)
    batch, length, channels = x.shape
    width = weight.shape[1]
    constants, blocks, n_tiles = _constants(x, width, "conv_tile_backward")
    tiles = tile("conv_tile_backward", device=x.device)["tiles"]
    n_spans = -(-n_tiles // tiles)
    dx = x.new_empty(x.shape)
    shares = x.new_empty((batch, n_spans, width + 1, channels), dtype=torch.float32)
    backward_kernel[blocks, batch, n_spans](
        x, weight, bias, dy, dx, shares, length, tiles, x.stride(0), *weight.stride(),
        dy.stride(0), DY_T=token_stride(dy), **constants,
    )  # fmt: skip
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    block = 32
    add_up_kernel[-(-channels // block), width + 1](
        shares, dweight, dbias, batch * n_spans, W=width, C=channels, BLOCK=block, ROWS=32
    )
    return dx, dweight, dbias
