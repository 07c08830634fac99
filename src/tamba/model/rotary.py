"""Rotary position angles (Su et al. 2021, arXiv 2104.09864), with transformers' scalings."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tamba.model.config import AttentionSpec
from tamba.ops.backend import rows_for_cpu, short_products_on_cpu


def rotary_key(spec: AttentionSpec) -> str:
    """Layers with equal keys share their angles."""
    return json.dumps([spec.rotary_dim, spec.rope], sort_keys=True)


class RotaryAngles(nn.Module):
    """cos and sin for positions, for one rotary setting.

    Frequencies are recomputed from the setting and never stored as buffers: a buffer would be cast
    with the model (bfloat16 angles are wrong beyond a few hundred tokens) and lost on meta devices.
    """

    def __init__(self, spec: AttentionSpec, max_position_embeddings: int) -> None:
        super().__init__()
        self.spec = spec
        self.kind: str = spec.rope.get("rope_type", "default")
        # Proportional scaling turns the whole head, at frequencies that the factor shapes.
        rope: dict[str, Any] = {
            k: v
            for k, v in spec.rope.items()
            if k != "partial_rotary_factor" or self.kind == "proportional"
        }
        # transformers' functions read sizes from a config; a head of rotary_dim gives exactly the
        # frequencies of the rotated part.
        self.rope_config = LlamaConfig(
            hidden_size=spec.rotary_dim,
            num_attention_heads=1,
            head_dim=spec.rotary_dim,
            max_position_embeddings=max_position_embeddings,
            rope_parameters={"rope_type": self.kind, **rope},
        )
        self._fixed: tuple[Tensor, float] | None = None

    def _frequencies(self, positions: Tensor) -> tuple[Tensor, float]:
        """Inverse frequencies [rotary_dim / 2] and the factor on cos and sin."""
        longest = self.rope_config.max_position_embeddings
        if self.kind == "dynamic" and (length := int(positions.max()) + 1) > longest:
            return self._compute(positions.device, length)
        if self.kind == "longrope":
            original = self.rope_config.rope_parameters["original_max_position_embeddings"]
            if int(positions.max()) + 1 > original:
                return self._compute(positions.device, original + 1)
        if self._fixed is None or self._fixed[0].device != positions.device:
            self._fixed = self._compute(positions.device, None)
        return self._fixed

    def _compute(self, device: torch.device, seq_len: int | None) -> tuple[Tensor, float]:
        if self.kind == "default":
            dim = self.spec.rotary_dim
            exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
            return 1.0 / self.rope_config.rope_parameters["rope_theta"] ** exponent, 1.0
        with torch.device("cpu"):
            frequencies, factor = ROPE_INIT_FUNCTIONS[self.kind](
                self.rope_config, torch.device("cpu"), seq_len=seq_len
            )
        return frequencies.to(device=device, dtype=torch.float32), factor

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos, sin, each [B, T, rotary_dim] in `dtype`."""
        frequencies, factor = self._frequencies(positions)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head: x [B, H, T, P], angles [B, T, rotary_dim]."""
    if x.dtype == torch.bfloat16 and short_products_on_cpu(x) and rows_for_cpu(x, cos.float()):
        # Scores are products, for which autocast would round the result.
        from tamba.ops.kernels import rows_cpu

        return rows_cpu.rotate(x, cos.float(), sin.float())
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    cos, sin = cos[:, None], sin[:, None]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
