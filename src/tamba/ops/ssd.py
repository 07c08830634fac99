"""SSD (Mamba-2) through matrix products, on any device that torch knows.

The block decomposition of arXiv 2405.21060, section 6: inside a chunk of Q tokens the output is a
Q x Q matrix times the inputs, between chunks a state is passed on. Here both parts of a chunk's
output are one product, ``[scores ∘ decay | C·decay] @ [dt·x ; state]``, and chunks are taken in
tiles small enough to stay in cache. The backward pass is written by hand and rebuilds the Q x Q
matrices, so that only the arguments and one state a chunk are kept.

Every decay is a product of numbers in [0, 1], never an exponential of a difference: nothing
overflows, small decays that follow large ones lose no digits, and a document start is a factor 0.
With bfloat16 arguments the matrix products take bfloat16 operands; the rest is float32.

Shape letters: `B` batch, `T` tokens, `H` heads, `G` groups, `P` head_dim, `N` d_state, `Q` chunk,
`K` chunks in a tile, `S` rows in a tile, `R` heads in a group.
"""

from __future__ import annotations

from itertools import pairwise
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
    step_sizes,
)

# Up to this many tokens a plain recurrence needs fewer operations than one chunk does.
_STEPS = 2
# The head_dim and d_state that the Triton kernels know.
_KERNEL_SIZES = (16, 32, 64, 128)
# How many Q x Q matrices a tile holds. On a CPU its buffers then stay in a core's cache; elsewhere
# the only concern is memory.
_TILE = 32
_TILE_ELSEWHERE = 4096


@outside_autocast
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t``, ``y_t = h_t C_t + D x_t``, for every head.

    Any split of the tokens over several calls, each given the state that the last one returned,
    equals one call. Differentiable in every tensor but `starts` and `padding`.

    Args:
        x: [B, T, H, P] inputs.
        dt: [B, T, H] step sizes, not below 0 once bias, softplus and limits are applied.
        A: [H], not above 0.
        B: [B, T, G, N]; head h uses group ``h // (H / G)``.
        C: [B, T, G, N].
        D: [H] skip, or None.
        z: [B, T, H, P] gate: y is multiplied by silu(z), after the skip; None for no gate.
        dt_bias: [H], added to dt, or None.
        dt_softplus: whether dt goes through softplus after the bias.
        dt_limit: least and greatest dt, applied last, or None.
        state: [B, H, P, N] before token 0; None for zeros.
        starts: [B, T] bool, True where a document starts and nothing before is seen, or None.
        padding: [B] int, leading positions that are no tokens, at most T, or None.
        chunk_size: tokens to a chunk, rounded up to a power of two; the kernels choose their own.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the state after the last token [B, H, P, N] in
        float32 (float64 when any argument is).

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, state, starts, padding)
    if x.shape[1] and kernels_run(
        "ssd", x, dt, A, B, C, D, z, dt_bias, state, unusual=_unusual(x, B)
    ):
        from tamba.ops.kernels import ssd as kernels

        return kernels.ssd(
            x,
            dt,
            A.float(),
            B,
            C,
            D=dense(D),
            z=z,
            dt_bias=dense(dt_bias),
            dt_softplus=dt_softplus,
            dt_limit=dt_limit,
            state=None if state is None else state.float(),
            starts=starts,
            padding=dense(padding),
        )
    y, state = _on_torch(
        x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, state, starts, padding, chunk_size
    )
    if z is not None and y.dtype == torch.bfloat16 and rows_for_cpu(y, z):
        from tamba.ops.kernels import rows_cpu

        y = rows_cpu.gate(z, y)
    elif z is not None:
        y = (y * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))).to(x.dtype)
    return y, state


def _unusual(x: Tensor, B: Tensor) -> str | None:
    """What about the sizes or the card the kernels do not cover."""
    for name, size in (("head_dim", x.shape[3]), ("d_state", B.shape[3])):
        if size not in _KERNEL_SIZES:
            return f"{name} {size} is none of {', '.join(map(str, _KERNEL_SIZES))}"
    if x.is_cuda and not _roomy(torch.cuda.get_device_capability(x.device)):
        return "their tiles need the 160 kB of shared memory a block that this card lacks"
    return None


