# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""SSD (Mamba-2) on Triton: forward and backward, in chunks of Q tokens.

The block decomposition of arXiv 2405.21060, section 6. How the work is cut decides the speed, since
at the usual sizes reading x and writing y is what the time goes to:

- Forward: a program walks the chunks of one head one after another, the state in registers, so that
  no state of a chunk goes through memory. Where there are fewer heads than the card has room for,
  the sequence is cut into a few segments: a first launch computes what each segment adds to the
  state, and each program of the second adds up those before its own.
- Backward: the same walk, once from the front and once from the back, leaves the state before and
  the gradient after every chunk, in the precision of x; then programs take one chunk and many heads
  of one group, so that the gradients of B and C are summed over heads inside a program, and over
  programs in a fixed order. Nothing is added atomically: the same call gives the same bits.

Decays. Inside a chunk they are `exp2` of differences of running sums, never above 1. A document
start, or a step so large that nothing of the state before it is left in float32, is no term of the
sum but opens a new *span*; between spans the decay is 0. So nothing overflows, and small decays
behind a huge one keep their digits. Steps just short of that still take sums to thousands, where
float32 has four decimals. So unless operands are bfloat16 a sum is two floats: itself rounded, and
in a second array what rounding took off; a difference of two sums then has the digits of a number
of its own size. Exponentials of one sum do without the second: rounded to nearest, a sum small
enough to leave anything of its exponential is off by 2^-24 of itself.

Shape letters as in `tamba.ops.ssd`; `K` chunks, `S` segments, `R` heads of a group, `U` row blocks
of a chunk. Step sizes, sums and spans are [B, H, K·Q] float32, float32 and int32.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from tamba.ops.kernels.tiles import Tile, multiprocessors, tile

LOG2E = tl.constexpr(1.4426950408889634)
# Below this a decay is 0 in float32, subnormal numbers aside.
VANISHED = tl.constexpr(-126.0)


# --- what every kernel does to its operands


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(exp(-|x|)), with log1p(e) = 2 atanh(e / (2 + e)) as a series.

    e is at most 1, so the series is in squares of at most 1/9: no digits are lost for tiny e.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 17 * q + 1.0 / 15
    series = series * q + 1.0 / 13
    series = series * q + 1.0 / 11
    series = series * q + 1.0 / 9
    series = series * q + 1.0 / 7
    series = series * q + 1.0 / 5
    series = series * q + 1.0 / 3
    series = series * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp2(-z * LOG2E))


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _decay(end, begin, low_ptr, end_at, begin_at):
    """exp2(end - begin): of the shape that they broadcast to.

    What rounding took off the sums lies at `low_ptr`, from where `end_at` and `begin_at`, of the
    shapes of the numbers, are their places; or `low_ptr` is None.
    """
    between = end - begin
    if low_ptr is not None:
        between += tl.load(low_ptr + end_at) - tl.load(low_ptr + begin_at)
    return tl.exp2(between)


@triton.jit
def _decays(ends, begins, low_ptr, end_at, begin_at, end_spans_ptr, begin_spans_ptr, whole, live):
    """`_decay` where `live` and in one span, else 0.

    `whole`: there is one span only, as in most chunks; then spans need not be read. Pointers have
    the shapes of the numbers.
    """
    if whole:
        decays = tl.where(live, _decay(ends, begins, low_ptr, end_at, begin_at), 0.0)
    else:
        same = tl.load(end_spans_ptr) == tl.load(begin_spans_ptr)
        decays = tl.where(live & same, _decay(ends, begins, low_ptr, end_at, begin_at), 0.0)
    return decays


