"""What of a converted layer can be computed rather than trained.

`calibrate` starts a Mamba-2 mixer from the attention that it replaces, on what that attention did
on some text. With ``q, k, v`` of one head, centred keys ``k' = k - mean(k)`` (softmax does not
notice the mean, a sum does) and to first order in the scores,

    softmax attention  ≈  sum over s of  w(t - s) · (1 + q_t · R(t - s) k'_s / sqrt(P)) · v_s

where R rotates (rotary positions) and the weights w of distances are those of the head. A
state-space head has ``w(d) = exp(-λ d)`` and no R. So, head by head:

- ``λ`` is the one of a few memories from which a linear map comes closest to the head's output;
- ``C`` is q turned by the mean of R under w, which is the best that no rotation can do;
- ``B`` is k', by way of the convolution's bias;
- ``1 +`` is a direction that C and B share as a constant: the one in which q and k vary least;
- the convolution passes each token through; under SiLU it is small, where SiLU is nearly linear;
- the gate, where there is one, is open: SiLU(z) is one, as nearly as a linear map of the input (or
  its bias) can hold it;
- the output projection is the least-squares one, which `fit_output` computes for any mixer.

Shape letters: `n` rows, `T` tokens, `D` d_model, `H` heads, `G` kv heads, `P` head_dim, `F`
d_inner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tamba.errors import UserError
from tamba.model.attention import Attention
from tamba.model.config import AttentionSpec, Mamba2Spec, MixerSpec
from tamba.model.mamba2 import Mamba2Mixer
from tamba.model.recurrent import RecurrentMixer
from tamba.model.rotary import RotaryAngles
from tamba.ops import ssd
from tamba.surgery import OPEN_GATE
from tamba.trace import Seen, computing, places

MEMORIES = (1.5, 4.0, 10.0, 25.0, 64.0, 200.0, 800.0)
"""Tokens that a head may remember: 1 / λ."""
_STEP = 0.5
"""First dt of every head: softplus is neither flat nor steep there."""
_BEFORE_SILU = 0.3
"""Root mean square of what SiLU is given: larger is less linear, smaller comes near the norm's
epsilon."""


def fit_output(
    mixer: RecurrentMixer,
    seen: Seen,
    *,
    ridge: float = 0.1,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> float:
    """Least squares of a mixer's output projection: its features on `seen.inputs` against
    `seen.outputs`.

    Minimises ``|X W - Y|² + ridge · s · n T |W - W0|²`` with X [n T, F] what the projection is
    given, W0 the projection at hand and s the mean square of X. A bias is fitted too, and not
    pulled. Sums are float32 and the solution is found in float64.

    Args:
        mixer: changed in place, in its output projection alone.
        seen: what it should do.
        ridge: the pull; 0 for none, which then needs features of full rank.
        dtype: of matrix products on the way to the features; None for the weights' own.
        batch_size: rows at a time.

    Returns:
        What is left: the mean square of ``X W - Y`` relative to the variance of Y.
    """
    project = mixer.out_proj
    assert isinstance(project, nn.Linear)
    sums = _Normal(project)
    hook = project.register_forward_pre_hook(lambda _, args: sums.features(args[0]))
    try:
        with computing(mixer, dtype):
            for first in range(0, len(seen.inputs), batch_size):
                rows = slice(first, first + batch_size)
                sums.wanted = seen.outputs[rows]
                mixer(seen.inputs[rows], None, places(seen.starts[rows]))
    finally:
        hook.remove()
    return sums.solve(ridge)


class _Normal:
    """Sums over tokens that least squares needs, and their solution for `project`."""

    def __init__(self, project: nn.Linear) -> None:
        self.project = project
        self.wanted = torch.empty(0)
        self._count = 0
        self._gram = self._cross = self._out = self._square = torch.zeros(())

    def features(self, x: Tensor) -> None:
        """Add a batch of what the projection is given, [B, T, F], beside `wanted` [B, T, D]."""
        wide = torch.promote_types(self.project.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, y = x.flatten(0, -2).to(wide), self.wanted.flatten(0, -2).to(wide)
            if self.project.bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            self._count += len(x)
            self._gram = self._gram + x.mT @ x
            self._cross = self._cross + x.mT @ y
            self._out = self._out + y.double().sum(0)
            self._square = self._square + y.double().square().sum()

    def solve(self, ridge: float) -> float:
        """Set the projection; what is left of the variance."""
        gram, cross = self._gram.double(), self._cross.double()
        weight = self.project.weight.detach().double().mT
        n_features = len(weight)
        if self.project.bias is not None:
            weight = torch.cat([weight, self.project.bias.detach().double()[None]])
        pull = torch.zeros(len(weight), dtype=torch.float64, device=gram.device)
        pull[:n_features] = ridge * gram.diagonal()[:n_features].mean()
        if pull[:n_features].sum() == 0 and ridge:
            raise UserError("least squares", "the mixer gives nothing at all", "check its weights")
        change = torch.linalg.solve(gram + pull.diag(), cross - gram @ weight)
        weight = weight + change
        with torch.no_grad():
            self.project.weight.copy_(weight[:n_features].mT)
            if self.project.bias is not None:
                self.project.bias.copy_(weight[-1])
        left = self._square - (2 * cross * weight).sum() + (weight * (gram @ weight)).sum()
        variance = self._square - self._out.square().sum() / self._count
        return float((left / variance).clamp_min(0))


def calibrate(
    mixer: RecurrentMixer,
    attention: Attention,
    angles: RotaryAngles | None,
    seen: Seen,
    *,
    ridge: float = 0.1,
    dtype: torch.dtype | None = None,
    memory_rows: int = 8,
    batch_size: int = 8,
) -> float:
    """Set every parameter of a converted mixer in closed form; see the head of this file.

    Args:
        mixer: a Mamba-2 mixer of the same heads as `attention`; changed in place.
        attention: what it replaces.
        angles: the attention's rotary angles, or None where it has none.
        seen: what the attention did, heads included.
        ridge: as for `fit_output`.
        dtype: of matrix products; None for the weights' own.
        memory_rows: rows that memories are chosen on.
        batch_size: rows at a time.

    Returns:
        As `fit_output`.

    Raises:
        UserError: a mixer of another form.
    """
    if not isinstance(mixer, Mamba2Mixer) or not can_calibrate(mixer.spec, attention.spec):
        raise UserError(
            "least squares of the whole mixer",
            "takes a Mamba-2 layer with the heads of the attention it replaces and a convolution "
            "bias",
            "fit the output projection alone (fit = 'output')",
        )
    maps = _maps(mixer, attention, seen)
    memory, turned = _memories(maps, attention, angles, seen.take(memory_rows), dtype)
    _write(mixer, maps, memory, turned)
    return fit_output(mixer, seen, ridge=ridge, dtype=dtype, batch_size=batch_size)


def can_calibrate(spec: MixerSpec, heads: AttentionSpec) -> bool:
    """Whether `calibrate` knows this pair: a Mamba-2 mixer with the heads of the attention, whose
    convolution has a bias."""
    return (
        isinstance(spec, Mamba2Spec)
        and (spec.n_heads, spec.n_groups, spec.head_dim, spec.d_state, spec.n_kv_heads)
        == (heads.n_heads, heads.n_heads, heads.head_dim, heads.head_dim, heads.n_kv_heads)
        and spec.conv_bias
    )


@dataclass(frozen=True)
class _Maps:
    """Linear maps of the layer input, in float32 at least.

    Args:
        q: [H, P, D], scaled as the attention scales scores; `k` [G, P, D]; `v` [G, P, D].
        q_bias: [H, P]; `k_bias` [G, P] makes keys centred; `v_bias` [G, P].
        constant: [G, P], unit directions in which q and k vary least.
        gate: [D] and its bias: what comes closest to `OPEN_GATE` for every token.
        sizes: root mean squares of v, k' and q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    constant: Tensor
    gate: Tensor
    sizes: tuple[float, float, float]


