"""Tiny random models for the tests: every kind of mixer, in stacks that mix them."""

from __future__ import annotations

import torch

from tamba.model.config import (
    AttentionSpec,
    BlockSpec,
    Mamba1Spec,
    Mamba2Spec,
    MLPSpec,
    NormSpec,
    TambaConfig,
)
from tamba.model.modeling import TambaForCausalLM

D_MODEL = 32
VOCAB = 61

ATTENTION = AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=8, rotary_dim=8)
BLOCKS = {
    "attention": BlockSpec(mixer=ATTENTION, mlp=MLPSpec(d_mlp=48)),
    "parallel": BlockSpec(
        mixer=AttentionSpec(
            n_heads=4, n_kv_heads=4, head_dim=8, rotary_dim=2, qkv_bias=True, out_bias=True
        ),
        mlp=MLPSpec(d_mlp=48, gated=False, activation="gelu", bias=True),
        norm=NormSpec(kind="layer"),
        residual="parallel",
    ),
    "sliding": BlockSpec(
        mixer=AttentionSpec(
            n_heads=4, n_kv_heads=2, head_dim=8, rotary_dim=8, sliding_window=5, qk_norm=NormSpec()
        ),
        mlp=MLPSpec(d_mlp=48),
    ),
    "mamba1": BlockSpec(mixer=Mamba1Spec(d_inner=48, d_state=4, dt_rank=3), mlp=None),
    "mamba1_gqa": BlockSpec(
        mixer=Mamba1Spec(
            d_inner=32,
            d_state=4,
            dt_rank=2,
            n_groups=8,
            n_kv_groups=4,
            repeat_span=2,
            dt_from="input",
        ),
        mlp=MLPSpec(d_mlp=48),
    ),
    "mamba2": BlockSpec(
        mixer=Mamba2Spec(n_heads=4, head_dim=8, d_state=6, n_groups=2, norm_groups=1, chunk_size=8),
        mlp=None,
    ),
    "mamba2_gqa": BlockSpec(
        mixer=Mamba2Spec(
            n_heads=4, head_dim=8, d_state=8, n_groups=4, n_kv_heads=2, norm_groups=4, chunk_size=8
        ),
        mlp=MLPSpec(d_mlp=48),
    ),
    "mamba2_plain": BlockSpec(
        mixer=Mamba2Spec(
            n_heads=4,
            head_dim=8,
            d_state=8,
            n_groups=4,
            n_kv_heads=2,
            gate=False,
            conv_activation="identity",
            chunk_size=8,
        ),
        mlp=MLPSpec(d_mlp=48),
    ),
}

STACKS = {
    "attention": ["attention", "parallel", "attention"],
    "sliding": ["sliding", "attention", "sliding"],
    "mamba1": ["mamba1", "mamba1_gqa", "mamba1"],
    "mamba2": ["mamba2", "mamba2_gqa", "mamba2_plain"],
    "mixed": ["mamba2_gqa", "attention", "mamba1", "sliding", "mamba2", "parallel", "mamba1_gqa"],
}
"""Layer lists by name: one kind alone, and everything together (a recurrent layer first)."""


def tiny_config(stack: str | list[str] = "mixed", **options) -> TambaConfig:
    layers = STACKS[stack] if isinstance(stack, str) else stack
    return TambaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "blocks": {name: BLOCKS[name] for name in sorted(set(layers))},
            "layers": layers,
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **options,
        }
    )


def tiny_model(
    stack: str | list[str] = "mixed",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options,
) -> TambaForCausalLM:
    """A random model in eval mode, with weights large enough for every part to matter."""
    torch.manual_seed(seed)
    model = TambaForCausalLM(tiny_config(stack, **options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "dt_bias" not in name:
                parameter.normal_(std=0.2)
            if name.endswith("dt_bias"):
                parameter.uniform_(-1, 1)  # steps near one, so that states forget and remember
            if name.endswith("mixer.D"):
                parameter.normal_()
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """[rows, length] ids; 0 is left out, it is the padding id."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
