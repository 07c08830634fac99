"""Causal attention for training on a CPU: torch's forward pass and a backward pass of products.

torch's own backward pass of flash attention on a CPU takes five times as long as the forward
pass. Here the gradient (Dao 2023, arXiv 2307.08691, section 3.1) is taken over spans of queries,
each with the keys up to its end, as batched products whose right-hand sides are shared by all heads
of a group. What lies between the products is a compiled loop: for where `rows_for_cpu` says yes.

Shape letters: `B` batch, `T` tokens, `H` heads, `G` kv heads, `R` heads of a group, `P` head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tamba.ops.discretize import compute_dtype, outside_autocast

# Queries of a span: the shorter, the less is computed of what the mask hides.
_SPAN = 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """``softmax(scaling · query keyᵀ) value``, every token with those up to it.

    Args:
        query: [B, H, T, P] bfloat16.
        key: [B, G, T, P]; head h attends with kv head ``h // (H / G)``.
        value: [B, G, T, P].
        scaling: of the scores.

    Returns:
        [B, H, T, P] in bfloat16.
    """
    out: Tensor = _Causal.apply(query, key, value, scaling)
    return out


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        keys, values = (
            t if repeats == 1 else t.repeat_interleave(repeats, dim=1) for t in (key, value)
        )
        out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, True, scale=scaling
        )
        ctx.save_for_backward(query, key, value, out, log_sums)
        ctx.scaling = scaling
        mixed: Tensor = out
        return mixed

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from tamba.ops.kernels import rows_cpu

        query, key, value, out, log_sums = ctx.saved_tensors
        batch, heads, length, width = query.shape
        groups, dtype = key.shape[1], query.dtype
        wide = compute_dtype(query)
        lead = batch * groups, heads // groups
        queries, grads = (t.reshape(*lead, length, width) for t in (query, grad.to(dtype)))
        sums = log_sums.reshape(*lead, length)
        along = torch.linalg.vecdot(grad.to(wide), out.to(wide)).view(*lead, length)
        keys, values = (t.reshape(-1, length, width) for t in (key, value))
        wide_keys = keys.to(wide)
        grad_query = torch.empty_like(queries)
        grad_key, grad_value = (torch.zeros_like(t, dtype=wide) for t in (keys, values))
        for first in range(0, length, _SPAN):
            at = slice(first, min(first + _SPAN, length))
            shape = *lead, at.stop - first, at.stop
            some, d_out = (t[:, :, at].flatten(1, 2) for t in (queries, grads))
            # Scores are wide: in bfloat16 they would be off by as much as 1 in 256.
            scores = torch.bmm(some.to(wide), wide_keys[:, : at.stop].mT).view(shape)
            d_scores = torch.bmm(d_out, values[:, : at.stop].mT).view(shape)
            of = sums[:, :, at].contiguous(), along[:, :, at].contiguous(), ctx.scaling, first
            p = rows_cpu.scores_backward(scores, d_scores, *of).flatten(1, 2)
            d_scores = d_scores.flatten(1, 2)
            grad_value[:, : at.stop] += torch.bmm(p.mT, d_out)
            grad_key[:, : at.stop] += torch.bmm(d_scores.mT, some)
            d_some = torch.bmm(d_scores, keys[:, : at.stop])
            grad_query[:, :, at] = d_some.view(*lead, -1, width)
        of_key, of_value = (g.to(dtype).view_as(key) for g in (grad_key, grad_value))
        return grad_query.view_as(query), of_key, of_value, None
