"""The parts that every kind of layer shares: norms and MLPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from tamba.model.config import MLPSpec, NormSpec
from tamba.ops.backend import rows_for_cpu, short_products_on_cpu


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dimension, or over `groups`
    equal parts of it; the statistics are taken in float32."""

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if short_products_on_cpu(x) and rows_for_cpu(x, self.weight):
            # Products are all that follows, and they take bfloat16: rounded once, here.
            from tamba.ops.kernels import rows_cpu

            return rows_cpu.rms_norm(x, self.weight, self.eps, self.groups)
        wide = x if x.dtype == torch.float64 else x.float()
        if self.groups > 1:
            wide = wide.unflatten(-1, (self.groups, -1))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.groups > 1:
            wide = wide.flatten(-2)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, groups={self.groups}"


def make_norm(spec: NormSpec, size: int) -> nn.Module:
    """The norm that `spec` describes, over `size` channels."""
    if spec.kind == "rms":
        return RMSNorm(size, spec.eps)
    return nn.LayerNorm(size, eps=spec.eps)


class PaddedLinear(nn.Linear):
    """A linear layer whose outputs are as many as a projection into heads happens to need.

    Where rows of the output begin at odd addresses, CUDA's matrix products fall back to a kernel
    that is three times slower, and everything that reads the output loads it in small pieces. There
    the weight gets rows of zeros up to a multiple of 16 for the time of a product of many tokens.
    """

    _MANY = 256

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., out_features]."""
        spare = -self.out_features % 16
        if not spare or not x.is_cuda or x.numel() < self._MANY * x.shape[-1]:
            return super().forward(x)
        weight = F.pad(self.weight, (0, 0, 0, spare))
        bias = None if self.bias is None else F.pad(self.bias, (0, spare))
        return F.linear(x, weight, bias)[..., : self.out_features]


class MLP(nn.Module):
    """Gated (SwiGLU and kin) or plain two-layer perceptron: [..., D] -> [..., D]."""

    def __init__(self, spec: MLPSpec, d_model: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, spec.d_mlp, bias=spec.bias) if spec.gated else None
        self.up_proj = nn.Linear(d_model, spec.d_mlp, bias=spec.bias)
        self.down_proj = nn.Linear(spec.d_mlp, d_model, bias=spec.bias)
        self.activation = ACT2FN[spec.activation]
        self._silu = spec.activation == "silu"

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self._silu and gate.dtype == torch.bfloat16 and rows_for_cpu(gate, up):
            from tamba.ops.kernels import rows_cpu

            return self.down_proj(rows_cpu.gate(gate, up))
        return self.down_proj(self.activation(gate) * up)
