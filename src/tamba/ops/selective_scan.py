"""The selective scan (Mamba-1) on any device that torch knows, without a loop over tokens.

``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = C_t · h_t`` has a decay for every channel and
state, so there is no matrix form to use: the work is elementwise, D · N numbers a token. It is done
in blocks of tokens small enough to stay in cache. Inside a block, tokens are cut into short runs
that all advance together; then each run gets the state that the run before it ended with. Only one
state a block is kept for the gradient, whose pass is the same scan from right to left over
recomputed states; nothing of size B · T · D · N ever exists.

The layout inside is time first and channels last, ``[T, B, N, D]``, so that dt, x (per channel) and
B, C (per state) broadcast along whole rows.

Shape letters: `B` batch, `T` tokens, `D` channels, `G` groups, `N` d_state. Channels are D1 x D2,
one of which is the group: B and C are ``[T, B, N, D1 or 1, D2 or 1]``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tamba.ops.backend import compiles_for_cpu, kernels_run
from tamba.ops.discretize import (
    compute_dtype,
    dense,
    outside_autocast,
    real_starts,
    shaped,
    shapes,
    step_sizes,
)

# Up to this many tokens a plain recurrence needs fewer operations than a block does.
_STEPS = 4
# Numbers of one [T, B, N, D] buffer of a block: several such buffers should fit a core's cache.
# Elsewhere the only concern is memory.
_BLOCK = 1 << 18
_BLOCK_ELSEWHERE = 1 << 25
# Numbers that one operation should at least touch to be worth its call.
_WORTH = 1 << 14


@outside_autocast
def selective_scan(
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
    state: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = (C_t · h_t + D x_t) silu(z_t)``.

    Gu and Dao 2023 (arXiv 2312.00752), section 3.2 and algorithm 2. Any split of the tokens over
    several calls, each given the state that the last one returned, equals one call. Differentiable
    in every tensor but `starts` and `padding`.

    Args:
        x: [B, T, D] inputs.
        dt: [B, T, D] step sizes.
        A: [D, N], not above 0.
        B: [B, T, G, N]; channel d uses group ``d // (D / G)``.
        C: [B, T, G, N].
        D: [D] skip, or None.
        z: [B, T, D] gate, or None.
        dt_bias: [D], added to dt, or None.
        dt_softplus: whether dt goes through softplus after the bias.
        state: [B, D, N] before token 0; None for zeros.
        starts: [B, T] bool, True where a document starts and nothing before is seen, or None.
        padding: [B] int, leading positions that are no tokens, at most T, or None.

    Returns:
        y [B, T, D] in the dtype of `x`, and the state after the last token [B, D, N] in float32
        (float64 when any argument is).

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, state, starts, padding)
    if x.shape[1] > 0 and kernels_run("selective_scan", x, dt, A, B, C, D, z, dt_bias, state):
        from tamba.ops.kernels import selective_scan as kernels

        return kernels.selective_scan(
            x, dt, A, B, C, dense(D), z, dense(dt_bias), dt_softplus, state, starts, dense(padding)
        )
    dtype = compute_dtype(x, dt, A, B, C)
    if state is None:
        state = torch.zeros(x.shape[0], *A.shape, dtype=dtype, device=x.device)
    state, A = state.to(dtype), A.to(dtype)
    if x.shape[1] == 0:
        return x.clone(), state.clone()
    dt = step_sizes(
        dt, dtype=dtype, bias=dt_bias, softplus=dt_softplus, limit=None, padding=padding
    )
    starts = real_starts(starts, padding)
    if x.shape[1] <= _STEPS:
        y, state = _by_steps(x, dt, A, B, C, state, starts)
    elif compiles_for_cpu(x, dtype):
        from tamba.ops.kernels import scan_cpu

        y, state = scan_cpu.selective_scan(x, dt, A, B, C, state, starts)
    else:
        y, state = _by_blocks(x, dt, A, B, C, state, starts)
    if D is not None:
        y = torch.addcmul(y, x.to(dtype), D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


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
    batch, length, channels = x.shape
    fits = (
        dt.shape == x.shape
        and A.shape[:1] == (channels,)
        and B.shape == C.shape
        and B.shape[:2] == (batch, length)
        and channels % B.shape[2] == 0
        and B.shape[3:] == A.shape[1:]
        and shaped(z, *x.shape)
        and shaped(state, batch, *A.shape)
        and shaped(D, channels)
        and shaped(dt_bias, channels)
        and shaped(starts, batch, length)
        and shaped(padding, batch)
    )
    if not fits:
        given = shapes(
            x=x, dt=dt, z=z, A=A, B=B, C=C, D=D, dt_bias=dt_bias, state=state, starts=starts,
            padding=padding,
        )  # fmt: skip
        raise ValueError(
            "selective_scan: expected x, dt and z [B,T,D], A [D,N], B and C [B,T,G,N] with G "
            "dividing D, D and dt_bias [D], state [B,D,N], starts [B,T], padding [B]; got "
            f"{given}"
        )


def _by_steps(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A few tokens, one after another: what decoding costs is the number of operations."""
    batch, length, channels = x.shape
    groups, d_state = B.shape[2:]
    decay = torch.exp(dt[..., None] * A)
    if starts is not None:
        decay = decay.masked_fill(starts[:, :, None, None], 0.0)
    inputs = (x * dt).reshape(batch, length, groups, -1, 1)
    B, C = B.to(dt.dtype), C.to(dt.dtype)
    outputs = []
    for t in range(length):
        state = (state * decay[:, t]).reshape(batch, groups, -1, d_state)
        state = torch.addcmul(state, inputs[:, t], B[:, t, :, None])
        outputs.append(torch.matmul(state, C[:, t, :, :, None]).view(batch, channels))
        state = state.view(batch, channels, d_state)
    y = outputs[0][:, None] if length == 1 else torch.stack(outputs, dim=1)
    return y, state


