# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""SSD's outputs on a Hopper card, in Gluon: what Triton's own pipelining does not overlap.

As in `ssd` a program walks the chunks of one head in a segment of the sequence, the state in
registers. Here it says itself when tiles are asked for, when products begin, and when either is
waited for (in Triton, `docs/performance-ssd.md`, a chunk is a chain of waits):

- Tiles of two chunks are held; those of the next but one are asked for as soon as a chunk is done.
- C Bᵀ and C times the state run while decays are computed, and the state's product while y is
  written. What each adds to the state is a product of its own, added in registers that no product
  writes: ptxas would wait for all products before such registers are touched.
- Three barriers a chunk.

Gluon is a part of Triton, which its interpreter does not know; `tests/gluon_interpreter.py` does.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Lines of `ssd.Steps.numbers`.
STEPS = gl.constexpr(0)
SUMS = gl.constexpr(1)
WEIGHTS = gl.constexpr(2)
COLUMNS = gl.constexpr(3)  # of a forward pass
ORIGINS_FORWARD = gl.constexpr(4)
TO_END = gl.constexpr(3)
SINCE = gl.constexpr(4)
ORIGINS = gl.constexpr(5)
# Channels of a head that the gradients take at a time.
WIDTH = gl.constexpr(64)


@gluon.jit
def _line(numbers, stage, which: gl.constexpr, of: gl.constexpr, Q: gl.constexpr):
    """[Q] of the numbers of a chunk."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lines = numbers.index(stage)._reinterpret(gl.float32, [8, Q], flat)
    return lines.index(which).load(of)


@gluon.jit
def _expect(tiles, bar, pred):
    mbarrier.expect(bar, tiles.block_type.nbytes, pred=pred)


@gluon.jit(
    do_not_specialize=[
        *("D_ptr", "first_ptr"),
        *("heads", "share", "chunks", "segments", "span_chunks", "pieces"),
    ]
)
def scan_kernel(
    x_tiles,
    B_tiles,
    C_tiles,
    D_ptr,
    z_tiles,
    number_tiles,
    through_ptr,
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
    SKIP: gl.constexpr,
    GATE: gl.constexpr,
    KEEP: gl.constexpr,
    FIRST: gl.constexpr,
    N: gl.constexpr,
    P: gl.constexpr,
    BLOCK_P: gl.constexpr,
    Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Outputs of one head (or part of its channels) in one segment, chunk after chunk; bfloat16.

    As `ssd._scan_kernel`. Names that end in `_` are products under way.
    """
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])
    of_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_P, 16])
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left_y: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    left_state: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    columns: gl.constexpr = gl.SliceLayout(0, of_scores)
    of_barrier: gl.constexpr = mbarrier.MBarrierLayout()
    of_kept: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_P, N], gl.bfloat16)

    blocks: gl.constexpr = P // BLOCK_P
    pid = gl.program_id(0)
    block = pid % blocks
    head = (pid // blocks) % heads
    rest = pid // blocks // heads
    segment = rest % segments
    row = rest // segments
    lane = row * heads + head
    column = head * P + block * BLOCK_P
    group = head // share * N
    begin = segment * span_chunks
    count = gl.minimum(chunks - begin, span_chunks)

    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, BLOCK_P], x_tiles.layout)
    Bs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, N], B_tiles.layout)
    Cs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, N], C_tiles.layout)
    ys = gl.allocate_shared_memory(gl.bfloat16, [1, Q, BLOCK_P], y_tiles.layout)
    kept = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_P, N], of_kept)
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 1, Q], number_tiles.layout)
    x_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    B_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    C_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    number_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barrier)
    z_bar = gl.allocate_shared_memory(gl.int64, [1], of_barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(x_bars.index(i), count=1)
        mbarrier.init(B_bars.index(i), count=1)
        mbarrier.init(C_bars.index(i), count=1)
        mbarrier.init(number_bars.index(i), count=1)
    mbarrier.init(z_bar, count=1)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        _expect(x_tiles, x_bars.index(i), i < count)
        _expect(B_tiles, B_bars.index(i), i < count)
        _expect(C_tiles, C_bars.index(i), i < count)
        _expect(number_tiles, number_bars.index(i), i < count)
    if GATE:
        _expect(z_tiles, z_bar, count > 0)
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        start = (begin + i) * Q
        there = i < count
        tma.async_copy_global_to_shared(
            C_tiles, [row, start, group], C_bars.index(i), Cs.index(i), pred=there
        )
        tma.async_copy_global_to_shared(
            B_tiles, [row, start, group], B_bars.index(i), Bs.index(i), pred=there
        )
        tma.async_copy_global_to_shared(
            x_tiles, [row, start, column], x_bars.index(i), xs.index(i), pred=there
        )
        tma.async_copy_global_to_shared(
            number_tiles, [0, lane, start], number_bars.index(i), numbers.index(i), pred=there
        )
    if GATE:  # z lies where y will
        tma.async_copy_global_to_shared(
            z_tiles, [row, begin * Q, column], z_bar, ys, pred=count > 0
        )

    p = block * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, of_state))
    n = gl.arange(0, N, gl.SliceLayout(0, of_state))
    inner = p[:, None] * N + n[None, :]
    state = gl.zeros([BLOCK_P, N], gl.float32, of_state)
    if FIRST:
        state += gl.load(first_ptr + lane.to(gl.int64) * (N * P) + inner)
    added_at = lane.to(gl.int64) * (segments - 1) * pieces
    for i in range(0, segment * pieces):
        added = gl.load(local_ptr + (added_at + i) * (N * P) + inner)
        state = state * gl.load(local_decay_ptr + added_at + i) + added

    through_ptr += lane * chunks + begin
    if SKIP:
        D = gl.load(D_ptr + head).to(gl.float32)
    kept.store(state.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()

    u = gl.arange(0, Q, rows)[:, None]
    s = gl.arange(0, Q, columns)[None, :]
    for i in range(0, count):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        through = gl.load(through_ptr + i)
        x = xs.index(stage).reshape([Q, BLOCK_P])
        B = Bs.index(stage).reshape([Q, N])
        C = Cs.index(stage).reshape([Q, N])
        # All waits before the first product: between products no branch may be.
        mbarrier.wait(C_bars.index(stage), phase)
        mbarrier.wait(B_bars.index(stage), phase)
        mbarrier.wait(x_bars.index(stage), phase)
        mbarrier.wait(number_bars.index(stage), phase)
        if GATE:
            mbarrier.wait(z_bar, i & 1)
        nothing = gl.zeros([Q, Q], gl.float32, of_scores)
        scores_ = warpgroup_mma(C, B.permute((1, 0)), nothing, use_acc=False, is_async=True)
        nothing = gl.zeros([Q, BLOCK_P], gl.float32, of_y)
        y_ = warpgroup_mma(C, kept.permute((1, 0)), nothing, use_acc=False, is_async=True)

        sums = _line(numbers, stage, SUMS, rows, Q)
        origins = _line(numbers, stage, ORIGINS_FORWARD, rows, Q)
        live = (s >= origins[:, None]) & (s <= u)
        between = sums[:, None] - _line(numbers, stage, COLUMNS, columns, Q)[None, :]
        decays = gl.exp2(gl.where(live, between, float("-inf")))
        since = gl.where(origins < 0, gl.exp2(sums), 0.0)
        weights = _line(numbers, stage, WEIGHTS, gl.SliceLayout(0, left_state), Q)
        weighted = x.permute((1, 0)).load(left_state).to(gl.float32) * weights[None, :]
        weighted = weighted.to(gl.bfloat16)

        scores = warpgroup_mma_wait(1, [scores_]) * decays
        if SKIP:
            scores = gl.where(u == s, scores + D, scores)
        scores = gl.convert_layout(scores.to(gl.bfloat16), left_y)
        y = warpgroup_mma_wait(0, [y_])
        y = y * gl.convert_layout(since, gl.SliceLayout(1, of_y))[:, None]
        y_ = warpgroup_mma(scores, x, y, is_async=True)
        nothing = gl.zeros([BLOCK_P, N], gl.float32, of_state)
        added_ = warpgroup_mma(weighted, B, nothing, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(1, [y_])
        start = (begin + i) * Q
        staged = ys.reshape([Q, BLOCK_P])
        if GATE:
            z = staged.load(of_y).to(gl.float32)
            gl.thread_barrier()
            if KEEP:
                staged.store(y.to(gl.bfloat16))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(before_tiles, [row, start, column], ys)
                tma.store_wait(0)
                gl.thread_barrier()
            y = y * (z / (1.0 + gl.exp2(-1.4426950408889634 * z)))
        staged.store(y.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y_tiles, [row, start, column], ys)
        state = state * through + warpgroup_mma_wait(0, [added_])
        kept.store(state.to(gl.bfloat16))
        more = i + STAGES < count
        _expect(C_tiles, C_bars.index(stage), more)
        _expect(B_tiles, B_bars.index(stage), more)
        _expect(x_tiles, x_bars.index(stage), more)
        _expect(number_tiles, number_bars.index(stage), more)
        if GATE:
            _expect(z_tiles, z_bar, i + 1 < count)
        tma.store_wait(0)
        fence_async_shared()
        gl.thread_barrier()
        start = (begin + i + STAGES) * Q
        tma.async_copy_global_to_shared(
            C_tiles, [row, start, group], C_bars.index(stage), Cs.index(stage), pred=more
        )
        tma.async_copy_global_to_shared(
            B_tiles, [row, start, group], B_bars.index(stage), Bs.index(stage), pred=more
        )
        tma.async_copy_global_to_shared(
            x_tiles, [row, start, column], x_bars.index(stage), xs.index(stage), pred=more
        )
        tma.async_copy_global_to_shared(
            number_tiles,
            [0, lane, start],
            number_bars.index(stage),
            numbers.index(stage),
            pred=more,
        )
        if GATE:
            tma.async_copy_global_to_shared(
                z_tiles, [row, (begin + i + 1) * Q, column], z_bar, ys, pred=i + 1 < count
            )
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(x_bars.index(i))
        mbarrier.invalidate(B_bars.index(i))
        mbarrier.invalidate(C_bars.index(i))
        mbarrier.invalidate(number_bars.index(i))
    mbarrier.invalidate(z_bar)
    if segment == segments - 1:
        gl.store(last_ptr + lane.to(gl.int64) * (N * P) + inner, state)


@gluon.jit
def _feed(
    x_tiles,
    dy_tiles,
    B_tiles,
    C_tiles,
    entering_tiles,
    leaving_tiles,
    number_tiles,
    passing_ptr,
    xs,
    dys,
    Bs,
    Cs,
    enterings,
    leavings,
    numbers,
    full,
    empty,
    row,
    chunk,
    chunks,
    heads,
    share,
    group,
    head,
    here,
    count,
    SHARED: gl.constexpr,
    N: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Asks for tiles; sums products of the state before and the gradient of that behind."""
    whole: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // N, N // 8], [4, 1], [1, 0])
    LAG: gl.constexpr = STAGES - 1
    PART: gl.constexpr = 16  # rows of a state at a time: there are few registers
    at_chunk = row * chunks + chunk
    start = chunk * Q
    BYTES: gl.constexpr = (
        x_tiles.block_type.nbytes
        + dy_tiles.block_type.nbytes
        + entering_tiles.block_type.nbytes
        + leaving_tiles.block_type.nbytes
        + number_tiles.block_type.nbytes
        + (0 if SHARED else B_tiles.block_type.nbytes + C_tiles.block_type.nbytes)
    )
    BLOCKS: gl.constexpr = P // WIDTH
    passing = 0.0
    for k in range(0, count * BLOCKS + LAG):
        i = k // BLOCKS
        stage = k % STAGES
        asks = i < count
        mbarrier.wait(empty.index(stage), (k // STAGES + 1) & 1, pred=asks & (k >= STAGES))
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES, pred=asks)
        column = k % BLOCKS * WIDTH
        place = (here + i) * P + column
        column += (head + i) * P
        tma.async_copy_global_to_shared(
            number_tiles, [0, row * heads + head + i, start], bar, numbers.index(stage), pred=asks
        )
        tma.async_copy_global_to_shared(
            dy_tiles, [row, start, column], bar, dys.index(stage), pred=asks
        )
        tma.async_copy_global_to_shared(
            x_tiles, [row, start, column], bar, xs.index(stage), pred=asks
        )
        tma.async_copy_global_to_shared(
            entering_tiles, [at_chunk, place, 0], bar, enterings.index(stage), pred=asks
        )
        tma.async_copy_global_to_shared(
            leaving_tiles, [at_chunk, place, 0], bar, leavings.index(stage), pred=asks
        )
        if not SHARED:
            tma.async_copy_global_to_shared(
                C_tiles, [row, start, (group + i) * N], bar, Cs.index(stage), pred=asks
            )
            tma.async_copy_global_to_shared(
                B_tiles, [row, start, (group + i) * N], bar, Bs.index(stage), pred=asks
            )
        j = k - LAG
        if j >= 0:
            stage = j % STAGES
            mbarrier.wait(full.index(stage), (j // STAGES) & 1)
            entering = enterings.index(stage).reshape([WIDTH, N])
            leaving = leavings.index(stage).reshape([WIDTH, N])
            total = gl.zeros([PART, N], gl.float32, whole)
            for at in gl.static_range(WIDTH // PART):
                a = entering.slice(at * PART, PART).load(whole).to(gl.float32)
                b = leaving.slice(at * PART, PART).load(whole).to(gl.float32)
                total += a * b
            found = gl.sum(gl.sum(total, 1), 0)
            passing = gl.where(j % BLOCKS == 0, found, passing + found)
            gl.store(passing_ptr + (row * heads + head + j // BLOCKS) * chunks + chunk, passing)
            gl.thread_barrier()
            mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _total(
    ptr, at_row, start, length, stride, group, of: gl.constexpr, Q: gl.constexpr, N: gl.constexpr
):
    """[Q, N] of what earlier launches left."""
    t = start + gl.arange(0, Q, gl.SliceLayout(1, of))
    n = gl.arange(0, N, gl.SliceLayout(0, of))
    at = (at_row * length + t)[:, None] * stride + group * N + n[None, :]
    return gl.load(ptr + at, mask=(t < length)[:, None], other=0.0)


@gluon.jit
def _keep(
    ptr,
    at_row,
    start,
    length,
    stride,
    group,
    total,
    of: gl.constexpr,
    Q: gl.constexpr,
    N: gl.constexpr,
):
    t = start + gl.arange(0, Q, gl.SliceLayout(1, of))
    n = gl.arange(0, N, gl.SliceLayout(0, of))
    at = (at_row * length + t)[:, None] * stride + group * N + n[None, :]
    gl.store(ptr + at, total, mask=(t < length)[:, None])


@gluon.jit
def _decays(numbers, stage, u, s, of: gl.constexpr, ENDS: gl.constexpr, Q: gl.constexpr):
    """Decays of paths; rows where they end (`ENDS`) or where they begin."""
    rows: gl.constexpr = gl.SliceLayout(1, of)
    columns: gl.constexpr = gl.SliceLayout(0, of)
    r = _line(numbers, stage, SUMS, rows, Q)[:, None]
    c = _line(numbers, stage, SUMS, columns, Q)[None, :]
    if ENDS:
        live = (s <= u) & (s >= _line(numbers, stage, ORIGINS, rows, Q)[:, None])
        between = r - c
    else:
        live = (s <= u) & (s >= _line(numbers, stage, ORIGINS, columns, Q)[None, :])
        between = c - r
    return gl.exp2(gl.where(live, between, float("-inf")))


@gluon.jit
def _from_begins(
    dx_tiles,
    dB_tiles,
    D_ptr,
    dB_ptr,
    inputs_ptr,
    xs,
    dys,
    Bs,
    Cs,
    leavings,
    numbers,
    full,
    empty,
    once,
    dxs,
    dBs,
    row,
    at_row,
    chunk,
    chunks,
    length,
    stride,
    heads,
    groups,
    group,
    head,
    count,
    fresh,
    SKIP: gl.constexpr,
    SHARED: gl.constexpr,
    N: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Gradients of x and B, by the tokens where paths begin: rows `s`."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])
    of_x: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    of_total: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left_x: gl.constexpr = gl.DotOperandLayout(0, of_x, 2)
    left_total: gl.constexpr = gl.DotOperandLayout(0, of_total, 2)
    rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    rows_x: gl.constexpr = gl.SliceLayout(1, of_x)
    s = gl.arange(0, Q, rows)[:, None]
    u = gl.arange(0, Q, gl.SliceLayout(0, of_scores))[None, :]
    q = gl.arange(0, Q, rows_x)
    start = chunk * Q
    total = gl.zeros([Q, N], gl.float32, of_total)
    if SHARED:
        if fresh == 0:
            total = _total(dB_ptr, at_row, start, length, groups * N, group, of_total, Q, N)
        mbarrier.wait(once, 0)
        B = Bs.index(0).reshape([Q, N])
        C = Cs.index(0).reshape([Q, N])
        scores = warpgroup_mma(
            B, C.permute((1, 0)), gl.zeros([Q, Q], gl.float32, of_scores), use_acc=False
        ).to(gl.bfloat16)
    BLOCKS: gl.constexpr = P // WIDTH
    for i in range(0, count):
        direct = gl.zeros([Q], gl.float32, rows_x)
        behind = gl.zeros([Q], gl.float32, rows_x)
        for block in gl.static_range(BLOCKS):
            k = i * BLOCKS + block
            stage = k % STAGES
            mbarrier.wait(full.index(stage), (k // STAGES) & 1)
            x = xs.index(stage).reshape([Q, WIDTH])
            dy = dys.index(stage).reshape([Q, WIDTH])
            leaving = leavings.index(stage).reshape([WIDTH, N])
            if not SHARED:
                B = Bs.index(stage).reshape([Q, N])
                C = Cs.index(stage).reshape([Q, N])
                if block == 0:
                    nothing = gl.zeros([Q, Q], gl.float32, of_scores)
                    scores_ = warpgroup_mma(
                        B, C.permute((1, 0)), nothing, use_acc=False, is_async=True
                    )
                    mixed = nothing
                mixed_ = warpgroup_mma(
                    x, dy.permute((1, 0)), mixed, use_acc=block > 0, is_async=True
                )
                if block == 0:
                    total = gl.zeros([Q, N], gl.float32, of_total)
            weight = _line(numbers, stage, WEIGHTS, gl.SliceLayout(1, left_total), Q)
            weighted = (x.load(left_total).to(gl.float32) * weight[:, None]).to(gl.bfloat16)
            nothing = gl.zeros([Q, WIDTH], gl.float32, of_x)
            outside_ = warpgroup_mma(
                B, leaving.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            total_ = warpgroup_mma(
                weighted, leaving, total, use_acc=SHARED or block > 0, is_async=True
            )
            if block == 0 or ((block == BLOCKS - 1) and not SHARED):
                decays = _decays(numbers, stage, u, s, of_scores, False, Q)
            if block == 0:
                if SHARED:
                    decayed = scores.to(gl.float32) * decays
                else:
                    decayed = warpgroup_mma_wait(3, [scores_]) * decays
                decayed = gl.convert_layout(decayed.to(gl.bfloat16), left_x)
            if (block == BLOCKS - 1) and not SHARED:
                step_rows = _line(numbers, stage, STEPS, rows, Q)
                mixed = warpgroup_mma_wait(2, [mixed_]) * decays * step_rows[:, None]
                short = gl.convert_layout(mixed.to(gl.bfloat16), left_total)
            inside_ = warpgroup_mma(decayed, dy, nothing, use_acc=False, is_async=True)
            if (block == BLOCKS - 1) and not SHARED:
                total_ = warpgroup_mma(short, C, total_, is_async=True)
                outside = warpgroup_mma_wait(3, [outside_])
            else:
                outside = warpgroup_mma_wait(2, [outside_])
            values = x.load(of_x).to(gl.float32)
            outside = outside * _line(numbers, stage, TO_END, rows_x, Q)[:, None]
            behind += gl.sum(values * outside, 1)
            step = _line(numbers, stage, STEPS, rows_x, Q)[:, None]
            if (block == BLOCKS - 1) or SHARED:
                inside, total = warpgroup_mma_wait(0, [inside_, total_])
            else:
                inside, total, mixed = warpgroup_mma_wait(0, [inside_, total_, mixed_])
            direct += gl.sum(values * inside, 1)
            dx = (inside + outside) * step
            if SKIP:
                dx += gl.load(D_ptr + head + i).to(gl.float32) * dy.load(of_x).to(gl.float32)
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            dxs.reshape([Q, WIDTH]).store(dx.to(gl.bfloat16))
            if (block == BLOCKS - 1) and not SHARED:
                dBs.reshape([Q, N]).store(total.to(gl.bfloat16))
            fence_async_shared()
            gl.thread_barrier()
            column = (head + i) * P + block * WIDTH
            tma.async_copy_shared_to_global(dx_tiles, [row, start, column], dxs)
            if (block == BLOCKS - 1) and not SHARED:
                tma.async_copy_shared_to_global(dB_tiles, [row, start, (group + i) * N], dBs)
        steps = (row * heads + head + i).to(gl.int64) * (chunks * Q) + start
        at = inputs_ptr + (steps + q) * 2
        gl.store(at, direct)
        gl.store(at + 1, behind)
    if SHARED:
        _keep(dB_ptr, at_row, start, length, stride, group, total, of_total, Q, N)
    tma.store_wait(0)


@gluon.jit
def _from_ends(
    dC_tiles,
    dC_ptr,
    d_scores_ptr,
    outputs_ptr,
    begins_ptr,
    xs,
    dys,
    Bs,
    Cs,
    enterings,
    numbers,
    full,
    empty,
    once,
    dCs,
    row,
    at_row,
    at_tile,
    chunk,
    chunks,
    length,
    stride,
    heads,
    groups,
    group,
    head,
    count,
    fresh,
    SHARED: gl.constexpr,
    N: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The gradient of C, by the tokens where paths end: rows `u`."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])
    of_x: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    of_total: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left_total: gl.constexpr = gl.DotOperandLayout(0, of_total, 2)
    rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    columns: gl.constexpr = gl.SliceLayout(0, of_scores)
    u = gl.arange(0, Q, rows)[:, None]
    s = gl.arange(0, Q, columns)[None, :]
    start = chunk * Q
    total = gl.zeros([Q, N], gl.float32, of_total)
    if SHARED:
        d_scores = gl.zeros([Q, Q], gl.float32, of_scores)
        if fresh == 0:
            total = _total(dC_ptr, at_row, start, length, groups * N, group, of_total, Q, N)
            d_scores = gl.load(d_scores_ptr + at_tile * (Q * Q) + u * Q + s)
        mbarrier.wait(once, 0)
        B = Bs.index(0).reshape([Q, N])
        C = Cs.index(0).reshape([Q, N])
        scores = warpgroup_mma(
            C, B.permute((1, 0)), gl.zeros([Q, Q], gl.float32, of_scores), use_acc=False
        ).to(gl.bfloat16)
    BLOCKS: gl.constexpr = P // WIDTH
    for i in range(0, count):
        met = gl.zeros([Q], gl.float32, gl.SliceLayout(1, of_x))
        for block in gl.static_range(BLOCKS):
            k = i * BLOCKS + block
            stage = k % STAGES
            mbarrier.wait(full.index(stage), (k // STAGES) & 1)
            x = xs.index(stage).reshape([Q, WIDTH])
            dy = dys.index(stage).reshape([Q, WIDTH])
            entering = enterings.index(stage).reshape([WIDTH, N])
            nothing = gl.zeros([Q, Q], gl.float32, of_scores)
            if block == 0:
                mixed = nothing
            mixed_ = warpgroup_mma(dy, x.permute((1, 0)), mixed, use_acc=block > 0, is_async=True)
            if not SHARED:
                B = Bs.index(stage).reshape([Q, N])
                C = Cs.index(stage).reshape([Q, N])
                if block == 0:
                    total = gl.zeros([Q, N], gl.float32, of_total)
                if block == BLOCKS - 1:
                    scores_ = warpgroup_mma(
                        C, B.permute((1, 0)), nothing, use_acc=False, is_async=True
                    )
            if block == BLOCKS - 1:
                decays = _decays(numbers, stage, u, s, of_scores, True, Q)
                step = _line(numbers, stage, STEPS, columns, Q)
                # Of `scores_` none is under way where groups are shared.
                mixed = warpgroup_mma_wait(0 if SHARED else 1, [mixed_])
                skip = gl.sum(gl.where(u == s, mixed, 0.0), 1)
                mixed = mixed * decays * step[None, :]
                if not SHARED:
                    scores = warpgroup_mma_wait(0, [scores_])
            since = _line(numbers, stage, SINCE, gl.SliceLayout(1, left_total), Q)
            weighted = (dy.load(left_total).to(gl.float32) * since[:, None]).to(gl.bfloat16)
            nothing = gl.zeros([Q, WIDTH], gl.float32, of_x)
            before_ = warpgroup_mma(
                C, entering.permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            total_ = warpgroup_mma(
                weighted, entering, total, use_acc=SHARED or block > 0, is_async=True
            )
            if block == BLOCKS - 1:
                if SHARED:
                    d_scores += mixed
                else:
                    short = gl.convert_layout(mixed.to(gl.bfloat16), left_total)
                    total_ = warpgroup_mma(short, B, total_, is_async=True)
                paths = gl.where(u > s, mixed * scores.to(gl.float32), 0.0)
                flows = gl.sum(paths, 1)
                begins = gl.sum(paths, 0)
            before = warpgroup_mma_wait(2 if (block == BLOCKS - 1) and not SHARED else 1, [before_])
            met += gl.sum(before * dy.load(of_x).to(gl.float32), 1)
            if block == BLOCKS - 1:
                flows += _line(numbers, stage, SINCE, rows, Q) * gl.convert_layout(met, rows)
                total = warpgroup_mma_wait(0, [total_])
                if not SHARED:
                    tma.store_wait(0)
            else:
                total, mixed = warpgroup_mma_wait(0, [total_, mixed_])
            gl.thread_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
        if not SHARED:
            dCs.reshape([Q, N]).store(total.to(gl.bfloat16))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dC_tiles, [row, start, (group + i) * N], dCs)
        steps = (row * heads + head + i).to(gl.int64) * (chunks * Q) + start
        at = outputs_ptr + (steps + gl.arange(0, Q, rows)) * 2
        gl.store(at, flows)
        gl.store(at + 1, skip)
        gl.store(begins_ptr + steps + gl.arange(0, Q, columns), begins)
    if SHARED:
        _keep(dC_ptr, at_row, start, length, stride, group, total, of_total, Q, N)
        gl.store(d_scores_ptr + at_tile * (Q * Q) + u * Q + s, d_scores)
    else:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        *("D_ptr", "heads", "share", "first_group", "groups_here", "first_head", "heads_here"),
        *("heads_each", "parts", "chunks", "length", "stride", "batch", "fresh"),
    ]
)
def grads_kernel(
    x_tiles,
    dy_tiles,
    B_tiles,
    C_tiles,
    entering_tiles,
    leaving_tiles,
    number_tiles,
    dx_tiles,
    dB_tiles,
    dC_tiles,
    D_ptr,
    dB_ptr,
    dC_ptr,
    d_scores_ptr,
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
    heads_each,
    parts,
    chunks,
    length,
    stride,
    batch,
    fresh,
    SKIP: gl.constexpr,
    SHARED: gl.constexpr,
    N: gl.constexpr,
    P: gl.constexpr,
    Q: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    FEEDER: gl.constexpr,
):
    """Gradients of x, B and C in one chunk: of some heads of one group, or of some groups of one.

    As `ssd._grads_kernel`, whose two halves are here two groups of warps of one program: what both
    read is read once. A third asks for tiles, `STAGES` of them held, and has a sum of its own.
    `heads_each` heads (or groups) a program; `stride`: of tokens in sums of B, given apart from
    `groups` so that no addresses are held from the start to the end.
    """
    pid = gl.program_id(0)
    part = pid % parts
    groups = heads // share
    if SHARED:
        here = pid // parts % groups_here
        rest = pid // parts // groups_here
        group = first_group + here
        begin = part * heads_each
        count = gl.minimum(heads_here - begin, heads_each)
        head = group * share + first_head + begin
        place = here * heads_here + begin
    else:
        rest = pid // parts
        begin = part * heads_each
        count = gl.minimum(groups_here - begin, heads_each)
        group = first_group + begin
        head = group
        place = begin
    chunk = rest % chunks
    row = rest // chunks
    at_row = part * batch + row
    at_tile = part * (batch * chunks * groups) + (row * chunks + chunk) * groups + group

    BC: gl.constexpr = 1 if SHARED else STAGES
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, WIDTH], x_tiles.layout)
    dys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, WIDTH], dy_tiles.layout)
    Bs = gl.allocate_shared_memory(gl.bfloat16, [BC, 1, Q, N], B_tiles.layout)
    Cs = gl.allocate_shared_memory(gl.bfloat16, [BC, 1, Q, N], C_tiles.layout)
    enterings = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, WIDTH, N], entering_tiles.layout)
    leavings = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, WIDTH, N], leaving_tiles.layout)
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 1, Q], number_tiles.layout)
    dxs = gl.allocate_shared_memory(gl.bfloat16, [1, Q, WIDTH], dx_tiles.layout)
    if SHARED:
        dBs = dxs
        dCs = dxs
    else:
        dBs = gl.allocate_shared_memory(gl.bfloat16, [1, Q, N], dB_tiles.layout)
        dCs = gl.allocate_shared_memory(gl.bfloat16, [1, Q, N], dC_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    mbarrier.init(once, count=1)
    fence_async_shared()
    gl.thread_barrier()
    if SHARED:
        mbarrier.expect(once, B_tiles.block_type.nbytes + C_tiles.block_type.nbytes)
        tma.async_copy_global_to_shared(B_tiles, [row, chunk * Q, group * N], once, Bs.index(0))
        tma.async_copy_global_to_shared(C_tiles, [row, chunk * Q, group * N], once, Cs.index(0))
    gl.warp_specialize(
        [
            (
                _from_begins,
                (
                    dx_tiles,
                    dB_tiles,
                    D_ptr,
                    dB_ptr,
                    inputs_ptr,
                    xs,
                    dys,
                    Bs,
                    Cs,
                    leavings,
                    numbers,
                    full,
                    empty,
                    once,
                    dxs,
                    dBs,
                    row,
                    at_row,
                    chunk,
                    chunks,
                    length,
                    stride,
                    heads,
                    groups,
                    group,
                    head,
                    count,
                    fresh,
                    SKIP,
                    SHARED,
                    N,
                    P,
                    Q,
                    STAGES,
                ),
            ),
            (
                _from_ends,
                (
                    dC_tiles,
                    dC_ptr,
                    d_scores_ptr,
                    outputs_ptr,
                    begins_ptr,
                    xs,
                    dys,
                    Bs,
                    Cs,
                    enterings,
                    numbers,
                    full,
                    empty,
                    once,
                    dCs,
                    row,
                    at_row,
                    at_tile,
                    chunk,
                    chunks,
                    length,
                    stride,
                    heads,
                    groups,
                    group,
                    head,
                    count,
                    fresh,
                    SHARED,
                    N,
                    P,
                    Q,
                    STAGES,
                ),
            ),
            (
                _feed,
                (
                    x_tiles,
                    dy_tiles,
                    B_tiles,
                    C_tiles,
                    entering_tiles,
                    leaving_tiles,
                    number_tiles,
                    passing_ptr,
                    xs,
                    dys,
                    Bs,
                    Cs,
                    enterings,
                    leavings,
                    numbers,
                    full,
                    empty,
                    row,
                    chunk,
                    chunks,
                    heads,
                    share,
                    group,
                    head,
                    place,
                    count,
                    SHARED,
                    N,
                    P,
                    Q,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, FEEDER],
    )


def tiles(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A [B, T, I, J] tensor in bfloat16 as [B, T, I J], to be read in tiles of one sequence.

    Made without the checks of its class, as `ssd._tiles`.
    """
    batch, length, heads, width = tensor.shape
    strides = tensor.stride()
    shape, steps = [batch, length, heads * width], [strides[0], strides[1], 1]
    return _described(tensor, shape, steps, [1, rows, columns], _layout(rows, columns))


def lines(numbers: Tensor, chunk: int) -> TensorDescriptor:
    """[L, B, H, T] in float32 as [L, B H, T]: all lines of a chunk of one head are a tile."""
    count, batch, heads, length = numbers.shape
    shape, strides = [count, batch * heads, length], [batch * heads * length, length, 1]
    block = [1 << (count - 1).bit_length(), 1, chunk]
    return _described(numbers, shape, strides, block, _LINES_LAYOUT)


def _described(
    tensor: Tensor,
    shape: list[int],
    strides: list[int],
    block: list[int],
    layout: gl.NVMMASharedLayout,
) -> TensorDescriptor:
    made: TensorDescriptor = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, shape, strides
    made.block_shape, made.layout, made.padding = block, layout, "zero"
    return made


_LINES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


@cache
def _layout(rows: int, columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, rows, columns], gl.bfloat16)
