# mypy: allow-untyped-defs, allow-untyped-calls
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
behind a huge one keep their digits.

Shape letters as in `tamba.ops.ssd`; `K` chunks, `S` segments, `R` heads of a group, `U` row blocks
of a chunk. Step sizes, sums and spans are [B, H, K·Q] float32, float32 and int32.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
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
def _decays(ends, begins, end_spans_ptr, begin_spans_ptr, whole, live):
    """exp2(end - begin) where `live` and in one span, else 0: of the shape that they broadcast to.

    `whole`: there is one span only, as in most chunks; then spans need not be read. Pointers have
    the shapes of the numbers.
    """
    if whole:
        decays = tl.where(live, tl.exp2(ends - begins), 0.0)
    else:
        same = tl.load(end_spans_ptr) == tl.load(begin_spans_ptr)
        decays = tl.where(live & same, tl.exp2(ends - begins), 0.0)
    return decays


@triton.jit
def _tile(tiles, row, start, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tiles.load([row, start, column]).reshape(ROWS, COLUMNS)


@triton.jit
def _put(tiles, row, start, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles.store([row, start, column], values.to(tiles.dtype).reshape(1, ROWS, COLUMNS))


# --- step sizes


@triton.jit(do_not_specialize=["length", "heads", "chunks", "dt_b", "starts_b"])
def _steps_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    padding_ptr,
    step_ptr,
    sum_ptr,
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
    """One chunk of a block of heads: step sizes, running sums of log2 decays, and spans."""
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
    sums = tl.cumsum(tl.where(opens, 0.0, decay), axis=0)
    spans = tl.cumsum(opens.to(tl.int32), axis=0)
    out = (row * heads + h)[None, :] * (chunks * Q) + t[:, None]
    stored = (h < heads)[None, :]
    tl.store(step_ptr + out, dt, mask=stored)
    tl.store(sum_ptr + out, sums, mask=stored)
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


@triton.jit(do_not_specialize=["heads", "share", "chunks", "segments", "span_chunks"])
def _states_kernel(
    left_tiles,
    right_tiles,
    gate_tiles,
    sum_ptr,
    column_ptr,
    span_ptr,
    first_ptr,
    local_ptr,
    local_decay_ptr,
    stored_tiles,
    partner_tiles,
    through_ptr,
    last_ptr,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    REVERSE: tl.constexpr,
    LOCAL: tl.constexpr,
    GATE: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    PITCH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state [N, P] of one head through one segment: ``decay · state + leftᵀ (weight · right)``.

    Forwards left is B, right x and the weight dt and the decay to the end of the chunk. Backwards
    (`REVERSE`) left is C, right the output's gradient and the weight the decay since the start.
    With `LOCAL` only what the segment adds and its whole decay are written; without, every state
    that enters a chunk (backwards: every gradient of one that leaves it) and, backwards, the sum of
    state times gradient that passes through each chunk, and the gradient of the first state.
    """
    blocks: tl.constexpr = P // BLOCK_P
    pid = tl.program_id(0)
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
        if GATE:
            right *= _silu(_tile(gate_tiles, row, start, column, Q, BLOCK_P).to(tl.float32))
        if REVERSE:
            weight = tl.where(spans == 0, tl.exp2(tl.load(sum_ptr + steps + t)), 0.0)
        else:
            columns = tl.load(column_ptr + steps + t)
            weight = tl.where(spans == span_end, tl.exp2(sum_end - columns), 0.0)
        if not LOCAL:
            if REVERSE:
                theirs = _tile(partner_tiles, row, chunk * N, column, N, BLOCK_P).to(tl.float32)
                tl.store(
                    through_ptr + (lane * chunks + chunk) * blocks + block,
                    through * tl.sum(tl.sum(theirs * state, axis=1), axis=0),
                )
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


# --- forward


@triton.jit(do_not_specialize=["heads", "share", "chunks", "segments", "span_chunks"])
def _scan_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    D_ptr,
    z_tiles,
    sum_ptr,
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
        scores *= _decays(
            sums[:, None],
            columns[None, :],
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

        weight = tl.where(spans == span_end, tl.exp2(sum_end - columns), 0.0)
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


@triton.jit(
    do_not_specialize=["heads", "groups", "share", "heads_each", "parts", "chunks", "lanes"]
)
def _grad_C_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    z_tiles,
    dy_tiles,
    sum_ptr,
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
    GATE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
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
        if GATE:
            z = _tile(z_tiles, row, start_u, head * P, ROWS, P)
            dy = (dy.to(tl.float32) * _silu(z.to(tl.float32))).to(DOT)
        state = _tile(entering_tiles, row, chunk * N, head * P, N, P)
        sums = tl.load(sum_ptr + steps + u)
        spans = tl.load(span_ptr + steps + u)
        columns = tl.load(column_ptr + steps + s)
        span_end = tl.load(span_ptr + steps + Q - 1)

        mixed = _dot(dy, tl.trans(x), DOT, PRECISION)
        mixed *= _decays(
            sums[:, None],
            columns[None, :],
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


@triton.jit(do_not_specialize=["heads", "groups", "share", "heads_each", "parts", "chunks"])
def _grad_x_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    D_ptr,
    z_tiles,
    before_tiles,
    dy_tiles,
    step_ptr,
    sum_ptr,
    span_ptr,
    leaving_tiles,
    scores_tiles,
    dx_tiles,
    dz_tiles,
    dB_tiles,
    direct_ptr,
    leaves_ptr,
    skip_ptr,
    heads,
    groups,
    share,
    heads_each,
    parts,
    chunks,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    PITCH: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk, some heads of one group: gradients of x, z and B.

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
    scores = _dot(B, tl.trans(C), DOT, PRECISION).to(DOT)  # [s, u]
    d_B = tl.zeros([Q, N], tl.float32)
    for i in range(0, tl.minimum(share - part * heads_each, heads_each)):
        head = group * share + part * heads_each + i
        lane = (row * heads + head).to(tl.int64)
        steps = lane * (chunks * Q) + start
        column = head * P
        x = _tile(x_tiles, row, start, column, Q, P)
        dy = _tile(dy_tiles, row, start, column, Q, P)
        if GATE:
            z = _tile(z_tiles, row, start, column, Q, P).to(tl.float32)
            y = _tile(before_tiles, row, start, column, Q, P).to(tl.float32)
            wide = dy.to(tl.float32)
            open_by = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
            dz = wide * y * open_by * (1.0 + z * (1.0 - open_by))
            _put(dz_tiles, row, start, column, dz, Q, P)
            dy = (wide * z * open_by).to(DOT)
        leaving = _tile(leaving_tiles, row, chunk * PITCH, column, N, P)
        sums = tl.load(sum_ptr + steps + q)
        spans = tl.load(span_ptr + steps + q)
        dt = tl.load(step_ptr + steps + q)
        sum_end = tl.load(sum_ptr + steps + Q - 1)
        span_end = tl.load(span_ptr + steps + Q - 1)
        to_end = tl.where(spans == span_end, tl.exp2(sum_end - sums), 0.0)

        wide_x = x.to(tl.float32)
        outside = _dot(B, leaving, DOT, PRECISION) * to_end[:, None]
        added = (wide_x * (dt * to_end)[:, None]).to(DOT)
        d_B = tl.dot(added, tl.trans(leaving).to(DOT), d_B, input_precision=PRECISION)
        tl.store(leaves_ptr + steps + q, dt * tl.sum(wide_x * outside, axis=1))
        # Transposed: a token's row is where paths begin, its columns where they end.
        decays = _decays(
            sums[None, :],
            sums[:, None],
            span_ptr + steps + q[None, :],
            span_ptr + steps + q[:, None],
            span_end == 0,
            q[:, None] <= q[None, :],
        )
        weighted = (scores.to(tl.float32) * decays).to(DOT)
        d_input = tl.dot(weighted, dy.to(DOT), outside, input_precision=PRECISION)
        tl.store(direct_ptr + steps + q, tl.sum(wide_x * d_input, axis=1))
        dx = d_input * dt[:, None]
        if SKIP:
            wide_dy = dy.to(tl.float32)
            dx += tl.load(D_ptr + head).to(tl.float32) * wide_dy
            tl.store(
                skip_ptr + lane * chunks + chunk, tl.sum(tl.sum(wide_x * wide_dy, axis=1), axis=0)
            )
        _put(dx_tiles, row, start, column, dx, Q, P)
    tiles = tl.num_programs(0) // parts
    d_scores = _tile(scores_tiles, part * tiles + tile_at, 0, 0, Q, Q)  # [u, s]
    C = _tile(C_tiles, row, start, group * N, Q, N)
    d_B = tl.dot(tl.trans(d_scores).to(DOT), C.to(DOT), d_B, input_precision=PRECISION)
    rows = tiles // (groups * chunks)
    _put(dB_tiles, part * rows + row, start, group * N, d_B, Q, N)


@triton.jit(do_not_specialize=["length", "heads", "chunks", "lanes", "dt_b", "starts_b", "out_b"])
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
    THROUGH: tl.constexpr,
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
    for i in tl.static_range(THROUGH):
        crossing += tl.load(
            through_ptr + (lane * chunks + chunk) * THROUGH + i, mask=h < heads, other=0.0
        )[None, :]
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


@dataclass(frozen=True)
class _Numbers:
    """What the matrix products run in.

    Attributes:
        wide: whether operands are float32.
        options: `DOT` and `PRECISION` of the kernels.
        stored: dtype of what the backward pass stores of the states.
    """

    wide: bool
    options: dict[str, object]
    stored: torch.dtype


def _numbers(*operands: Tensor) -> _Numbers:
    dtypes = {t.dtype for t in operands}
    interpreted = not operands[0].is_cuda  # there products of bfloat16 are not to be had
    if dtypes == {torch.bfloat16}:
        dot = tl.float32 if interpreted else tl.bfloat16
        return _Numbers(False, {"DOT": dot, "PRECISION": "ieee"}, torch.bfloat16)
    # tf32 holds every float16, and one product of tf32 no less than one of float16.
    precision = "tf32x3" if torch.float32 in dtypes else "tf32"
    if interpreted:
        precision = "ieee"
    return _Numbers(True, {"DOT": tl.float32, "PRECISION": precision}, torch.float32)


@dataclass(frozen=True)
class _Timing:
    """dt as given, with what turns it into step sizes."""

    dt: Tensor
    A: Tensor
    bias: Tensor | None
    starts: Tensor | None
    padding: Tensor | None
    softplus: bool
    low: float
    high: float

    def arguments(self) -> tuple[Tensor, ...]:
        """Pointers; where there is nothing, one that is not read."""
        bias, starts, padding = self.bias, self.starts, self.padding
        return (
            self.dt,
            self.A,
            self.A if bias is None else bias,
            self.A if starts is None else starts,
            self.A if padding is None else padding,
        )

    def strides(self) -> tuple[int, ...]:
        """Of dt and of starts."""
        return (*self.dt.stride(), *((0, 0) if self.starts is None else self.starts.stride()))

    def options(self) -> dict[str, object]:
        """Of the kernels."""
        return {
            "SOFTPLUS": self.softplus,
            "LIMIT": self.low > -math.inf or self.high < math.inf,
            "BIAS": self.bias is not None,
            "STARTS": self.starts is not None,
            "PADDING": self.padding is not None,
            "BLOCK_H": 16,
            "num_warps": 4,
        }


@dataclass(frozen=True)
class _Steps:
    """Of `chunks` chunks of `chunk` tokens, [B, H, K·Q].

    Attributes:
        step: step sizes.
        sums: running sums of log2 decays.
        columns: sums less log2 of the step sizes, so that one exponential has both factors.
        spans: numbers of spans, from 0 in every chunk.
    """

    step: Tensor
    sums: Tensor
    columns: Tensor
    spans: Tensor
    chunk: int
    chunks: int

    @classmethod
    def of(cls, timing: _Timing, chunk: int) -> _Steps:
        batch, length, heads = timing.dt.shape
        chunks = triton.cdiv(length, chunk)
        step, sums, columns = timing.dt.new_empty(
            3, batch, heads, chunks * chunk, dtype=torch.float32
        )
        spans = timing.dt.new_empty(batch, heads, chunks * chunk, dtype=torch.int32)
        options = timing.options()
        _steps_kernel[(batch * chunks, triton.cdiv(heads, 16))](
            *timing.arguments(),
            step,
            sums,
            columns,
            spans,
            length,
            heads,
            chunks,
            *timing.strides(),
            timing.low,
            timing.high,
            **options,
            Q=chunk,
        )
        return cls(step, sums, columns, spans, chunk, chunks)

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """All but the step sizes."""
        return self.sums, self.columns, self.spans


def _walks(lanes: int, chunks: int, sizes: Tile, head_dim: int, device: torch.device) -> int:
    """Chunks of a segment, so that programs fill the card and no segment is empty."""
    programs = lanes * (head_dim // min(sizes["head_dim"], head_dim))
    segments = max(1, min(sizes["per_sm"] * multiprocessors(device) // programs, chunks))
    return triton.cdiv(chunks, segments)


def _states(
    left: Tensor,
    right: Tensor,
    gate: Tensor | None,
    first: Tensor | None,
    steps: _Steps,
    each: int,
    numbers: _Numbers,
    sizes: Tile,
    *,
    reverse: bool,
    local: tuple[Tensor, Tensor] | None = None,
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Launch `_states_kernel`.

    Args:
        left: B or C; right: x or dy; gate: z or None; first: [B, H, P, N] or None.
        steps: of the chunks to walk.
        each: chunks of a segment.
        numbers, sizes: as for every launch.
        reverse: whether it walks from the back.
        local: what the segments add, and their decays; None where there is one segment only.
        into: stored and partner [B, K·pitch, H, P], of which a chunk takes the first N rows of its
            pitch; through [B, H, K, blocks] and last. None for the launch that computes `local`.

    Returns:
        `local`, where that is what it computes.
    """
    batch, _, heads, head_dim = right.shape
    groups, d_state = left.shape[2:]
    block = min(sizes["head_dim"], head_dim)
    segments = triton.cdiv(steps.chunks, each)
    made = None
    right_tiles = _tiles(right, steps.chunk, block)
    stored_tiles = partner_tiles = right_tiles
    walked, pitch = segments, 0
    if into is None:
        adds = right.new_empty(batch, heads, segments, d_state, head_dim, dtype=torch.float32)
        local = made = adds, adds.new_empty(batch, heads, segments)
        through = last = adds
        walked -= 1
    else:
        stored, partner, through, last = into
        stored_tiles, partner_tiles = (_tiles(t, d_state, block) for t in (stored, partner))
        pitch = stored.shape[1] // steps.chunks
    adds, decays = local if local is not None else (steps.sums, steps.sums)
    _states_kernel[(batch * walked * heads * (head_dim // block),)](
        _tiles(left, steps.chunk, d_state),
        right_tiles,
        right_tiles if gate is None else _tiles(gate, steps.chunk, block),
        *steps.pointers(),
        steps.sums if first is None else first,
        adds,
        decays,
        stored_tiles,
        partner_tiles,
        through,
        last,
        heads,
        heads // groups,
        steps.chunks,
        segments,
        each,
        REVERSE=reverse,
        LOCAL=made is not None,
        GATE=gate is not None,
        FIRST=first is not None,
        N=d_state,
        P=head_dim,
        BLOCK_P=block,
        Q=steps.chunk,
        PITCH=pitch,
        **numbers.options,
        **_launch(sizes),
    )
    return made


def forward(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    timing: _Timing,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, P], the state after the last token, and y before the gate where to `keep` it."""
    batch, _, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    numbers = _numbers(x, B, C)
    sizes = _sizes("ssd_scan", numbers, d_state, head_dim, x.device)
    block, chunk = min(sizes["head_dim"], head_dim), sizes["chunk"]
    steps = _Steps.of(timing, chunk)
    each = _walks(batch * heads, steps.chunks, sizes, head_dim, x.device)
    segments = triton.cdiv(steps.chunks, each)
    local = None
    if segments > 1:
        walk = _sizes("ssd_segments", numbers, d_state, head_dim, x.device)
        local = _states(B, x, None, None, steps, each, numbers, walk, reverse=False)
    adds, decays = local if local is not None else (steps.sums, steps.sums)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    before = torch.empty_like(y) if keep else y.new_empty(0)
    last = y.new_empty(batch, heads, head_dim, d_state, dtype=torch.float32)
    x_tiles, y_tiles = _tiles(x, chunk, block), _tiles(y, chunk, block)
    _scan_kernel[(batch * segments * heads * (head_dim // block),)](
        x_tiles,
        _tiles(B, chunk, d_state),
        _tiles(C, chunk, d_state),
        x if D is None else D,
        x_tiles if z is None else _tiles(z, chunk, block),
        *steps.pointers(),
        last if state is None else state,
        adds,
        decays,
        y_tiles,
        _tiles(before, chunk, block) if keep else y_tiles,
        last,
        heads,
        heads // groups,
        steps.chunks,
        segments,
        each,
        SKIP=D is not None,
        GATE=z is not None,
        KEEP=keep,
        FIRST=state is not None,
        N=d_state,
        P=head_dim,
        BLOCK_P=block,
        Q=chunk,
        **numbers.options,
        **_launch(sizes),
    )
    return y, last, before


def backward(
    dy: Tensor,
    d_last: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    before: Tensor,
    timing: _Timing,
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C, D, z, the bias and the state; empty for what is not given."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    share = heads // groups
    numbers = _numbers(x, B, C)

    def sizes_of(operation: str) -> Tile:
        return _sizes(operation, numbers, d_state, head_dim, x.device)

    sizes = sizes_of("ssd_grad_C")
    rows = min(sizes["rows"], sizes["chunk"])
    steps = _Steps.of(timing, sizes["chunk"])
    chunk, chunks = steps.chunk, steps.chunks

    # The states before all chunks, and the gradients of those after them.
    walk = sizes_of("ssd_states")
    p_blocks = head_dim // min(walk["head_dim"], head_dim)
    each = _walks(batch * heads, chunks, walk, head_dim, x.device)
    entering = x.new_empty(batch, chunks * d_state, heads, head_dim, dtype=numbers.stored)
    dx = x.new_empty(batch, chunks * chunk, heads, head_dim)
    # A gradient of a state is no larger than that of x in its chunk, which comes later.
    alias = dx.dtype == entering.dtype and d_state <= chunk
    leaving = dx if alias else torch.empty_like(entering)
    through = dx.new_empty(batch, heads, chunks, p_blocks, dtype=torch.float32)
    d_first = dx.new_empty(batch, heads, head_dim, d_state, dtype=torch.float32)
    for reverse, left, right, gate, first, stored in (
        (False, B, x, None, state, entering),
        (True, C, dy, z, d_last, leaving),
    ):
        local = None
        if each < chunks:
            local = _states(left, right, gate, None, steps, each, numbers, walk, reverse=reverse)
        into = stored, entering, through, d_first
        _states(
            left,
            right,
            gate,
            first,
            steps,
            each,
            numbers,
            walk,
            reverse=reverse,
            local=local,
            into=into,
        )

    # One chunk and some heads of a group a program.
    tiles = batch * chunks * groups
    wanted = sizes["per_sm"] * multiprocessors(x.device) * rows // chunk // tiles
    heads_each = triton.cdiv(share, max(1, min(wanted, share)))
    parts = triton.cdiv(share, heads_each)
    d_scores = x.new_empty(parts * tiles, chunk, 1, chunk, dtype=numbers.stored)
    lanes = batch * heads
    per_token = dx.new_empty(3 + chunk // rows, *steps.step.shape, dtype=torch.float32)
    ends, direct, leaves, begins = per_token[0], per_token[1], per_token[2], per_token[3:]
    counts = (heads, groups, share, heads_each, parts, chunks)
    shape = {"GATE": z is not None, "N": d_state, "P": head_dim, "Q": chunk, **numbers.options}
    x_tiles, B_tiles = _tiles(x, chunk, head_dim), _tiles(B, chunk, d_state)
    dy_tiles = _tiles(dy, rows, head_dim)
    dC = _parts(C, parts)
    _grad_C_kernel[(tiles * parts * (chunk // rows),)](
        x_tiles,
        B_tiles,
        _tiles(C, rows, d_state),
        dy_tiles if z is None else _tiles(z, rows, head_dim),
        dy_tiles,
        *steps.pointers(),
        _tiles(entering, d_state, head_dim),
        _tiles(dC, rows, d_state),
        _tiles(d_scores, rows, chunk),
        ends,
        begins,
        *counts,
        lanes,
        ROWS=rows,
        **shape,
        **_launch(sizes),
    )
    dC = _whole(dC, C)
    sizes = sizes_of("ssd_grad_x")
    dB = _parts(B, parts)
    dz = x.new_empty(0) if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    # Shares of the gradients of A and the bias, and of D, for sums over all chunks.
    shares = dx.new_empty(2, batch, chunks, heads, dtype=torch.float32)
    skips = shares.new_empty(batch, heads, chunks)
    dy_tiles = _tiles(dy, chunk, head_dim)
    # dx is written up to the length alone: behind it lie gradients of states, of no further use.
    _grad_x_kernel[(tiles * parts,)](
        x_tiles,
        B_tiles,
        _tiles(C, chunk, d_state),
        x if D is None else D,
        dy_tiles if z is None else _tiles(z, chunk, head_dim),
        dy_tiles if z is None else _tiles(before, chunk, head_dim),
        dy_tiles,
        steps.step,
        steps.sums,
        steps.spans,
        _tiles(leaving, d_state, head_dim),
        _tiles(d_scores, chunk, chunk),
        _tiles(dx, chunk, head_dim),
        dy_tiles if z is None else _tiles(dz, chunk, head_dim),
        _tiles(dB, chunk, d_state),
        direct,
        leaves,
        skips,
        *counts,
        SKIP=D is not None,
        PITCH=leaving.shape[1] // chunks,
        **shape,
        **_launch(sizes),
    )
    dB = _whole(dB, B)
    ddt = torch.empty_like(timing.dt, memory_format=torch.contiguous_format)
    _grad_steps_kernel[(batch * chunks, triton.cdiv(heads, 16))](
        *timing.arguments(),
        steps.step,
        ends,
        begins,
        direct,
        leaves,
        through,
        ddt,
        shares,
        length,
        heads,
        chunks,
        lanes,
        *timing.strides(),
        *ddt.stride()[:2],
        timing.low,
        timing.high,
        **timing.options(),
        Q=chunk,
        PARTS=chunk // rows,
        THROUGH=p_blocks,
    )
    return (
        dx[:, :length],
        ddt,
        shares[0].sum((0, 1)),
        dB,
        dC,
        skips.sum((0, 2)).to(D.dtype) if D is not None else x.new_empty(0),
        dz,
        shares[1].sum((0, 1)).to(timing.bias.dtype) if timing.bias is not None else x.new_empty(0),
        d_first if state is not None else x.new_empty(0),
    )


def _sizes(
    operation: str, numbers: _Numbers, d_state: int, head_dim: int, device: torch.device
) -> Tile:
    kind = "wide" if numbers.wide else "half"
    return tile(operation, f"{kind} N{d_state} P{head_dim}", kind, device=device)


def _launch(sizes: Tile) -> dict[str, int]:
    """Triton's own options; `registers` caps those of a thread, so that more programs fit."""
    options = {"num_warps": sizes["warps"], "num_stages": sizes["stages"]}
    return options | ({"maxnreg": sizes["registers"]} if "registers" in sizes else {})


def _tiles(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A [B, T, I, J] tensor as [B, T, I J], to be read in tiles of one sequence."""
    batch, length, heads, width = tensor.shape
    return TensorDescriptor(
        tensor,
        [batch, length, heads * width],
        [tensor.stride(0), tensor.stride(1), 1],
        [1, rows, columns],
    )


def _parts(like: Tensor, parts: int) -> Tensor:
    """[parts·B, T, G, N] for a gradient that is summed by parts; one part has its own dtype."""
    dtype = like.dtype if parts == 1 else torch.float32
    return like.new_empty(parts * like.shape[0], *like.shape[1:], dtype=dtype)


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    if parts.shape == like.shape:
        return parts
    return parts.unflatten(0, (-1, like.shape[0])).sum(0).to(like.dtype)


# --- the operators


@torch.library.custom_op("tamba::ssd", mutates_args=())
def _ssd(
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
    timing = _Timing(dt, A, dt_bias, starts, padding, softplus, low, high)
    with _on(x):
        return forward(x, B, C, D, z, state, timing, keep)


@_ssd.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, starts, padding, softplus, low, high, keep):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
    return y, last, torch.empty_like(y) if keep else x.new_empty(0)


@torch.library.custom_op("tamba::ssd_backward", mutates_args=())
def _ssd_backward(
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
    timing = _Timing(dt, A, dt_bias, starts, padding, softplus, low, high)
    with _on(x):
        return backward(dy, d_last, x, B, C, D, z, state, before, timing)


@_ssd_backward.register_fake
def _(
    dy,
    d_last,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    state,
    starts,
    padding,
    before,
    softplus,
    low,
    high,
):
    inner = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (D, z, dt_bias, state))
    dD, dz, d_bias, d_state = inner
    return (*(torch.empty_like(t) for t in (x, dt, A, B, C)), dD, dz, d_bias, d_state)


def _save(ctx, inputs, output):
    *tensors, softplus, low, high, _keep = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = softplus, low, high
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, d_last, _d_before):
    *tensors, before = ctx.saved_tensors
    x, D, z, bias, state = (tensors[i] for i in (0, 5, 6, 7, 8))
    dy = torch.zeros_like(x) if dy is None else _readable(dy)
    if d_last is not None:
        d_last = d_last.contiguous()
    dx, ddt, dA, dB, dC, dD, dz, d_bias, d_state = torch.ops.tamba.ssd_backward(
        dy, d_last, *tensors, before, *ctx.options
    )
    optional = (
        None if given is None else grad
        for given, grad in ((D, dD), (z, dz), (bias, d_bias), (state, d_state))
    )
    return dx, ddt, dA, dB, dC, *optional, None, None, None, None, None, None


_ssd.register_autograd(_differentiate, setup_context=_save)


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
        and tensor.storage_offset() % unit == 0
    )
    if fits:
        return tensor
    return tensor.clone() if tensor.is_contiguous() else tensor.contiguous()


def _on(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
    x, B, C = _readable(x), _readable(B), _readable(C)
    z = None if z is None else _readable(z)
    low, high = (-math.inf, math.inf) if dt_limit is None else dt_limit
    keep = z is not None and torch.is_grad_enabled()
    y, last, _ = torch.ops.tamba.ssd(
        x,
        dt,
        A.contiguous(),
        B,
        C,
        D,
        z,
        dt_bias,
        None if state is None else state.contiguous(),
        starts,
        padding,
        dt_softplus,
        low,
        high,
        keep,
    )
    return y, last
