"""The matrices that attention and a Mamba-2 mixer multiply their values with.

Shape letters: `B` rows, `T` tokens, `H` heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tamba.model.attention import Attention
from tamba.model.config import AttentionSpec, Mamba2Spec, MixerSpec
from tamba.model.mamba2 import Mamba2Mixer
from tamba.model.recurrent import no_autocast
from tamba.model.rotary import rotate
from tamba.model.tokens import Tokens
from tamba.ops import causal_conv1d
from tamba.ops.reference import ssd_mixing_matrix


def can_compare(mixer: MixerSpec, attention: AttentionSpec) -> bool:
    """Whether both have a matrix for the same heads."""
    return isinstance(mixer, Mamba2Spec) and mixer.n_heads == attention.n_heads


def attention_matrix(attention: Attention, hidden: Tensor, where: Tokens) -> Tensor:
    """hidden [B, T, D] -> [B, H, T, T]: each row a token's weights over those before it."""
    heads = (*hidden.shape[:-1], -1, attention.head_dim)
    q, k = (p(hidden.to(p.weight.dtype)).view(heads) for p in (attention.q_proj, attention.k_proj))
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if attention.rotary_key is not None:
        cos, sin = where.rotary[attention.rotary_key]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k = k.repeat_interleave(attention.num_key_value_groups, dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q):
        scores = q.to(wide) @ k.to(wide).transpose(2, 3) * attention.scaling
        index = torch.arange(hidden.shape[1], device=hidden.device)
        back = index[:, None] - index
        seen = back >= 0
        if attention.spec.sliding_window is not None:
            seen = seen & (back < attention.spec.sliding_window)
        if where.documents is not None:
            seen = seen & (where.documents[:, None, :, None] == where.documents[:, None, None, :])
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def mixing_matrix(mixer: Mamba2Mixer, hidden: Tensor, where: Tokens) -> Tensor:
    """hidden [B, T, D] -> [B, H, T, T]: what the mixer multiplies its values with, D included."""
    s, spec = mixer.slices, mixer.spec
    projected = mixer.in_proj(hidden)
    with no_autocast(projected):
        wide = torch.promote_types(projected.dtype, torch.float32)
        xBC, _ = causal_conv1d(
            projected[..., s["x"].start : s["C"].stop].to(wide),
            mixer.conv1d.weight[:, 0].to(wide),
            None if mixer.conv1d.bias is None else mixer.conv1d.bias.to(wide),
            activation="silu" if spec.conv_activation == "silu" else None,
            starts=where.starts,
        )
        _, B, C = mixer.split_heads(xBC)
        return ssd_mixing_matrix(
            projected[..., s["dt"]].to(wide),
            -torch.exp(mixer.A_log),
            B,
            C,
            D=mixer.D,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            dt_limit=spec.dt_limit,
            starts=where.starts,
        )