def _by_blocks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Lay the arguments out for `_Scan`: whole blocks, channels last, B and C to broadcast."""
    groups, tokens = B.shape[2], x.shape[1]
    members = x.shape[2] // groups
    by_member = groups > members  # channels in order of member, then group: long rows broadcast
    if by_member:
        x, dt, A, state = (
            _swap(t, dim, groups, members) for t, dim in ((x, 2), (dt, 2), (A, 0), (state, 1))
        )
    cut = _Cut(x, A.shape[1])
    absent = -tokens % cut.length
    if absent:  # tokens with dt = 0 pass the state on as it is
        x, dt = (F.pad(t, (0, 0, 0, absent)) for t in (x, dt))
        B, C = (F.pad(t, (0, 0, 0, 0, 0, absent)) for t in (B, C))
        starts = None if starts is None else F.pad(starts, (0, absent))
    B, C = (t.transpose(2, 3).unsqueeze(-2 if by_member else -1) for t in (B, C))
    y, state = _Scan.apply(x, dt, A.mT, B, C, state.mT, starts, cut, torch.is_grad_enabled())
    y, state = y[:, :tokens], state.mT.contiguous()
    if by_member:
        y, state = _swap(y, 2, members, groups), _swap(state, 1, members, groups)
    return y, state


def _swap(tensor: Tensor, dim: int, first: int, second: int) -> Tensor:
    """A dimension of first x second things in the order of second x first."""
    return (
        torch.unflatten(tensor, dim, (first, second)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    )


class _Cut:
    """How [B, T, D] is cut into blocks that all have one length, of about `_BLOCK` numbers.

    Attributes:
        rows: spans of the batch that are worked through one after another.
        run: tokens that advance one after another; the longer, the fewer runs follow one another.
        length: tokens in a block, a multiple of `run`.
    """

    def __init__(self, x: Tensor, d_state: int) -> None:
        batch, tokens, channels = x.shape
        size = _BLOCK if x.device.type == "cpu" else _BLOCK_ELSEWHERE
        n_rows = max(1, min(batch, size // (tokens * channels * d_state)))
        self.rows = [slice(row, min(row + n_rows, batch)) for row in range(0, batch, n_rows)]
        token = n_rows * channels * d_state
        self.run = min(16, max(2, _power_of_two(_WORTH // token)))
        # Not below d_state tokens, so that one kept state a block is no more than the arguments.
        length = _power_of_two(max(d_state, size // token))
        n_blocks = -(-tokens // length)
        self.length = -(-tokens // (n_blocks * self.run)) * self.run

    def blocks(self, tensor: Tensor, rows: slice) -> list[Tensor]:
        """[B, T, ...] to views [t, rows, ...] of its blocks."""
        return list(torch.split(tensor[rows].transpose(0, 1), self.length))


def _power_of_two(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


class _Chain:
    """``states[t + 1] += decay[t] * states[t]`` for all t in order, or its mirror image.

    Runs of tokens advance together, one token at a time; then each run gets its share of
    the state that the run before it ended with. The views that this needs are made once.

    Args:
        decay: [t, ...].
        product: [t, ...] memory for products of decays inside runs; may be `decay` itself.
        states: [t + 1, ...]. states[0] is what comes in, the rest what each token adds.
        run: tokens in a run.
        backwards: ``states[t] += decay[t] * states[t + 1]`` from the last t to the first instead;
            states[-1] is what comes in.
    """

    def __init__(
        self, decay: Tensor, product: Tensor, states: Tensor, run: int, backwards: bool
    ) -> None:
        order = list(range(run))
        body, edges = states[1:], list(states[::run].unbind(0))
        rest, entering = slice(0, -1), states[:-1:run]
        if backwards:
            order.reverse()
            edges.reverse()
            body, rest, entering = states[:-1], slice(1, None), states[run::run]
        decays, products, runs = (torch.unflatten(t, 0, (-1, run)) for t in (decay, product, body))
        whole = list(products[:, order[-1]].unbind(0))
        if backwards:
            whole.reverse()
        self._apart = product is not decay
        self._tokens = [(decays[:, q], products[:, q], runs[:, q]) for q in order]
        self._edges = list(zip(edges[:-1], whole, edges[1:], strict=True))
        self._rest = runs[:, rest], products[:, rest], entering[:, None]

    def advance(self) -> None:
        decay, product, before = self._tokens[0]
        if self._apart:
            product.copy_(decay)
        for decay, product_here, state in self._tokens[1:]:
            state.addcmul_(decay, before)
            torch.mul(decay, product, out=product_here)
            product, before = product_here, state
        for entering, whole, leaving in self._edges:
            leaving.addcmul_(whole, entering)
        states, products, edges = self._rest
        states.addcmul_(products, edges)


class _Groups:
    """Products over the states or the channels of a block.

    `per_state` tensors (B, C and their gradients) are [t, b, N, D1 or 1, D2 or 1], `per_channel`
    ones [t, b, D], full ones [t, b, N, D]. With one group for all channels they are matrix
    products, which cost a fraction of what the same elementwise work does.
    """

    def __init__(self, per_state: Tensor, channels: int) -> None:
        first, second = per_state.shape[-2:]
        self.single = (first, second) == (1, 1)
        self._shared = -2 if first == 1 else -1  # the dimension of a group's members
        if first == 1:
            first = channels // second
        self._shape = (first, channels // first)

    def outer(self, per_state: Tensor, per_channel: Tensor, out: Tensor) -> None:
        """Their product [t, b, N, D], into `out`."""
        channels = torch.unflatten(per_channel, -1, self._shape)[:, :, None]
        torch.mul(channels, per_state, out=torch.unflatten(out, -1, self._shape))

    def over_states(self, per_state: Tensor, full: Tensor, out: Tensor | None = None) -> Tensor:
        """The sum over N of their product, [t, b, D]."""
        if self.single:
            weight = per_state.flatten(2)[:, :, None]
            if out is None:
                return torch.matmul(weight, full)[:, :, 0]
            torch.matmul(weight, full, out=out[:, :, None])
            return out
        if out is None:
            out = torch.empty_like(full[:, :, 0])
        result, full = torch.unflatten(out, -1, self._shape), torch.unflatten(full, -1, self._shape)
        torch.mul(full[:, :, 0], per_state[:, :, 0], out=result)
        for n in range(1, full.shape[2]):
            result.addcmul_(full[:, :, n], per_state[:, :, n])
        return out

    def over_channels(self, per_channel: Tensor, full: Tensor) -> Tensor:
        """The sum over each group's members of their product, shaped per state."""
        if self.single:
            return torch.matmul(per_channel[:, :, None], full.mT)[:, :, 0, :, None, None]
        full, weight = (
            torch.unflatten(full, -1, self._shape),
            torch.unflatten(per_channel, -1, self._shape),
        )
        states = range(full.shape[2])
        parts = [(full[:, :, n] * weight).sum(self._shared, keepdim=True) for n in states]
        return torch.stack(parts, dim=2)

    def spread(self, per_state: Tensor) -> Tensor:
        """[t, b, D1 or 1, D2 or 1] to a view [t, b, D] or one that broadcasts as it."""
        if self.single:
            return per_state.flatten(2)
        return per_state.expand(*per_state.shape[:2], *self._shape).flatten(2)

    def gather(self, per_channel: Tensor) -> Tensor:
        """[t, b, D] summed over each group's members, [t, b, 1, D1 or 1, D2 or 1]."""
        if self.single:
            return per_channel.sum(-1)[:, :, None, None, None]
        return torch.unflatten(per_channel, -1, self._shape).sum(self._shared, keepdim=True)[
            :, :, None
        ]


