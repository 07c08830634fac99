"""Softmax attention as a mixer: MHA and GQA, rotary, q/k norm, sliding window.

The product itself goes through transformers' attention interface (eager, sdpa, flash, flex), but
for packed rows under sdpa on a GPU, which no mask [B, 1, T, T] is written for.
Shape letters: `B` batch, `T` new tokens, `S` keys, `H` heads, `G` kv heads, `P` head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.layers import RMSNorm
from tamba.model.rotary import rotary_key, rotate
from tamba.model.tokens import Tokens
from tamba.ops.attention import causal_attention
from tamba.ops.backend import rows_for_cpu

logger = logging.get_logger(__name__)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    is_causal = True  # read by transformers' attention functions

    def __init__(self, config: TambaConfig, spec: AttentionSpec, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.layer_idx = layer_idx
        self.head_dim = spec.head_dim
        self.num_key_value_groups = spec.n_heads // spec.n_kv_heads
        self.scaling = spec.scale if spec.scale is not None else spec.head_dim**-0.5
        self.rotary_key = rotary_key(spec) if spec.rotary_dim else None
        d_model, d_q, d_kv = (
            config.d_model,
            spec.n_heads * spec.head_dim,
            spec.n_kv_heads * spec.head_dim,
        )
        self.q_proj = nn.Linear(d_model, d_q, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(d_model, d_kv, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(d_model, d_kv, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(d_q, d_model, bias=spec.out_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.qk_norm.eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.qk_norm.eps) if spec.qk_norm else None
        self.weights = AttentionWeights()

    def forward(self, hidden: Tensor, state: Cache | None, tokens: Tokens, **kwargs: Any) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]; keys and values are added to `state` when there is one."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            proj(hidden).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if self.rotary_key is not None:
            cos, sin = tokens.rotary[self.rotary_key]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        dtype = value.dtype
        if state is not None:
            key, value = state.update(key, value, self.layer_idx)
        if tokens.segments is not None:
            if kwargs.get("output_attentions"):
                # As transformers says of sdpa, which this stands in for.
                logger.warning_once(
                    "`output_attentions=True` records nothing under `sdpa`; set attn_implementation"
                    " to `eager`"
                )
            # Autocast knows nothing of the operator; angles and states may be wider than products.
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            window = self.spec.sliding_window
            mixed = _by_document(query, key, value, tokens.segments, self.scaling, window)
            return self.o_proj(mixed)
        if state is None and self._by_products(query, key, value, tokens):
            mixed = causal_attention(query.to(dtype), key.to(dtype), value, self.scaling)
            return self.o_proj(mixed.transpose(1, 2).reshape(*hidden.shape[:-1], -1))
        kind = "full_attention" if self.spec.sliding_window is None else "sliding_attention"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _eager)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            tokens.attention_masks.get(kind),
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.spec.sliding_window,
            position_ids=tokens.positions,
            **kwargs,
        )
        if weights is not None:
            self.weights(weights)
        return self.o_proj(mixed.reshape(*hidden.shape[:-1], -1))

    def _by_products(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens) -> bool:
        """Whether a gradient is to come of plain causal attention in bfloat16 on a CPU."""
        return (
            self.config._attn_implementation == "sdpa"
            and self.spec.sliding_window is None
            and tokens.attention_masks.get("full_attention") is None
            and torch.is_grad_enabled()
            and (query.requires_grad or key.requires_grad or value.requires_grad)
            and value.dtype == torch.bfloat16
            and rows_for_cpu(query, key, value)
        )


def takes_documents(config: TambaConfig, hidden: Tensor) -> bool:
    """Whether attention layers can take packed rows as documents end to end.

    hidden [B, T, D] tells device and type: of a GPU that has the flash kernel that torch carries,
    which computes in 16 bits alone. Other implementations than sdpa are left what they ask for.
    """
    if not hidden.is_cuda or torch.version.hip or config._attn_implementation != "sdpa":
        return False
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else hidden.dtype
    widths = [s.mixer.head_dim for s in config.block_specs if isinstance(s.mixer, AttentionSpec)]
    return (
        dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        and all(width % 8 == 0 and width <= 256 for width in widths)
    )


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, scaling: float, window: int | None
) -> Tensor:
    """[B, H, T, P] queries over [B, G, T, P] keys -> [B, T, H·P], each within its document.

    Flash attention over sequences of any length (Dao 2023, arXiv 2307.08691): work grows with the
    squares of documents, not of rows, and no mask is written.
    """
    rows, _, length, _ = query.shape
    laid = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        *laid,
        edges,
        edges,
        length,
        length,
        0.0,
        True,  # causal
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return mixed.view(rows, length, -1)


class AttentionWeights(nn.Identity):
    """Where the weights [B, H, T, S] pass by, so that `output_attentions` can record them.

    They exist under `eager` alone; others say that they have none.
    """


def _eager(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The readable form: [B, H, T, P] queries over [B, G, S, P] keys -> [B, T, H, P], weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
