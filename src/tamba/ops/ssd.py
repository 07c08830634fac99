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

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tamba.ops.discretize import compute_dtype, outside_autocast, real_starts, step_sizes

# Up to this many tokens a plain recurrence needs fewer operations than one chunk does.
_STEPS = 2
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
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """State space duality: ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t ⊗ B_t``, ``y_t = h_t C_t + D x_t``.

    Any split of the tokens over several calls, each given the state that the last one returned,
    equals one call. Differentiable in every tensor but `starts` and `padding`.

    Args:
        x: [B, T, H, P] inputs.
        dt: [B, T, H] step sizes.
        A: [H], not above 0.
        B: [B, T, G, N]; head h uses group ``h // (H / G)``.
        C: [B, T, G, N].
        D: [H] skip, or None.
        dt_bias: [H], added to dt, or None.
        dt_softplus: whether dt goes through softplus after the bias.
        dt_limit: least and greatest dt, applied last, or None.
        state: [B, H, P, N] before token 0; None for zeros.
        starts: [B, T] bool, True where a document starts and nothing before is seen, or None.
        padding: [B] int, leading positions that are no tokens, or None.
        chunk_size: tokens to a chunk, rounded up to a power of two.

    Returns:
        y [B, T, H, P] in the dtype of `x`, and the state after the last token [B, H, P, N] in
        float32 (float64 when any argument is).

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_shapes(x, dt, A, B, C, state)
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
    y, state = _Chunked.apply(x, dt, A, B, C, D, state, starts, chunk)
    return y, state


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None
) -> None:
    batch, length, heads, head_dim = x.shape
    groups, d_state = B.shape[2:]
    fits = (
        dt.shape == x.shape[:3]
        and A.shape == (heads,)
        and B.shape == C.shape == (batch, length, groups, d_state)
        and heads % groups == 0
        and (state is None or state.shape == (batch, heads, head_dim, d_state))
    )
    if not fits:
        raise ValueError(
            "ssd: expected x [B,T,H,P], dt [B,T,H], A [H], B and C [B,T,G,N] with G dividing H, "
            f"state [B,H,P,N]; got x {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)}, "
            f"B {tuple(B.shape)}, C {tuple(C.shape)}, "
            f"state {None if state is None else tuple(state.shape)}"
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
    inputs = (x * dt[..., None]).view(batch, length, groups, rows, 1)
    B, C = B.to(dt.dtype), C.to(dt.dtype)
    outputs = []
    for t in range(length):
        state = state * decay[:, t, :, None, None]
        state = state.view(batch, groups, rows, d_state)
        state = torch.addcmul(state, inputs[:, t], B[:, t, :, None])
        outputs.append(torch.matmul(state, C[:, t, :, :, None]).view(batch, heads, head_dim))
        state = state.view(batch, heads, head_dim, d_state)
    y = outputs[0][:, None] if length == 1 else torch.stack(outputs, dim=1)
    if D is not None:
        y = torch.addcmul(y, x, D.to(dt.dtype)[:, None])
    return y.to(x.dtype), state


@dataclass
class _Tile:
    """Rows and chunks that are computed together, and the tokens they span."""

    rows: slice
    chunks: slice
    tokens: slice
    absent: int  # tokens that the last chunk lacks


class _Plan:
    """How a problem is cut into chunks and tiles, and the views that go with it."""

    def __init__(self, x: Tensor, B: Tensor, chunk: int) -> None:
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.d_state = B.shape[2:]
        self.share = self.heads // self.groups
        self.chunk = chunk
        self.n_chunks = -(-self.length // chunk)
        tile = _TILE if x.device.type == "cpu" else _TILE_ELSEWHERE
        self.tile_chunks = max(1, min(self.n_chunks, tile // self.heads))
        self.tile_rows = max(1, min(self.batch, tile // (self.heads * self.tile_chunks)))

    def row_spans(self) -> list[slice]:
        return [
            slice(row, min(row + self.tile_rows, self.batch))
            for row in range(0, self.batch, self.tile_rows)
        ]

    def tiles(self, rows: slice) -> list[_Tile]:
        """The tiles of these rows in the order of time."""
        tiles = []
        for first in range(0, self.n_chunks, self.tile_chunks):
            last = min(first + self.tile_chunks, self.n_chunks)
            tokens = slice(first * self.chunk, min(last * self.chunk, self.length))
            absent = last * self.chunk - tokens.stop
            tiles.append(_Tile(rows, slice(first, last), tokens, absent))
        return tiles

    def cut(self, tensor: Tensor, tile: _Tile) -> Tensor:
        """[B, T, I, J] to a tile's [S, K, I, Q, J]; tokens beyond the last are zeros."""
        part = tensor[tile.rows, tile.tokens]
        if tile.absent:
            part = F.pad(part, (0, 0, 0, 0, 0, tile.absent))
        part = part.unflatten(1, (-1, self.chunk))
        return part.transpose(2, 3)

    def put(self, tensor: Tensor, tile: _Tile, part: Tensor) -> None:
        """The inverse of `cut`: write [S, K, I, Q, J] to its place in [B, T, I, J]."""
        part = part.transpose(2, 3).flatten(1, 2) if tile.absent else part.transpose(2, 3)
        if tile.absent:
            tensor[tile.rows, tile.tokens].copy_(part[:, : -tile.absent])
        else:
            tensor[tile.rows, tile.tokens].unflatten(1, (-1, self.chunk)).copy_(part)

    def scalars(self, values: Tensor) -> Tensor:
        """[B, T, H] to [B, chunks, H, Q]; tokens beyond the last are 0."""
        values = F.pad(values, (0, 0, 0, self.n_chunks * self.chunk - self.length))
        return values.unflatten(1, (self.n_chunks, self.chunk)).transpose(2, 3).contiguous()

    def by_groups(self, tensor: Tensor) -> Tensor:
        """[S, K, H, ...] to [S, K, G, R, ...]."""
        return tensor.unflatten(2, (self.groups, self.share))

    def over_heads(self, tensor: Tensor) -> Tensor:
        """[S, K, H, ...] summed over the heads of each group, [S, K, G, ...]."""
        return tensor if self.share == 1 else self.by_groups(tensor).sum(3)

    def unscalars(self, values: Tensor) -> Tensor:
        """The inverse of `scalars`."""
        return values.transpose(2, 3).flatten(1, 2)[:, : self.length]