def _roomy(capability: tuple[int, int]) -> bool:
    """Whether a block has 160 kB of shared memory: A100, H100, B200 and their kin."""
    return capability == (8, 0) or capability[0] in (9, 10)


def _on_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    state: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`ssd` without the gate, in plain torch."""
    dtype = compute_dtype(x, dt, A, B, C)
    if state is None:
        state = torch.zeros(
            x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=dtype, device=x.device
        )
    state, A = state.to(dtype), A.to(dtype)
    if x.shape[1] == 0:
        return x.clone(), state.clone()
    dt = step_sizes(
        dt, dtype=dtype, bias=dt_bias, softplus=dt_softplus, limit=dt_limit, padding=padding
    )
    starts = real_starts(starts, padding)
    if x.shape[1] <= _STEPS:
        return _by_steps(x, dt, A, B, C, D, state, starts)
    chunk = 1 << (min(chunk_size, x.shape[1]) - 1).bit_length()
    absent = -x.shape[1] % chunk
    if absent:  # whole chunks from here on: tokens with dt = 0 pass the state on as it is
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, absent)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, absent))
        starts = None if starts is None else F.pad(starts, (0, absent))
    keep = torch.is_grad_enabled()
    y, state = _Chunked.apply(x, dt, A, B, C, D, state, starts, chunk, keep)
    return y[:, : y.shape[1] - absent], state


def _check_shapes(
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
) -> None:
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    fits = (
        dt.shape == x.shape[:3]
        and A.shape == (heads,)
        and B.shape == C.shape == (batch, length, groups, d_state)
        and heads % groups == 0
        and shaped(z, *x.shape)
        and shaped(state, batch, heads, head_dim, d_state)
        and shaped(D, heads)
        and shaped(dt_bias, heads)
        and shaped(starts, batch, length)
        and shaped(padding, batch)
    )
    if not fits:
        given = shapes(
            x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state, starts=starts,
            padding=padding,
        )  # fmt: skip
        raise ValueError(
            "ssd: expected x and z [B,T,H,P], dt [B,T,H], A, D and dt_bias [H], B and C [B,T,G,N] "
            f"with G dividing H, state [B,H,P,N], starts [B,T], padding [B]; got {given}"
        )


def _by_steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A few tokens, one after another: what decoding costs is the number of operations."""
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    rows = heads // groups * head_dim
    decay = torch.exp(dt * A)
    if starts is not None:
        decay = decay.masked_fill(starts[..., None], 0.0)
    inputs = (x * dt[..., None]).reshape(batch, length, groups, rows, 1)
    B, C = B.to(dt.dtype), C.to(dt.dtype)
    outputs = []
    for t in range(length):
        state = state * decay[:, t, :, None, None]
        state = state.reshape(batch, groups, rows, d_state)
        state = torch.addcmul(state, inputs[:, t], B[:, t, :, None])
        outputs.append(torch.matmul(state, C[:, t, :, :, None]).view(batch, heads, head_dim))
        state = state.view(batch, heads, head_dim, d_state)
    y = outputs[0][:, None] if length == 1 else torch.stack(outputs, dim=1)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dt.dtype)[:, None])
    return y.to(x.dtype), state


def _product_dtype(*operands: Tensor) -> torch.dtype:
    """What matrix products take: bfloat16 when all operands are, else at least float32."""
    if all(t.dtype == torch.bfloat16 for t in operands):
        return torch.bfloat16
    return compute_dtype(*operands)


