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
def _decays(rows, row_spans, columns, column_spans, live):
    """[rows, columns]: exp2(row - column) where both lie in one span and `live`, else 0."""
    same = row_spans[:, None] == column_spans[None, :]
    return tl.where(same & live, tl.exp2(rows[:, None] - columns[None, :]), 0.0)


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


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "share",
        "chunks",
        "segments",
        "span_chunks",
    ]
)
def _states_kernel(
    left_ptr,
    right_ptr,
    gate_ptr,
    step_ptr,
    sum_ptr,
    span_ptr,
    first_ptr,
    local_ptr,
    local_decay_ptr,
    stored_ptr,
    partner_ptr,
    through_ptr,
    last_ptr,
    length,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    left_b,
    left_t,
    left_g,
    right_b,
    right_t,
    right_h,
    gate_b,
    gate_t,
    gate_h,
    stored_b,
    stored_k,
    stored_h,
    stored_n,
    partner_b,
    partner_k,
    partner_h,
    partner_n,
    REVERSE: tl.constexpr,
    LOCAL: tl.constexpr,
    GATE: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
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
        row = (rest // (segments - 1)).to(tl.int64)
    else:
        segment = rest % segments
        row = (rest // segments).to(tl.int64)
    lane = row * heads + head

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

    left_ptr += row * left_b + (head // share) * left_g
    right_ptr += row * right_b + head * right_h
    gate_ptr += row * gate_b + head * gate_h
    lefts = q[:, None] * left_t + n[None, :]
    rights = q[:, None] * right_t + p[None, :]
    gates = q[:, None] * gate_t + p[None, :]
    steps = lane * (chunks * Q)
    begin = segment * span_chunks
    count = tl.minimum(chunks - begin, span_chunks)
    for i in range(0, count):
        chunk = begin + (count - 1 - i if REVERSE else i)
        t = chunk * Q + q
        real = (t < length)[:, None]
        origin = (chunk * Q).to(tl.int64)
        left = tl.load(left_ptr + origin * left_t + lefts, mask=real, other=0.0)
        right = tl.load(right_ptr + origin * right_t + rights, mask=real, other=0.0)
        right = right.to(tl.float32)
        sums = tl.load(sum_ptr + steps + t)
        spans = tl.load(span_ptr + steps + t)
        sum_end = tl.load(sum_ptr + steps + chunk * Q + Q - 1)
        span_end = tl.load(span_ptr + steps + chunk * Q + Q - 1)
        through = tl.where(span_end == 0, tl.exp2(sum_end), 0.0)
        if GATE:
            gate = tl.load(gate_ptr + origin * gate_t + gates, mask=real, other=0.0)
            right *= _silu(gate.to(tl.float32))
        if REVERSE:
            weight = tl.where(spans == 0, tl.exp2(sums), 0.0)
        else:
            dt = tl.load(step_ptr + steps + t)
            weight = tl.where(spans == span_end, tl.exp2(sum_end - sums), 0.0) * dt
        if not LOCAL:
            if REVERSE:
                theirs = tl.load(
                    partner_ptr
                    + row * partner_b
                    + chunk.to(tl.int64) * partner_k
                    + head * partner_h
                    + n[:, None] * partner_n
                    + p[None, :]
                ).to(tl.float32)
                passing = through * tl.sum(tl.sum(theirs * state, axis=1), axis=0)
                tl.store(
                    through_ptr + (lane * chunks + chunk) * blocks + block,
                    passing,
                )
            tl.store(
                stored_ptr
                + row * stored_b
                + chunk.to(tl.int64) * stored_k
                + head * stored_h
                + n[:, None] * stored_n
                + p[None, :],
                state.to(stored_ptr.dtype.element_ty),
            )
        state = state * through + _dot(tl.trans(left), right * weight[:, None], DOT, PRECISION)
        whole *= through
    if LOCAL:
        j = lane * segments + segment
        tl.store(local_ptr + j * (N * P) + inner, state)
        if block == 0:
            tl.store(local_decay_ptr + j, whole)
    elif REVERSE and segment == 0:
        tl.store(last_ptr + lane * (N * P) + p[None, :] * N + n[:, None], state)


# --- forward


@triton.jit(do_not_specialize=["length", "heads", "share", "chunks", "segments", "span_chunks"])
def _scan_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    step_ptr,
    sum_ptr,
    span_ptr,
    first_ptr,
    local_ptr,
    local_decay_ptr,
    y_ptr,
    before_ptr,
    last_ptr,
    length,
    heads,
    share,
    chunks,
    segments,
    span_chunks,
    x_b,
    x_t,
    x_h,
    B_b,
    B_t,
    B_g,
    C_b,
    C_t,
    C_g,
    z_b,
    z_t,
    z_h,
    y_b,
    y_t,
    y_h,
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
    row = (rest // segments).to(tl.int64)
    lane = row * heads + head

    n = tl.arange(0, N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.arange(0, Q)
    inner = n[:, None] * P + p[None, :]
    state = tl.zeros([N, BLOCK_P], tl.float32)
    if FIRST:
        state += tl.load(first_ptr + lane * (N * P) + p[None, :] * N + n[:, None])
    state = _enter(state, local_ptr, local_decay_ptr, lane, segment, segments, inner, N * P, False)

    x_ptr += row * x_b + head * x_h
    B_ptr += row * B_b + (head // share) * B_g
    C_ptr += row * C_b + (head // share) * C_g
    z_ptr += row * z_b + head * z_h
    xs = q[:, None] * x_t + p[None, :]
    Bs = q[:, None] * B_t + n[None, :]
    Cs = q[:, None] * C_t + n[None, :]
    zs = q[:, None] * z_t + p[None, :]
    ys = q[:, None] * y_t + p[None, :]
    if SKIP:
        D = tl.load(D_ptr + head).to(tl.float32)
    steps = lane * (chunks * Q)
    begin = segment * span_chunks
    for i in range(0, tl.minimum(chunks - begin, span_chunks)):
        chunk = begin + i
        t = chunk * Q + q
        real = (t < length)[:, None]
        origin = (chunk * Q).to(tl.int64)
        C = tl.load(C_ptr + origin * C_t + Cs, mask=real, other=0.0)
        B = tl.load(B_ptr + origin * B_t + Bs, mask=real, other=0.0)
        x = tl.load(x_ptr + origin * x_t + xs, mask=real, other=0.0)
        sums = tl.load(sum_ptr + steps + t)
        spans = tl.load(span_ptr + steps + t)
        dt = tl.load(step_ptr + steps + t)
        sum_end = tl.load(sum_ptr + steps + chunk * Q + Q - 1)
        span_end = tl.load(span_ptr + steps + chunk * Q + Q - 1)

        scores = _dot(C, tl.trans(B), DOT, PRECISION)
        scores *= _decays(sums, spans, sums, spans, q[:, None] >= q[None, :]) * dt[None, :]
        y = _dot(C, state, DOT, PRECISION)
        y *= tl.where(spans == 0, tl.exp2(sums), 0.0)[:, None]
        y = tl.dot(scores.to(DOT), x.to(DOT), y, input_precision=PRECISION)
        if SKIP:
            y += D * x.to(tl.float32)
        out = row * y_b + head * y_h + origin * y_t
        if KEEP:
            tl.store(before_ptr + out + ys, y.to(before_ptr.dtype.element_ty), mask=real)
        if GATE:
            z = tl.load(z_ptr + origin * z_t + zs, mask=real, other=0.0)
            y *= _silu(z.to(tl.float32))
        tl.store(y_ptr + out + ys, y.to(y_ptr.dtype.element_ty), mask=real)

        weight = tl.where(spans == span_end, tl.exp2(sum_end - sums), 0.0) * dt
        through = tl.where(span_end == 0, tl.exp2(sum_end), 0.0)
        added = (x.to(tl.float32) * weight[:, None]).to(DOT)
        state = tl.dot(tl.trans(B).to(DOT), added, state * through, input_precision=PRECISION)
    if segment == segments - 1:
        tl.store(last_ptr + lane * (N * P) + p[None, :] * N + n[:, None], state)


# --- backward


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "groups",
        "share",
        "heads_each",
        "blocks",
        "chunks",
        "lanes",
        "dC_part",
        "dC_b",
    ]
)
def _grad_C_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    z_ptr,
    dy_ptr,
    step_ptr,
    sum_ptr,
    span_ptr,
    stored_ptr,
    dC_ptr,
    scores_ptr,
    ends_ptr,
    begins_ptr,
    length,
    heads,
    groups,
    share,
    heads_each,
    blocks,
    chunks,
    lanes,
    x_b,
    x_t,
    x_h,
    B_b,
    B_t,
    B_g,
    C_b,
    C_t,
    C_g,
    z_b,
    z_t,
    z_h,
    dy_b,
    dy_t,
    dy_h,
    dC_part,
    dC_b,
    dC_t,
    dC_g,
    stored_b,
    stored_k,
    stored_h,
    stored_n,
    GATE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row block of one chunk, a block of the heads of one group: gradient of C.

    Also written: the gradient of C Bᵀ summed over the heads, for the gradient of B; and for every
    head what flows along paths by the token they end at (with those from the state before the
    chunk) and, inside the chunk, by the token they begin at.
    """
    pid = tl.program_id(0)
    part_rows: tl.constexpr = Q // ROWS
    u_block = pid % part_rows
    rest = pid // part_rows
    part = rest % blocks
    group = (rest // blocks) % groups
    chunk = (rest // blocks // groups) % chunks
    row = (rest // blocks // groups // chunks).to(tl.int64)

    n = tl.arange(0, N)
    p = tl.arange(0, P)
    s = tl.arange(0, Q)
    u = u_block * ROWS + tl.arange(0, ROWS)
    t_s = chunk * Q + s
    t_u = chunk * Q + u
    real_s = (t_s < length)[:, None]
    real_u = (t_u < length)[:, None]
    at_s = t_s.to(tl.int64)[:, None]
    at_u = t_u.to(tl.int64)[:, None]
    Bs = B_ptr + row * B_b + group * B_g + at_s * B_t + n[None, :]
    Cs = C_ptr + row * C_b + group * C_g + at_u * C_t + n[None, :]
    B = tl.load(Bs, mask=real_s, other=0.0)
    C = tl.load(Cs, mask=real_u, other=0.0)
    scores = _dot(C, tl.trans(B), DOT, PRECISION).to(DOT)  # [u, s]
    d_scores = tl.zeros([ROWS, Q], tl.float32)
    d_C = tl.zeros([ROWS, N], tl.float32)
    for i in range(0, tl.minimum(share - part * heads_each, heads_each)):
        head = group * share + part * heads_each + i
        lane = row * heads + head
        steps = lane * (chunks * Q)
        x = tl.load(
            x_ptr + row * x_b + head * x_h + at_s * x_t + p[None, :], mask=real_s, other=0.0
        )
        dy = tl.load(
            dy_ptr + row * dy_b + head * dy_h + at_u * dy_t + p[None, :], mask=real_u, other=0.0
        )
        if GATE:
            z = tl.load(
                z_ptr + row * z_b + head * z_h + at_u * z_t + p[None, :], mask=real_u, other=0.0
            )
            dy = (dy.to(tl.float32) * _silu(z.to(tl.float32))).to(DOT)
        state = tl.load(
            stored_ptr
            + row * stored_b
            + chunk.to(tl.int64) * stored_k
            + head * stored_h
            + n[:, None] * stored_n
            + p[None, :]
        )
        sums_u = tl.load(sum_ptr + steps + t_u)
        spans_u = tl.load(span_ptr + steps + t_u)
        sums_s = tl.load(sum_ptr + steps + t_s)
        spans_s = tl.load(span_ptr + steps + t_s)
        dt = tl.load(step_ptr + steps + t_s)

        mixed = _dot(dy, tl.trans(x), DOT, PRECISION)
        mixed *= _decays(sums_u, spans_u, sums_s, spans_s, u[:, None] >= s[None, :]) * dt[None, :]
        d_scores += mixed
        # A path from a token to itself meets no decay.
        paths = tl.where(u[:, None] > s[None, :], mixed * scores.to(tl.float32), 0.0)
        since = tl.where(spans_u == 0, tl.exp2(sums_u), 0.0)
        from_state = _dot(dy, tl.trans(state), DOT, PRECISION) * since[:, None]
        d_C += from_state
        ends = tl.sum(paths, axis=1) + tl.sum(from_state * C.to(tl.float32), axis=1)
        tl.store(ends_ptr + steps + t_u, ends)
        tl.store(
            begins_ptr + (u_block * lanes + lane) * (chunks * Q) + t_s,
            tl.sum(paths, axis=0),
        )
    d_scores = d_scores.to(DOT)
    tiles = tl.num_programs(0) // (part_rows * blocks)
    tile_at = (part * tiles + rest // blocks).to(tl.int64)
    tl.store(
        scores_ptr + tile_at * (Q * Q) + u[:, None] * Q + s[None, :],
        d_scores.to(scores_ptr.dtype.element_ty),
    )
    B = tl.load(Bs, mask=real_s, other=0.0)
    d_C = tl.dot(d_scores, B.to(DOT), d_C, input_precision=PRECISION)
    tl.store(
        dC_ptr + part.to(tl.int64) * dC_part + row * dC_b + at_u * dC_t + group * dC_g + n[None, :],
        d_C.to(dC_ptr.dtype.element_ty),
        mask=real_u,
    )


@triton.jit(
    do_not_specialize=[
        "length",
        "heads",
        "groups",
        "share",
        "heads_each",
        "blocks",
        "chunks",
        "dB_part",
        "dB_b",
    ]
)
def _grad_x_kernel(
    x_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    before_ptr,
    dy_ptr,
    step_ptr,
    sum_ptr,
    span_ptr,
    leaving_ptr,
    scores_ptr,
    dx_ptr,
    dz_ptr,
    dB_ptr,
    direct_ptr,
    leaves_ptr,
    skip_ptr,
    length,
    heads,
    groups,
    share,
    heads_each,
    blocks,
    chunks,
    x_b,
    x_t,
    x_h,
    B_b,
    B_t,
    B_g,
    C_b,
    C_t,
    C_g,
    z_b,
    z_t,
    z_h,
    before_b,
    before_t,
    before_h,
    dy_b,
    dy_t,
    dy_h,
    dx_b,
    dx_t,
    dx_h,
    dz_b,
    dz_t,
    dz_h,
    dB_part,
    dB_b,
    dB_t,
    dB_g,
    leaving_b,
    leaving_k,
    leaving_h,
    leaving_n,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk, a block of the heads of one group: gradients of x, z and B.

    Also written: for every head and token the gradient of dt as the factor of x, and what flows
    along the paths that begin there and leave the chunk; and its share of the gradient of D. The
    gradient of the state after the chunk may lie where dx will: it is read before dx is written.
    """
    pid = tl.program_id(0)
    part = pid % blocks
    group = (pid // blocks) % groups
    chunk = (pid // blocks // groups) % chunks
    row = (pid // blocks // groups // chunks).to(tl.int64)

    n = tl.arange(0, N)
    p = tl.arange(0, P)
    q = tl.arange(0, Q)
    t = chunk * Q + q
    real = (t < length)[:, None]
    at = t.to(tl.int64)[:, None]
    Bs = B_ptr + row * B_b + group * B_g + at * B_t + n[None, :]
    Cs = C_ptr + row * C_b + group * C_g + at * C_t + n[None, :]
    B = tl.load(Bs, mask=real, other=0.0)
    C = tl.load(Cs, mask=real, other=0.0)
    scores = _dot(B, tl.trans(C), DOT, PRECISION).to(DOT)  # [s, u]
    d_B = tl.zeros([Q, N], tl.float32)
    for i in range(0, tl.minimum(share - part * heads_each, heads_each)):
        head = group * share + part * heads_each + i
        lane = row * heads + head
        steps = lane * (chunks * Q)
        x = tl.load(x_ptr + row * x_b + head * x_h + at * x_t + p[None, :], mask=real, other=0.0)
        dy = tl.load(
            dy_ptr + row * dy_b + head * dy_h + at * dy_t + p[None, :], mask=real, other=0.0
        )
        if GATE:
            z = tl.load(
                z_ptr + row * z_b + head * z_h + at * z_t + p[None, :], mask=real, other=0.0
            ).to(tl.float32)
            y = tl.load(
                before_ptr + row * before_b + head * before_h + at * before_t + p[None, :],
                mask=real,
                other=0.0,
            ).to(tl.float32)
            wide = dy.to(tl.float32)
            open_by = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
            dz = wide * y * open_by * (1.0 + z * (1.0 - open_by))
            tl.store(
                dz_ptr + row * dz_b + head * dz_h + at * dz_t + p[None, :],
                dz.to(dz_ptr.dtype.element_ty),
                mask=real,
            )
            dy = (wide * z * open_by).to(DOT)
        leaving = tl.load(
            leaving_ptr
            + row * leaving_b
            + chunk.to(tl.int64) * leaving_k
            + head * leaving_h
            + n[:, None] * leaving_n
            + p[None, :]
        )
        sums = tl.load(sum_ptr + steps + t)
        spans = tl.load(span_ptr + steps + t)
        dt = tl.load(step_ptr + steps + t)
        sum_end = tl.load(sum_ptr + steps + chunk * Q + Q - 1)
        span_end = tl.load(span_ptr + steps + chunk * Q + Q - 1)
        to_end = tl.where(spans == span_end, tl.exp2(sum_end - sums), 0.0)

        # Transposed: a token's row is where paths begin, its columns where they end.
        live = q[:, None] <= q[None, :]
        same = spans[:, None] == spans[None, :]
        decays = tl.where(same & live, tl.exp2(sums[None, :] - sums[:, None]), 0.0)
        weighted = (scores.to(tl.float32) * decays).to(DOT)
        wide_x = x.to(tl.float32)
        outside = _dot(B, leaving, DOT, PRECISION) * to_end[:, None]
        added = wide_x * (dt * to_end)[:, None]
        d_B = tl.dot(added.to(DOT), tl.trans(leaving).to(DOT), d_B, input_precision=PRECISION)
        tl.store(leaves_ptr + steps + t, dt * tl.sum(wide_x * outside, axis=1))
        d_input = tl.dot(weighted, dy.to(DOT), outside, input_precision=PRECISION)
        tl.store(direct_ptr + steps + t, tl.sum(wide_x * d_input, axis=1))
        dx = d_input * dt[:, None]
        if SKIP:
            wide = dy.to(tl.float32)
            dx += tl.load(D_ptr + head).to(tl.float32) * wide
            tl.store(
                skip_ptr + lane * chunks + chunk, tl.sum(tl.sum(wide_x * wide, axis=1), axis=0)
            )
        tl.debug_barrier()
        tl.store(
            dx_ptr + row * dx_b + head * dx_h + at * dx_t + p[None, :],
            dx.to(dx_ptr.dtype.element_ty),
            mask=real,
        )
    tile_at = (part * (tl.num_programs(0) // blocks) + pid // blocks).to(tl.int64)
    d_scores = tl.load(scores_ptr + tile_at * (Q * Q) + q[:, None] * Q + q[None, :])  # [u, s]
    C = tl.load(Cs, mask=real, other=0.0)
    d_B = tl.dot(tl.trans(d_scores).to(DOT), C.to(DOT), d_B, input_precision=PRECISION)
    tl.store(
        dB_ptr + part.to(tl.int64) * dB_part + row * dB_b + at * dB_t + group * dB_g + n[None, :],
        d_B.to(dB_ptr.dtype.element_ty),
        mask=real,
    )


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
    """Step sizes, sums and spans [B, H, K·Q] of `chunks` chunks of `chunk` tokens."""

    step: Tensor
    sums: Tensor
    spans: Tensor
    chunk: int
    chunks: int

    @classmethod
    def of(cls, timing: _Timing, chunk: int) -> _Steps:
        batch, length, heads = timing.dt.shape
        chunks = triton.cdiv(length, chunk)
        step, sums = timing.dt.new_empty(2, batch, heads, chunks * chunk, dtype=torch.float32)
        spans = timing.dt.new_empty(batch, heads, chunks * chunk, dtype=torch.int32)
        options = timing.options()
        _steps_kernel[(batch * chunks, triton.cdiv(heads, 16))](
            *timing.arguments(),
            step,
            sums,
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
        return cls(step, sums, spans, chunk, chunks)

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.step, self.sums, self.spans


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
        into: stored and partner [B, K, H, N, P], through [B, H, K, blocks] and last. None for the
            launch that computes `local`.

    Returns:
        `local`, where that is what it computes.
    """
    batch, length, heads, head_dim = right.shape
    groups, d_state = left.shape[2:]
    block = min(sizes["head_dim"], head_dim)
    segments = triton.cdiv(steps.chunks, each)
    made = None
    if into is None:
        adds = right.new_empty(batch, heads, segments, d_state, head_dim, dtype=torch.float32)
        local = made = adds, adds.new_empty(batch, heads, segments)
        into = (adds, adds, adds, adds)
    stored, partner, through, last = into
    adds, decays = local if local is not None else (steps.step, steps.step)
    walked = segments if made is None else segments - 1
    four = (0, 0, 0, 0)
    _states_kernel[(batch * walked * heads * (head_dim // block),)](
        left,
        right,
        right if gate is None else gate,
        *steps.pointers(),
        steps.step if first is None else first,
        adds,
        decays,
        stored,
        partner,
        through,
        last,
        length,
        heads,
        heads // groups,
        steps.chunks,
        segments,
        each,
        *left.stride()[:3],
        *right.stride()[:3],
        *((0, 0, 0) if gate is None else gate.stride()[:3]),
        *(four if made is not None else stored.stride()[:4]),
        *(four if made is not None else partner.stride()[:4]),
        REVERSE=reverse,
        LOCAL=made is not None,
        GATE=gate is not None,
        FIRST=first is not None,
        N=d_state,
        P=head_dim,
        BLOCK_P=block,
        Q=steps.chunk,
        **numbers.options,
        num_warps=sizes["warps"],
        num_stages=sizes["stages"],
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
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    numbers = _numbers(x, B, C)
    sizes = _sizes("ssd_scan", numbers, d_state, head_dim, x.device)
    block = min(sizes["head_dim"], head_dim)
    steps = _Steps.of(timing, sizes["chunk"])
    each = _walks(batch * heads, steps.chunks, sizes, head_dim, x.device)
    segments = triton.cdiv(steps.chunks, each)
    local = None
    if segments > 1:
        walk = _sizes("ssd_segments", numbers, d_state, head_dim, x.device)
        local = _states(B, x, None, None, steps, each, numbers, walk, reverse=False)
    adds, decays = local if local is not None else (steps.step, steps.step)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    before = torch.empty_like(y) if keep else y.new_empty(0)
    last = y.new_empty(batch, heads, head_dim, d_state, dtype=torch.float32)
    _scan_kernel[(batch * segments * heads * (head_dim // block),)](
        x,
        B,
        C,
        x if D is None else D,
        x if z is None else z,
        *steps.pointers(),
        last if state is None else state,
        adds,
        decays,
        y,
        before if keep else y,
        last,
        length,
        heads,
        heads // groups,
        steps.chunks,
        segments,
        each,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *((0, 0, 0) if z is None else z.stride()[:3]),
        *y.stride()[:3],
        SKIP=D is not None,
        GATE=z is not None,
        KEEP=keep,
        FIRST=state is not None,
        N=d_state,
        P=head_dim,
        BLOCK_P=block,
        Q=sizes["chunk"],
        **numbers.options,
        num_warps=sizes["warps"],
        num_stages=sizes["stages"],
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
    entering = x.new_empty(batch, chunks, heads, d_state, head_dim, dtype=numbers.stored)
    dx = torch.empty(batch, chunks * chunk, heads, head_dim, dtype=x.dtype, device=x.device)
    if dx.dtype == entering.dtype and d_state <= chunk:
        # A gradient of a state is no larger than that of x in its chunk, which comes later.
        leaving = dx.unflatten(1, (chunks, chunk))[:, :, :d_state].transpose(2, 3)
    else:
        leaving = torch.empty_like(entering)
    through = dx.new_empty(batch, heads, chunks, p_blocks, dtype=torch.float32)
    d_state_first = dx.new_empty(batch, heads, head_dim, d_state, dtype=torch.float32)
    for reverse, left, right, gate, first, into in (
        (False, B, x, None, state, (entering, entering, through, d_state_first)),
        (True, C, dy, z, d_last, (leaving, entering, through, d_state_first)),
    ):
        local = None
        if each < chunks:
            local = _states(left, right, gate, None, steps, each, numbers, walk, reverse=reverse)
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
    parts = max(1, min(wanted, share))
    heads_each = triton.cdiv(share, parts)
    parts = triton.cdiv(share, heads_each)
    scores = x.new_empty(parts * tiles, chunk, chunk, dtype=numbers.stored)
    lanes = batch * heads
    per_token = dx.new_empty(3 + chunk // rows, *steps.step.shape, dtype=torch.float32)
    ends, direct, leaves, begins = per_token[0], per_token[1], per_token[2], per_token[3:]
    common = (length, heads, groups, share, heads_each, parts, chunks)
    strides = (
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *((0, 0, 0) if z is None else z.stride()[:3]),
    )
    shape = {"N": d_state, "P": head_dim, "Q": chunk, **numbers.options}
    dC = _parts(C, parts)
    _grad_C_kernel[(tiles * parts * (chunk // rows),)](
        x,
        B,
        C,
        x if z is None else z,
        dy,
        *steps.pointers(),
        entering,
        dC,
        scores,
        ends,
        begins,
        *common,
        lanes,
        *strides,
        *dy.stride()[:3],
        *dC.stride()[:4],
        *entering.stride()[:4],
        GATE=z is not None,
        ROWS=rows,
        **shape,
        num_warps=sizes["warps"],
        num_stages=sizes["stages"],
    )
    dC = _whole(dC, C)
    sizes = sizes_of("ssd_grad_x")
    dB = _parts(B, parts)
    dz = x.new_empty(0) if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    # Shares of the gradients of A and the bias, and of D, for sums over all chunks.
    shares = dx.new_empty(2, batch, chunks, heads, dtype=torch.float32)
    skips = shares.new_empty(batch, heads, chunks)
    _grad_x_kernel[(tiles * parts,)](
        x,
        B,
        C,
        x if D is None else D,
        x if z is None else z,
        x if z is None else before,
        dy,
        *steps.pointers(),
        leaving,
        scores,
        dx,
        dz,
        dB,
        direct,
        leaves,
        skips,
        *common,
        *strides,
        *((0, 0, 0) if z is None else before.stride()[:3]),
        *dy.stride()[:3],
        *dx.stride()[:3],
        *((0, 0, 0) if z is None else dz.stride()[:3]),
        *dB.stride()[:4],
        *leaving.stride()[:4],
        SKIP=D is not None,
        GATE=z is not None,
        **shape,
        num_warps=sizes["warps"],
        num_stages=sizes["stages"],
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
        d_state_first if state is not None else x.new_empty(0),
    )


def _sizes(
    operation: str, numbers: _Numbers, d_state: int, head_dim: int, device: torch.device
) -> Tile:
    kind = "wide" if numbers.wide else "half"
    return tile(operation, f"{kind} N{d_state} P{head_dim}", kind, device=device)


def _parts(like: Tensor, parts: int) -> Tensor:
    """[parts, B, T, G, N] for a gradient that is summed by parts; one part has its own dtype."""
    dtype = like.dtype if parts == 1 else torch.float32
    return torch.empty(parts, *like.shape, dtype=dtype, device=like.device)


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(like.dtype)


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
    if dy is None:
        dy = x.new_zeros(x.shape[3]).expand(x.shape)
    elif dy.stride(-1) != 1:
        dy = dy.contiguous()
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
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    if z is not None and z.stride(-1) != 1:
        z = z.contiguous()
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
