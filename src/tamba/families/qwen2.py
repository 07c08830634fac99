"""Qwen2 and Qwen2.5: Llama's names, biases on q, k and v alone, a window in the upper layers."""

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

_KEYS = Keys(understood=DECODER_KEYS | WINDOW_KEYS, only={"use_mrope": (False,)})


def _read(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("qwen2", config, _KEYS, where)
    return read_decoder(hf, where, qkv_bias=True, windows=window_layers(hf))


def _write(config: TambaConfig) -> dict[str, Any]:
    out = write_decoder(config, "qwen2", "Qwen2ForCausalLM")
    mixers, mlps = mixers_of(config, AttentionSpec, "qwen2"), mlps_of(config, "qwen2")
    for attention, mlp in zip(mixers, mlps, strict=True):
        require(attention.rotary_dim > 0, "attention without rotary", "qwen2")
        require(attention.qkv_bias and not attention.out_bias, "other than q/k/v biases", "qwen2")
        require(attention.qk_norm is None, "q/k norm", "qwen2")
        require(not mlp.bias, "MLP biases", "qwen2")
    heads, width = out["num_attention_heads"], out["head_dim"]
    require(heads * width == config.hidden_size, "a free head_dim", "qwen2")
    return {**out, **write_windows(config, "qwen2")}


QWEN2 = Family(
    name="qwen2",
    matches=lambda config, names: config.get("model_type") == "qwen2",
    read_config=_read,
    links=links,
    write_config=_write,
    ignored=IGNORED,
)