class _Decays:
    """Products of consecutive decays inside chunks.

    Built by doubling: a block of 2s tokens is two blocks of s, and the decay from a token of the
    first to a token of the second is (what is left of it at the end of the first) times (what the
    second leaves up to there).

    Attributes:
        from_start: [B, K, H, Q], from before the chunk to each token, that token's included.
        to_end: [B, K, H, Q], from after each token to the end of the chunk.
    """

    def __init__(self, decay: Tensor) -> None:
        *lead, chunk = decay.shape
        from_start, to_end = decay, torch.ones_like(decay)
        self._levels: list[tuple[Tensor, Tensor]] = []
        size = 1
        while size < chunk:
            first, second = from_start.view(*lead, -1, 2, size).unbind(-2)
            left, right = to_end.view(*lead, -1, 2, size).unbind(-2)
            self._levels.append((second[..., :, None], left[..., None, :]))
            from_start = torch.cat([first, first[..., -1:] * second], dim=-1)
            to_end = torch.cat([left * second[..., -1:], right], dim=-1)
            size *= 2
        self.from_start = from_start.view(*lead, chunk)
        self.to_end = to_end.view(*lead, chunk)

    def fill(self, at: tuple[slice, slice], blocks: list[Tensor]) -> None:
        """Write the decays between the tokens of a tile's chunks into `blocks` (`lower_blocks`)."""
        for (second, left), block in zip(self._levels, blocks, strict=True):
            torch.mul(second[at], left[at], out=block)


