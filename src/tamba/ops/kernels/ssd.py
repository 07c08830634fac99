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
  programs in a fixed order. Nothing is added atomically: the same call gives the same bits. The
  states of all heads at once could need several times the room of the arguments, so heads go
  through both launches in slices.

Decays. Inside a chunk they are `exp2` of differences of running sums, never above 1. A document
start, or a step so large that nothing of the state before it is left in float32, is no term of the
sum but opens a new *span*; between spans the decay is 0. So nothing overflows, and small decays
behind a huge one keep their digits. Steps just short of that still take sums to thousands, where
float32 has four decimals. So unless operands are bfloat16 a sum is two floats: itself rounded, and
in a second array what rounding took off; a difference of two sums then has the digits of a number
of its own size. Exponentials of one sum do without the second: rounded to nearest, a sum small
enough to leave anything of its exponential is off by 2^-24 of itself.

Shape letters as in `tamba.ops.ssd`; `K` chunks, `S` segments, `R` heads of a group. Step sizes,
sums and spans are [B, H, K·Q] float32, float32 and int32.
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

from tamba.ops.backend import gluon_runs
from tamba.ops.kernels import ssd_hopper
from tamba.ops.kernels.tiles import Tile, architecture, multiprocessors, tile

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
def _decays(ends, begins, low_ptr, end_at, begin_at, end_spans, begin_spans, live):
    """`_decay` where `live` and in one span, else 0."""
    live = live & (end_spans == begin_spans)
    return tl.where(live, _decay(ends, begins, low_ptr, end_at, begin_at), 0.0)