class _Decays:
    """Products of consecutive decays inside chunks.

    Built by doubling: a block of 2s tokens is two blocks of s, and the decay from a token of the
    first to a token of the second is (what is left of it at the end of the first) times (what the
    second leaves up to there).

    Attributes:
        from_start: [B, chunks, H, Q], from before the chunk to each token, that token's included.
        to_end: [B, chunks, H, Q], from after each token to the end of the chunk.
    """

    def __init__(self, decay: Tensor) -> None:
        *lead, chunk = decay.shape
        from_start, to_end = decay, torch.ones_like(decay)
        self._levels: list[tuple[Tensor, Tensor]] = []
        size = 1
        while size < chunk:
            first, second = from_start.view(*lead, -1, 2, size).unbind(-2)
            left, right = to_end.view(*lead, -1, 2, size).unbind(-2)
            self._levels.append((second, left))
            from_start = torch.cat([first, first[..., -1:] * second], dim=-1)
            to_end = torch.cat([left * second[..., -1:], right], dim=-1)
            size *= 2
        self.from_start = from_start.view(*lead, chunk)
        self.to_end = to_end.view(*lead, chunk)
        self._matrix: Tensor | None = None

    def matrix(self, tile: _Tile) -> Tensor:
        """[S, K, H, Q, Q]: the decay from after token j to token i, 1 on and 0 above the diagonal.

        The result is overwritten by the next call.
        """
        lead, chunk = self.from_start[tile.rows, tile.chunks].shape[:-1], self.from_start.shape[-1]
        if self._matrix is None or self._matrix.shape[:-2] != lead:
            self._matrix = self.from_start.new_zeros(*lead, chunk, chunk)
            self._matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        size = 1
        for second, left in self._levels:
            blocks = self._matrix.view(*lead, chunk // (2 * size), 2 * size, -1, 2 * size)
            blocks = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., size:, :size]
            torch.mul(
                second[tile.rows, tile.chunks][..., :, None],
                left[tile.rows, tile.chunks][..., None, :],
                out=blocks,
            )
            size *= 2
        return self._matrix


