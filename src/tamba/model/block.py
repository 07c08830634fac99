"""One layer of the stack: norm, mixer, norm, MLP, and how they join the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from tamba.model.attention import Attention
from tamba.model.config import AttentionSpec, BlockSpec, Mamba1Spec, TambaConfig
from tamba.model.layers import MLP, make_norm
from tamba.model.mamba1 import Mamba1Mixer
from tamba.model.mamba2 import Mamba2Mixer
from tamba.model.tokens import Tokens


class Block(GradientCheckpointingLayer):
    """``x + mixer(norm x)``, then ``x + mlp(mlp_norm x)``; both from the same x when parallel."""

    def __init__(self, config: TambaConfig, spec: BlockSpec, layer_idx: int) -> None:
        super().__init__()
        self.spec = spec
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = make_norm(spec.norm, config.d_model)
        self.mixer = _make_mixer(config, spec, layer_idx)
        self.mlp_norm = make_norm(spec.norm, config.d_model) if spec.mlp else None
        self.mlp = MLP(spec.mlp, config.d_model) if spec.mlp else None

    def forward(
        self,
        hidden: Tensor,
        past_key_values: Cache | None,
        tokens: Tokens,
        mixer: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]; the state is read from and written to the cache.

        `mixer` stands in for the layer's own, where a student is trained by parts.
        """
        mixer = self.mixer if mixer is None else mixer
        residual = hidden
        if self.residual_in_fp32:  # the stream is wide, the layers compute in the weights' type
            residual = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            hidden = hidden.to(self._dtype)
        if isinstance(mixer, Attention):
            mixed = mixer(self.norm(hidden), past_key_values, tokens, **kwargs)
        else:
            mixed = mixer(self.norm(hidden), past_key_values, tokens)
        if self.mlp is None or self.mlp_norm is None:
            return residual + mixed
        if self.spec.residual == "parallel":
            return residual + mixed + self.mlp(self.mlp_norm(hidden))
        residual = residual + mixed
        hidden = residual.to(self._dtype) if self.residual_in_fp32 else residual
        return residual + self.mlp(self.mlp_norm(hidden))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.norm.parameters()).dtype


def _make_mixer(config: TambaConfig, spec: BlockSpec, layer_idx: int) -> nn.Module:
    if isinstance(spec.mixer, AttentionSpec):
        return Attention(config, spec.mixer, layer_idx)
    if isinstance(spec.mixer, Mamba1Spec):
        return Mamba1Mixer(config, spec.mixer, layer_idx)
    return Mamba2Mixer(config, spec.mixer, layer_idx)