class _Workspace:
    """Buffers for one block, and the recurrence over them, reused by all blocks.

    Attributes:
        decay: [t, b, N, D]. When there is no gradient to follow, `states` overwrites it.
        states: [t + 1, b, N, D], before and after each token.
    """

    def __init__(
        self, cut: _Cut, rows: slice, A: Tensor, groups: _Groups, backward: bool = False
    ) -> None:
        length, shape = cut.length, (rows.stop - rows.start, *A.shape)
        self._A, self.groups = A, groups
        self.decay = A.new_empty(length, *shape)
        self.states = A.new_empty(length + 1, *shape)
        product = self.decay
        if backward:
            product = torch.empty_like(self.decay)
            self.adjoint = torch.empty_like(self.states)
            self._back = _Chain(self.decay, product, self.adjoint, cut.run, backwards=True)
            self.back, self.ahead = self.adjoint[:-1], self.adjoint[1:]
        self._forth = _Chain(self.decay, product, self.states, cut.run, backwards=False)
        self.before, self.after = self.states[:-1], self.states[1:]

    def run(self, dt: Tensor, inputs: Tensor, B: Tensor, starts: Tensor | None) -> None:
        """Fill `states`, whose first is given, from dt, dt * x [t, b, D] and B."""
        torch.mul(dt[:, :, None], self._A, out=self.decay)
        self.decay.exp_()
        if starts is not None:
            self.decay.masked_fill_(starts[:, :, None, None], 0.0)
        self.groups.outer(B, inputs, self.after)
        self._forth.advance()

    def run_back(self, dy: Tensor, C: Tensor) -> None:
        """Fill `adjoint`, whose last is given: what the loss gains from the state before a token.

        That is the token's decay times what it gains from the state after it, which is what y
        takes from there and what later tokens do.
        """
        self.groups.outer(C, dy, self.back)
        self.back.mul_(self.decay)
        self._back.advance()


