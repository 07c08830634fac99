# mypy: allow-untyped-defs, allow-incomplete-defs
# mypy: disable-error-code="assignment,var-annotated,misc"
"""The causal depthwise convolution as Triton kernels, each input read once.

A program owns a block of channels of one row and walks a span of tokens with the window in
registers, one row of channels after another. The backward pass recomputes what the activation saw,
takes each token's gradient once and hands it to the W inputs under it, which are finished W - 1
tokens later. Spans overlap by W - 1 tokens at each end, and nothing is exchanged between programs;
shares of the gradients of taps and bias are added up afterwards in a fixed order. What
`tamba.ops.kernels.conv_tiles` can do it does instead, faster.

Shape letters: `B` batch, `T` tokens, `C` channels, `W` taps, `S` spans of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tamba.ops.kernels import conv_tiles
from tamba.ops.kernels.selective_scan import row_at, rows_of, sigmoid, token_stride
from tamba.ops.kernels.tiles import multiprocessors, tile

# What differs from call to call of one model: not to be compiled for.
_OF_A_CALL = ["starts", "padding", "x_b", "state_b", "starts_b", "starts_t"]


@triton.jit
def load_rows(rows, t0, first, T, mask, STRIDE: tl.constexpr, K: tl.constexpr):
    """K rows as they lie in memory; 0 where there is no token."""
    loaded = ()
    rows += t0.to(tl.int64) * STRIDE
    for k in tl.static_range(K):
        here = mask & (t0 + k >= first) & (t0 + k < T)
        loaded += (tl.load(rows + k * STRIDE, mask=here, other=0.0),)
    return loaded


@triton.jit
def with_state(row, state, t, first, mask, state_w, W: tl.constexpr, HAS_STATE: tl.constexpr):
    """Row t in float32, taken from the window before token 0 where it is not a token."""
    value = row.to(tl.float32)
    if HAS_STATE:
        slot = t - first + W - 1
        past = mask & (slot >= 0) & (slot < W - 1)
        value += tl.load(state + slot * state_w, mask=past, other=0.0).to(tl.float32)
    return value


@triton.jit
def value_at(x, state, t, first, T, mask, X_T: tl.constexpr, state_w, W: tl.constexpr,
             HAS_STATE: tl.constexpr):  # fmt: skip
    """Row t of the inputs after the window before them, float32; 0 where there is none."""
    row = load_rows(x, t, first, T, mask, X_T, 1)
    return with_state(row[0], state, t, first, mask, state_w, W, HAS_STATE)


@triton.jit
def continues(starts, t, starts_t, first, T, HAS_STARTS: tl.constexpr):
    """1.0 where token t sees what is before it, 0.0 where it starts a document."""
    if HAS_STARTS:
        begins = tl.load(starts + t * starts_t, mask=(t >= first) & (t < T) & (t >= 0), other=0)
        return tl.where(begins != 0, 0.0, 1.0)
    return 1.0


@triton.jit
def reaches_end(starts, t, starts_t, first, T, W: tl.constexpr, HAS_STARTS: tl.constexpr):
    """1.0 where no document starts after token t, one of the last W - 1."""
    seen = 1.0
    for j in tl.static_range(1, W):
        seen = seen * continues(starts, t + j, starts_t, first, T, HAS_STARTS)
    return seen


@triton.jit(do_not_specialize=[*_OF_A_CALL, "T", "span"])
def forward_kernel(
    x, weight, bias, state, starts, padding, y, last,
    T, span, x_b, w_c, w_w, state_b, state_c, state_w, starts_b, starts_t,
    X_T: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y of one block of channels over one span, and with the last span the window after it."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(2) * span
    end = tl.minimum(begin + span, T)
    x = row_at(x, row, x_b, X_T) + c
    y += row * T * C + c
    state += row * state_b + c * state_c
    starts += row * starts_b
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row).to(tl.int32)
    taps = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + c * w_c + k * w_w, mask=mask, other=0.0).to(tl.float32),)
    bias_ = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias_ = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    # What the next token finds before it, and whether it may look past each of those.
    start = begin
    window = ()
    open_ = ()
    for j in tl.static_range(1, W):
        t = start - (W - j)
        window += (value_at(x, state, t, first, T, mask, X_T, state_w, W, HAS_STATE),)
        open_ += (tl.zeros([], tl.float32) + continues(starts, t, starts_t, first, T, HAS_STARTS),)
    raw = load_rows(x, start, first, T, mask, X_T, K)
    for tile_ in range((end - begin + K - 1) // K):
        t0 = start + tile_ * K
        y_at = y + t0.to(tl.int64) * C
        values = ()
        for k in tl.static_range(K):
            values += (with_state(raw[k], state, t0 + k, first, mask, state_w, W, HAS_STATE),)
        raw = load_rows(x, t0 + K, first, T, mask, X_T, K)
        for k in tl.static_range(K):
            out = bias_ + taps[W - 1] * values[k]
            seen = continues(starts, t0 + k, starts_t, first, T, HAS_STARTS)
            open_ += (tl.zeros([], tl.float32) + seen,)
            for j in tl.static_range(1, W):
                part = taps[W - 1 - j] * window[W - 1 - j]
                if HAS_STARTS:
                    part = part * seen
                    seen = seen * open_[W - 1 - j]
                out += part
            if SILU:
                out = out * sigmoid(out, ASM)
            live = mask & (t0 + k < end)
            tl.store(y_at + k * C, out.to(y.dtype.element_ty), mask=live)
            window = window[1:] + (values[k],)  # noqa: RUF005
            open_ = open_[1:]
    if end == T:
        for k in tl.static_range(W - 1):
            t = T - (W - 1) + k
            value = value_at(x, state, t, first, T, mask, X_T, state_w, W, HAS_STATE)
            value = value * reaches_end(starts, t, starts_t, first, T, W, HAS_STARTS)
            to = last + (row * C + c) * (W - 1) + k
            tl.store(to, value.to(last.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_OF_A_CALL, "T", "span", "n_spans", "dy_b", "dlast_b"])
def backward_kernel(
    x, weight, bias, state, starts, padding, dy, dlast, dx, dtaps, dstate,
    T, span, n_spans, x_b, w_c, w_w, state_b, state_c, state_w, starts_b, starts_t,
    dy_b, dlast_b, dlast_c, dlast_w,
    X_T: tl.constexpr, DY_T: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DLAST: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """dx of one span, its share of the gradients of taps and bias [B, S, W + 1, C], and dstate.

    Tokens up to W - 1 past the span are gone through for what they give to inputs inside it.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    row = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    begin = which * span
    end = tl.minimum(begin + span, T)
    x = row_at(x, row, x_b, X_T) + c
    dy = row_at(dy, row, dy_b, DY_T) + c
    dx += row * T * C + c
    state += row * state_b + c * state_c
    starts += row * starts_b
    first = 0
    if HAS_PADDING:
        first = tl.load(padding + row).to(tl.int32)
    taps = ()
    dtaps_ = ()
    for k in tl.static_range(W):
        taps += (tl.load(weight + c * w_c + k * w_w, mask=mask, other=0.0).to(tl.float32),)
        dtaps_ += (tl.zeros([BLOCK], tl.float32),)
    bias_ = tl.zeros([BLOCK], tl.float32)
    dbias_ = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias_ = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    start = begin
    window = ()
    pending = ()
    open_ = ()
    for j in tl.static_range(1, W):
        t = start - (W - j)
        window += (value_at(x, state, t, first, T, mask, X_T, state_w, W, HAS_STATE),)
        pending += (tl.zeros([BLOCK], tl.float32),)
        open_ += (tl.zeros([], tl.float32) + continues(starts, t, starts_t, first, T, HAS_STARTS),)
    # The inputs before token 0 belong to the first span, so that dstate has one writer.
    owned = begin
    if which == 0:
        owned = begin - (W - 1)
    raw_x = load_rows(x, start, first, T, mask, X_T, K)
    raw_dy = load_rows(dy, start, first, T, mask, DY_T, K)
    for tile_ in range((end - begin + W - 1 + K - 1) // K):
        t0 = start + tile_ * K
        dx_at = dx + t0.to(tl.int64) * C
        values = ()
        grads = ()
        for k in tl.static_range(K):
            values += (with_state(raw_x[k], state, t0 + k, first, mask, state_w, W, HAS_STATE),)
            grads += (raw_dy[k].to(tl.float32),)
        raw_x = load_rows(x, t0 + K, first, T, mask, X_T, K)
        raw_dy = load_rows(dy, t0 + K, first, T, mask, DY_T, K)
        for k in tl.static_range(K):
            t = t0 + k
            # How much of each of the taps before the last the token sees.
            seen = continues(starts, t, starts_t, first, T, HAS_STARTS)
            open_ += (tl.zeros([], tl.float32) + seen,)
            inputs = (values[k],)
            sights = (1.0,)
            for j in tl.static_range(1, W):
                part = window[W - 1 - j]
                sights += (seen,)
                if HAS_STARTS:
                    part = part * seen
                    seen = seen * open_[W - 1 - j]
                inputs += (part,)
            grad = grads[k]
            if SILU:
                out = bias_
                for j in tl.static_range(W):
                    out += taps[W - 1 - j] * inputs[j]
                s = sigmoid(out, ASM)
                grad = grad * (s + out * s * (1.0 - s))
            mine = tl.where(t < end, grad, 0.0)
            dbias_ += mine
            sums = ()
            for j in tl.static_range(W):
                sums += (dtaps_[j] + mine * inputs[j],)
            dtaps_ = sums
            given = ()
            for j in tl.static_range(W - 1):  # pending[j] is for token t - (W - 1) + j
                part = taps[j] * grad
                if HAS_STARTS:
                    part = part * sights[W - 1 - j]
                given += (pending[j] + part,)
            given += (taps[W - 1] * grad,)
            done = given[0]
            u = t - (W - 1)
            if HAS_DLAST:
                slot = u - (T - (W - 1))
                if slot >= 0:
                    late = tl.load(
                        dlast + row * dlast_b + c * dlast_c + slot * dlast_w,
                        mask=mask & (slot < W - 1), other=0.0,
                    )  # fmt: skip
                    late = late.to(tl.float32)
                    done += late * reaches_end(starts, u, starts_t, first, T, W, HAS_STARTS)
            own = mask & (u >= owned) & (u < end)
            to_x = tl.where(u >= first, done, 0.0)
            tl.store(dx_at + (k - (W - 1)) * C, to_x.to(dx.dtype.element_ty), mask=own & (u >= 0))
            if HAS_STATE:
                slot = u - first + W - 1
                of_state = own & (u < first) & (slot >= 0)
                to = dstate + (row * C + c) * (W - 1) + slot
                tl.store(to, done.to(dstate.dtype.element_ty), mask=of_state)
            pending = given[1:]
            window = window[1:] + (values[k],)  # noqa: RUF005
            open_ = open_[1:]
    at = (row * n_spans + which) * (W + 1) * C + c
    for j in tl.static_range(W):
        tl.store(dtaps + at + (W - 1 - j) * C, dtaps_[j], mask=mask)
    tl.store(dtaps + at + W * C, dbias_, mask=mask)


class _Prepared:
    """Arguments of one call as both kernels want them."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        state: Tensor | None,
        starts: Tensor | None,
        padding: Tensor | None,
        operation: str,
    ) -> None:
        self.x = rows_of(x)
        self.batch, self.length, self.n_channels = x.shape
        self.width = weight.shape[1]
        sizes = tile(operation, device=x.device)
        block, tokens = sizes["channels"], sizes["tokens"]
        blocks = -(-self.n_channels // block)
        n_tiles = -(-self.length // tokens)
        wanted = sizes["per_sm"] * multiprocessors(x.device)
        tiles = max(
            sizes["least_tiles"], n_tiles * blocks * self.batch // wanted if wanted else n_tiles
        )
        self.span = tiles * tokens
        self.n_spans = -(-n_tiles // tiles)
        self.grid = (blocks, self.batch, self.n_spans)
        marks = self.x if starts is None else starts.view(torch.uint8)
        past = self.x if state is None else state
        none = self.x
        self.inputs = (
            self.x, weight, none if bias is None else bias, past, marks,
            none if padding is None else padding,
        )  # fmt: skip
        self.strides = (
            self.x.stride(0), *weight.stride(), *past.stride(), *marks.stride()[:2]
        )  # fmt: skip
        self.constants: dict[str, Any] = dict(
            X_T=token_stride(self.x),
            W=self.width,
            C=self.n_channels,
            BLOCK=block,
            K=tokens,
            SILU=silu,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None,
            HAS_STARTS=starts is not None,
            HAS_PADDING=padding is not None,
            ASM=x.is_cuda,
            num_warps=sizes["warps"],
            num_stages=1,
        )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, C] and the window after the last token [B, C, W - 1], in the dtype of x."""
    if bias is not None and conv_tiles.suits(
        "conv_tile_forward", x, weight, bias, silu, state, starts, padding
    ):
        return conv_tiles.forward(x, weight, bias)
    call = _Prepared(x, weight, bias, silu, state, starts, padding, "conv_forward")
    y = x.new_empty(x.shape)
    last = x.new_empty(call.batch, call.n_channels, call.width - 1)
    forward_kernel[call.grid](
        *call.inputs, y, last, call.length, call.span, *call.strides, **call.constants
    )
    return y, last


def backward(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, empty for what was not given."""
    if bias is not None and conv_tiles.suits(
        "conv_tile_backward", x, weight, bias, silu, state, starts, padding, dlast
    ):
        return *conv_tiles.backward(dy, x, weight, bias), x.new_empty(0)
    call = _Prepared(x, weight, bias, silu, state, starts, padding, "conv_backward")
    dy = rows_of(dy)
    dx = x.new_empty(x.shape)
    shares = x.new_empty(
        (call.batch, call.n_spans, call.width + 1, call.n_channels), dtype=torch.float32
    )
    dstate = x.new_empty(0) if state is None else state.new_empty(state.shape)
    backward_kernel[call.grid](
        *call.inputs, dy, shares if dlast is None else dlast, dx, shares, dstate,
        call.length, call.span, call.n_spans, *call.strides,
        dy.stride(0), *((0, 0, 0) if dlast is None else dlast.stride()),
        DY_T=token_stride(dy), HAS_DLAST=dlast is not None, **call.constants,
    )  # fmt: skip
    total = shares.sum((0, 1))
    dweight = weight.new_empty(weight.shape).copy_(total[:-1].mT)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape).copy_(total[-1])
    return dx, dweight, dbias, dstate


@torch.library.custom_op("tamba::causal_conv1d", mutates_args=())
def conv_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`forward` as an operator that torch's compiler and autograd know."""
    with torch.cuda.device_of(x):
        return forward(x, weight, bias, silu, state, starts, padding)


@conv_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], weight.shape[1] - 1))


@torch.library.custom_op("tamba::causal_conv1d_backward", mutates_args=())
def conv_backward_op(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` likewise."""
    with torch.cuda.device_of(x):
        return backward(dy, dlast, x, weight, bias, silu, state, starts, padding)


@conv_backward_op.register_fake
def _(
    dy: Tensor,
    dlast: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(x), like(weight), like(bias), like(state)


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, silu, state, starts, padding = inputs
    ctx.save_for_backward(x, weight, bias, state, starts, padding)
    ctx.silu = silu
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, starts, padding = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, dweight, dbias, dstate = conv_backward_op(
        dy, dlast, x, weight, bias, ctx.silu, state, starts, padding
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None,
        None if state is None else dstate,
        None,
        None,
    )


conv_op.register_autograd(_gradient, setup_context=_keep_for_gradient)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`tamba.ops.causal_conv1d` for arguments whose shapes were checked, at least one token."""
    y, last = conv_op(x, weight, bias, silu, state, starts, padding)
    return y, last
