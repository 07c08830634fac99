"""GPT-NeoX and Pythia: LayerNorm, parallel residual, partial rotary, biases, GELU MLP.

q, k and v are one matrix whose rows come as (head, [q | k | v], head_dim), not as three stacked
matrices. The head is `embed_out` on disk, `lm_head` in newer classes; both are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from tamba.families.family import (
    Family,
    Keys,
    Link,
    Shapes,
    check_activation,
    make_config,
    mixers_of,
    mlps_of,
    read_rope,
    read_with_transformers,
    renamed,
    require,
    same_everywhere,
    words,
    write_rope,
)
from tamba.model.config import AttentionSpec, BlockSpec, MLPSpec, NormSpec, TambaConfig

_OUTER = {
    "model.embed_tokens.weight": "gpt_neox.embed_in.weight",
    "model.final_norm.*": "gpt_neox.final_layer_norm.*",
}
_LAYER = {
    "norm.*": "input_layernorm.*",
    "mlp_norm.*": "post_attention_layernorm.*",
    "mixer.o_proj.*": "attention.dense.*",
    "mlp.up_proj.*": "mlp.dense_h_to_4h.*",
    "mlp.down_proj.*": "mlp.dense_4h_to_h.*",
}
_KEYS = Keys(
    understood=words(
        """
        vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act
        max_position_embeddings layer_norm_eps tie_word_embeddings use_parallel_residual
        attention_bias rope_parameters rope_scaling rope_theta rotary_pct rotary_emb_base
        partial_rotary_factor initializer_range
        """
    )
)


def _read(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("gpt_neox", config, _KEYS, where)
    head_dim = hf.hidden_size // hf.num_attention_heads
    rope, rotary_dim = read_rope(hf, head_dim, where)
    norm = NormSpec(kind="layer", eps=hf.layer_norm_eps)
    block = BlockSpec(
        mixer=AttentionSpec(
            n_heads=hf.num_attention_heads,
            n_kv_heads=hf.num_attention_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope=rope,
            qkv_bias=bool(hf.attention_bias),
            out_bias=bool(hf.attention_bias),
        ),
        mlp=MLPSpec(
            d_mlp=hf.intermediate_size,
            gated=False,
            activation=check_activation(hf.hidden_act, f"{where}: hidden_act"),
            bias=True,
        ),
        norm=norm,
        residual="parallel" if hf.use_parallel_residual else "sequential",
    )
    return make_config(
        hf,
        [("attention", block)] * hf.num_hidden_layers,
        norm,
        max_position_embeddings=hf.max_position_embeddings,
    )


def _links(config: TambaConfig, names: Collection[str]) -> Iterable[Link]:
    head = "lm_head.weight" if "lm_head.weight" in names else "embed_out.weight"
    yield Link(("lm_head.weight",), (head,))
    yield from renamed("", "", _OUTER)
    for i, block in enumerate(config.block_specs):
        ours, theirs = f"model.layers.{i}.", f"gpt_neox.layers.{i}."
        yield from renamed(ours, theirs, _LAYER)
        heads = block.mixer.n_heads if isinstance(block.mixer, AttentionSpec) else 0
        for leaf in ("weight", "bias"):
            yield Link(
                tuple(f"{ours}mixer.{p}_proj.{leaf}" for p in "qkv"),
                (f"{theirs}attention.query_key_value.{leaf}",),
                read=lambda fused, heads=heads: split_heads(fused, heads),
                write=lambda q, k, v, heads=heads: (fuse_heads(q, k, v, heads),),
            )


def split_heads(fused: torch.Tensor, n_heads: int) -> tuple[torch.Tensor, ...]:
    """Rows [H * 3 * P, ...], ordered (head, [q | k | v], P) -> q, k, v, each [H * P, ...]."""
    parts = fused.unflatten(0, (n_heads, 3, -1))
    return tuple(parts[:, i].flatten(0, 1) for i in range(3))


def fuse_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The inverse of `split_heads`."""
    parts = [p.unflatten(0, (n_heads, -1)) for p in (q, k, v)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def _write(config: TambaConfig) -> dict[str, Any]:
    family = "gpt_neox"
    block = same_everywhere(config.block_specs, "the block", family)
    attention = mixers_of(config, AttentionSpec, family)[0]
    mlp, norm = mlps_of(config, family)[0], block.norm
    require(
        norm.kind == "layer" and norm == config.final_norm_spec, "mixed norms or RMSNorm", family
    )
    require(not mlp.gated and mlp.bias, "another MLP", family)
    require(attention.n_kv_heads == attention.n_heads, "grouped heads", family)
    require(attention.qkv_bias == attention.out_bias, "biases on some projections", family)
    require(
        attention.qk_norm is None and attention.sliding_window is None, "q/k norm, windows", family
    )
    require(attention.head_dim * attention.n_heads == config.hidden_size, "a free head_dim", family)
    require(attention.scale is None, "an attention scale of its own", family)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.d_mlp,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": attention.n_heads,
        "hidden_act": mlp.activation,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": norm.eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "use_parallel_residual": block.residual == "parallel",
        "attention_bias": attention.qkv_bias,
        **write_rope(attention),
        "rotary_pct": attention.rotary_dim / attention.head_dim,
        "rotary_emb_base": attention.rope["rope_theta"],
    }


GPT_NEOX = Family(
    name="gpt_neox",
    matches=lambda config, names: config.get("model_type") == "gpt_neox",
    read_config=_read,
    links=_links,
    write_config=_write,
    ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)
