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
SUMS = gl.constexpr(0)
ORIGINS = gl.constexpr(1)
STEPS = gl.constexpr(2)
WEIGHTS = gl.constexpr(3)
TO_END = gl.constexpr(4)
SINCE = gl.constexpr(5)


@gluon.jit
def _line(
    numbers, stage, which: gl.constexpr, of: gl.constexpr, Q: gl.constexpr, LINES: gl.constexpr
):
    """[Q] of the numbers of a chunk."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lines = numbers.index(stage)._reinterpret(gl.float32, [LINES, Q], flat)
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
    LINES: gl.constexpr,
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
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES, LINES, 1, Q], number_tiles.layout)
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

        sums = _line(numbers, stage, SUMS, rows, Q, LINES)
        origins = _line(numbers, stage, ORIGINS, rows, Q, LINES)
        live = (s >= origins[:, None]) & (s <= u)
        between = sums[:, None] - _line(numbers, stage, STEPS, columns, Q, LINES)[None, :]
        decays = gl.exp2(gl.where(live, between, float("-inf")))
        since = gl.where(origins < 0, gl.exp2(sums), 0.0)
        weights = _line(numbers, stage, WEIGHTS, gl.SliceLayout(0, left_state), Q, LINES)
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
            number_tiles, [0, lane, start], number_bars.index(stage), numbers.index(stage), pred=more
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


def tiles(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A [B, T, I, J] tensor in bfloat16 as [B, T, I J], to be read in tiles of one sequence.

    Made without the checks of its class, as `ssd._tiles`.
    """
    batch, length, heads, width = tensor.shape
    strides = tensor.stride()
    shape, strides = [batch, length, heads * width], [strides[0], strides[1], 1]
    return _described(tensor, shape, strides, [1, rows, columns], _layout(rows, columns))


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
