"""The maths of the recurrent mixers, written to be read: the truth every fast path is held against.

Plain torch, one obvious operation after another, in float32 or, when any input is float64, in
float64. Nothing here is fast, and nothing here is shared with the fast paths.

Shape letters: `B` batch, `T` tokens, `D` channels, `H` heads, `G` groups, `P` head_dim,
`N` d_state, `W` conv width. An upper-case `A`, `B`, `C`, `D` alone is the SSM quantity of the
papers. Head h uses group ``h // (H / G)``, channel d group ``d // (D / G)``.

`starts[b, t]` (bool) is True where token t begins a new document: it sees nothing before itself,
the given state included. `padding[b]` counts the leading positions of row b that are no tokens:
they change neither state nor window, `starts` is ignored there, and what they give out means
nothing.

Sources: Gu and Dao 2023 (arXiv 2312.00752), section 3.2 and algorithm 2, for the selective scan;
Dao and Gu 2024 (arXiv 2405.21060), sections 3, 5 and 6, for SSD, its matrix form and its chunked
form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> Pair:
    """Depthwise causal convolution, one token after another, over a window of the last W inputs.

    Args:
        x: [B, T, C] inputs.
        weight: [C, W]; the last tap meets the current token.
        bias: [C] or None.
        activation: ``"silu"`` or None.
        state: [B, C, W - 1], the inputs before token 0, oldest first; None for zeros.
        starts: [B, T] bool or None.
        padding: [B] int or None.

    Returns:
        y [B, T, C] and the window after the last token [B, C, W - 1].
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    dtype = _compute_dtype(x, weight)
    if state is None:
        state = x.new_zeros(batch, channels, width - 1)
    window, weight = state.to(dtype), weight.to(dtype)
    starts, real = _starts_and_real(x, starts, padding)
    outputs = []
    for t in range(length):
        window = torch.where(starts[:, t, None, None], 0.0, window)
        seen = torch.cat([window, x[:, t, :, None].to(dtype)], dim=-1)  # [B, C, W]
        y = (seen * weight).sum(-1)
        outputs.append(y if bias is None else y + bias.to(dtype))
        window = torch.where(real[:, t, None, None], seen[..., 1:], window)
    y = torch.stack(outputs, dim=1) if outputs else x.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), window.to(x.dtype)


def ssd_step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Pair:
    """One token of SSD: ``state' = exp(dt A) state + dt x ⊗ B``, ``y = state' C``.

    Args:
        state: [B, H, P, N].
        x: [B, H, P].
        dt: [B, H], ready for use (bias and softplus already applied).
        A: [H], negative.
        B: [B, G, N].
        C: [B, G, N].

    Returns:
        y [B, H, P] and the new state.
    """
    share = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(share, dim=1), C.repeat_interleave(share, dim=1)
    decay = torch.exp(dt * A)[..., None, None]
    state = decay * state + dt[..., None, None] * x[..., None] * B[:, :, None, :]
    return (state * C[:, :, None, :]).sum(-1), state


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
) -> Pair:
    """SSD (Mamba-2) as a recurrence over tokens.

    Args:
        x: [B, T, H, P] inputs.
        dt: [B, T, H] step sizes.
        A: [H], negative.
        B: [B, T, G, N].
        C: [B, T, G, N].
        D: [H] skip, or None.
        dt_bias: [H], added to dt, or None.
        dt_softplus: whether dt goes through softplus after the bias.
        dt_limit: least and greatest dt, applied last, or None.
        state: [B, H, P, N] before token 0; None for zeros.
        starts: [B, T] bool or None.
        padding: [B] int or None.
        chunk_size: unused here; only so that the signature is that of the fast path.

    Returns:
        y [B, T, H, P] and the state after the last token [B, H, P, N].
    """
    del chunk_size
    dtype = _compute_dtype(x, dt, A, B, C)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    state = state.to(dtype)
    starts, real = _starts_and_real(x, starts, padding)
    dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit) * real[..., None]
    outputs = []
    for t in range(x.shape[1]):
        state = torch.where(starts[:, t, None, None, None], 0.0, state)
        y, state = ssd_step(
            state, x[:, t].to(dtype), dt[:, t], A.to(dtype), B[:, t].to(dtype), C[:, t].to(dtype)
        )
        outputs.append(y if D is None else y + D.to(dtype)[:, None] * x[:, t])
    y = torch.stack(outputs, dim=1) if outputs else x
    return y.to(x.dtype), state


