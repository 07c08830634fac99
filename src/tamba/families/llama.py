"""Llama 1 to 3, SmolLM2, Mistral and SmolLM3: RMSNorm, grouped-query attention, SwiGLU.

The three model types share one set of tensor names and differ in which layers rotate and which look
through a window. Qwen2 and Qwen3 take the same names from here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

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

OUTER = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER = {
    "norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mixer.q_proj.*": "self_attn.q_proj.*",
    "mixer.k_proj.*": "self_attn.k_proj.*",
    "mixer.v_proj.*": "self_attn.v_proj.*",
    "mixer.o_proj.*": "self_attn.o_proj.*",
    "mixer.q_norm.weight": "self_attn.q_norm.weight",
    "mixer.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate_proj.*": "mlp.gate_proj.*",
    "mlp.up_proj.*": "mlp.up_proj.*",
    "mlp.down_proj.*": "mlp.down_proj.*",
}
IGNORED = ("rotary_emb.inv_freq",)

DECODER_KEYS = words(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps
    tie_word_embeddings rope_parameters rope_scaling rope_theta initializer_range
    """
)
WINDOW_KEYS = frozenset(
    {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
)


def links(config: TambaConfig, names: Collection[str] = ()) -> Iterable[Link]:
    """The name map of every family that is named like Llama."""
    yield from renamed("", "", OUTER)
    for i in range(config.num_hidden_layers):
        yield from renamed(f"model.layers.{i}.", f"model.layers.{i}.", LAYER)


def read_decoder(
    hf: Any,
    where: str,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: list[int | None] | None = None,
    rotated: list[bool] | None = None,
) -> TambaConfig:
    """A stack of Llama-shaped blocks; `windows` and `rotated` say what differs layer by layer."""
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    rope, rotary_dim = read_rope(hf, head_dim, where)
    norm = NormSpec(kind="rms", eps=hf.rms_norm_eps)
    mlp = MLPSpec(
        d_mlp=hf.intermediate_size,
        gated=True,
        activation=check_activation(hf.hidden_act, f"{where}: hidden_act"),
        bias=mlp_bias,
    )
    # The stock classes of these families turn the whole head; less than that crashes them.
    require(rotary_dim == head_dim, "a partial rotary factor", f"{where}: {hf.model_type}")

    def block(window: int | None, turns: bool) -> tuple[str, BlockSpec]:
        name = ("sliding_" if window is not None else "") + "attention" + ("" if turns else "_nope")
        attention = AttentionSpec(
            n_heads=hf.num_attention_heads,
            n_kv_heads=hf.num_key_value_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim if turns else 0,
            rope=rope,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=norm if qk_norm else None,
            sliding_window=window,
        )
        return name, BlockSpec(mixer=attention, mlp=mlp, norm=norm)

    n = hf.num_hidden_layers
    pairs = zip(windows or [None] * n, rotated or [True] * n, strict=True)
    layers = [block(window, turns) for window, turns in pairs]
    return make_config(hf, layers, norm, max_position_embeddings=hf.max_position_embeddings)


def write_decoder(config: TambaConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """What Llama-shaped families say alike. Raises UserError for a stack of another shape."""
    blocks = config.block_specs
    mixers = mixers_of(config, AttentionSpec, model_type)
    require(all(b.residual == "sequential" for b in blocks), "a parallel residual", model_type)
    norms = [b.norm for b in blocks] + [config.final_norm_spec]
    norm = same_everywhere(norms, "the norm", model_type)
    require(norm.kind == "rms", "LayerNorm", model_type)
    mlp = same_everywhere(mlps_of(config, model_type), "the MLP", model_type)
    require(mlp.gated, "an MLP without gate", model_type)
    attention = same_everywhere(map(_without_layer_choices, mixers), "attention", model_type)
    require(attention.scale is None, "an attention scale of its own", model_type)
    turning = [m for m in mixers if m.rotary_dim]
    require(all(a.rotary_dim == a.head_dim for a in turning), "partial rotary", model_type)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.d_mlp,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": mlp.activation,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": norm.eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        **write_rope(turning[0] if turning else attention),
    }


def _without_layer_choices(attention: AttentionSpec) -> AttentionSpec:
    return replace(attention, sliding_window=None, rotary_dim=0)


def window_layers(hf: Any) -> list[int | None]:
    """The window of each layer from `layer_types`, as transformers derives or reads them."""
    return [hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types]


def write_windows(config: TambaConfig, model_type: str) -> dict[str, Any]:
    """The keys that say which layers look through a window."""
    windows = [m.sliding_window for m in mixers_of(config, AttentionSpec, model_type)]
    sizes = {w for w in windows if w is not None}
    require(len(sizes) <= 1, "windows of different sizes", model_type)
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": max(sizes, default=None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def _biases(config: TambaConfig, model_type: str) -> dict[str, bool]:
    attention = mixers_of(config, AttentionSpec, model_type)[0]
    require(attention.qkv_bias == attention.out_bias, "q/k/v biases without an o bias", model_type)
    require(attention.qk_norm is None, "q/k norm", model_type)
    return {"attention_bias": attention.qkv_bias, "mlp_bias": mlps_of(config, model_type)[0].bias}


_LLAMA_KEYS = Keys(
    understood=DECODER_KEYS | {"attention_bias", "mlp_bias"}, only={"rope_interleaved": (False,)}
)


def _read_llama(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("llama", config, _LLAMA_KEYS, where)
    bias = bool(hf.attention_bias)
    return read_decoder(hf, where, qkv_bias=bias, out_bias=bias, mlp_bias=bool(hf.mlp_bias))


def _write_llama(config: TambaConfig) -> dict[str, Any]:
    mixers = mixers_of(config, AttentionSpec, "llama")
    out = write_decoder(config, "llama", "LlamaForCausalLM")
    require(all(m.sliding_window is None for m in mixers), "a sliding window", "llama")
    require(all(m.rotary_dim for m in mixers), "attention without rotary", "llama")
    return {**out, **_biases(config, "llama")}


LLAMA = Family(
    name="llama",
    matches=lambda config, names: config.get("model_type") == "llama",
    read_config=_read_llama,
    links=links,
    write_config=_write_llama,
    ignored=IGNORED,
)

_MISTRAL_KEYS = Keys(understood=DECODER_KEYS | {"sliding_window"})


def _read_mistral(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("mistral", config, _MISTRAL_KEYS, where)
    return read_decoder(hf, where, windows=[hf.sliding_window] * hf.num_hidden_layers)


def _write_mistral(config: TambaConfig) -> dict[str, Any]:
    mixers = mixers_of(config, AttentionSpec, "mistral")
    out = write_decoder(config, "mistral", "MistralForCausalLM")
    require(all(m.rotary_dim for m in mixers), "attention without rotary", "mistral")
    require(not any(_biases(config, "mistral").values()), "biases", "mistral")
    window = same_everywhere((m.sliding_window for m in mixers), "the window", "mistral")
    return {**out, "sliding_window": window}


MISTRAL = Family(
    name="mistral",
    matches=lambda config, names: config.get("model_type") == "mistral",
    read_config=_read_mistral,
    links=links,
    write_config=_write_mistral,
    ignored=IGNORED,
)

_SMOLLM3_KEYS = Keys(
    understood=DECODER_KEYS
    | WINDOW_KEYS
    | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
)


def _read_smollm3(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("smollm3", config, _SMOLLM3_KEYS, where)
    n = hf.num_hidden_layers
    for key in ("no_rope_layers", "layer_types"):
        require(len(getattr(hf, key)) >= n, f"{key} shorter than the {n} layers", where)
    windows = window_layers(hf)[:n]
    require(
        hf.use_sliding_window or not any(windows),
        "use_sliding_window and layer_types at odds",
        where,
    )
    rotated = [bool(flag) for flag in hf.no_rope_layers[:n]]
    bias = bool(hf.attention_bias)
    return read_decoder(
        hf,
        where,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.mlp_bias),
        windows=windows,
        rotated=rotated,
    )


def _write_smollm3(config: TambaConfig) -> dict[str, Any]:
    mixers = mixers_of(config, AttentionSpec, "smollm3")
    out = write_decoder(config, "smollm3", "SmolLM3ForCausalLM")
    require(out["head_dim"] * mixers[0].n_heads == config.hidden_size, "a free head_dim", "smollm3")
    return {
        **out,
        **_biases(config, "smollm3"),
        **write_windows(config, "smollm3"),
        "no_rope_layers": [int(m.rotary_dim > 0) for m in mixers],
    }


SMOLLM3 = Family(
    name="smollm3",
    matches=lambda config, names: config.get("model_type") == "smollm3",
    read_config=_read_smollm3,
    links=links,
    write_config=_write_smollm3,
    ignored=IGNORED,
)
