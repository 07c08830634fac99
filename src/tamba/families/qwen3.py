"""Qwen3 (dense): Llama's names, RMSNorm on each head of q and k, and a head_dim of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tamba.families.family import (
    Family,
    Keys,
    Shapes,
    mixers_of,
    mlps_of,
    read_with_transformers,
    require,
)
from tamba.families.llama import (
    DECODER_KEYS,
    IGNORED,
    WINDOW_KEYS,
    links,
    read_decoder,
    window_layers,
    write_decoder,
    write_windows,
)
from tamba.model.config import AttentionSpec, TambaConfig

_KEYS = Keys(understood=DECODER_KEYS | WINDOW_KEYS | {"attention_bias"})


def _read(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("qwen3", config, _KEYS, where)
    bias = bool(hf.attention_bias)
    return read_decoder(
        hf, where, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=window_layers(hf)
    )


def _write(config: TambaConfig) -> dict[str, Any]:
    out = write_decoder(config, "qwen3", "Qwen3ForCausalLM")
    mixers, mlps = mixers_of(config, AttentionSpec, "qwen3"), mlps_of(config, "qwen3")
    for attention, mlp in zip(mixers, mlps, strict=True):
        require(attention.rotary_dim > 0, "attention without rotary", "qwen3")
        require(attention.qkv_bias == attention.out_bias, "biases on some projections", "qwen3")
        require(
            attention.qk_norm == config.final_norm_spec,
            "other than q/k norm of the same epsilon",
            "qwen3",
        )
        require(not mlp.bias, "MLP biases", "qwen3")
    windows = write_windows(config, "qwen3")
    return {**out, **windows, "attention_bias": mixers[0].qkv_bias}


QWEN3 = Family(
    name="qwen3",
    matches=lambda config, names: config.get("model_type") == "qwen3",
    read_config=_read,
    links=links,
    write_config=_write,
    ignored=IGNORED,
)