def _lower_blocks(matrix: Tensor) -> list[Tensor]:
    """[..., Q, Q] to its blocks below the diagonal by size s = 1, 2, 4, …: [..., Q / 2s, s, s]."""
    *lead, chunk, _ = matrix.shape
    blocks, size = [], 1
    while size < chunk:
        grid = matrix.view(*lead, chunk // (2 * size), 2 * size, chunk // (2 * size), 2 * size)
        diagonal = grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        blocks.append(diagonal[..., size:, :size])
        size *= 2
    return blocks


class _Buffers:
    """The operands of one tile's matrix products, and views of them; reused by tiles of one shape.

    Attributes:
        lead: (S, K, H).
        decay: [S, K, H, Q, Q], from after token j to token i; 1 on and 0 above the diagonal.
        left: [S K H, Q, Q + N], ``[C B^T ∘ decay | C · from_start]``.
        right: [S K H, Q + N, P], ``[dt · x ; state before the chunk]``.
        B_to_end: [S K H, Q, N], ``B · to_end``.
        out: [S K H, Q, P].
        B, C: [S K G, Q, N]; dt, from_start, to_end: [S, K, H, Q, 1], see `_Decays`;
            through: [S, K, H, 1, 1], the decay of a whole chunk. All set by `_Problem.load`.
    """

    B: Tensor
    C: Tensor
    dt: Tensor
    from_start: Tensor
    to_end: Tensor
    through: Tensor

    def __init__(
        self, lead: tuple[int, ...], sizes: tuple[int, int, int], groups: int, like: Tensor
    ) -> None:
        (rows, chunks, heads), (chunk, d_state, head_dim) = lead, sizes
        count, width = rows * chunks * heads, chunk + d_state
        self.lead = lead
        wide = compute_dtype(like)
        self.decay = like.new_zeros(*lead, chunk, chunk, dtype=wide)
        self.decay.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        self.decay_blocks = _lower_blocks(self.decay)
        self.left = like.new_empty(count, chunk, width)
        self.right = like.new_empty(count, width, head_dim)
        self.B_to_end = like.new_empty(count, chunk, d_state)
        self.out = like.new_empty(count, chunk, head_dim)
        most = max(chunk, d_state) * max(width, head_dim)
        self._scratch = like.new_empty(count * most, dtype=wide)

        self.inputs = self.right[:, :chunk]
        by_head = self.right.view(*lead, width, head_dim)
        self.inputs_by_head, self.states = by_head[..., :chunk, :], by_head[..., chunk:, :]
        self.states_as_columns = self.right[:, chunk:].flatten(1)[..., None]
        grouped = (rows, chunks, groups, heads // groups)
        by_group = self.left.view(*grouped, chunk, width)
        self.scores, self.C_from_start = by_group[..., :chunk], by_group[..., chunk:]
        self.decay_by_group = self.decay.view(*grouped, chunk, chunk)
        self.B_to_end_by_group = self.B_to_end.view(*grouped, chunk, d_state)

    def scratch(self, shape: torch.Size) -> Tensor:
        """Memory to work in, float32, until the next call."""
        return torch.narrow(self._scratch, 0, 0, shape.numel()).view(shape)


class _Problem:
    """The arguments cut into chunks, and the tiles they are worked through in.

    Attributes:
        xs: [B, K, H, Q, P]; Bs, Cs: [B, K, G, Q, N]; dts: [B, K, H, Q]; views of the arguments.
        starts: [B, K, 1, Q] bool or None.
        decays: of all chunks.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        starts: Tensor | None,
        chunk: int,
    ) -> None:
        self.chunk, self.product = chunk, _product_dtype(x, B, C)
        self.xs, self.Bs, self.Cs = self.cut(x), self.cut(B), self.cut(C)
        self.dts = self.cut(dt[..., None])[..., 0].contiguous()
        self.starts = None if starts is None else self.cut(starts[..., None, None])[..., 0]
        decay = torch.exp(self.dts * A[:, None])
        if self.starts is not None:
            decay = decay.masked_fill(self.starts, 0.0)
        self.decays = _Decays(decay)
        # Factors of the operands of matrix products, rounded as those are.
        self._factors = [
            t.to(self.product)[..., None]
            for t in (self.dts, self.decays.from_start, self.decays.to_end)
        ]
        self.batch, self.n_chunks, self.heads = self.xs.shape[:3]
        self.groups, self.d_state, self.head_dim = B.shape[2], B.shape[3], x.shape[3]
        self._buffers: dict[tuple[int, ...], _Buffers] = {}

    def cut(self, tensor: Tensor) -> Tensor:
        """[B, T, I, J] to a view [B, K, I, Q, J]."""
        return torch.unflatten(tensor, 1, (-1, self.chunk)).transpose(2, 3)

    def tiles(self) -> list[list[tuple[slice, slice]]]:
        """(rows, chunks) of the tiles: for each span of rows, those of its chunks in time order."""
        limit = _TILE if self.xs.device.type == "cpu" else _TILE_ELSEWHERE
        chunks = _spans(self.n_chunks, max(1, limit // self.heads))
        longest = chunks[0].stop
        rows = _spans(self.batch, max(1, limit // (self.heads * longest)))
        return [[(row, chunk) for chunk in chunks] for row in rows]

    def load(self, at: tuple[slice, slice]) -> _Buffers:
        """The operands of a tile, all but the states."""
        lead = tuple(self.dts[at].shape[:3])
        tile = self._buffers.get(lead)
        if tile is None:
            sizes = self.chunk, self.d_state, self.head_dim
            like = torch.empty(0, device=self.xs.device, dtype=self.product)
            tile = self._buffers[lead] = _Buffers(lead, sizes, self.groups, like)
        B, C = (t[at].to(self.product).contiguous() for t in (self.Bs, self.Cs))
        tile.B, tile.C = B.flatten(0, 2), C.flatten(0, 2)
        tile.dt, tile.from_start, tile.to_end = (t[at] for t in self._factors)
        tile.through = self.decays.from_start[at][..., -1:, None]
        self.decays.fill(at, tile.decay_blocks)
        scores = torch.bmm(tile.C, tile.B.mT).view(*B.shape[:3], 1, self.chunk, self.chunk)
        torch.mul(scores, tile.decay_by_group, out=tile.scores)
        torch.mul(C.unsqueeze(3), self.by_groups(tile.from_start), out=tile.C_from_start)
        torch.mul(B.unsqueeze(3), self.by_groups(tile.to_end), out=tile.B_to_end_by_group)
        torch.mul(self.xs[at], tile.dt, out=tile.inputs_by_head)
        return tile

    def by_groups(self, tensor: Tensor) -> Tensor:
        """[S, K, H, ...] to [S, K, G, R, ...]."""
        return torch.unflatten(tensor, 2, (self.groups, -1))


def _spans(count: int, most: int) -> list[slice]:
    """`count` things in as few spans of at most `most` as possible, nearly equal, longest first."""
    n_spans = -(-count // most)
    short, longer = divmod(count, n_spans)
    stops = [i * short + min(i, longer) for i in range(n_spans + 1)]
    return [slice(a, b) for a, b in pairwise(stops)]


class _Chunked(torch.autograd.Function):
    """The chunked form over all tiles, and its gradient. T is a multiple of the chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor,
        starts: Tensor | None,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        problem = _Problem(x, dt, A, B, C, starts, chunk)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        ys = problem.cut(y)
        final = torch.empty_like(state, memory_format=torch.contiguous_format)
        entering = None
        if keep and any(ctx.needs_input_grad):
            shape = *problem.xs.shape[:3], problem.d_state, problem.head_dim
            entering = torch.empty(shape, dtype=problem.product, device=x.device)
        skip = None if D is None else D.to(problem.product)[:, None, None]
        for tiles in problem.tiles():
            rows = tiles[0][0]
            running = state[rows].transpose(2, 3)  # [S, H, N, P]
            for at in tiles:
                tile = problem.load(at)
                added = torch.bmm(tile.B_to_end.mT, tile.inputs).view_as(tile.states)
                for k in range(tile.lead[1]):
                    tile.states[:, k] = running
                    running = torch.addcmul(added[:, k], running, tile.through[:, k])
                if entering is not None:
                    entering[at] = tile.states
                out = torch.bmm(tile.left, tile.right, out=tile.out).view_as(tile.inputs_by_head)
                if skip is None:
                    ys[at] = out
                else:
                    torch.addcmul(out, problem.xs[at], skip, out=ys[at])
            final[rows] = running.transpose(2, 3)
        ctx.save_for_backward(x, dt, A, B, C, D, starts, entering)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        x, dt, A, B, C, D, starts, entering = ctx.saved_tensors
        problem = _Problem(x, dt, A, B, C, starts, ctx.chunk)
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        grads = _Gradients(problem, x, B, C)
        grad_state = dt.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
        grad_ys = problem.cut(grad_y)
        skip = None if D is None else D.to(problem.product)[:, None, None]
        for tiles in problem.tiles():
            rows = tiles[0][0]
            running = (grad_state if grad_final is None else grad_final)[rows].transpose(2, 3)
            for at in reversed(tiles):
                tile = problem.load(at)
                tile.states.copy_(entering[at])
                dy = grad_ys[at].to(problem.product).contiguous()
                running = grads.add(at, tile, dy, running, skip)
            grad_state[rows] = running.transpose(2, 3)
        log_decay = grads.balance.flip(-1).cumsum(-1).flip(-1).add_(grads.leaves[..., None])
        if problem.starts is not None:
            log_decay = log_decay.masked_fill_(problem.starts, 0.0)
        grad_A = (log_decay * problem.dts).sum((0, 1, 3))
        grad_dt = grads.dts.addcmul_(log_decay, A[:, None])
        grad_dt = grad_dt.transpose(2, 3).flatten(1, 2)
        grad_D = None if D is None else grads.skip.sum((0, 1, 3)).to(D.dtype)
        return grads.x, grad_dt, grad_A, grads.B, grads.C, grad_D, grad_state, None, None, None


class _Gradients:
    """What the backward pass fills in, tile by tile.

    Attributes:
        x, B, C: gradients, shaped as their arguments.
        dts: [B, K, H, Q], of dt as the factor of x.
        balance: [B, K, H, Q], paths that end at a token less paths that start there.
        leaves: [B, K, H], paths that leave the chunk.
        skip: [B, K, H, Q], of D, by token.
    """

    def __init__(self, problem: _Problem, x: Tensor, B: Tensor, C: Tensor) -> None:
        self._problem = problem
        self.x, self.B, self.C = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C)
        )
        self._xs, self._Bs, self._Cs = (problem.cut(t) for t in (self.x, self.B, self.C))
        self.dts, self.balance, self.skip = (torch.empty_like(problem.dts) for _ in range(3))
        self.leaves = torch.empty_like(problem.dts[..., 0])

    def add(
        self,
        at: tuple[slice, slice],
        tile: _Buffers,
        dy: Tensor,
        running: Tensor,
        skip: Tensor | None,
    ) -> Tensor:
        """Gradients of one tile.

        Args:
            at: its place.
            tile: its operands, states included.
            dy: [S, K, H, Q, P] gradient of the output.
            running: [S, H, N, P] gradient of the state after the tile.
            skip: D [H, 1, 1], or None.

        Returns:
            The gradient of the state before the tile.
        """
        problem, chunk = self._problem, self._problem.chunk
        xs, flat_dy = problem.xs[at], dy.flatten(0, 2)

        d_right = torch.bmm(tile.left.mT, flat_dy)
        d_left = torch.bmm(flat_dy, tile.right.mT)
        d_states = d_right.view(*tile.lead, *d_right.shape[1:])[..., chunk:, :]
        leaving = torch.empty_like(d_states, memory_format=torch.contiguous_format)
        for k in reversed(range(tile.lead[1])):
            leaving[:, k] = running
            running = torch.addcmul(d_states[:, k], running, tile.through[:, k])
        flat_leaving = leaving.flatten(0, 2)
        d_B_to_end = torch.bmm(tile.inputs, flat_leaving.mT)
        d_inputs = torch.baddbmm(d_right[:, :chunk], tile.B_to_end, flat_leaving).view_as(dy)

        work = tile.scratch(dy.shape)
        self.dts[at] = torch.mul(d_inputs, xs, out=work).sum(-1)
        if skip is None:
            torch.mul(d_inputs, tile.dt, out=self._xs[at])
        else:
            self.skip[at] = torch.mul(dy, xs, out=work).sum(-1)
            d_inputs.mul_(tile.dt)
            torch.addcmul(d_inputs, dy, skip, out=self._xs[at])

        # The decay of token t is a factor of every path that starts before t and ends at t or
        # later: the paths by where they end, less those by where they start, summed from t on,
        # plus those that leave the chunk. Only the terms here; the sum waits for all tiles.
        paths = torch.mul(d_left, tile.left, out=tile.scratch(d_left.shape))
        balance = paths.sum(-1).sub_(paths[..., :chunk].sum(-2))
        work = tile.scratch(d_B_to_end.shape)
        out_of_chunk = torch.mul(d_B_to_end, tile.B_to_end, out=work).sum(-1)
        self.balance[at] = balance.sub_(out_of_chunk).view(*tile.lead, chunk)
        if dy.is_cpu:  # a product with one column is no product that a CPU is fast at
            work = tile.scratch(leaving.shape)
            through = torch.mul(leaving, tile.states, out=work).sum((-2, -1))
        else:
            through = torch.bmm(flat_leaving.flatten(1)[:, None], tile.states_as_columns)
        leaves = torch.addcmul(out_of_chunk.sum(-1), through.flatten(), tile.through.flatten())
        self.leaves[at] = leaves.view(tile.lead)

        d_left = problem.by_groups(d_left.view(*tile.lead, *d_left.shape[1:]))
        work = tile.scratch(tile.decay_by_group.shape)
        d_scores = torch.mul(d_left[..., :chunk], tile.decay_by_group, out=work)
        alone = d_scores.shape[3] == 1  # each head has its own B and C
        d_scores = d_scores[:, :, :, 0] if alone else d_scores.sum(3)
        d_scores = d_scores.to(dy.dtype).flatten(0, 2)
        shape = self._Bs[at].shape
        d_C = torch.bmm(d_scores, tile.B).view(shape)
        d_B = torch.bmm(d_scores.mT, tile.C).view(shape)
        d_B_to_end = d_B_to_end.view_as(tile.B_to_end_by_group)
        from_start, to_end = problem.by_groups(tile.from_start), problem.by_groups(tile.to_end)
        if alone:
            d_left, from_start = d_left[:, :, :, 0], from_start[:, :, :, 0]
            torch.addcmul(d_C, d_left[..., chunk:], from_start, out=self._Cs[at])
            torch.addcmul(d_B, d_B_to_end[:, :, :, 0], to_end[:, :, :, 0], out=self._Bs[at])
        else:
            torch.add(d_C, (d_left[..., chunk:] * from_start).sum(3), out=self._Cs[at])
            torch.add(d_B, (d_B_to_end * to_end).sum(3), out=self._Bs[at])
        return running
