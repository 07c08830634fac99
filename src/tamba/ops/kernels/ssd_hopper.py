# mypy: allow-untyped-defs, allow-untyped-calls
"""SSD's outputs on a Hopper card, in Gluon: what Triton's own pipelining does not overlap.

A program walks the chunks of a segment of one head, as in `ssd`, and says itself when tiles are
asked for, when products begin and when they are waited for.
"""

from __future__ import annotations

from functools import cache

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
from torch import Tensor


@gluon.jit
def _expect(tiles, bar, pred):
    mbarrier.expect(bar, tiles.block_type.nbytes, pred=pred)


@gluon.jit(
    do_not_specialize=[
        *("D_ptr", "first_ptr"),
        *("heads", "share", "chunks", "segments", "span_chunks", "pieces"),
    ]
)
def _scan_kernel(
    x_tiles, B_tiles, C_tiles, D_ptr,
    sum_ptr, column_ptr, origin_ptr, weight_ptr, through_ptr,
    first_ptr, local_ptr, local_decay_ptr, y_tiles, last_ptr,
    heads, share, chunks, segments, span_chunks, pieces,
    SKIP: gl.constexpr, FIRST: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
    BLOCK_P: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr,
):
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])
    of_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_P, 16])
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    left_y: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    left_state: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    blocks: gl.constexpr = P // BLOCK_P
    pid = gl.program_id(0)
    block = pid % blocks
    head = (pid // blocks) % heads
    rest = pid // blocks // heads
    segment = rest % segments
    row = rest // segments
    lane = (row * heads + head).to(gl.int64)
    column = head * P + block * BLOCK_P
    group = head // share * N
    begin = segment * span_chunks
    count = gl.minimum(chunks - begin, span_chunks)

    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, BLOCK_P], x_tiles.layout)
    Bs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, N], B_tiles.layout)
    Cs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, Q, N], C_tiles.layout)
    ys = gl.allocate_shared_memory(gl.bfloat16, [1, Q, BLOCK_P], y_tiles.layout)
    kept_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_P, N], gl.bfloat16)
    kept = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_P, N], kept_layout)
    sums_at = gl.allocate_shared_memory(gl.float32, [Q], flat)
    columns_at = gl.allocate_shared_memory(gl.float32, [Q], flat)
    weights_at = gl.allocate_shared_memory(gl.float32, [Q], flat)
    origins_at = gl.allocate_shared_memory(gl.int32, [Q], flat)
    x_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    B_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    C_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(x_bars.index(i), count=1)
        mbarrier.init(B_bars.index(i), count=1)
        mbarrier.init(C_bars.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        _expect(x_tiles, x_bars.index(i), i < count)
        _expect(B_tiles, B_bars.index(i), i < count)
        _expect(C_tiles, C_bars.index(i), i < count)
    gl.thread_barrier()
    for i in gl.static_range(STAGES):
        start = (begin + i) * Q
        tma.async_copy_global_to_shared(C_tiles, [row, start, group], C_bars.index(i), Cs.index(i), pred=i < count)
        tma.async_copy_global_to_shared(B_tiles, [row, start, group], B_bars.index(i), Bs.index(i), pred=i < count)
        tma.async_copy_global_to_shared(x_tiles, [row, start, column], x_bars.index(i), xs.index(i), pred=i < count)

    # The state before this segment.
    p = block * BLOCK_P + gl.arange(0, BLOCK_P, gl.SliceLayout(1, of_state))
    n = gl.arange(0, N, gl.SliceLayout(0, of_state))
    inner = p[:, None] * N + n[None, :]
    state = gl.zeros([BLOCK_P, N], gl.float32, of_state)
    if FIRST:
        state += gl.load(first_ptr + lane * (N * P) + inner)
    j = lane * (segments - 1) * pieces
    for i in range(0, segment * pieces):
        added = gl.load(local_ptr + (j + i) * (N * P) + inner).to(gl.float32)
        state = state * gl.load(local_decay_ptr + j + i) + added

    q = gl.arange(0, Q, line)
    steps = lane * (chunks * Q)
    at = steps + begin * Q + q
    sums_at.store(gl.load(sum_ptr + at))
    columns_at.store(gl.load(column_ptr + at))
    weights_at.store(gl.load(weight_ptr + at))
    origins_at.store(gl.load(origin_ptr + at))
    through = gl.load(through_ptr + lane * chunks + begin)
    if SKIP:
        D = gl.load(D_ptr + head).to(gl.float32)
    kept.store(state.to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()

    rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    columns_: gl.constexpr = gl.SliceLayout(0, of_scores)
    u = gl.arange(0, Q, rows)
    s = gl.arange(0, Q, columns_)[None, :]
    for i in range(0, count):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        # What the next chunk needs besides its tiles, on its way while this one is worked on.
        following = gl.minimum(begin + i + 1, chunks - 1)
        at = steps + following * Q + q
        next_sums = gl.load(sum_ptr + at)
        next_columns = gl.load(column_ptr + at)
        next_weights = gl.load(weight_ptr + at)
        next_origins = gl.load(origin_ptr + at)
        next_through = gl.load(through_ptr + lane * chunks + following)

        x = xs.index(stage).reshape([Q, BLOCK_P])
        B = Bs.index(stage).reshape([Q, N])
        C = Cs.index(stage).reshape([Q, N])
        mbarrier.wait(C_bars.index(stage), phase)
        mbarrier.wait(B_bars.index(stage), phase)
        mbarrier.wait(x_bars.index(stage), phase)
        scores_ = warpgroup_mma(C, B.permute((1, 0)), gl.zeros([Q, Q], gl.float32, of_scores), use_acc=False, is_async=True)
        y_ = warpgroup_mma(C, kept.permute((1, 0)), gl.zeros([Q, BLOCK_P], gl.float32, of_y), use_acc=False, is_async=True)

        sums = sums_at.load(rows)
        origins = origins_at.load(rows)
        begins = columns_at.load(columns_)
        # Paths begin at `origin` or later, and at `u` or earlier.
        live = (s - origins[:, None]).to(gl.uint32, bitcast=True) <= (u - origins).to(gl.uint32, bitcast=True)[:, None]
        decays = gl.exp2(gl.where(live, sums[:, None] - begins[None, :], float("-inf")))
        since = gl.where(origins < 0, gl.exp2(sums), 0.0)
        weights = weights_at.load(gl.SliceLayout(0, left_state))
        weighted = x.permute((1, 0)).load(left_state).to(gl.float32) * weights[None, :]
        weighted = weighted.to(gl.bfloat16)

        scores = warpgroup_mma_wait(1, [scores_])
        scores = scores * decays
        if SKIP:
            scores = gl.where(u[:, None] == s, scores + D, scores)
        scores = gl.convert_layout(scores.to(gl.bfloat16), left_y)
        y = warpgroup_mma_wait(0, [y_])
        y = y * gl.convert_layout(since, gl.SliceLayout(1, of_y))[:, None]
        y_ = warpgroup_mma(scores, x, y, is_async=True)
        added_ = warpgroup_mma(weighted, B, gl.zeros([BLOCK_P, N], gl.float32, of_state), use_acc=False, is_async=True)
        y = warpgroup_mma_wait(1, [y_])
        ys.reshape([Q, BLOCK_P]).store(y.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y_tiles, [row, (begin + i) * Q, column], ys)
        state = state * through + warpgroup_mma_wait(0, [added_])
        kept.store(state.to(gl.bfloat16))
        through = next_through
        sums_at.store(next_sums)
        columns_at.store(next_columns)
        weights_at.store(next_weights)
        origins_at.store(next_origins)
        more = i + STAGES < count
        _expect(C_tiles, C_bars.index(stage), more)
        _expect(B_tiles, B_bars.index(stage), more)
        _expect(x_tiles, x_bars.index(stage), more)
        tma.store_wait(0)
        fence_async_shared()
        gl.thread_barrier()
        start = (begin + i + STAGES) * Q
        tma.async_copy_global_to_shared(C_tiles, [row, start, group], C_bars.index(stage), Cs.index(stage), pred=more)
        tma.async_copy_global_to_shared(B_tiles, [row, start, group], B_bars.index(stage), Bs.index(stage), pred=more)
        tma.async_copy_global_to_shared(x_tiles, [row, start, column], x_bars.index(stage), xs.index(stage), pred=more)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(x_bars.index(i))
        mbarrier.invalidate(B_bars.index(i))
        mbarrier.invalidate(C_bars.index(i))
    if segment == segments - 1:
        gl.store(last_ptr + lane * (N * P) + inner, state)


def tiles(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A [B, T, I, J] tensor in bfloat16 as [B, T, I J], to be read in tiles of one sequence."""
    batch, length, heads, width = tensor.shape
    strides = tensor.stride()
    made = object.__new__(TensorDescriptor)
    made.base = tensor
    made.shape = [batch, length, heads * width]
    made.strides = [strides[0], strides[1], 1]
    made.block_shape = [1, rows, columns]
    made.padding = "zero"
    made.layout = _layout(rows, columns)
    return made


@cache
def _layout(rows, columns):
    return gl.NVMMASharedLayout.get_default_for([1, rows, columns], gl.bfloat16)