@triton.jit
def _tile(tiles, row, start, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tiles.load([row, start, column]).reshape(ROWS, COLUMNS)


@triton.jit
def _put(tiles, row, start, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles.store([row, start, column], values.to(tiles.dtype).reshape(1, ROWS, COLUMNS))


# --- step sizes


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


_STEP_ARGUMENTS = [
    *("dt_ptr", "A_ptr", "bias_ptr", "starts_ptr", "padding_ptr", "out_ptr"),
    *("length", "heads", "chunks"),
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
    weight_ptr,
    to_end_ptr,
    since_ptr,
    through_ptr,
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
    GRADIENT: tl.constexpr,
    ORIGINS: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One chunk of a block of heads: step sizes, running sums of log2 decays, spans, and weights.

    With `low_ptr` sums are in two parts. `GRADIENT`: for a backward pass, which reads `to_end` and
    `since` and no `columns`. `ORIGINS`: what lies at `span_ptr` is not the number of a token's span
    but where in the chunk it begins, -1 for before the chunk.
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
    if column_ptr is not None:
        tl.store(column_ptr + out, sums - tl.log2(dt), mask=stored)
    if ORIGINS:
        origins = tl.where(opens, tl.arange(0, Q)[:, None], -1).to(tl.float32)
        tl.store(span_ptr + out, tl.associative_scan(origins, 0, _later), mask=stored)
    else:
        tl.store(span_ptr + out, spans, mask=stored)
    last = (tl.arange(0, Q) == Q - 1)[:, None]
    sum_end = tl.sum(tl.where(last, sums, 0.0), axis=0)
    span_end = tl.sum(tl.where(last, spans, 0), axis=0)
    to_end = tl.exp2((sum_end[None, :] - sums).to(tl.float32))
    to_end = tl.where(spans == span_end[None, :], to_end, 0.0)
    tl.store(weight_ptr + out, dt * to_end, mask=stored)
    if GRADIENT:
        tl.store(to_end_ptr + out, to_end, mask=stored)
        since = tl.where(spans == 0, tl.exp2(sums.to(tl.float32)), 0.0)
        tl.store(since_ptr + out, since, mask=stored)
    through = tl.where(span_end == 0, tl.exp2(sum_end.to(tl.float32)), 0.0)
    tl.store(through_ptr + (row * heads + h) * chunks + chunk, through, mask=h < heads)


# --- states


@triton.jit
def _enter(
    state,
    local_ptr,
    decay_ptr,
    lane,
    segment,
    segments,
    pieces,
    inner,
    reverse,
    SIZE: tl.constexpr,
):
    """`state` carried through the segments that come before `segment` (`reverse`: after it)."""
    kept = (segments - 1) * pieces
    j = lane * kept
    count = segment * pieces
    step = 1
    if reverse:
        j += kept - 1
        count = kept - count
        step = -1
    for i in range(0, count):
        added = tl.load(local_ptr + (j + step * i) * SIZE + inner).to(tl.float32)
        state = state * tl.load(decay_ptr + j + step * i) + added
    return state


@triton.jit
def _add(state, through, right, weight, left, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``through · state + (weight · right)ᵀ left`` [P, N], for right [Q, P] and left [Q, N].

    The state is an accumulator, and the other product operand need not leave registers.
    """
    weighted = tl.trans(right).to(tl.float32) * weight[None, :]
    return tl.dot(weighted.to(DOT), left.to(DOT), state * through, input_precision=PRECISION)


@triton.jit
def _walk(
    pid,
    reverse,
    left_tiles,
    right_tiles,
    weight_ptr,
    through_ptr,
    given,
    first_ptr,
    local_ptr,
    local_decay_ptr,
    stored_tiles,
    heads,
    share,
    first_group,
    groups_here,
    first_head,
    heads_here,
    chunks,
    segments,
    span_chunks,
    pieces,
    kept,
    LOCAL: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state [P, N] of one head through one segment or a piece of one, by `_add`.

    Forwards left is B, right x and the weight dt and the decay to the end of the chunk. Backwards
    (`reverse`) left is C, right the output's gradient and the weight the decay since the start.
    With `LOCAL` a program takes one of the `pieces` of a segment and writes only what that adds and
    its whole decay; without, a whole segment, from the state at `first_ptr` (`given`: there is one)
    and what other segments add, and it writes every state that enters a chunk (backwards: every
    gradient of one that leaves it). What segments add is there for all heads, or for those of this
    launch, if only that many are `kept`. Returns where the head's states lie, the number of its
    part of the sequence, and the state at the other end of that.
    """
    blocks: tl.constexpr = P // BLOCK_P
    block = pid % blocks
    here = (pid // blocks) % (groups_here * heads_here)
    rest = pid // blocks // (groups_here * heads_here)
    # Of the segment that nobody comes after nobody needs to know what it adds.
    programs = (segments - 1) * pieces if LOCAL else segments
    mine = rest % programs
    row = rest // programs
    group = first_group + here // heads_here
    head = group * share + first_head + here % heads_here
    lane = (row * heads + head).to(tl.int64)
    place = (row * kept + (head if kept == heads else here)).to(tl.int64)

    n = tl.arange(0, N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.arange(0, Q)
    inner = p[:, None] * N + n[None, :]
    state = tl.zeros([BLOCK_P, N], tl.float32)
    whole = tl.full([], 1.0, tl.float32)
    if not LOCAL:
        if given:
            state += tl.load(first_ptr + lane * (N * P) + inner)
        state = _enter(
            *(state, local_ptr, local_decay_ptr, place, mine, segments, pieces, inner, reverse),
            N * P,
        )

    column = head * P + block * BLOCK_P
    most = span_chunks // pieces if LOCAL else span_chunks
    begin = mine * most
    if LOCAL:
        begin += span_chunks if reverse else 0
    count = tl.minimum(chunks - begin, most)
    step = 1
    if reverse:
        begin += count - 1
        step = -1
    following = tl.load(through_ptr + lane * chunks + begin)
    for i in range(0, count):
        chunk = begin + step * i
        through = following  # loaded one chunk ahead: nothing hides how long that takes
        ahead = tl.minimum(tl.maximum(chunk + step, 0), chunks - 1)
        following = tl.load(through_ptr + lane * chunks + ahead)
        start = chunk * Q
        left = _tile(left_tiles, row, start, group * N, Q, N)
        right = _tile(right_tiles, row, start, column, Q, BLOCK_P)
        weight = tl.load(weight_ptr + lane * (chunks * Q) + start + q)
        if not LOCAL:
            at = here * P + block * BLOCK_P
            _put(stored_tiles, row * chunks + chunk, at, 0, state, BLOCK_P, N)
        state = _add(state, through, right, weight, left, DOT, PRECISION)
        whole *= through
    if LOCAL:
        j = place * programs + mine
        tl.store(local_ptr + j * (N * P) + inner, state.to(local_ptr.dtype.element_ty))
        if block == 0:
            tl.store(local_decay_ptr + j, whole)
    return lane * (N * P) + inner, mine, state


_COUNTS = [
    *("heads", "share", "first_group", "groups_here", "first_head", "heads_here"),
    *("chunks", "segments", "span_chunks", "pieces", "kept"),
]


@triton.jit(do_not_specialize=_COUNTS)
def _segments_kernel(
    B_tiles,
    x_tiles,
    weight_ptr,
    through_ptr,
    local_ptr,
    local_decay_ptr,
    heads,
    share,
    first_group,
    groups_here,
    first_head,
    heads_here,
    chunks,
    segments,
    span_chunks,
    pieces,
    kept,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What every piece of every segment but the last adds to the state."""
    _walk(
        *(tl.program_id(0), False, B_tiles, x_tiles, weight_ptr, through_ptr),
        *(False, local_ptr, local_ptr, local_decay_ptr, x_tiles),
        *(heads, share, first_group, groups_here, first_head, heads_here),
        *(chunks, segments, span_chunks, pieces, kept),
        *(True, N, P, BLOCK_P, Q, DOT, PRECISION),
    )


@triton.jit(do_not_specialize=["first_ptr", "d_last_ptr", *_COUNTS])
def _states_kernel(
    B_tiles,
    C_tiles,
    x_tiles,
    dy_tiles,
    weight_ptr,
    since_ptr,
    through_ptr,
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
    first_group,
    groups_here,
    first_head,
    heads_here,
    chunks,
    segments,
    span_chunks,
    pieces,
    kept,
    LOCAL: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both walks of the backward pass: half of the programs from the front, half from the back.

    Which way is no constant: two walks in one kernel would take the shared memory of both.
    """
    pid = tl.program_id(0)
    half = tl.num_programs(0) // 2
    reverse = pid >= half
    if reverse:
        pid -= half
        left_tiles, right_tiles, stored_tiles = C_tiles, dy_tiles, leaving_tiles
        sought_ptr, known_ptr = since_ptr, d_last_ptr
        added_ptr, decay_ptr = d_local_ptr, d_local_decay_ptr
    else:
        left_tiles, right_tiles, stored_tiles = B_tiles, x_tiles, entering_tiles
        sought_ptr, known_ptr = weight_ptr, first_ptr
        added_ptr, decay_ptr = local_ptr, local_decay_ptr
    if FIRST and LAST:
        given = True
    elif FIRST:
        given = pid == tl.program_id(0)
    elif LAST:
        given = reverse
    else:
        given = False
    places, mine, state = _walk(
        *(pid, reverse, left_tiles, right_tiles, sought_ptr, through_ptr),
        *(given, known_ptr, added_ptr, decay_ptr, stored_tiles),
        *(heads, share, first_group, groups_here, first_head, heads_here),
        *(chunks, segments, span_chunks, pieces, kept),
        *(LOCAL, N, P, BLOCK_P, Q, DOT, PRECISION),
    )
    if FIRST and not LOCAL:  # noqa: SIM102 - of constants and values together no branch can be left out
        if reverse & (mine == 0):
            tl.store(d_first_ptr + places, state)


# --- forward


@triton.jit(
    do_not_specialize=[
        *("D_ptr", "first_ptr"),
        *("heads", "share", "chunks", "segments", "span_chunks", "pieces"),
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
    pieces,
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
    inner = p[None, :] * N + n[:, None]
    state = tl.zeros([N, BLOCK_P], tl.float32)
    if FIRST:
        state += tl.load(first_ptr + lane * (N * P) + inner)
    state = _enter(
        *(state, local_ptr, local_decay_ptr, lane, segment, segments, pieces, inner, False),
        N * P,
    )

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
        causal = q[:, None] >= q[None, :]
        begins = columns if FOLDED else sums
        if span_end == 0:  # one span only, as in most chunks
            decays = tl.where(
                causal,
                _decay(sums[:, None], begins[None, :], low_ptr, at[:, None], at[None, :]),
                0.0,
            )
        else:
            decays = _decays(
                *(sums[:, None], begins[None, :], low_ptr, at[:, None], at[None, :]),
                *(tl.load(span_ptr + at[:, None]), tl.load(span_ptr + at[None, :]), causal),
            )
        scores *= decays
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
        tl.store(last_ptr + lane * (N * P) + inner, state)


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
    do_not_specialize=[
        *("D_ptr", "heads", "share", "first_group", "groups_here", "first_head", "heads_here"),
        *("held", "heads_each", "parts", "chunks", "batch", "fresh"),
    ]
)
def _grads_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    D_ptr,
    dy_tiles,
    step_ptr,
    sum_ptr,
    low_ptr,
    span_ptr,
    weight_ptr,
    to_end_ptr,
    since_ptr,
    entering_ptr,
    entering_tiles,
    leaving_tiles,
    dx_tiles,
    dB_tiles,
    dC_tiles,
    d_scores_tiles,
    inputs_ptr,
    outputs_ptr,
    begins_ptr,
    passing_ptr,
    heads,
    share,
    first_group,
    groups_here,
    first_head,
    heads_here,
    held,
    heads_each,
    parts,
    chunks,
    batch,
    fresh,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    Q: tl.constexpr,
    SKIP: tl.constexpr,
    SHARED: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk, some heads of one group: gradient of x, and what they add to those of B and C.

    Half of the programs look at tokens from where paths begin (rows `s` of their Q x Q matrices):
    they have the gradients of x and B. The others, from where paths end (rows `u`), have that of C.
    Neighbours have the same chunk and heads, so that what both read is read from memory once.

    What is added goes onto what earlier launches left, unless this is the first (`fresh`): two
    sums over states, and the gradient of C Bᵀ, for `_sums_kernel`. A group of one head (not
    `SHARED`) has no such sums and its gradients of B and C are finished here.

    Also written, for every head and token: the inner products of x with what comes back to it
    from the chunk and from behind it (`inputs`, pairs); what flows along paths that end there and
    of the output's gradient with x (`outputs`, pairs); what flows along paths inside the chunk by
    the token they begin at (`begins`). For every head the inner product of the state before and
    the gradient of that behind (`passing`).
    """
    pid = tl.program_id(0)
    ends = pid % 2
    pid = pid // 2
    part = pid % parts
    here = pid // parts % groups_here
    chunk = (pid // parts // groups_here) % chunks
    row = pid // parts // groups_here // chunks
    group = first_group + here
    groups = heads // share
    tile_at = (row * chunks + chunk) * groups + group
    at_row = part * batch + row
    at_tile = part * (batch * chunks * groups) + tile_at

    q = tl.arange(0, Q)
    pair = tl.arange(0, 2)
    p = tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    start = chunk * Q
    total = tl.zeros([Q, N], tl.float32)
    count = tl.minimum(heads_here - part * heads_each, heads_each)
    # Each half has its own tiles: of shared memory a variable of both would be held by both.
    if ends == 0:
        B = _tile(B_tiles, row, start, group * N, Q, N)
        C = _tile(C_tiles, row, start, group * N, Q, N)
        if SHARED:
            if fresh == 0:
                total += _tile(dB_tiles, at_row, start, group * N, Q, N)
            scores = _dot(B, tl.trans(C), DOT, PRECISION).to(DOT)  # [s, u]
        for i in tl.range(0, count, num_stages=STAGES):
            j = part * heads_each + i
            head = group * share + first_head + j
            lane = (row * heads + head).to(tl.int64)
            steps = lane * (chunks * Q) + start
            at_chunk = row * chunks + chunk
            weight = tl.load(weight_ptr + steps + q)
            passing = 0.0
            for block in tl.static_range(P // BLOCK_P):
                column = head * P + block * BLOCK_P
                place = (here * heads_here + j) * P + block * BLOCK_P
                x = _tile(x_tiles, row, start, column, Q, BLOCK_P)
                leaving = _tile(leaving_tiles, at_chunk, place, 0, BLOCK_P, N)
                # Past shared memory, which has no room for a tile of one inner product.
                lines = at_chunk.to(tl.int64) * (held * P) + place + p
                entering = tl.zeros([BLOCK_P, N], entering_ptr.dtype.element_ty)
                if count > 0:
                    entering = tl.load(entering_ptr + lines[:, None] * N + n[None, :])
                weighted = (x.to(tl.float32) * weight[:, None]).to(DOT)
                total = tl.dot(weighted, leaving.to(DOT), total, input_precision=PRECISION)
                passing += tl.sum(entering.to(tl.float32) * leaving.to(tl.float32))
            tl.store(passing_ptr + lane * chunks + chunk, passing)

            sums = tl.load(sum_ptr + steps + q)
            spans = tl.load(span_ptr + steps + q)
            dt = tl.load(step_ptr + steps + q)
            if not SHARED:
                scores = _dot(B, tl.trans(C), DOT, PRECISION).to(DOT)
            decays = _decays(
                *(sums[None, :], sums[:, None], low_ptr, steps + q[None, :], steps + q[:, None]),
                *(spans[None, :], spans[:, None], q[:, None] <= q[None, :]),
            )
            if not SHARED:
                mixed = tl.zeros([Q, Q], tl.float32)
                for block in tl.static_range(P // BLOCK_P):
                    column = head * P + block * BLOCK_P
                    x = _tile(x_tiles, row, start, column, Q, BLOCK_P)
                    dy = _tile(dy_tiles, row, start, column, Q, BLOCK_P)
                    mixed += _dot(x, tl.trans(dy), DOT, PRECISION)
                mixed *= decays * dt[:, None]
                total = tl.dot(mixed.to(DOT), C.to(DOT), total, input_precision=PRECISION)
            decayed = (scores.to(tl.float32) * decays).to(DOT)
            to_end = tl.load(to_end_ptr + steps + q)
            from_inside = tl.zeros([Q], tl.float32)
            from_behind = tl.zeros([Q], tl.float32)
            for block in tl.static_range(P // BLOCK_P):
                column = head * P + block * BLOCK_P
                place = (here * heads_here + j) * P + block * BLOCK_P
                dy = _tile(dy_tiles, row, start, column, Q, BLOCK_P)
                if P > BLOCK_P:
                    x = _tile(x_tiles, row, start, column, Q, BLOCK_P)
                    leaving = _tile(leaving_tiles, at_chunk, place, 0, BLOCK_P, N)
                outside = _dot(B, tl.trans(leaving), DOT, PRECISION) * to_end[:, None]
                inside = _dot(decayed, dy, DOT, PRECISION)
                values = x.to(tl.float32)
                from_inside += tl.sum(values * inside, axis=1)
                from_behind += tl.sum(values * outside, axis=1)
                dx = inside * dt[:, None] + outside * dt[:, None]
                if SKIP:
                    dx += tl.load(D_ptr + head).to(tl.float32) * dy.to(tl.float32)
                _put(dx_tiles, row, start, column, dx, Q, BLOCK_P)
            found = tl.join(from_inside, from_behind)
            tl.store(inputs_ptr + (steps + q[:, None]) * 2 + pair[None, :], found)
        _put(dB_tiles, at_row, start, group * N, total, Q, N)
    else:
        B = _tile(B_tiles, row, start, group * N, Q, N)
        C = _tile(C_tiles, row, start, group * N, Q, N)
        scores = _dot(C, tl.trans(B), DOT, PRECISION).to(DOT)  # [u, s]
        d_scores = tl.zeros([Q, Q], tl.float32)
        if SHARED:  # noqa: SIM102 - of constants and values together no branch can be left out
            if fresh == 0:
                total += _tile(dC_tiles, at_row, start, group * N, Q, N)
                d_scores += _tile(d_scores_tiles, at_tile, 0, 0, Q, Q)
        for i in tl.range(0, count, num_stages=STAGES):
            j = part * heads_each + i
            head = group * share + first_head + j
            lane = (row * heads + head).to(tl.int64)
            steps = lane * (chunks * Q) + start
            sums = tl.load(sum_ptr + steps + q)
            spans = tl.load(span_ptr + steps + q)
            since = tl.load(since_ptr + steps + q)
            mixed = tl.zeros([Q, Q], tl.float32)
            skip = tl.zeros([Q], tl.float32)
            for block in tl.static_range(P // BLOCK_P):
                column = head * P + block * BLOCK_P
                x = _tile(x_tiles, row, start, column, Q, BLOCK_P)
                dy = _tile(dy_tiles, row, start, column, Q, BLOCK_P)
                mixed += _dot(dy, tl.trans(x), DOT, PRECISION)
                skip += tl.sum(x.to(tl.float32) * dy.to(tl.float32), axis=1)
            mixed *= tl.load(step_ptr + steps + q)[None, :]
            mixed *= _decays(
                *(sums[:, None], sums[None, :], low_ptr, steps + q[:, None], steps + q[None, :]),
                *(spans[:, None], spans[None, :], q[:, None] >= q[None, :]),
            )
            if SHARED:
                d_scores += mixed
            else:
                total = tl.dot(mixed.to(DOT), B.to(DOT), total, input_precision=PRECISION)
            # A path from a token to itself meets no decay.
            paths = tl.where(q[:, None] > q[None, :], mixed * scores.to(tl.float32), 0.0)
            tl.store(begins_ptr + steps + q, tl.sum(paths, axis=0))
            flows = tl.sum(paths, axis=1)
            for block in tl.static_range(P // BLOCK_P):
                column = head * P + block * BLOCK_P
                place = (here * heads_here + j) * P + block * BLOCK_P
                if P > BLOCK_P:
                    dy = _tile(dy_tiles, row, start, column, Q, BLOCK_P)
                entering = _tile(entering_tiles, row * chunks + chunk, place, 0, BLOCK_P, N)
                before = _dot(C, tl.trans(entering), DOT, PRECISION)
                flows += since * tl.sum(before * dy.to(tl.float32), axis=1)
                weighted = (dy.to(tl.float32) * since[:, None]).to(DOT)
                total = tl.dot(weighted, entering.to(DOT), total, input_precision=PRECISION)
            found = tl.join(flows, skip)
            tl.store(outputs_ptr + (steps + q[:, None]) * 2 + pair[None, :], found)
        if SHARED:
            _put(d_scores_tiles, at_tile, 0, 0, d_scores, Q, Q)
        _put(dC_tiles, at_row, start, group * N, total, Q, N)


@triton.jit(do_not_specialize=["groups", "parts", "chunks", "batch"])
def _sums_kernel(
    B_tiles,
    C_tiles,
    dB_parts,
    dC_parts,
    d_scores_parts,
    dB_tiles,
    dC_tiles,
    groups,
    parts,
    chunks,
    batch,
    N: tl.constexpr,
    Q: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of B and C in one chunk of a group, from the parts that `_grads_kernel` left."""
    tile_at = tl.program_id(0)
    group = tile_at % groups
    start = (tile_at // groups) % chunks * Q
    row = tile_at // groups // chunks
    d_scores = tl.zeros([Q, Q], tl.float32)
    d_B = tl.zeros([Q, N], tl.float32)
    d_C = tl.zeros([Q, N], tl.float32)
    for part in range(0, parts):
        d_scores += _tile(d_scores_parts, part * (batch * chunks * groups) + tile_at, 0, 0, Q, Q)
        d_B += _tile(dB_parts, part * batch + row, start, group * N, Q, N)
        d_C += _tile(dC_parts, part * batch + row, start, group * N, Q, N)
    B = _tile(B_tiles, row, start, group * N, Q, N)
    C = _tile(C_tiles, row, start, group * N, Q, N)
    d_B = tl.dot(tl.trans(d_scores).to(DOT), C.to(DOT), d_B, input_precision=PRECISION)
    d_C = tl.dot(d_scores.to(DOT), B.to(DOT), d_C, input_precision=PRECISION)
    _put(dB_tiles, row, start, group * N, d_B, Q, N)
    _put(dC_tiles, row, start, group * N, d_C, Q, N)


@triton.jit(do_not_specialize=_STEP_ARGUMENTS)
def _grad_steps_kernel(
    dt_ptr,
    A_ptr,
    bias_ptr,
    starts_ptr,
    padding_ptr,
    step_ptr,
    through_ptr,
    inputs_ptr,
    outputs_ptr,
    begins_ptr,
    passing_ptr,
    out_ptr,
    sums_ptr,
    length,
    heads,
    chunks,
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
    BLOCK_H: tl.constexpr,
):
    """One chunk of a block of heads: the gradient of dt, and shares of those of A, the bias and D.

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
    step = tl.load(step_ptr + at, mask=known, other=0.0)
    behind = tl.load(inputs_ptr + at * 2 + 1, mask=known, other=0.0)
    direct = tl.load(inputs_ptr + at * 2, mask=known, other=0.0) + behind
    balance = tl.load(outputs_ptr + at * 2, mask=known, other=0.0)
    balance -= tl.load(begins_ptr + at, mask=known, other=0.0)
    leaves = step * behind
    crossing = tl.cumsum(balance, axis=0, reverse=True) + tl.cumsum(leaves, axis=0) - leaves
    passing = tl.load(passing_ptr + lane * chunks + chunk, mask=h < heads, other=0.0)
    passing *= tl.load(through_ptr + lane * chunks + chunk, mask=h < heads, other=0.0)
    crossing += passing[None, :]
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    closed = step * (A * LOG2E)[None, :] < VANISHED
    real = t < length
    if PADDING:
        real = real & (t >= tl.load(padding_ptr + row))
    if STARTS:
        start = tl.load(starts_ptr + row * starts_b + t.to(tl.int64) * starts_t, mask=real, other=0)
        closed = closed | (start != 0)[:, None]
    crossing = tl.where(closed, 0.0, crossing)
    grad = crossing * A[None, :] + direct
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
    shares += tl.num_programs(0).to(tl.int64) * heads
    skip = tl.load(outputs_ptr + at * 2 + 1, mask=known, other=0.0)
    tl.store(sums_ptr + shares, tl.sum(skip, axis=0), mask=h < heads)


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
_hopper_scan = _Launcher(ssd_hopper.scan_kernel)
_ungate = _Launcher(_ungate_kernel)
_grads = _Launcher(_grads_kernel)
_hopper_grads = _Launcher(ssd_hopper.grads_kernel)
_sums = _Launcher(_sums_kernel)
_grad_steps = _Launcher(_grad_steps_kernel)

_STEP_SIZES: Tile = {"warps": 4, "stages": 1}
_STEP_HEADS = 16
_SUMS_SIZES: Tile = {"warps": 4, "stages": 1}
# Numbers, of those of x, that what segments add may take in a backward pass.
_ADDED_SHARE = 0.15
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
            "DOT": tl.float32 if self.wide or interpreted else tl.bfloat16,
            "PRECISION": precision if self.wide and not interpreted else "ieee",
        }

    def hopper(self, chunk: int, block: int) -> bool:
        """Whether `ssd_hopper` takes this, for a chunk and channels of a program."""
        dtypes = {t.dtype for t in (self.x, self.B, self.C, self.z) if t is not None}
        return (
            gluon_runs()
            and (chunk, block) == (64, 64)
            and self.d_state in (64, 128)
            and dtypes == {torch.bfloat16}
            and architecture(self.device) == "sm90"
        )

    def sizes(self, operation: str, *cases: str) -> Tile:
        kind = "wide" if self.wide else "half"
        special = f"{kind} N{self.d_state} P{self.head_dim}"
        buckets = *(f"{kind} {case}" for case in cases), special, kind
        return tile(operation, *buckets, device=self.device)

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

    def steps(self, chunk: int, gradient: bool, hopper: bool) -> Steps:
        """Launch `_steps_kernel`, for a forward pass or for a backward one (`gradient`).

        For `hopper` kernels all numbers but sums over chunks lie in `Steps.numbers`.
        """
        chunks = -(-self.length // chunk)
        shape = self.batch, self.heads, chunks * chunk
        wanted = 3 + self.wide + (2 if gradient else not self.wide) + hopper
        numbers = self.new(wanted, *shape)
        step, sums, weight, *rest = numbers.unbind()
        spans = rest.pop() if hopper else self.new(*shape, dtype=torch.int32)
        low = rest.pop() if self.wide else None
        to_end, since = rest if gradient else (weight, weight)
        columns = None if gradient or self.wide else rest[0]
        through = self.new(self.batch, self.heads, chunks)
        pointers, strides, constants = self.step_arguments()
        constants |= {"GRADIENT": gradient, "ORIGINS": hopper, "Q": chunk}
        _steps(
            (self.batch * chunks, -(-self.heads // _STEP_HEADS), 1),
            (
                *(*pointers, step, sums, low, columns, weight, to_end, since, through, spans),
                *(self.length, self.heads, chunks, *strides, self.low, self.high),
            ),
            constants,
            _STEP_SIZES,
            self.key,
        )
        columns = step if columns is None else columns
        return Steps(
            *(
                numbers,
                step,
                sums,
                low,
                columns,
                spans,
                weight,
                to_end,
                since,
                through,
                chunk,
                chunks,
            )
        )

    def slices(self, chunk: int, percent: int) -> tuple[int, int]:
        """(groups, heads of each) whose states a backward pass holds at a time.

        Both states of every chunk take up to so many numbers as `percent` of those of x, or those
        of one head of each group where that is not enough.
        """
        room = self.batch * self.length * self.heads * self.head_dim * percent // 100
        chunks = -(-self.length // chunk)
        most = max(1, room // (2 * self.batch * chunks * self.head_dim * self.d_state))
        if self.share == 1:
            return min(most, self.groups), 1
        count = -(-self.share // max(1, min(most // self.groups, self.share)))
        return self.groups, -(-self.share // count)

    def cut(self, sizes: Tile, length: int, walks: int) -> int:
        """Chunks of each part of `length` chunks, so that the programs of `walks` rows of heads and
        as many parts fill the card, and no part is empty."""
        programs = walks * (self.head_dim // min(sizes["head_dim"], self.head_dim))
        parts = min(sizes["per_sm"] * multiprocessors(self.device) // max(1, programs), length)
        return -(-length // max(1, parts))

    def added(self, heads: int, pieces: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Room for what pieces of segments add to the states of heads, and for their decays."""
        shape = self.batch, heads, pieces
        return self.new(*shape, self.head_dim, self.d_state, dtype=dtype), self.new(*shape)


@dataclass(frozen=True)
class Steps:
    """Of `chunks` chunks of `chunk` tokens, [B, H, K·Q].

    Attributes:
        numbers: the first of those below beside one another. For kernels for Hopper cards: step,
            sums, weight, columns and origins, or for a backward pass step, sums, weight, to_end,
            since and origins (`_steps_kernel`).
        step: step sizes.
        sums: running sums of log2 decays.
        low: what rounding took off the sums; None for bfloat16, which has no use for it.
        columns: sums less log2 of the step sizes, so that one exponential has both factors. Good
            for bfloat16 (`FOLDED`); where sums are in the thousands it costs float32 digits, and
            there, as in a backward pass, the step sizes are in its place.
        spans: numbers of spans, from 0 in every chunk.
        weight: step size times the decay from a token to the end of its chunk.
        to_end: that decay alone, and
        since: the decay from the start of the chunk to a token, both for a backward pass only.
        through: that of the whole chunk [B, H, K].
    """

    numbers: Tensor
    step: Tensor
    sums: Tensor
    low: Tensor | None
    columns: Tensor
    spans: Tensor
    weight: Tensor
    to_end: Tensor
    since: Tensor
    through: Tensor
    chunk: int
    chunks: int


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, H, P], the state after the last token, and y before the gate where to `keep` it."""
    x, B, C, D, z, state = call.x, call.B, call.C, call.D, call.z, call.state
    n, heads = call.d_state, call.heads
    sizes = call.sizes("ssd_scan")
    block, chunk = min(sizes["head_dim"], call.head_dim), sizes["chunk"]
    hopper = call.hopper(chunk, block)
    steps = call.steps(chunk, False, hopper)
    x_tiles, B_tiles = _tiles(x, chunk, block), _tiles(B, chunk, n)
    walk = call.sizes("ssd_segments")
    width = min(walk["head_dim"], call.head_dim)
    lanes = call.batch * heads
    each = call.cut(sizes, steps.chunks, lanes)
    # Walks through segments that write nothing have room for more programs, so they are in pieces.
    piece = call.cut(walk, each, lanes * (-(-steps.chunks // each) - 1))
    pieces = -(-each // piece)
    each = pieces * piece
    segments = -(-steps.chunks // each)
    counts = steps.chunks, segments, each, pieces
    walked = (segments - 1) * pieces
    adds, decays = call.added(heads, walked, torch.float32)
    narrow = x_tiles if width == block else _tiles(x, chunk, width)
    _segments(
        (lanes * walked * (call.head_dim // width), 1, 1),
        (
            *(B_tiles, narrow, steps.weight, steps.through, adds, decays),
            *(heads, call.share, 0, call.groups, 0, call.share, *counts, heads),
        ),
        {**call.constants, "BLOCK_P": width, "Q": chunk},
        walk,
        call.key,
    )
    y = call.new(*x.shape, dtype=x.dtype)
    before = torch.empty_like(y) if keep else call.new(0, dtype=x.dtype)
    last = call.new(call.batch, heads, call.head_dim, n)
    run, make = (_hopper_scan, ssd_hopper.tiles) if hopper else (_scan, _tiles)
    x_tiles, y_tiles = make(x, chunk, block), make(y, chunk, block)
    constants: dict[str, object] = {
        "SKIP": D is not None,
        "GATE": z is not None,
        "KEEP": keep,
        "FIRST": state is not None,
        "BLOCK_P": block,
        "Q": chunk,
    }
    numbers: tuple[object, ...]
    if hopper:
        constants |= {"N": n, "P": call.head_dim, "STAGES": sizes["stages"]}
        numbers = ssd_hopper.lines(steps.numbers, chunk), steps.through
    else:
        constants |= {**call.constants, "FOLDED": not call.wide}
        numbers = steps.sums, steps.low, steps.columns, steps.spans
    run(
        (lanes * segments * (call.head_dim // block), 1, 1),
        (
            *(x_tiles, make(B, chunk, n), make(C, chunk, n), x if D is None else D),
            *(x_tiles if z is None else make(z, chunk, block), *numbers),
            *(last if state is None else state, adds, decays, y_tiles),
            *(make(before, chunk, block) if keep else y_tiles, last),
            *(heads, call.share, *counts),
        ),
        constants,
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
    shared = share > 1
    case = "shared" if shared else "alone"
    hopper = p in (64, 128) and call.hopper(64, 64) and dy.dtype == torch.bfloat16
    sizes = call.sizes("ssd_grads", f"hopper {case} N{n}" if hopper else case)
    chunk = sizes["chunk"]
    steps = call.steps(chunk, True, hopper)
    chunks = steps.chunks
    walk, local = call.sizes("ssd_states"), call.sizes("ssd_segments")
    tiles = batch * chunks * groups

    groups_each, heads_each = call.slices(chunk, sizes["states"])
    most = groups_each * heads_each
    entering, leaving = (
        call.new(batch * chunks, most * p, 1, n, dtype=call.stored) for _ in range(2)
    )
    each = call.cut(walk, chunks, 2 * batch * most)
    segments = -(-chunks // each)
    # What segments add is of all heads at once where that takes little room next to x: a slice has
    # too few heads to fill the card again.
    kept = heads if (segments - 1) * 2 * n <= _ADDED_SHARE * call.length else most
    (adds, decays), (d_adds, d_decays) = (
        call.added(kept, segments - 1, call.stored) for _ in range(2)
    )
    dx = call.new(*x.shape, dtype=x.dtype)
    d_first = call.new(0) if call.state is None else call.new(batch, heads, p, n)
    begins, passing = torch.empty_like(steps.step), torch.empty_like(steps.through)
    inputs, outputs = call.new(2, *steps.step.shape, 2).unbind()

    # Heads of a program: so many programs that they fill the card.
    looped = groups_each if hopper and not shared else heads_each
    programs = (1 if hopper else 2) * batch * chunks * most // looped
    wanted = sizes["per_sm"] * multiprocessors(call.device) // programs
    part_heads = -(-looped // max(1, min(wanted, looped)))
    parts = -(-looped // part_heads)
    dB, dC = call.new(*B.shape, dtype=B.dtype), call.new(*C.shape, dtype=C.dtype)
    block = min(sizes["head_dim"], p)
    x_chunks, dy_chunks = _tiles(x, chunk, block), _tiles(dy, chunk, block)
    B_chunks, C_chunks = _tiles(B, chunk, n), _tiles(C, chunk, n)
    dB_parts, dC_parts, d_scores_parts, d_scores = dB, dC, dB, x_chunks
    if shared:
        d_scores_parts = call.new(parts * tiles, chunk, 1, chunk)
        d_scores = _tiles(d_scores_parts, chunk, chunk)
        dB_parts, dC_parts = (call.new(parts * batch, *B.shape[1:]) for _ in range(2))
    # One kernel walks both ways, so that what it reads must be of one type.
    sides = (B, C) if B.dtype == C.dtype else (B.float(), C.float())
    walks = (
        *(steps.weight, steps.since, steps.through),
        steps.sums if call.state is None else call.state,
        steps.sums if d_last is None else d_last,
        *(adds, decays, d_adds, d_decays),
    )
    products = (
        *(x_chunks, B_chunks, C_chunks, x if D is None else D, dy_chunks),
        *(steps.step, steps.sums, steps.low, steps.spans),
        *(steps.weight, steps.to_end, steps.since, entering),
        *(_tiles(entering, block, n), _tiles(leaving, block, n), _tiles(dx, chunk, block)),
        *(_tiles(dB_parts, chunk, n), _tiles(dC_parts, chunk, n), d_scores),
        *(inputs, outputs, begins, passing),
    )

    if hopper:
        make = ssd_hopper.tiles
        hopper_products = (
            *(make(x, chunk, 64), make(dy, chunk, 64), make(B, chunk, n), make(C, chunk, n)),
            *(make(entering, 64, n), make(leaving, 64, n), ssd_hopper.lines(steps.numbers, chunk)),
            *(make(dx, chunk, 64), make(dB, chunk, n), make(dC, chunk, n), x if D is None else D),
            *(dB_parts, dC_parts, d_scores_parts),
            *(inputs, outputs, begins, passing),
        )
        hopper_constants: dict[str, object] = {
            "SKIP": D is not None,
            "SHARED": shared,
            **{"N": n, "P": p, "Q": chunk, "STAGES": sizes["stages"]},
            **{"REGISTERS": sizes["worker"], "FEEDER": sizes["feeder"]},
        }

    def run_walks(count: int, counts: tuple[int, ...], local: bool, sizes: Tile) -> None:
        """`count` segments of the heads that `counts` says, from the front and from the back."""
        width = min(sizes["head_dim"], p)
        _states(
            (2 * batch * count * counts[3] * counts[5] * (p // width), 1, 1),
            (
                *(_tiles(t, chunk, n) for t in sides),
                *(_tiles(t, chunk, width) for t in (x, dy)),
                *walks,
                *(_tiles(t, width, n) for t in (entering, leaving)),
                *(d_first, *counts, chunks, segments, each, 1, kept),
            ),
            {
                **call.constants,
                "LOCAL": local,
                "FIRST": call.state is not None,
                "LAST": d_last is not None,
                "BLOCK_P": width,
                "Q": chunk,
            },
            sizes,
            key,
        )

    if kept == heads:
        run_walks(segments - 1, (heads, share, 0, groups, 0, share), True, local)
    for first_group in range(0, groups, groups_each):
        for first_head in range(0, share, heads_each):
            here = min(groups_each, groups - first_group), min(heads_each, share - first_head)
            counts = heads, share, first_group, here[0], first_head, here[1]
            if kept != heads:
                run_walks(segments - 1, counts, True, local)
            run_walks(segments, counts, False, walk)
            fresh = int(first_head == 0)
            if hopper:
                _hopper_grads(
                    (batch * chunks * (here[0] if shared else 1) * parts, 1, 1),
                    (
                        *(*hopper_products, *counts, part_heads, parts, chunks, call.length),
                        *(groups * n, batch, fresh),
                    ),
                    hopper_constants,
                    sizes,
                    key,
                )
                continue
            _grads(
                (2 * batch * chunks * here[0] * parts, 1, 1),
                (*products, *counts, most, part_heads, parts, chunks, batch, fresh),
                {
                    **call.constants,
                    "BLOCK_P": block,
                    "Q": chunk,
                    "SKIP": D is not None,
                    "SHARED": shared,
                    "STAGES": sizes["stages"],
                },
                sizes,
                key,
            )
    if shared:
        _sums(
            (tiles, 1, 1),
            (
                *(B_chunks, C_chunks, _tiles(dB_parts, chunk, n), _tiles(dC_parts, chunk, n)),
                *(d_scores, _tiles(dB, chunk, n), _tiles(dC, chunk, n)),
                *(groups, parts, chunks, batch),
            ),
            {k: call.constants[k] for k in ("N", "DOT", "PRECISION")} | {"Q": chunk},
            _SUMS_SIZES,
            key,
        )
    ddt = call.new(*call.dt.shape, dtype=call.dt.dtype)
    # Shares of the gradients of A, the bias and D, for sums over all chunks.
    shares = call.new(3, batch * chunks, heads)
    pointers, strides, step_constants = call.step_arguments()
    _grad_steps(
        (batch * chunks, -(-heads // _STEP_HEADS), 1),
        (
            *(*pointers, steps.step, steps.through, inputs, outputs, begins, passing),
            *(ddt, shares),
            *(call.length, heads, chunks, *strides, *ddt.stride()[:2]),
            *(call.low, call.high),
        ),
        {**step_constants, "Q": chunk},
        _STEP_SIZES,
        key,
    )
    shares = shares.sum(1)
    none = [call.new(0) for _ in range(2)]
    return (
        dx,
        ddt,
        shares[0],
        dB,
        dC,
        none[0] if D is None else shares[2].to(D.dtype, copy=True),
        dz,
        none[1] if call.bias is None else shares[1].to(call.bias.dtype, copy=True),
        d_first,
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