class _Chunked(torch.autograd.Function):
    """The chunked form over all tiles, and its gradient."""

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
    ) -> tuple[Tensor, Tensor]:
        plan = _Plan(x, B, chunk)
        product = _product_dtype(x, B, C)
        inside = _Inside(plan, dt, A, starts, product)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        final = torch.empty_like(state)
        needs_grad = any(ctx.needs_input_grad)
        shape = (plan.batch, plan.n_chunks, plan.heads, plan.d_state, plan.head_dim)
        entering = torch.empty(shape, dtype=product, device=x.device) if needs_grad else None
        skip = None if D is None else D.to(dt.dtype)[:, None, None]
        for rows in plan.row_spans():
            running = state[rows].transpose(2, 3)
            for tile in plan.tiles(rows):
                inside.load(tile, x, B, C)
                added = torch.bmm(inside.B_to_end.flatten(0, 2).mT, inside.inputs)
                added = added.view(inside.lead + added.shape[1:])
                through = inside.from_start[..., -1, None, None]
                for k in range(inside.lead[1]):
                    inside.states[:, k] = running
                    running = torch.addcmul(added[:, k], running, through[:, k])
                if entering is not None:
                    entering[tile.rows, tile.chunks] = inside.states
                out = torch.bmm(inside.left, inside.right).view(*inside.lead, chunk, -1)
                if skip is not None:
                    out = torch.addcmul(out, plan.cut(x, tile), skip)
                plan.put(y, tile, out)
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
        plan = _Plan(x, B, ctx.chunk)
        inside = _Inside(plan, dt, A, starts, entering.dtype)
        chunk, d_state = plan.chunk, plan.d_state
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        grad_x, grad_B, grad_C = torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        grad_dt = torch.empty_like(inside.dt)  # [B, chunks, H, Q]
        grad_log = torch.empty_like(inside.dt)  # for dt * A, the logarithm of the decay
        grad_skip = torch.empty_like(inside.dt) if D is not None else None
        grad_state = dt.new_zeros(plan.batch, plan.heads, plan.head_dim, d_state)
        skip = None if D is None else D.to(dt.dtype)[:, None, None]
        for rows in plan.row_spans():
            # What the loss gains from the state after the tokens seen so far (from the right).
            running = grad_state[rows].transpose(2, 3)
            if grad_final is not None:
                running = grad_final[rows].transpose(2, 3)
            for tile in reversed(plan.tiles(rows)):
                at = tile.rows, tile.chunks
                inside.load(tile, x, B, C)
                lead = inside.lead
                inside.states.copy_(entering[at])
                dy = plan.cut(grad_y, tile).to(entering.dtype).contiguous().flatten(0, 2)
                d_right = torch.bmm(inside.left.mT, dy)
                d_left = torch.bmm(dy, inside.right.mT)

                through = inside.from_start[..., -1, None, None]
                d_entering = d_right.view(*lead, chunk + d_state, -1)[..., chunk:, :]
                leaving = torch.empty_like(d_entering, memory_format=torch.contiguous_format)
                for k in reversed(range(lead[1])):
                    leaving[:, k] = running
                    running = torch.addcmul(d_entering[:, k], running, through[:, k])
                leaving = leaving.flatten(0, 2)
                d_B_to_end = torch.bmm(inside.inputs, leaving.mT)
                B_to_end = inside.B_to_end.flatten(0, 2)
                d_inputs = torch.baddbmm(d_right[:, :chunk], B_to_end, leaving)

                # d loss / d log decay of token t: every path that crosses t, i.e. starts before it
                # and ends at it or later. Paths by where they end, less those by where they start,
                # summed from t on, plus those that leave the chunk.
                paths = torch.mul(d_left, inside.left, out=inside.scratch)
                ends, begins = paths.sum(-1), paths[..., :chunk].sum(-2)
                out_of_chunk = torch.mul(d_B_to_end, B_to_end).sum(-1, dtype=dt.dtype)
                through_chunk = (leaving.view_as(d_entering) * inside.states).sum(
                    (-2, -1), dtype=dt.dtype
                )
                leaves = out_of_chunk.sum(-1) + through_chunk.flatten() * through.flatten()
                crossing = (ends - begins - out_of_chunk).flip(-1).cumsum(-1).flip(-1)
                crossing = (crossing + leaves[:, None]).view(*lead, chunk)
                if inside.starts is not None:
                    crossing = crossing.masked_fill(inside.starts[at], 0.0)
                grad_log[at] = crossing

                xs = plan.cut(x, tile)
                d_inputs = d_inputs.view(*lead, chunk, -1)
                dts = inside.dt[at]
                grad_dt[at] = torch.mul(d_inputs, xs).sum(-1, dtype=dt.dtype)
                d_x = torch.mul(d_inputs, dts[..., None])
                if grad_skip is not None and skip is not None:
                    dy = dy.view_as(d_inputs)
                    grad_skip[at] = torch.mul(dy, xs).sum(-1, dtype=dt.dtype)
                    d_x = torch.addcmul(d_x, dy, skip)
                plan.put(grad_x, tile, d_x)

                d_left = d_left.view(*lead, chunk, chunk + d_state)
                d_scores = plan.over_heads(d_left[..., :chunk] * inside.decay).to(entering.dtype)
                d_scores = d_scores.flatten(0, 2)
                d_C = torch.bmm(d_scores, inside.B.flatten(0, 2)).view_as(inside.C)
                d_B = torch.bmm(d_scores.mT, inside.C.flatten(0, 2)).view_as(inside.B)
                d_C = d_C + plan.over_heads(d_left[..., chunk:] * inside.from_start[..., None])
                d_B_to_end = d_B_to_end.view(*lead, chunk, d_state)
                d_B = d_B + plan.over_heads(d_B_to_end * inside.to_end[..., None])
                plan.put(grad_C, tile, d_C)
                plan.put(grad_B, tile, d_B)
            grad_state[rows] = running.transpose(2, 3)
        grad_A = (grad_log * inside.dt).sum((0, 1, 3))
        grad_dt = plan.unscalars(grad_dt.add_(grad_log * A[:, None]))
        grad_D = None
        if grad_skip is not None:
            grad_D = grad_skip.sum((0, 1, 3)).to(D.dtype)
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_state, None, None