def ssd_mixing_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The matrix M of SSD from a zero state: ``y[b, :, h] = M[b, h] @ x[b, :, h]``.

    ``M[i, j] = C_i · B_j exp(dt_{j+1} A + … + dt_i A) dt_j`` for i ≥ j, plus D on the diagonal
    (arXiv 2405.21060, equation 3 and section 5.1). Arguments as for `ssd`.

    Returns:
        [B, H, T, T], lower triangular.
    """
    dtype = _compute_dtype(dt, A, B, C)
    starts, real = _starts_and_real(dt, starts, padding)
    dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit) * real[..., None]
    share = dt.shape[2] // B.shape[2]
    B = B.to(dtype).repeat_interleave(share, dim=2)
    C = C.to(dtype).repeat_interleave(share, dim=2)
    decay = torch.exp(_segment_sums((dt * A.to(dtype)).transpose(1, 2)))  # [B, H, T, T]
    decay = torch.where(_same_document(starts)[:, None], decay, 0.0)
    scores = torch.einsum("bihn,bjhn->bhij", C, B)
    matrix = scores * decay * dt.transpose(1, 2)[:, :, None, :]
    if D is not None:
        matrix = matrix + D.to(dtype)[:, None, None] * torch.eye(dt.shape[1], device=dt.device)
    return matrix


def ssd_chunked(
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
) -> Pair:
    """SSD in chunks: the matrix form inside a chunk, a state from one chunk to the next.

    The block decomposition of arXiv 2405.21060, section 6, one chunk after another. Arguments and
    results as for `ssd`.
    """
    dtype = _compute_dtype(x, dt, A, B, C)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    state, A = state.to(dtype), A.to(dtype)
    starts, real = _starts_and_real(x, starts, padding)
    dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit) * real[..., None]
    share = x.shape[2] // B.shape[2]
    outputs = []
    for at in range(0, x.shape[1], chunk_size):
        span = slice(at, at + chunk_size)
        xs, dts, begins = x[:, span].to(dtype), dt[:, span], starts[:, span]
        Bs, Cs = B[:, span].to(dtype), C[:, span].to(dtype)
        inside = ssd_mixing_matrix(dts, A, Bs, Cs, D=D, starts=begins)
        Bs, Cs = Bs.repeat_interleave(share, dim=2), Cs.repeat_interleave(share, dim=2)
        log_decay = (dts * A).cumsum(1)  # from before the chunk to each token
        sees_state = begins.cumsum(1) == 0
        from_state = torch.exp(log_decay) * sees_state[..., None]
        y = torch.einsum("bhij,bjhp->bihp", inside, xs)
        y = y + torch.einsum("bihn,bhpn,bih->bihp", Cs, state, from_state)
        outputs.append(y)
        reaches_end = _same_document(begins)[:, -1]  # [B, chunk]
        to_end = torch.exp(_segment_sums((dts * A).transpose(1, 2))[..., -1, :]).transpose(1, 2)
        to_end = to_end * reaches_end[..., None]
        state = state * from_state[:, -1, :, None, None]
        state = state + torch.einsum("bjhp,bjhn,bjh,bjh->bhpn", xs, Bs, to_end, dts)
    y = torch.cat(outputs, dim=1) if outputs else x
    return y.to(x.dtype), state


def selective_scan_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> Pair:
    """One token of the selective scan: ``h' = exp(dt A) h + dt x B``, ``y = C · h'``.

    Args:
        state: [B, D, N].
        x: [B, D].
        dt: [B, D], ready for use (bias and softplus already applied).
        A: [D, N], negative.
        B: [B, G, N].
        C: [B, G, N].

    Returns:
        y [B, D] and the new state.
    """
    share = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(share, dim=1), C.repeat_interleave(share, dim=1)
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    return (state * C).sum(-1), state


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
) -> Pair:
    """The selective scan (Mamba-1) as a recurrence over tokens.

    Args:
        x: [B, T, D] inputs.
        dt: [B, T, D] step sizes.
        A: [D, N], negative.
        B: [B, T, G, N].
        C: [B, T, G, N].
        D: [D] skip, or None.
        z: [B, T, D] gate, applied as ``y * silu(z)``, or None.
        dt_bias: [D], added to dt, or None.
        dt_softplus: whether dt goes through softplus after the bias.
        state: [B, D, N] before token 0; None for zeros.
        starts: [B, T] bool or None.
        padding: [B] int or None.

    Returns:
        y [B, T, D] and the state after the last token [B, D, N].
    """
    dtype = _compute_dtype(x, dt, A, B, C)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape)
    state = state.to(dtype)
    starts, real = _starts_and_real(x, starts, padding)
    dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, None) * real[..., None]
    outputs = []
    for t in range(x.shape[1]):
        state = torch.where(starts[:, t, None, None], 0.0, state)
        y, state = selective_scan_step(
            state, x[:, t].to(dtype), dt[:, t], A.to(dtype), B[:, t].to(dtype), C[:, t].to(dtype)
        )
        outputs.append(y if D is None else y + D.to(dtype) * x[:, t])
    y = torch.stack(outputs, dim=1) if outputs else x.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


def selective_scan_mixing_matrix(
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    starts: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The matrix M of the selective scan from a zero state: ``y[b, :, d] = M[b, d] @ x[b, :, d]``.

    ``M[i, j] = Σ_n C_i[n] B_j[n] exp((dt_{j+1} + … + dt_i) A[n]) dt_j`` for i ≥ j, plus D on the
    diagonal. The gate is not part of it. Arguments as for `selective_scan`.

    Returns:
        [B, D, T, T], lower triangular.
    """
    dtype = _compute_dtype(dt, A, B, C)
    starts, real = _starts_and_real(dt, starts, padding)
    dt = _step_sizes(dt.to(dtype), dt_bias, dt_softplus, None) * real[..., None]
    share = dt.shape[2] // B.shape[2]
    B = B.to(dtype).repeat_interleave(share, dim=2)
    C = C.to(dtype).repeat_interleave(share, dim=2)
    elapsed = _segment_sums(dt.transpose(1, 2))  # [B, D, T, T], -inf above the diagonal
    causal = torch.isfinite(elapsed)
    elapsed = torch.where(causal, elapsed, 0.0)
    decay = torch.exp(elapsed[..., None] * A.to(dtype)[:, None, None, :])  # [B, D, T, T, N]
    visible = causal & _same_document(starts)[:, None]
    matrix = torch.einsum("bidn,bjdn,bdijn->bdij", C, B, decay) * dt.transpose(1, 2)[:, :, None, :]
    matrix = torch.where(visible, matrix, 0.0)
    if D is not None:
        matrix = matrix + D.to(dtype)[:, None, None] * torch.eye(dt.shape[1], device=dt.device)
    return matrix


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _starts_and_real(x: Tensor, starts: Tensor | None, padding: Tensor | None) -> Pair:
    """Both as [B, T] bool: where a document starts, and which positions are tokens."""
    batch, length = x.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    if padding is not None:
        real = torch.arange(length, device=x.device) >= padding[:, None]
    return (torch.zeros_like(real) if starts is None else starts & real), real


def _step_sizes(
    dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] | None
) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt if limit is None else dt.clamp(*limit)


def _segment_sums(values: Tensor) -> Tensor:
    """``S[..., i, j] = values[j + 1] + … + values[i]``, -inf for i < j; [..., T] to [..., T, T].

    Summed term by term, not as differences of one running sum, which lose small terms that follow
    large ones.
    """
    length = values.shape[-1]
    ones = torch.ones(length, length, dtype=torch.bool, device=values.device)
    terms = values[..., :, None].expand(*values.shape, length).masked_fill(~ones.tril(-1), 0.0)
    return terms.cumsum(-2).masked_fill(~ones.tril(), float("-inf"))


def _same_document(starts: Tensor) -> Tensor:
    """[B, T, T]: True at (i, j) when no document starts after token j up to token i (i ≥ j)."""
    document = starts.cumsum(1)
    return document[:, :, None] == document[:, None, :]
