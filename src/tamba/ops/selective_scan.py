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

from tamba.ops.discretize import compute_dtype, outside_autocast, real_starts, step_sizes

# Up to this many tokens a plain recurrence needs fewer operations than a block does.
_STEPS = 4
# Numbers of one [T, B, N, D] buffer of a block: several such buffers should fit a core's cache.
# Elsewhere the only concern is memory.
_BLOCK = 1 << 18
_BLOCK_ELSEWHERE = 1 << 25
# Tokens that advance one after another inside a block.
_RUN = 4


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
        padding: [B] int, leading positions that are no tokens, or None.

    Returns:
        y [B, T, D] in the dtype of `x`, and the state after the last token [B, D, N] in float32
        (float64 when any argument is).

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check_shapes(x, dt, A, B, C, z, state)
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
    scan = _by_steps if x.shape[1] <= _STEPS else _by_blocks
    y, state = scan(x, dt, A, B, C, state, starts)
    if D is not None:
        y = torch.addcmul(y, x.to(dtype), D.to(dtype))
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, state: Tensor | None
) -> None:
    batch, length, channels = x.shape
    fits = (
        dt.shape == x.shape
        and A.shape[:1] == (channels,)
        and B.shape == C.shape
        and B.shape[:2] == (batch, length)
        and channels % B.shape[2] == 0
        and B.shape[3:] == A.shape[1:]
        and (z is None or z.shape == x.shape)
        and (state is None or state.shape == (batch, *A.shape))
    )
    if not fits:
        raise ValueError(
            "selective_scan: expected x, dt and z [B,T,D], A [D,N], B and C [B,T,G,N] with G "
            f"dividing D, state [B,D,N]; got x {tuple(x.shape)}, dt {tuple(dt.shape)}, "
            f"z {None if z is None else tuple(z.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, "
            f"C {tuple(C.shape)}, state {None if state is None else tuple(state.shape)}"
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
    inputs = (x * dt).view(batch, length, groups, -1, 1)
    B, C = B.to(dt.dtype), C.to(dt.dtype)
    outputs = []
    for t in range(length):
        state = (state * decay[:, t]).view(batch, groups, -1, d_state)
        state = torch.addcmul(state, inputs[:, t], B[:, t, :, None])
        outputs.append(torch.matmul(state, C[:, t, :, :, None]).view(batch, channels))
        state = state.view(batch, channels, d_state)
    y = outputs[0][:, None] if length == 1 else torch.stack(outputs, dim=1)
    return y, state


def _by_blocks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Lay the arguments out for `_Scan`: channels last, the longer of group and member innermost."""
    groups = B.shape[2]
    members = x.shape[2] // groups
    if groups > members:  # order channels by member, then group
        x, dt, A, state = (
            t.unflatten(dim, (groups, members)).transpose(dim, dim + 1).flatten(dim, dim + 1)
            for t, dim in ((x, 2), (dt, 2), (A, 0), (state, 1))
        )
        B, C = (t.transpose(2, 3)[..., None, :] for t in (B, C))  # [B, T, N, 1, G]
    else:
        B, C = (t.transpose(2, 3)[..., None] for t in (B, C))  # [B, T, N, G, 1]
    y, state = _Scan.apply(x, dt, A.mT, B, C, state.mT, starts)
    state = state.mT
    if groups > members:
        y, state = (
            t.unflatten(dim, (members, groups)).transpose(dim, dim + 1).flatten(dim, dim + 1)
            for t, dim in ((y, 2), (state, 1))
        )
    return y, state


class _Blocks:
    """How [B, T, D] is cut into blocks, and the buffers that all blocks share.

    Attributes:
        rows: spans of the batch that are worked through one after another.
        length: tokens in a block, a multiple of `_RUN`.
    """

    def __init__(self, x: Tensor, d_state: int, dtype: torch.dtype) -> None:
        batch, tokens, channels = x.shape
        size = _BLOCK if x.device.type == "cpu" else _BLOCK_ELSEWHERE
        most = -(-tokens // _RUN) * _RUN
        n_rows = max(1, min(batch, size // (most * channels * d_state)))
        fitting = size // (n_rows * channels * d_state) // _RUN * _RUN
        # Not below d_state tokens, so that one kept state a block is no more than the arguments.
        self.length = min(most, max(fitting, -(-d_state // _RUN) * _RUN))
        self.rows = [slice(row, min(row + n_rows, batch)) for row in range(0, batch, n_rows)]
        self.tokens = [slice(t, min(t + self.length, tokens)) for t in range(0, tokens, self.length)]
        self._shape = (self.length, n_rows, d_state, channels)
        self._like = {"device": x.device, "dtype": dtype}

    def buffer(self, extra: int = 0) -> Tensor:
        """[length + extra, rows, N, D]."""
        return torch.empty(self._shape[0] + extra, *self._shape[1:], **self._like)


def _take(tensor: Tensor, rows: slice, tokens: slice, dtype: torch.dtype) -> Tensor:
    """A block of [B, T, ...] as [t, rows, ...], in `dtype`, with zero tokens up to whole runs."""
    part = tensor[rows, tokens].transpose(0, 1).to(dtype)
    absent = -part.shape[0] % _RUN
    if absent:
        part = torch.cat([part, part.new_zeros(absent, *part.shape[1:])])
    return part


def _runs(tensor: Tensor) -> Tensor:
    """[t, ...] to [t / run, run, ...]."""
    return tensor.unflatten(0, (-1, _RUN))


def _scan_right(decay: Tensor, product: Tensor, states: Tensor) -> None:
    """``states[t + 1] += decay[t] * states[t]`` for all t in order.

    Args:
        decay: [t, ...].
        product: [t, ...] memory for products of decays inside runs; may be `decay` itself.
        states: [t + 1, ...]; states[0] is what comes in, the rest what each token adds.
    """
    length = decay.shape[0]
    decays, products, body = _runs(decay), _runs(product), _runs(states[1:])
    if product is not decay:
        products[:, 0] = decays[:, 0]
    for q in range(1, _RUN):
        body[:, q].addcmul_(decays[:, q], body[:, q - 1])
        torch.mul(decays[:, q], products[:, q - 1], out=products[:, q])
    edges, whole = states[::_RUN].unbind(0), products[:, -1].unbind(0)
    for k, through in enumerate(whole):
        edges[k + 1].addcmul_(through, edges[k])
    body[:, :-1].addcmul_(products[:, :-1], states[:length:_RUN, None])


def _scan_left(decay: Tensor, product: Tensor, states: Tensor) -> None:
    """``states[t] += decay[t] * states[t + 1]`` for all t in reverse.

    The arguments are those of `_scan_right`, but states[-1] is what comes in.
    """
    length = decay.shape[0]
    decays, products, body = _runs(decay), _runs(product), _runs(states[:-1])
    if product is not decay:
        products[:, -1] = decays[:, -1]
    for q in reversed(range(_RUN - 1)):
        body[:, q].addcmul_(decays[:, q], body[:, q + 1])
        torch.mul(decays[:, q], products[:, q + 1], out=products[:, q])
    edges, whole = states[::_RUN].unbind(0), products[:, 0].unbind(0)
    for k in reversed(range(len(whole))):
        edges[k].addcmul_(whole[k], edges[k + 1])
    body[:, 1:].addcmul_(products[:, 1:], states[_RUN :: _RUN, None])


def _over_states(states: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out[t, b, d] = Σ_n weight[t, b, n, ·] states[t, b, n, d]``; weight [t, b, n, d1, d2]."""
    if weight.shape[3:] == (1, 1):
        torch.matmul(weight[..., 0].mT, states, out=out[:, :, None])
        return out
    shape = _channels(weight, states.shape[-1])
    states, result = states.unflatten(-1, shape), out.unflatten(-1, shape)
    torch.mul(states[:, :, 0], weight[:, :, 0], out=result)
    for n in range(1, weight.shape[2]):
        result.addcmul_(states[:, :, n], weight[:, :, n])
    return out


def _over_channels(states: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """``Σ_d weight[t, b, d] states[t, b, n, d]`` over the members of each group, shaped as `like`."""
    if like.shape[3:] == (1, 1):
        return torch.matmul(states, weight[..., None])[..., None]
    shape = _channels(like, states.shape[-1])
    dim = -2 if like.shape[-2] == 1 else -1
    states, weight = states.unflatten(-1, shape), weight.unflatten(-1, shape)
    parts = [(states[:, :, n] * weight).sum(dim, keepdim=True) for n in range(states.shape[2])]
    return torch.stack(parts, dim=2)


def _channels(weight: Tensor, channels: int) -> tuple[int, int]:
    """D1, D2 from a [..., D1 or 1, D2 or 1] tensor."""
    first, second = weight.shape[-2:]
    return (first, channels // first) if second == 1 else (channels // second, second)


class _Scan(torch.autograd.Function):
    """The scan and its gradient, block by block.

    Arguments: x, dt [B, T, D]; A [N, D]; B, C [B, T, N, D1 or 1, D2 or 1]; state [B, N, D];
    starts [B, T] bool or None. Gives y [B, T, D] in the dtype of dt
    and the last state [B, N, D].
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
    ) -> tuple[Tensor, Tensor]:
        dtype = dt.dtype
        A = A.contiguous()
        blocks = _Blocks(x, A.shape[0], dtype)
        y = torch.empty_like(dt, memory_format=torch.contiguous_format)
        final = torch.empty_like(state, memory_format=torch.contiguous_format)
        entering = None
        if any(ctx.needs_input_grad):
            entering = dt.new_empty(len(blocks.tokens), *state.shape)
        decay, states = blocks.buffer(), blocks.buffer(1)
        for rows in blocks.rows:
            running = state[rows]
            for k, tokens in enumerate(blocks.tokens):
                if entering is not None:
                    entering[k, rows] = running
                block = _Block(rows, tokens, x, dt, A, B, starts)
                here, reached = block.run(decay, decay, states, running)
                weight = _take(C, rows, tokens, dtype)
                out = _over_states(reached[1:], weight, torch.empty_like(block.dt))
                y[rows, tokens] = out[: block.real].transpose(0, 1)
                running = reached[-1].clone()
            final[rows] = running
        ctx.save_for_backward(x, dt, A, B, C, starts, entering)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
        x, dt, A, B, C, starts, entering = ctx.saved_tensors
        dtype = dt.dtype
        if grad_y is None:
            grad_y = torch.zeros_like(dt)
        blocks = _Blocks(x, A.shape[0], dtype)
        grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(t) for t in (x, dt, B, C))
        grad_state = torch.zeros_like(entering[0]) if grad_final is None else grad_final.clone()
        decay, product, states = blocks.buffer(), blocks.buffer(), blocks.buffer(1)
        adjoint, by_A = blocks.buffer(1), blocks.buffer().zero_()
        for rows in blocks.rows:
            running = grad_state[rows]
            for k, tokens in reversed(list(enumerate(blocks.tokens))):
                block = _Block(rows, tokens, x, dt, A, B, starts)
                here, reached = block.run(decay, product, states, entering[k, rows])
                dy = _take(grad_y, rows, tokens, dtype)
                C_here = _take(C, rows, tokens, dtype)
                d_C = _over_channels(reached[1:], dy, C_here)

                # back[t] is the gradient of the state before token t: decay times that of the
                # state after it, which is what y_t takes from it plus back[t + 1].
                back = adjoint[: here.shape[0] + 1, : here.shape[1]]
                block.outer(dy, C_here, back[:-1])
                back[:-1].mul_(here)
                back[-1] = running
                _scan_left(here, product[: here.shape[0], : here.shape[1]], back)
                running = back[0].clone()

                ahead = back[1:]
                shape = _channels(block.B, x.shape[2])
                met = (C_here * block.B).sum(2).expand(*dy.shape[:2], *shape).flatten(2)
                d_inputs = _over_states(ahead, block.B, torch.empty_like(dy)).addcmul_(met, dy)
                d_B = _over_channels(ahead, block.inputs, block.B)
                overlap = dy * block.inputs
                if block.B.shape[3:] == (1, 1):
                    overlap = overlap.sum(-1)[:, :, None, None, None]
                else:
                    dim = -2 if block.B.shape[-2] == 1 else -1
                    overlap = overlap.unflatten(-1, shape).sum(dim, keepdim=True)[:, :, None]
                d_B = d_B.addcmul_(C_here, overlap)

                # d loss / d (dt_t A), [t, rows, N, D].
                d_log = back[:-1].mul_(reached[:-1])
                by_A[: here.shape[0], : here.shape[1]].addcmul_(d_log, block.dt[:, :, None])
                d_dt = d_log.mul_(A).sum(2).addcmul_(d_inputs, block.x)

                for grad, part in (
                    (grad_x, d_inputs * block.dt), (grad_dt, d_dt), (grad_B, d_B), (grad_C, d_C)
                ):  # fmt: skip
                    grad[rows, tokens] = part[: block.real].transpose(0, 1)
            grad_state[rows] = running
        return grad_x, grad_dt, by_A.sum((0, 1)), grad_B, grad_C, grad_state, None


class _Block:
    """A block's arguments, [t, rows, ...] in the computing dtype.

    Attributes:
        x, dt, inputs: [t, rows, D]; inputs is dt * x.
        B: [t, rows, N, D1 or 1, D2 or 1].
        real: how many of the t are tokens; the rest fill up the last run.
    """

    def __init__(
        self,
        rows: slice,
        tokens: slice,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        starts: Tensor | None,
    ) -> None:
        dtype = dt.dtype
        self.real = tokens.stop - tokens.start
        self.x, self.dt, self.B = (_take(t, rows, tokens, dtype) for t in (x, dt, B))
        self.inputs = self.x * self.dt
        self._A = A
        self._keep = None if starts is None else 1 - _take(starts, rows, tokens, dtype)

    def outer(self, per_channel: Tensor, per_state: Tensor, out: Tensor) -> None:
        """``out[t, b, n, d] = per_state[t, b, n, ·] * per_channel[t, b, d]``."""
        shape = _channels(per_state, per_channel.shape[-1])
        channels = per_channel.unflatten(-1, shape)[:, :, None]
        torch.mul(channels, per_state, out=out.unflatten(-1, shape))

    def run(
        self, decay: Tensor, product: Tensor, states: Tensor, entering: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The decays [t, rows, N, D] and the states before and after each token [t + 1, ...].

        With `product` the same memory as `decay`, the decays are lost.
        """
        length, rows = self.dt.shape[:2]
        overwrites = product is decay
        decay, states = decay[:length, :rows], states[: length + 1, :rows]
        product = decay if overwrites else product[:length, :rows]
        torch.mul(self.dt[:, :, None], self._A, out=decay)
        decay.exp_()
        if self._keep is not None:
            decay.mul_(self._keep[:, :, None, None])
        states[0] = entering
        self.outer(self.inputs, self.B, states[1:])
        _scan_right(decay, product, states)
        return decay, states