def _product_dtype(*operands: Tensor) -> torch.dtype:
    """What matrix products take: bfloat16 when all operands are, else at least float32."""
    if all(t.dtype == torch.bfloat16 for t in operands):
        return torch.bfloat16
    return compute_dtype(*operands)


class _Inside:
    """A tile's operands, which the forward pass and the backward pass both need.

    Attributes, after `load`:
        lead: (S, K, H).
        dt: [B, chunks, H, Q] of the whole problem; `starts` likewise with H = 1, or None.
        from_start, to_end: [S, K, H, Q], see `_Decays`.
        decay: [S, K, H, Q, Q], see `_Decays.matrix`.
        B, C: [S, K, G, Q, N].
        B_to_end: [S, K, H, Q, N], B times what is left of it at the end of the chunk.
        left: [S K H, Q, Q + N], ``[C B^T ∘ decay | C · from_start]``.
        right: [S K H, Q + N, P], ``[dt · x ; state]``; `inputs` and `states` are its parts, and
            `states` [S, K, H, N, P] is left for the caller to fill.
        scratch: [S K H, Q, Q + N], free for use.
    """

    def __init__(
        self, plan: _Plan, dt: Tensor, A: Tensor, starts: Tensor | None, product: torch.dtype
    ) -> None:
        self._plan, self._product = plan, product
        self.dt = plan.scalars(dt)
        decay = torch.exp(self.dt * A[:, None])
        self.starts = None
        if starts is not None:
            self.starts = plan.scalars(starts[..., None])
            decay = decay.masked_fill(self.starts, 0.0)
        self._decays = _Decays(decay)
        self.lead = (0, 0, 0)

    def load(self, tile: _Tile, x: Tensor, B: Tensor, C: Tensor) -> None:
        plan, chunk = self._plan, self._plan.chunk
        at = tile.rows, tile.chunks
        self.from_start, self.to_end = self._decays.from_start[at], self._decays.to_end[at]
        self._allocate(tuple(self.from_start.shape[:3]), x)
        self.decay = self._decays.matrix(tile)
        self.B = plan.cut(B, tile).to(self._product).contiguous()
        self.C = plan.cut(C, tile).to(self._product).contiguous()
        scores = torch.bmm(self.C.flatten(0, 2), self.B.flatten(0, 2).mT)
        scores = scores.view(*self.lead[:2], plan.groups, 1, chunk, chunk)
        left = plan.by_groups(self.left.view(*self.lead, chunk, -1))
        torch.mul(scores, plan.by_groups(self.decay), out=left[..., :chunk])
        from_start, to_end = plan.by_groups(self.from_start), plan.by_groups(self.to_end)
        torch.mul(self.C.unsqueeze(3), from_start.unsqueeze(-1), out=left[..., chunk:])
        torch.mul(
            self.B.unsqueeze(3), to_end.unsqueeze(-1), out=plan.by_groups(self.B_to_end)
        )
        inputs = self.inputs.view(*self.lead, chunk, -1)
        torch.mul(plan.cut(x, tile), self.dt[at].unsqueeze(-1), out=inputs)

    def _allocate(self, lead: tuple[int, ...], x: Tensor) -> None:
        if lead == self.lead:
            return
        self.lead = lead
        plan, like = self._plan, {"device": x.device, "dtype": self._product}
        chunk, d_state, matrices = plan.chunk, plan.d_state, lead[0] * lead[1] * lead[2]
        self.left = torch.empty(matrices, chunk, chunk + d_state, **like)
        self.scratch = torch.empty_like(self.left, dtype=self.dt.dtype)
        self.right = torch.empty(matrices, chunk + d_state, plan.head_dim, **like)
        self.inputs = self.right[:, :chunk]
        self.states = self.right.view(*lead, chunk + d_state, -1)[..., chunk:, :]
        self.B_to_end = torch.empty(*lead, chunk, d_state, **like)