class _Scan(torch.autograd.Function):
    """The scan and its gradient, block by block.

    Arguments: x, dt [B, T, D]; A [N, D]; B, C [B, T, N, D1 or 1, D2 or 1]; state [B, N, D];
    starts [B, T] bool or None; how to cut, T being a multiple of its length; whether to keep what
    the gradient needs. Gives y [B, T, D] in the dtype of dt and the last state [B, N, D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        starts: Tensor | None,
        cut: _Cut,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        A, dtype = A.contiguous(), dt.dtype
        groups = _Groups(B, x.shape[2])
        y = torch.empty_like(dt, memory_format=torch.contiguous_format)
        final = torch.empty_like(state, memory_format=torch.contiguous_format)
        n_blocks = x.shape[1] // cut.length
        entering = None
        if keep and any(ctx.needs_input_grad):
            entering = dt.new_empty(n_blocks, *state.shape)
        work = None
        for rows in cut.rows:
            if work is None or rows.stop - rows.start != work.states.shape[1]:
                work = _Workspace(cut, rows, A, groups)
            work.states[-1] = state[rows]
            xs, dts, Bs, Cs, ys = (cut.blocks(t, rows) for t in (x, dt, B, C, y))
            begins = [None] * n_blocks if starts is None else cut.blocks(starts, rows)
            for k in range(n_blocks):
                work.states[0] = work.states[-1]
                if entering is not None:
                    entering[k, rows] = work.states[0]
                work.run(dts[k], xs[k] * dts[k], Bs[k].to(dtype), begins[k])
                groups.over_states(Cs[k].to(dtype), work.after, out=ys[k])
            final[rows] = work.states[-1]
        ctx.save_for_backward(x, dt, A, B, C, starts, entering)
        ctx.cut = cut
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        x, dt, A, B, C, starts, entering = ctx.saved_tensors
        cut, dtype = ctx.cut, dt.dtype
        groups = _Groups(B, x.shape[2])
        if grad_y is None:
            grad_y = torch.zeros_like(dt)
        grads = [torch.empty_like(t) for t in (x, dt, B, C)]
        grad_state = torch.zeros_like(entering[0])
        if grad_final is not None:
            grad_state.copy_(grad_final)
        work, grad_A = None, torch.zeros_like(A)
        for rows in cut.rows:
            if work is None or rows.stop - rows.start != work.states.shape[1]:
                work = _Workspace(cut, rows, A, groups, backward=True)
            work.adjoint[0] = grad_state[rows]
            xs, dts, Bs, Cs, dys = (cut.blocks(t, rows) for t in (x, dt, B, C, grad_y))
            places = zip(*(cut.blocks(t, rows) for t in grads), strict=True)
            begins = [None] * len(xs) if starts is None else cut.blocks(starts, rows)
            for k, (d_x, d_dt, d_B, d_C) in reversed(list(enumerate(places))):
                work.states[0] = entering[k, rows]
                B_here, C_here, dy = Bs[k].to(dtype), Cs[k].to(dtype), dys[k]
                inputs = xs[k] * dts[k]
                work.run(dts[k], inputs, B_here, begins[k])
                d_C.copy_(groups.over_channels(dy, work.after))
                work.adjoint[-1] = work.adjoint[0]
                work.run_back(dy, C_here)

                # A token's input goes to the state after it, from where y_t and later tokens take.
                d_inputs = groups.over_states(B_here, work.ahead)
                d_inputs.addcmul_(groups.spread((C_here * B_here).sum(2)), dy)
                torch.mul(d_inputs, dts[k], out=d_x)
                overlap = groups.gather(dy * inputs)
                later = groups.over_channels(inputs, work.ahead)
                torch.addcmul(later, C_here, overlap, out=d_B)

                d_log = work.before.mul_(work.back)  # of dt · A
                grad_A.add_((d_log * dts[k][:, :, None]).sum((0, 1)))
                torch.addcmul(d_log.mul_(A).sum(2), d_inputs, xs[k], out=d_dt)
            grad_state[rows] = work.adjoint[0]
        d_x, d_dt, d_B, d_C = grads
        return d_x, d_dt, grad_A, d_B, d_C, grad_state, None, None, None