def _maps(mixer: Mamba2Mixer, attention: Attention, seen: Seen) -> _Maps:
    spec = attention.spec
    H, G, P = spec.n_heads, spec.n_kv_heads, spec.head_dim
    wide = torch.promote_types(attention.q_proj.weight.dtype, torch.float32)
    # Second moments of the input say all that follows asks of q, k and v.
    u = seen.inputs.flatten(0, 1)
    moments, mean = torch.zeros(()), torch.zeros(())
    for part in u.split(8192):
        x = part.to(wide)
        moments, mean = moments + x.mT @ x, mean + x.sum(0)
    moments, mean = moments.double() / len(u), mean.double() / len(u)

    def read(name: str, heads: int) -> tuple[Tensor, Tensor]:
        linear = getattr(attention, name)
        bias = linear.weight.new_zeros(heads * P) if linear.bias is None else linear.bias
        return (
            linear.weight.detach().double().unflatten(0, (heads, P)),
            bias.detach().double().unflatten(0, (heads, P)),
        )

    (q, q_bias), (k, k_bias), (v, v_bias) = read("q_proj", H), read("k_proj", G), read("v_proj", G)
    if attention.q_norm is not None and attention.k_norm is not None:
        # A norm is no linear map; its mean size is.
        q, q_bias = _sized(q, q_bias, attention.q_norm.weight, moments, mean)
        k, k_bias = _sized(k, k_bias, attention.k_norm.weight, moments, mean)
    q, q_bias = q * attention.scaling, q_bias * attention.scaling
    k_bias = -(k @ mean)
    spread = moments - torch.outer(mean, mean)
    q_square = _second(q, q_bias, moments, mean)
    k_square = k @ spread @ k.mT
    per_kv = q_square.unflatten(0, (G, H // G)).sum(1)
    constant = torch.linalg.eigh(k_square + per_kv).eigenvectors[..., 0]
    ridge = 1e-3 * moments.diagonal().mean() * torch.eye(len(mean)).to(moments)
    gate = OPEN_GATE * torch.linalg.solve(moments + ridge, mean)
    v_square = _second(v, v_bias, moments, mean)
    sizes = (_size(v_square), _size(k_square), _size(q_square))
    return _Maps(
        q=q.to(wide),
        k=k.to(wide),
        v=v.to(wide),
        q_bias=q_bias.to(wide),
        k_bias=k_bias.to(wide),
        v_bias=v_bias.to(wide),
        constant=constant.to(wide),
        gate=gate.to(wide),
        sizes=sizes,
    )


def _second(weight: Tensor, bias: Tensor, moments: Tensor, mean: Tensor) -> Tensor:
    """[heads, P, P]: mean of y yᵀ for y = weight u + bias, per head."""
    cross = (weight @ mean)[..., None] * bias[..., None, :]
    return weight @ moments @ weight.mT + cross + cross.mT + bias[..., None] * bias[..., None, :]


def _size(square: Tensor) -> float:
    return math.sqrt(max(float(square.diagonal(dim1=-2, dim2=-1).mean()), 1e-30))


def _sized(
    weight: Tensor, bias: Tensor, norm: Tensor, moments: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """A head's map with the mean effect of an RMSNorm over its P outputs."""
    square = _second(weight, bias, moments, mean).diagonal(dim1=-2, dim2=-1).mean(-1)
    gain = norm.detach().double() * square.rsqrt()[:, None]
    return weight * gain[..., None], bias * gain


def _memories(
    maps: _Maps,
    attention: Attention,
    angles: RotaryAngles | None,
    seen: Seen,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The best memory of each head [H], and its q turned by the mean rotation under it [H, P, D].

    For each memory the head's recurrence runs alone, and a P x P map from its output to what the
    attention's head gave is fitted; the memory that explains most of it wins.
    """
    assert seen.heads is not None
    H, P = maps.q.shape[:2]
    share = H // len(maps.k)
    wide = maps.q.dtype
    turned = torch.stack([_turn(maps, angles, memory) for memory in MEMORIES])  # [M, H, P+1, D]
    k = torch.cat([maps.k, maps.k_bias[..., None]], dim=-1)
    explained = torch.zeros(len(MEMORIES), H, dtype=torch.float64, device=maps.q.device)
    gram = torch.zeros(len(MEMORIES), H, P, P, dtype=wide, device=maps.q.device)
    cross = torch.zeros_like(gram)
    decay = -1.0 / torch.tensor(MEMORIES, device=maps.q.device, dtype=wide)
    A = decay.repeat_interleave(H)
    for row in range(len(seen.inputs)):
        with torch.autocast(seen.inputs.device.type, enabled=False):
            u = seen.inputs[row : row + 1]
            u = torch.cat([u, u.new_ones(*u.shape[:-1], 1)], dim=-1).to(dtype or wide)
            apply = _applied(u)
            B = apply(k) + maps.constant.to(u.dtype)
            v = apply(torch.cat([maps.v, maps.v_bias[..., None]], dim=-1))
            C = apply(turned.flatten(0, 1))
            constants = maps.constant.repeat_interleave(share, 0).repeat(len(MEMORIES), 1)
            C = C + constants.to(u.dtype)
            B, v = (t.repeat_interleave(share, 2).repeat(1, 1, len(MEMORIES), 1) for t in (B, v))
            dt = torch.ones(C.shape[:3], dtype=wide, device=u.device)
            y, _ = ssd(v, dt, A, B, C, starts=places(seen.starts[row : row + 1]).starts)
            y = y[0].to(wide).unflatten(1, (len(MEMORIES), H)).permute(1, 2, 0, 3)
            want = seen.heads[row].to(wide).unflatten(-1, (H, P)).transpose(0, 1)
            gram += y.mT @ y
            cross += y.mT @ want
    power = gram.diagonal(dim1=-2, dim2=-1).double().clamp_min(1e-20)
    scale = power.rsqrt()
    gram, cross = gram.double() * scale[..., None] * scale[..., None, :], cross.double()
    cross = cross * scale[..., None]
    solved = torch.linalg.solve(gram + 1e-3 * torch.eye(P).to(gram), cross)
    explained = (cross * solved).sum((-2, -1))
    best = explained.argmax(0)
    heads = torch.arange(H, device=best.device)
    return torch.tensor(MEMORIES, device=best.device, dtype=wide)[best], turned[best, heads]


def _applied(u: Tensor) -> Callable[[Tensor], Tensor]:
    """Apply [heads, P, D+1] maps to u [1, T, D+1], giving [1, T, heads, P]."""
    return lambda maps: (u @ maps.flatten(0, 1).to(u.dtype).mT).unflatten(-1, maps.shape[:2])


def _turn(maps: _Maps, angles: RotaryAngles | None, memory: float) -> Tensor:
    """[H, P, D+1]: q and its bias turned by the mean of R(d) under weights exp(-d / memory)."""
    q = torch.cat([maps.q, maps.q_bias[..., None]], dim=-1)
    if angles is None:
        return q
    reach = math.ceil(12 * memory)
    distance = torch.arange(reach, device=q.device)
    weight = torch.exp(-distance.double() / memory)
    weight = weight / weight.sum()
    cos, sin = (a[0].double() for a in angles(distance[None], torch.float32))
    # Scaled angles (YaRN) scale q and k, so scores twice.
    scale = (cos[0].square() + sin[0].square()).sqrt()
    half = cos.shape[-1] // 2
    c, s = ((weight @ a * scale)[:half, None].to(q.dtype) for a in (cos, sin))
    first, second, rest = q.split([half, half, q.shape[1] - 2 * half], dim=1)
    return torch.cat([c * first - s * second, c * second + s * first, rest], dim=1)


@torch.no_grad()
def _write(mixer: Mamba2Mixer, maps: _Maps, memory: Tensor, turned: Tensor) -> None:
    spec, s = mixer.spec, mixer.slices
    share = spec.n_heads // len(maps.k)
    weight, bias = mixer.in_proj.weight, mixer.in_proj.bias
    weight[s["x"]] = maps.v.flatten(0, 1).to(weight.dtype)
    weight[s["B"]] = maps.k.flatten(0, 1).to(weight.dtype)
    weight[s["C"]] = turned[..., :-1].flatten(0, 1).to(weight.dtype)
    weight[s["dt"]] = 0.0
    if mixer.spec.proj_bias:
        weight[s["z"]] = 0.0
        bias.zero_()
        bias[s["z"]] = OPEN_GATE
    else:
        weight[s["z"]] = maps.gate.to(weight.dtype)
    parts = {
        "x": maps.v_bias,
        "B": maps.k_bias + maps.constant,
        "C": turned[..., -1] + maps.constant.repeat_interleave(share, 0),
    }
    first = s["x"].start
    taps, shift = mixer.conv1d.weight, mixer.conv1d.bias
    assert shift is not None, "can_calibrate asks for it"
    taps.zero_()
    for (name, part), size in zip(parts.items(), maps.sizes, strict=True):
        channels = slice(s[name].start - first, s[name].stop - first)
        factor = _BEFORE_SILU / size if spec.conv_activation == "silu" else 1.0
        taps[channels, 0, -1] = factor  # the last tap is the present token
        shift[channels] = (part.flatten() * factor).to(shift.dtype)
    step = torch.full_like(memory, _STEP)
    mixer.dt_bias.copy_(torch.log(torch.expm1(step)))
    mixer.A_log.copy_(torch.log(1.0 / (memory * step)))
    mixer.D.zero_()
    # Features are nothing like the attention's now: the fit must not be pulled to its projection.
    for parameter in mixer.out_proj.parameters():
        parameter.zero_()
    if mixer.norm is not None:
        mixer.norm.weight.fill_(1.0)