@triton.jit
def _tile(tiles, row, start, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tiles.load([row, start, column]).reshape(ROWS, COLUMNS)


@triton.jit
def _put(tiles, row, start, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles.store([row, start, column], values.to(tiles.dtype).reshape(1, ROWS, COLUMNS))


# --- step sizes


_STEP_ARGUMENTS = [
    *("dt_ptr", "A_ptr", "bias_ptr", "starts_ptr", "padding_ptr", "out_ptr"),
    *("length", "heads", "chunks", "lanes"),
    *("dt_b", "dt_t", "dt_h", "starts_b", "starts_t", "out_b", "out_t"),
]


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _steps_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    padding_ptr,
    step_ptr,
    sum_ptr,
    low_ptr,
    column_ptr,
    span_ptr,
    length,
    heads,
    chunks,
    dt_b,
    dt_t,
    dt_h,
    starts_b,
    starts_t,
    low,
    high,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    STARTS: tl.constexpr,
    PADDING: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One chunk of a block of heads: step sizes, running sums of log2 decays, and spans.

    With `low_ptr` sums are in two parts, and there are no `columns`.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    t = chunk * Q + tl.arange(0, Q)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    within = (t < length)[:, None] & (h < heads)[None, :]
    real = t < length
    if PADDING:
        real = real & (t >= tl.load(padding_ptr + row))
    places = dt_ptr + row * dt_b + t.to(tl.int64)[:, None] * dt_t + h[None, :] * dt_h
    dt = tl.load(places, mask=within, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
        dt = dt + bias[None, :]
    if SOFTPLUS:
        dt = _softplus(dt)
    if LIMIT:
        dt = tl.minimum(tl.maximum(dt, low), high)
    dt = tl.where(within & real[:, None], dt, 0.0)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    decay = dt * (A * LOG2E)[None, :]
    opens = decay < VANISHED
    if STARTS:
        start = tl.load(starts_ptr + row * starts_b + t.to(tl.int64) * starts_t, mask=real, other=0)
        opens = opens | (start != 0)[:, None]
    sums = tl.where(opens, 0.0, decay)
    if low_ptr is not None:
        sums = sums.to(tl.float64)
    sums = tl.cumsum(sums, axis=0)
    spans = tl.cumsum(opens.to(tl.int32), axis=0)
    out = (row * heads + h)[None, :] * (chunks * Q) + t[:, None]
    stored = (h < heads)[None, :]
    tl.store(step_ptr + out, dt, mask=stored)
    tl.store(sum_ptr + out, sums, mask=stored)
    if low_ptr is not None:
        tl.store(low_ptr + out, sums - sums.to(tl.float32), mask=stored)
    else:
        tl.store(column_ptr + out, sums - tl.log2(dt), mask=stored)
    tl.store(span_ptr + out, spans, mask=stored)


# --- states


@triton.jit
def _enter(
    state,
    local_ptr,
    decay_ptr,
    lane,
    segment,
    segments,
    inner,
    SIZE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """`state` carried through the segments that come before `segment` (backwards: after it)."""
    for i in range(0, segments - 1 - segment if REVERSE else segment):
        j = lane * segments + (segments - 1 - i if REVERSE else i)
        state = state * tl.load(decay_ptr + j) + tl.load(local_ptr + j * SIZE + inner)
    return state


@triton.jit
def _walk(
    pid,
    left_tiles,
    right_tiles,
    sum_ptr,
    low_ptr,
    column_ptr,
    span_ptr,
    first_ptr,
    local_ptr,
    local_decay_ptr,
    stored_tiles,
    last_ptr,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    REVERSE: tl.constexpr,
    LOCAL: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    PITCH: tl.constexpr,
    FOLDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state [N, P] of one head through one segment: ``decay · state + leftᵀ (weight · right)``.

    Forwards left is B, right x and the weight dt and the decay to the end of the chunk. Backwards
    (`REVERSE`) left is C, right the output's gradient and the weight the decay since the start.
    With `LOCAL` only what the segment adds and its whole decay are written; without, every state
    that enters a chunk (backwards: every gradient of one that leaves it), and backwards the
    gradient of the first state.
    """
    blocks: tl.constexpr = P // BLOCK_P
    block = pid % blocks
    head = (pid // blocks) % heads
    rest = pid // blocks // heads
    if LOCAL:  # the segment that nobody comes after needs no such state
        segment = rest % (segments - 1) + (1 if REVERSE else 0)
        row = rest // (segments - 1)
    else:
        segment = rest % segments
        row = rest // segments
    lane = (row * heads + head).to(tl.int64)

    n = tl.arange(0, N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.arange(0, Q)
    inner = n[:, None] * P + p[None, :]
    state = tl.zeros([N, BLOCK_P], tl.float32)
    whole = tl.full([], 1.0, tl.float32)
    if not LOCAL:
        if FIRST:
            state += tl.load(first_ptr + lane * (N * P) + p[None, :] * N + n[:, None])
        state = _enter(
            state, local_ptr, local_decay_ptr, lane, segment, segments, inner, N * P, REVERSE
        )

    column = head * P + block * BLOCK_P
    group = head // share * N
    steps = lane * (chunks * Q)
    begin = segment * span_chunks
    count = tl.minimum(chunks - begin, span_chunks)
    for i in range(0, count):
        chunk = begin + (count - 1 - i if REVERSE else i)
        start = chunk * Q
        t = start + q
        left = _tile(left_tiles, row, start, group, Q, N)
        right = _tile(right_tiles, row, start, column, Q, BLOCK_P).to(tl.float32)
        spans = tl.load(span_ptr + steps + t)
        sum_end = tl.load(sum_ptr + steps + start + Q - 1)
        span_end = tl.load(span_ptr + steps + start + Q - 1)
        through = tl.where(span_end == 0, tl.exp2(sum_end), 0.0)
        if REVERSE:
            weight = tl.where(spans == 0, tl.exp2(tl.load(sum_ptr + steps + t)), 0.0)
        else:
            columns = tl.load(column_ptr + steps + t)
            if FOLDED:
                weight = tl.exp2(sum_end - columns)
            else:
                sums = tl.load(sum_ptr + steps + t)
                weight = _decay(sum_end, sums, low_ptr, steps + start + Q - 1, steps + t) * columns
            weight = tl.where(spans == span_end, weight, 0.0)
        if not LOCAL:
            _put(stored_tiles, row, chunk * PITCH, column, state, N, BLOCK_P)
        state = tl.dot(
            tl.trans(left).to(DOT),
            (right * weight[:, None]).to(DOT),
            state * through,
            input_precision=PRECISION,
        )
        whole *= through
    if LOCAL:
        j = lane * segments + segment
        tl.store(local_ptr + j * (N * P) + inner, state)
        if block == 0:
            tl.store(local_decay_ptr + j, whole)
    elif REVERSE and segment == 0:
        tl.store(last_ptr + lane * (N * P) + p[None, :] * N + n[:, None], state)


@triton.jit(do_not_specialize=["first_ptr", "heads", "share", "chunks", "segments", "span_chunks"])
def _segments_kernel(
    B_tiles,
    x_tiles,
    sum_ptr,
    low_ptr,
    column_ptr,
    span_ptr,
    local_ptr,
    local_decay_ptr,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    FOLDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What every segment but the last adds to the state."""
    _walk(
        tl.program_id(0),
        B_tiles,
        x_tiles,
        sum_ptr,
        low_ptr,
        column_ptr,
        span_ptr,
        local_ptr,
        local_ptr,
        local_decay_ptr,
        x_tiles,
        local_ptr,
        heads,
        share,
        chunks,
        segments,
        span_chunks,
        False,
        True,
        False,
        N,
        P,
        BLOCK_P,
        Q,
        0,
        FOLDED,
        DOT,
        PRECISION,
    )


@triton.jit(
    do_not_specialize=[
        *("first_ptr", "d_last_ptr"),
        *("heads", "share", "chunks", "segments", "span_chunks"),
    ]
)
def _states_kernel(
    B_tiles,
    C_tiles,
    x_tiles,
    dy_tiles,
    sum_ptr,
    low_ptr,
    column_ptr,
    span_ptr,
    first_ptr,
    d_last_ptr,
    local_ptr,
    local_decay_ptr,
    d_local_ptr,
    d_local_decay_ptr,
    entering_tiles,
    leaving_tiles,
    d_first_ptr,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    LOCAL: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    PITCH: tl.constexpr,
    FOLDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both walks of the backward pass: half of the programs from the front, half from the back."""
    half = tl.num_programs(0) // 2
    pid = tl.program_id(0)
    if pid < half:
        _walk(
            pid,
            B_tiles,
            x_tiles,
            sum_ptr,
            low_ptr,
            column_ptr,
            span_ptr,
            first_ptr,
            local_ptr,
            local_decay_ptr,
            entering_tiles,
            d_first_ptr,
            heads,
            share,
            chunks,
            segments,
            span_chunks,
            False,
            LOCAL,
            FIRST,
            N,
            P,
            BLOCK_P,
            Q,
            N,
            FOLDED,
            DOT,
            PRECISION,
        )
    else:
        _walk(
            pid - half,
            C_tiles,
            dy_tiles,
            sum_ptr,
            low_ptr,
            column_ptr,
            span_ptr,
            d_last_ptr,
            d_local_ptr,
            d_local_decay_ptr,
            leaving_tiles,
            d_first_ptr,
            heads,
            share,
            chunks,
            segments,
            span_chunks,
            True,
            LOCAL,
            LAST,
            N,
            P,
            BLOCK_P,
            Q,
            PITCH,
            FOLDED,
            DOT,
            PRECISION,
        )


# --- forward


@triton.jit(
    do_not_specialize=[
        *("D_ptr", "first_ptr"),
        *("heads", "share", "chunks", "segments", "span_chunks"),
    ]
)
def _scan_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    D_ptr,
    z_tiles,
    sum_ptr,
    low_ptr,
    column_ptr,
    span_ptr,
    first_ptr,
    local_ptr,
    local_decay_ptr,
    y_tiles,
    before_tiles,
    last_ptr,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    FOLDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of one head (or part of its channels) in one segment, chunk after chunk."""
    blocks: tl.constexpr = P // BLOCK_P
    pid = tl.program_id(0)
    block = pid % blocks
    head = (pid // blocks) % heads
    rest = pid // blocks // heads
    segment = rest % segments
    row = rest // segments
    lane = (row * heads + head).to(tl.int64)

    n = tl.arange(0, N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.arange(0, Q)
    inner = n[:, None] * P + p[None, :]
    state = tl.zeros([N, BLOCK_P], tl.float32)
    if FIRST:
        state += tl.load(first_ptr + lane * (N * P) + p[None, :] * N + n[:, None])
    state = _enter(state, local_ptr, local_decay_ptr, lane, segment, segments, inner, N * P, False)

    column = head * P + block * BLOCK_P
    group = head // share * N
    if SKIP:
        D = tl.load(D_ptr + head).to(tl.float32)
    steps = lane * (chunks * Q)
    begin = segment * span_chunks
    for i in range(0, tl.minimum(chunks - begin, span_chunks)):
        start = (begin + i) * Q
        at = steps + start + q
        C = _tile(C_tiles, row, start, group, Q, N)
        B = _tile(B_tiles, row, start, group, Q, N)
        x = _tile(x_tiles, row, start, column, Q, BLOCK_P)
        sums = tl.load(sum_ptr + at)
        columns = tl.load(column_ptr + at)
        spans = tl.load(span_ptr + at)
        sum_end = tl.load(sum_ptr + steps + start + Q - 1)
        span_end = tl.load(span_ptr + steps + start + Q - 1)

        scores = _dot(C, tl.trans(B), DOT, PRECISION)
        if not FOLDED:
            scores *= columns[None, :]
        scores *= _decays(
            sums[:, None],
            columns[None, :] if FOLDED else sums[None, :],
            *(low_ptr, at[:, None], at[None, :]),
            span_ptr + at[:, None],
            span_ptr + at[None, :],
            span_end == 0,
            q[:, None] >= q[None, :],
        )
        if SKIP:
            scores = tl.where(q[:, None] == q[None, :], scores + D, scores)
        y = _dot(C, state, DOT, PRECISION)
        y *= tl.where(spans == 0, tl.exp2(sums), 0.0)[:, None]
        y = tl.dot(scores.to(DOT), x.to(DOT), y, input_precision=PRECISION)
        if KEEP:
            _put(before_tiles, row, start, column, y, Q, BLOCK_P)
        if GATE:
            y *= _silu(_tile(z_tiles, row, start, column, Q, BLOCK_P).to(tl.float32))
        _put(y_tiles, row, start, column, y, Q, BLOCK_P)

        if FOLDED:
            weight = tl.exp2(sum_end - columns)
        else:
            weight = _decay(sum_end, sums, low_ptr, steps + start + Q - 1, at) * columns
        weight = tl.where(spans == span_end, weight, 0.0)
        through = tl.where(span_end == 0, tl.exp2(sum_end), 0.0)
        state = tl.dot(
            tl.trans(B).to(DOT),
            (x.to(tl.float32) * weight[:, None]).to(DOT),
            state * through,
            input_precision=PRECISION,
        )
    if segment == segments - 1:
        tl.store(last_ptr + lane * (N * P) + p[None, :] * N + n[:, None], state)


# --- backward


@triton.jit
def _ungate_kernel(
    dy_tiles,
    z_tiles,
    before_tiles,
    dz_tiles,
    d_before_tiles,
    P: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some tokens of one head: gradients of the gate and of what it was multiplied by."""
    row = tl.program_id(2)
    start = tl.program_id(1) * ROWS
    column = tl.program_id(0) * P
    dy = _tile(dy_tiles, row, start, column, ROWS, P).to(tl.float32)
    z = _tile(z_tiles, row, start, column, ROWS, P).to(tl.float32)
    before = _tile(before_tiles, row, start, column, ROWS, P).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    _put(dz_tiles, row, start, column, dy * before * share * (1.0 + z * (1.0 - share)), ROWS, P)
    _put(d_before_tiles, row, start, column, dy * z * share, ROWS, P)


@triton.jit(
    do_not_specialize=["heads", "groups", "share", "heads_each", "parts", "chunks", "lanes"]
)
def _grad_C_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    dy_tiles,
    sum_ptr,
    low_ptr,
    column_ptr,
    span_ptr,
    entering_tiles,
    dC_tiles,
    scores_tiles,
    ends_ptr,
    begins_ptr,
    heads,
    groups,
    share,
    heads_each,
    parts,
    chunks,
    lanes,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    FOLDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of one chunk, some heads of one group: gradient of C.

    Also written: the gradient of C Bᵀ summed over the heads, for the gradient of B; and for every
    head what flows along paths by the token they end at (with those from the state before the
    chunk) and, inside the chunk, by the token they begin at.
    """
    pid = tl.program_id(0)
    slices: tl.constexpr = Q // ROWS
    u_slice = pid % slices
    part = pid // slices % parts
    tile_at = pid // slices // parts
    group = tile_at % groups
    chunk = (tile_at // groups) % chunks
    row = tile_at // groups // chunks

    s = tl.arange(0, Q)
    u = u_slice * ROWS + tl.arange(0, ROWS)
    start = chunk * Q
    start_u = start + u_slice * ROWS
    B = _tile(B_tiles, row, start, group * N, Q, N)
    C = _tile(C_tiles, row, start_u, group * N, ROWS, N)
    scores = _dot(C, tl.trans(B), DOT, PRECISION).to(DOT)  # [u, s]
    d_scores = tl.zeros([ROWS, Q], tl.float32)
    d_C = tl.zeros([ROWS, N], tl.float32)
    for i in range(0, tl.minimum(share - part * heads_each, heads_each)):
        head = group * share + part * heads_each + i
        lane = (row * heads + head).to(tl.int64)
        steps = lane * (chunks * Q) + start
        x = _tile(x_tiles, row, start, head * P, Q, P)
        dy = _tile(dy_tiles, row, start_u, head * P, ROWS, P)
        state = _tile(entering_tiles, row, chunk * N, head * P, N, P)
        sums = tl.load(sum_ptr + steps + u)
        spans = tl.load(span_ptr + steps + u)
        columns = tl.load(column_ptr + steps + s)
        span_end = tl.load(span_ptr + steps + Q - 1)

        mixed = _dot(dy, tl.trans(x), DOT, PRECISION)
        begins = columns
        if not FOLDED:
            mixed *= columns[None, :]
            begins = tl.load(sum_ptr + steps + s)
        mixed *= _decays(
            sums[:, None],
            begins[None, :],
            *(low_ptr, steps + u[:, None], steps + s[None, :]),
            span_ptr + steps + u[:, None],
            span_ptr + steps + s[None, :],
            span_end == 0,
            u[:, None] >= s[None, :],
        )
        d_scores += mixed
        # A path from a token to itself meets no decay.
        paths = tl.where(u[:, None] > s[None, :], mixed * scores.to(tl.float32), 0.0)
        ends = tl.sum(paths, axis=1)
        tl.store(
            begins_ptr + u_slice * lanes * (chunks * Q).to(tl.int64) + steps + s,
            tl.sum(paths, axis=0),
        )
        since = tl.where(spans == 0, tl.exp2(sums), 0.0)
        from_state = _dot(dy, tl.trans(state), DOT, PRECISION) * since[:, None]
        d_C += from_state
        ends += tl.sum(from_state * C.to(tl.float32), axis=1)
        tl.store(ends_ptr + steps + u, ends)
    tiles = tl.num_programs(0) // (slices * parts)
    d_scores = d_scores.to(DOT)
    _put(scores_tiles, part * tiles + tile_at, u_slice * ROWS, 0, d_scores, ROWS, Q)
    B = _tile(B_tiles, row, start, group * N, Q, N)
    d_C = tl.dot(d_scores, B.to(DOT), d_C, input_precision=PRECISION)
    rows = tl.num_programs(0) // (slices * parts * groups * chunks)
    _put(dC_tiles, part * rows + row, start_u, group * N, d_C, ROWS, N)


@triton.jit(
    do_not_specialize=["D_ptr", "heads", "groups", "share", "heads_each", "parts", "chunks"]
)
def _grad_x_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    D_ptr,
    dy_tiles,
    step_ptr,
    sum_ptr,
    low_ptr,
    span_ptr,
    entering_tiles,
    leaving_tiles,
    scores_tiles,
    dx_tiles,
    dB_tiles,
    direct_ptr,
    leaves_ptr,
    through_ptr,
    skip_ptr,
    heads,
    groups,
    share,
    heads_each,
    parts,
    chunks,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    SKIP: tl.constexpr,
    PITCH: tl.constexpr,
    FOLDED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk, some heads of one group: gradients of x and B.

    Also written: for every head and token the gradient of dt as the factor of x, and what flows
    along the paths that begin there and leave the chunk; and its share of the gradient of D. The
    gradient of the state after the chunk may lie where dx will: it is read before dx is written.
    """
    pid = tl.program_id(0)
    part = pid % parts
    tile_at = pid // parts
    group = tile_at % groups
    chunk = (tile_at // groups) % chunks
    row = tile_at // groups // chunks

    q = tl.arange(0, Q)
    start = chunk * Q
    B = _tile(B_tiles, row, start, group * N, Q, N)
    C = _tile(C_tiles, row, start, group * N, Q, N)
    # Transposed: a token's row is where paths begin, its columns where they end.
    scores = _dot(B, tl.trans(C), DOT, PRECISION).to(DOT)  # [s, u]
    d_B = tl.zeros([Q, N], tl.float32)
    for i in range(0, tl.minimum(share - part * heads_each, heads_each)):
        head = group * share + part * heads_each + i
        lane = (row * heads + head).to(tl.int64)
        steps = lane * (chunks * Q) + start
        column = head * P
        sums = tl.load(sum_ptr + steps + q)
        sum_end = tl.load(sum_ptr + steps + Q - 1)
        span_end = tl.load(span_ptr + steps + Q - 1)
        dy = _tile(dy_tiles, row, start, column, Q, P)
        decays = _decays(
            *(sums[None, :], sums[:, None], low_ptr, steps + q[None, :], steps + q[:, None]),
            *(span_ptr + steps + q[None, :], span_ptr + steps + q[:, None], span_end == 0),
            q[:, None] <= q[None, :],
        )
        # The columns all at once. In two halves the compiler (Triton 3.6, sm90) got the last row
        # wrong in every head of a program but the first.
        inside = _dot(scores.to(tl.float32) * decays, dy, DOT, PRECISION)

        leaving = _tile(leaving_tiles, row, chunk * PITCH, column, N, P)
        x = _tile(x_tiles, row, start, column, Q, P).to(tl.float32)
        dt = tl.load(step_ptr + steps + q)
        spans = tl.load(span_ptr + steps + q)
        to_end = tl.where(
            spans == span_end, _decay(sum_end, sums, low_ptr, steps + Q - 1, steps + q), 0.0
        )
        outside = _dot(B, leaving, DOT, PRECISION) * to_end[:, None]
        tl.store(leaves_ptr + steps + q, dt * tl.sum(x * outside, axis=1))
        d_input = inside + outside
        tl.store(direct_ptr + steps + q, tl.sum(x * d_input, axis=1))
        added = (x * (dt * to_end)[:, None]).to(DOT)
        d_B = tl.dot(added, tl.trans(leaving).to(DOT), d_B, input_precision=PRECISION)

        dx = d_input * dt[:, None]
        if SKIP:
            dy = dy.to(tl.float32)
            dx += tl.load(D_ptr + head).to(tl.float32) * dy
            tl.store(skip_ptr + lane * chunks + chunk, tl.sum(tl.sum(x * dy, axis=1), axis=0))
        entering = _tile(entering_tiles, row, chunk * N, column, N, P)
        passing = tl.sum(tl.sum(entering.to(tl.float32) * leaving.to(tl.float32), axis=1), axis=0)
        passing *= tl.where(span_end == 0, tl.exp2(sum_end), 0.0)
        tl.store(through_ptr + lane * chunks + chunk, passing)
        _put(dx_tiles, row, start, column, dx, Q, P)
    tiles = tl.num_programs(0) // parts
    d_scores = _tile(scores_tiles, part * tiles + tile_at, 0, 0, Q, Q)  # [u, s]
    C = _tile(C_tiles, row, start, group * N, Q, N)
    d_B = tl.dot(tl.trans(d_scores).to(DOT), C.to(DOT), d_B, input_precision=PRECISION)
    rows = tiles // (groups * chunks)
    _put(dB_tiles, part * rows + row, start, group * N, d_B, Q, N)


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _grad_steps_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    padding_ptr,
    step_ptr,
    ends_ptr,
    begins_ptr,
    direct_ptr,
    leaves_ptr,
    through_ptr,
    out_ptr,
    sums_ptr,
    length,
    heads,
    chunks,
    lanes,
    dt_b,
    dt_t,
    dt_h,
    starts_b,
    starts_t,
    out_b,
    out_t,
    low,
    high,
    SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr,
    BIAS: tl.constexpr,
    STARTS: tl.constexpr,
    PADDING: tl.constexpr,
    Q: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One chunk of a block of heads: the gradient of dt, and shares of those of A and the bias.

    The decay of token t is a factor of the paths that begin before t and end at t or later: those
    inside the chunk by where they end less those by where they begin, summed from t on; those from
    the state before, summed from t on; those that leave the chunk, summed up to t; and those that
    pass through. The difference is of sums over the same float32 numbers, and so exact enough.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    t = chunk * Q + tl.arange(0, Q)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    known = (h < heads)[None, :]
    lane = row * heads + h
    total = chunks * Q
    at = lane[None, :] * total + t[:, None]
    balance = tl.load(ends_ptr + at, mask=known, other=0.0)
    for i in tl.static_range(PARTS):
        balance -= tl.load(begins_ptr + i * lanes * total + at, mask=known, other=0.0)
    leaves = tl.load(leaves_ptr + at, mask=known, other=0.0)
    crossing = tl.cumsum(balance, axis=0, reverse=True) + tl.cumsum(leaves, axis=0) - leaves
    crossing += tl.load(through_ptr + lane * chunks + chunk, mask=h < heads, other=0.0)[None, :]
    step = tl.load(step_ptr + at, mask=known, other=0.0)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    closed = step * (A * LOG2E)[None, :] < VANISHED
    real = t < length
    if PADDING:
        real = real & (t >= tl.load(padding_ptr + row))
    if STARTS:
        start = tl.load(starts_ptr + row * starts_b + t.to(tl.int64) * starts_t, mask=real, other=0)
        closed = closed | (start != 0)[:, None]
    crossing = tl.where(closed, 0.0, crossing)
    grad = crossing * A[None, :] + tl.load(direct_ptr + at, mask=known, other=0.0)
    within = (t < length)[:, None] & known
    if SOFTPLUS or LIMIT:
        places = dt_ptr + row * dt_b + t.to(tl.int64)[:, None] * dt_t + h[None, :] * dt_h
        raw = tl.load(places, mask=within, other=0.0).to(tl.float32)
        if BIAS:
            bias = tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
            raw += bias[None, :]
        ready = raw
        if SOFTPLUS:
            ready = _softplus(raw)
        if LIMIT:
            grad = tl.where((ready >= low) & (ready <= high), grad, 0.0)
        if SOFTPLUS:
            # The slope is exp(x) / (1 + exp(x)), without overflow on either side.
            e = tl.exp2(-tl.abs(raw) * LOG2E)
            grad *= tl.where(raw >= 0, 1.0, e) / (1.0 + e)
    grad = tl.where(real[:, None] & known, grad, 0.0)
    tl.store(
        out_ptr + row * out_b + t.to(tl.int64)[:, None] * out_t + h[None, :],
        grad.to(out_ptr.dtype.element_ty),
        mask=within,
    )
    shares = (row * chunks + chunk) * heads + h
    tl.store(sums_ptr + shares, tl.sum(crossing * step, axis=0), mask=h < heads)
    shares += tl.num_programs(0).to(tl.int64) * heads
    tl.store(sums_ptr + shares, tl.sum(grad, axis=0), mask=h < heads)


# --- launches


class _Launcher:
    """Launches a kernel; once compiled, past Triton's look-up, which costs more than a launch.

    The kernels here are specialised on constants and dtypes alone, so those are the key. A grid of
    no programs compiles and launches nothing: for what only a longer sequence needs, so that none
    waits for a compiler later.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, tuple[Any, list[object]]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[object],
        constants: dict[str, object],
        sizes: Tile,
        key: Hashable,
    ) -> None:
        """`key`: dtypes of the arguments and their device. `sizes`: for Triton's own options."""
        key = key, tuple(constants.values()), tuple(sizes.values())
        known = self._compiled.get(key)
        if known is not None:
            compiled, tail = known
            if grid[0]:
                compiled[grid](*arguments, *tail)
            return
        options = {"num_warps": sizes["warps"], "num_stages": sizes["stages"]}
        if "registers" in sizes:  # of a thread at most, so that more programs fit
            options["maxnreg"] = sizes["registers"]
        compiled = self._kernel[grid](*arguments, **constants, **options)
        if compiled is not None:  # not under the interpreter
            tail = [constants[name] for name in self._kernel.arg_names if name in constants]
            self._compiled[key] = compiled, tail


_steps = _Launcher(_steps_kernel)
_segments = _Launcher(_segments_kernel)
_states = _Launcher(_states_kernel)
_scan = _Launcher(_scan_kernel)
_ungate = _Launcher(_ungate_kernel)
_grad_C = _Launcher(_grad_C_kernel)
_grad_x = _Launcher(_grad_x_kernel)
_grad_steps = _Launcher(_grad_steps_kernel)

_STEP_SIZES: Tile = {"warps": 4, "stages": 1}
_STEP_HEADS = 16
_UNGATE_SIZES: Tile = {"rows": 64, "warps": 4, "stages": 1}


@dataclass
class Call:
    """The arguments of `tamba.ops.ssd`, ready for the kernels, and what follows from them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    state: Tensor | None
    starts: Tensor | None
    padding: Tensor | None
    softplus: bool
    low: float
    high: float

    def __post_init__(self) -> None:
        self.batch, self.length, self.heads, self.head_dim = self.x.shape
        self.groups, self.d_state = self.B.shape[2:]
        self.share = self.heads // self.groups
        self.device = self.x.device
        given = (
            *(self.x, self.dt, self.A, self.B, self.C, self.D, self.z),
            *(self.bias, self.state, self.starts, self.padding),
        )
        far = self.dt.stride(0) > 0x7FFFFFFF  # then it is an int64
        self.key = (self.device, far, *(None if t is None else t.dtype for t in given))
        self._numbers()

    def _numbers(self) -> None:
        """What matrix products run in, and the dtype that states are stored in."""
        dtypes = {self.x.dtype, self.B.dtype, self.C.dtype}
        interpreted = not self.x.is_cuda  # there products of bfloat16 are not to be had
        self.wide = dtypes != {torch.bfloat16}
        self.stored = torch.float32 if self.wide else torch.bfloat16
        # tf32 holds every float16, and one product of tf32 no less than one of float16.
        precision = "tf32x3" if torch.float32 in dtypes else "tf32"
        self.constants = {
            "N": self.d_state,
            "P": self.head_dim,
            "FOLDED": not self.wide,
            "DOT": tl.float32 if self.wide or interpreted else tl.bfloat16,
            "PRECISION": precision if self.wide and not interpreted else "ieee",
        }

    def sizes(self, operation: str) -> Tile:
        kind = "wide" if self.wide else "half"
        special = f"{kind} N{self.d_state} P{self.head_dim}"
        return tile(operation, special, kind, device=self.device)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def step_arguments(self) -> tuple[list[object], list[object], dict[str, object]]:
        """Pointers, strides and constants of the kernels that read dt."""
        bias, starts, padding = self.bias, self.starts, self.padding
        pointers: list[object] = [
            self.dt,
            self.A,
            self.A if bias is None else bias,
            self.A if starts is None else starts,
            self.A if padding is None else padding,
        ]
        strides: list[object] = [
            *self.dt.stride(),
            *((0, 0) if starts is None else starts.stride()),
        ]
        constants: dict[str, object] = {
            "SOFTPLUS": self.softplus,
            "LIMIT": self.low > -math.inf or self.high < math.inf,
            "BIAS": bias is not None,
            "STARTS": starts is not None,
            "PADDING": padding is not None,
            "BLOCK_H": _STEP_HEADS,
        }
        return pointers, strides, constants

    def steps(self, chunk: int) -> Steps:
        """Launch `_steps_kernel`."""
        chunks = -(-self.length // chunk)
        shape = self.batch, self.heads, chunks * chunk
        step, sums, rest = self.new(3, *shape).unbind()
        low, columns = (rest, None) if self.wide else (None, rest)
        spans = self.new(*shape, dtype=torch.int32)
        pointers, strides, constants = self.step_arguments()
        constants["Q"] = chunk
        _steps(
            (self.batch * chunks, -(-self.heads // _STEP_HEADS), 1),
            (
                *(*pointers, step, sums, low, columns, spans),
                *(self.length, self.heads, chunks, *strides, self.low, self.high),
            ),
            constants,
            _STEP_SIZES,
            self.key,
        )
        return Steps(step, sums, low, step if columns is None else columns, spans, chunk, chunks)

    def segment_chunks(self, sizes: Tile, chunks: int, walks: int = 1) -> int:
        """Chunks of a segment, so that programs fill the card and no segment is empty."""
        blocks = self.head_dim // min(sizes["head_dim"], self.head_dim)
        programs = walks * self.batch * self.heads * blocks
        segments = min(sizes["per_sm"] * multiprocessors(self.device) // programs, chunks)
        return -(-chunks // max(1, segments))

    def added_by_segments(self, segments: int) -> tuple[Tensor, Tensor]:
        """Room for what segments add to a state, and for their decays; none for one segment."""
        shape = self.batch, self.heads, segments if segments > 1 else 0
        return self.new(*shape, self.d_state, self.head_dim), self.new(*shape)


@dataclass(frozen=True)
class Steps:
    """Of `chunks` chunks of `chunk` tokens, [B, H, K·Q].

    Attributes:
        step: step sizes.
        sums: running sums of log2 decays.
        low: what rounding took off the sums; None for bfloat16, which has no use for it.
        columns: sums less log2 of the step sizes, so that one exponential has both factors. Good
            for bfloat16 (`FOLDED`); where sums are in the thousands it costs float32 digits, and
            there the step sizes are in its place.
        spans: numbers of spans, from 0 in every chunk.
    """

    step: Tensor
    sums: Tensor
    low: Tensor | None
    columns: Tensor
    spans: Tensor
    chunk: int
    chunks: int


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, P], the state after the last token, and y before the gate where to `keep` it."""
    x, B, C, D, z, state = call.x, call.B, call.C, call.D, call.z, call.state
    n, heads = call.d_state, call.heads
    sizes = call.sizes("ssd_scan")
    block, chunk = min(sizes["head_dim"], call.head_dim), sizes["chunk"]
    steps = call.steps(chunk)
    each = call.segment_chunks(sizes, steps.chunks)
    segments = -(-steps.chunks // each)
    sums = steps.sums, steps.low, steps.columns, steps.spans
    counts = heads, call.share, steps.chunks, segments, each
    x_tiles, B_tiles = _tiles(x, chunk, block), _tiles(B, chunk, n)
    adds, decays = call.added_by_segments(segments)
    walk = call.sizes("ssd_segments")
    width = min(walk["head_dim"], call.head_dim)
    narrow = x_tiles if width == block else _tiles(x, chunk, width)
    _segments(
        (call.batch * (segments - 1) * heads * (call.head_dim // width), 1, 1),
        (B_tiles, narrow, *sums, adds, decays, *counts),
        {**call.constants, "BLOCK_P": width, "Q": chunk},
        walk,
        call.key,
    )
    y = call.new(*x.shape, dtype=x.dtype)
    before = torch.empty_like(y) if keep else call.new(0, dtype=x.dtype)
    last = call.new(call.batch, heads, call.head_dim, n)
    y_tiles = _tiles(y, chunk, block)
    _scan(
        (call.batch * segments * heads * (call.head_dim // block), 1, 1),
        (
            *(x_tiles, B_tiles, _tiles(C, chunk, n), x if D is None else D),
            x_tiles if z is None else _tiles(z, chunk, block),
            *sums,
            *(last if state is None else state, adds, decays, y_tiles),
            *(_tiles(before, chunk, block) if keep else y_tiles, last),
            *counts,
        ),
        {
            **call.constants,
            "SKIP": D is not None,
            "GATE": z is not None,
            "KEEP": keep,
            "FIRST": state is not None,
            "BLOCK_P": block,
            "Q": chunk,
        },
        sizes,
        call.key,
    )
    return y, last, before


def backward(call: Call, dy: Tensor, d_last: Tensor | None, before: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, the bias and the state; empty for what is not given."""
    x, B, C, D, z = call.x, call.B, call.C, call.D, call.z
    batch, heads, groups, share = call.batch, call.heads, call.groups, call.share
    n, p = call.d_state, call.head_dim
    key = *call.key, dy.dtype
    dz = call.new(*(x.shape if z is not None else (0,)), dtype=x.dtype if z is None else z.dtype)
    if z is not None:
        gated, dy = dy, call.new(*x.shape, dtype=x.dtype)
        rows = _UNGATE_SIZES["rows"]
        _ungate(
            (heads, -(-call.length // rows), batch),
            [_tiles(t, rows, p) for t in (gated, z, before, dz, dy)],
            {"P": p, "ROWS": rows},
            _UNGATE_SIZES,
            key,
        )
    sizes = call.sizes("ssd_grad_C")
    chunk = sizes["chunk"]
    steps = call.steps(chunk)
    chunks = steps.chunks
    sums = steps.sums, steps.low, steps.columns, steps.spans

    # The states before all chunks, and the gradients of those after them.
    entering = call.new(batch, chunks * n, heads, p, dtype=call.stored)
    dx = call.new(*x.shape, dtype=x.dtype)
    # A gradient of a state is no larger than that of x in a whole chunk, which comes later.
    fits = dx.dtype == call.stored and n <= chunk and call.length % chunk == 0
    leaving = dx if fits else torch.empty_like(entering)
    pitch = leaving.shape[1] // chunks
    d_first = call.new(batch, heads, p, n)
    walk = call.sizes("ssd_states")
    width = min(walk["head_dim"], p)
    each = call.segment_chunks(walk, chunks, walks=2)
    segments = -(-chunks // each)
    adds, decays = call.added_by_segments(segments)
    d_adds, d_decays = call.added_by_segments(segments)
    for local in (True, False):
        _states(
            (2 * batch * (segments - local) * heads * (p // width), 1, 1),
            (
                *(_tiles(B, chunk, n), _tiles(C, chunk, n)),
                *(_tiles(x, chunk, width), _tiles(dy, chunk, width)),
                *sums,
                steps.sums if call.state is None else call.state,
                steps.sums if d_last is None else d_last,
                *(adds, decays, d_adds, d_decays),
                *(_tiles(entering, n, width), _tiles(leaving, n, width), d_first),
                *(heads, share, chunks, segments, each),
            ),
            {
                **call.constants,
                "LOCAL": local,
                "FIRST": call.state is not None,
                "LAST": d_last is not None,
                "BLOCK_P": width,
                "Q": chunk,
                "PITCH": pitch,
            },
            walk,
            key,
        )

    # One chunk and some heads of a group a program.
    rows = min(sizes["rows"], chunk)
    tiles = batch * chunks * groups
    wanted = sizes["per_sm"] * multiprocessors(call.device) * rows // chunk // tiles
    heads_each = -(-share // max(1, min(wanted, share)))
    parts = -(-share // heads_each)
    d_scores = call.new(parts * tiles, chunk, 1, chunk, dtype=call.stored)
    ends, direct, leaves = (torch.empty_like(steps.step) for _ in range(3))
    begins = call.new(chunk // rows, *steps.step.shape)
    counts = heads, groups, share, heads_each, parts, chunks
    constants = {**call.constants, "Q": chunk}
    dC = _parts(C, parts)
    _grad_C(
        (tiles * parts * (chunk // rows), 1, 1),
        (
            *(_tiles(x, chunk, p), _tiles(B, chunk, n), _tiles(C, rows, n)),
            *(_tiles(dy, rows, p), *sums),
            *(_tiles(entering, n, p), _tiles(dC, rows, n), _tiles(d_scores, rows, chunk)),
            *(ends, begins, *counts, batch * heads),
        ),
        {**constants, "ROWS": rows},
        sizes,
        (*key, dC.dtype),
    )
    dC = _whole(dC, C)
    sizes = call.sizes("ssd_grad_x")
    dB = _parts(B, parts)
    skips, through = call.new(batch, heads, chunks), call.new(batch, heads, chunks)
    _grad_x(
        (tiles * parts, 1, 1),
        (
            *(_tiles(x, chunk, p), _tiles(B, chunk, n), _tiles(C, chunk, n)),
            *(x if D is None else D, _tiles(dy, chunk, p)),
            *(steps.step, steps.sums, steps.low, steps.spans),
            *(_tiles(entering, n, p), _tiles(leaving, n, p), _tiles(d_scores, chunk, chunk)),
            *(_tiles(dx, chunk, p), _tiles(dB, chunk, n), direct, leaves, through, skips, *counts),
        ),
        {**constants, "SKIP": D is not None, "PITCH": pitch},
        sizes,
        (*key, dB.dtype),
    )
    dB = _whole(dB, B)
    ddt = call.new(*call.dt.shape, dtype=call.dt.dtype)
    # Shares of the gradients of A and the bias, for sums over all chunks.
    shares = call.new(2, batch * chunks, heads)
    pointers, strides, step_constants = call.step_arguments()
    _grad_steps(
        (batch * chunks, -(-heads // _STEP_HEADS), 1),
        (
            *(*pointers, steps.step, ends, begins, direct, leaves, through, ddt, shares),
            *(call.length, heads, chunks, batch * heads, *strides, *ddt.stride()[:2]),
            *(call.low, call.high),
        ),
        {**step_constants, "Q": chunk, "PARTS": begins.shape[0]},
        _STEP_SIZES,
        key,
    )
    shares = shares.sum(1)
    none = [call.new(0) for _ in range(4)]
    return (
        dx,
        ddt,
        shares[0],
        dB,
        dC,
        none[0] if D is None else skips.sum((0, 2)).to(D.dtype),
        dz,
        none[2] if call.bias is None else shares[1].to(call.bias.dtype, copy=True),
        none[3] if call.state is None else d_first,
    )


def _tiles(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A [B, T, I, J] tensor as [B, T, I J], to be read in tiles of one sequence.

    Made without the checks of its class, which take longer than the rest: `_readable` has made
    them, and our own tensors pass.
    """
    batch, length, heads, width = tensor.shape
    strides = tensor.stride()
    tiles: TensorDescriptor = object.__new__(TensorDescriptor)
    tiles.base = tensor
    tiles.shape = [batch, length, heads * width]
    tiles.strides = [strides[0], strides[1], 1]
    tiles.block_shape = [1, rows, columns]
    tiles.padding = "zero"
    return tiles


def _parts(like: Tensor, parts: int) -> Tensor:
    """[parts·B, T, G, N] for a gradient that is summed by parts; one part has its own dtype."""
    dtype = like.dtype if parts == 1 else torch.float32
    return like.new_empty(parts * like.shape[0], *like.shape[1:], dtype=dtype)


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    if parts.shape == like.shape:
        return parts
    return parts.unflatten(0, (-1, like.shape[0])).sum(0).to(like.dtype)


def _readable(tensor: Tensor) -> Tensor:
    """`tensor` [B, T, I, J], or where tiles of it cannot be addressed as they are, a copy.

    Views of a projection's output pass as they are where their width in bytes is a multiple of 16.
    """
    unit = 16 // tensor.element_size()
    batch, token, head, last = tensor.stride()
    fits = (
        last == 1
        and (head == tensor.shape[3] or tensor.shape[2] == 1)
        and token % unit == 0
        and batch % unit == 0
        and min(token, batch) > 0
        and tensor.data_ptr() % 16 == 0
    )
    if fits:
        return tensor
    return tensor.clone() if tensor.is_contiguous() else tensor.contiguous()


# --- the operator


def _run_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    softplus: bool,
    low: float,
    high: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, B, C = _readable(x), _readable(B), _readable(C)
    z = None if z is None else _readable(z)
    call = Call(x, dt, A, B, C, D, z, dt_bias, state, starts, padding, softplus, low, high)
    with _on(x):
        return forward(call, keep)


def _run_backward(
    dy: Tensor,
    d_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    before: Tensor,
    softplus: bool,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, B, C, dy = _readable(x), _readable(B), _readable(C), _readable(dy)
    z = None if z is None else _readable(z)
    d_last = None if d_last is None else d_last.contiguous()
    call = Call(x, dt, A, B, C, D, z, dt_bias, state, starts, padding, softplus, low, high)
    with _on(x):
        return backward(call, dy, d_last, before)  # type: ignore[return-value]


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


# Twice under one maths: as operators of torch's library, which compilers can see through, and as a
# plain autograd function, whose overhead a model with short sequences would otherwise notice.
_forward_op = torch.library.custom_op("tamba::ssd", _run_forward, mutates_args=())
_backward_op = torch.library.custom_op("tamba::ssd_backward", _run_backward, mutates_args=())


@_forward_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, starts, padding, softplus, low, high, keep):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
    return y, last, torch.empty_like(y) if keep else x.new_empty(0)


@_backward_op.register_fake
def _(dy, d_last, x, dt, A, B, C, D, z, dt_bias, state, starts, padding, before, *options):
    def like(t):
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    none = [x.new_empty(0, dtype=torch.float32) for _ in range(3)]
    return (
        *(like(t) for t in (x, dt, A, B, C)),
        none[0] if D is None else like(D),
        x.new_empty(0) if z is None else like(z),
        none[1] if dt_bias is None else like(dt_bias),
        none[2] if state is None else like(state),
    )


def _save(ctx, inputs, output):
    *tensors, softplus, low, high, _keep = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = softplus, low, high
    ctx.set_materialize_grads(False)


def _gradients(run, ctx, dy, d_last):
    """Gradients of all arguments, by `run`."""
    *tensors, before = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = list(run(dy, d_last, *tensors, before, *ctx.options))
    for i in (5, 6, 7, 8):
        if tensors[i] is None:
            grads[i] = None
    return (*grads, None, None, None, None, None, None)


def _differentiate(ctx, dy, d_last, _d_before):
    return _gradients(_backward_op, ctx, dy, d_last)


_forward_op.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """`tamba::ssd` without the library's bookkeeping."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _run_forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_last, _d_before):
        return _gradients(_run_backward, ctx, dy, d_last)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`tamba.ops.ssd` on Triton, for at least one token; A and the state in float32."""
    low, high = (-math.inf, math.inf) if dt_limit is None else dt_limit
    tensors = (
        *(x, dt, A.contiguous(), B, C, D, z, dt_bias),
        *(None if state is None else state.contiguous(), starts, padding),
    )
    keep = z is not None and torch.is_grad_enabled()
    options = dt_softplus, float(low), float(high), keep
    # A compiler at work, or a tensor without memory of its own: torch must see an operator.
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        y, last, _ = _forward_op(*tensors, *options)
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, last, _ = _Eager.apply(*tensors, *options)
    else:
        y, last, _ = _run_forward(*tensors, *options)
    return y, last


_PLAIN = (Tensor, torch.nn.Parameter)
