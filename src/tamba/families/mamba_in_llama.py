"""The released checkpoints of *The Mamba in the Llama* (arXiv 2408.15237), in both their layouts.

A Llama whose `config.json` says nothing of the conversion; `mamba_config.json` beside it lists the
layers that stayed attention, and the kind of the other mixers shows in their tensors alone. The
Mamba-1 mixers come with separate projections (training layout) or with one fused `in_proj`, and in
the latter layout attention is a fused `mha` (the M1 checkpoints).

Mamba-1 checkpoints were made with `repeat_span = 1`: slices of d_state channels are repeated one by
one, which pairs most C slices with the wrong B and x slice of their head. That is how they were
trained, so that is how they are read. Rotary scaling follows `config.json`, as in training; the
released inference code leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from tamba.errors import UserError
from tamba.families import llama
from tamba.families.family import (
    Family,
    Keys,
    Link,
    Shapes,
    make_config,
    mixers_of,
    renamed,
    require,
    same_everywhere,
    words,
)
from tamba.model.config import (
    AttentionSpec,
    BlockSpec,
    Mamba1Spec,
    Mamba2Spec,
    NormSpec,
    TambaConfig,
)

MAMBA_CONFIG = "mamba_config"
"""Where a checkpoint holds the content of `mamba_config.json` inside its configuration."""

_SHARED = {
    "norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate_proj.*": "mlp.gate_proj.*",
    "mlp.up_proj.*": "mlp.up_proj.*",
    "mlp.down_proj.*": "mlp.down_proj.*",
}
_MIXER = {
    "mixer.conv1d.*": "mamba.conv1d.*",
    "mixer.dt_proj.weight": "mamba.dt_proj.weight",
    "mixer.A_log": "mamba.A_log",
    "mixer.D": "mamba.D",
    "mixer.norm.weight": "mamba.norm.weight",
    "mixer.out_proj.weight": "mamba.out_proj.weight",
}
# Row blocks of our in_proj, in order, by the name of the linear that holds each on its own.
_SEPARATE = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
_KEYS = Keys(
    understood=words(
        """
        d_model ssm_cfg rms_norm_eps vocab_size d_inner d_xb intermediate_size hidden_act n_layer
        attn_layers
        """
    )
)
_SSM_KEYS = Keys(
    understood=words("expand ngroups d_state d_conv conv_bias"),
    only={"bias": (False,), "repeat_kv_before_conv": (True,)},
)


def _read(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    extra = dict(config[MAMBA_CONFIG])
    place = f"{where}: {MAMBA_CONFIG}"
    _KEYS.check(extra, {}, place)
    ssm = dict(extra.get("ssm_cfg") or {})
    _SSM_KEYS.check(ssm, {}, f"{place}.ssm_cfg")
    plain = {k: v for k, v in config.items() if k != MAMBA_CONFIG}
    stock = llama.MISTRAL if config.get("model_type") == "mistral" else llama.LLAMA
    base = stock.read_config(plain, shapes, where)
    (name,), block = set(base.layers or ()), base.block_specs[0]
    attention = mixers_of(base, AttentionSpec, place)[0]
    n_layers = base.num_hidden_layers
    kept = set(extra.get("attn_layers") or ())
    if not kept <= set(range(n_layers)):
        raise UserError(f"{place}.attn_layers", f"{sorted(kept)} is not within 0..{n_layers - 1}")
    for key, ours in (("d_model", base.hidden_size), ("n_layer", n_layers)):
        if extra.get(key) not in (None, ours):
            raise UserError(f"{place}.{key}", f"{extra[key]} where {where} says {ours}")

    d_inner = extra.get("d_inner") or int(ssm.get("expand", 1) * base.hidden_size)
    d_xb = extra.get("d_xb") or attention.n_kv_heads * attention.head_dim
    d_conv, conv_bias = ssm.get("d_conv", 4), ssm.get("conv_bias", True)
    layers = []
    for i in range(n_layers):
        if i in kept:
            layers.append((name, block))
            continue
        state = shapes.get(f"model.layers.{i}.mamba.A_log")
        if state is None:
            raise UserError(where, f"layer {i} is not among attn_layers, and has no mamba tensors")
        if len(state) == 1:
            heads = state[0]
            d_state = ssm.get("d_state") or d_inner // heads
            mixer: Mamba1Spec | Mamba2Spec = Mamba2Spec(
                n_heads=heads,
                head_dim=d_inner // heads,
                d_state=d_state,
                n_groups=heads,
                n_kv_heads=d_xb // d_state,
                d_conv=d_conv,
                conv_bias=conv_bias,
                norm_groups=heads,
                norm_eps=1e-5,
                chunk_size=256,
            )
        else:
            rank = shapes.get(f"model.layers.{i}.mamba.dt_proj.weight", (0, 0))[1]
            mixer = Mamba1Spec(
                d_inner=d_inner,
                d_state=state[1],
                dt_rank=rank or math.ceil(base.hidden_size / 16),
                d_conv=d_conv,
                n_groups=d_inner // state[1],
                n_kv_groups=d_xb // state[1],
                repeat_span=1,
                dt_from="input",
                conv_bias=conv_bias,
            )
        norm = NormSpec(kind="rms", eps=extra.get("rms_norm_eps", block.norm.eps))
        layers.append((mixer.kind, replace(block, mixer=mixer, norm=norm)))
    return make_config(
        base, layers, base.final_norm_spec, max_position_embeddings=base.max_position_embeddings
    )


def _links(config: TambaConfig, names: Collection[str]) -> Iterable[Link]:
    yield from renamed("", "", llama.OUTER)
    for i, block in enumerate(config.block_specs):
        prefix = f"model.layers.{i}."
        if isinstance(block.mixer, AttentionSpec):
            yield from _attention_links(prefix, block.mixer, names)
            continue
        bias = "dt_proj.bias" if isinstance(block.mixer, Mamba1Spec) else "dt_bias"
        table = {**_SHARED, **_MIXER, "mixer.dt_bias": f"mamba.{bias}"}
        yield from renamed(prefix, prefix, table)
        fused = f"{prefix}mamba.in_proj.weight"
        if isinstance(block.mixer, Mamba1Spec) and fused not in names:
            sizes = _row_blocks(block.mixer)
            yield Link(
                (f"{prefix}mixer.in_proj.weight",),
                tuple(f"{prefix}mamba.{part}.weight" for part in _SEPARATE),
                read=lambda *parts: (torch.cat(parts),),
                write=lambda whole, sizes=sizes: whole.split(sizes),
            )
        else:
            yield Link((f"{prefix}mixer.in_proj.weight",), (fused,))


def _attention_links(
    prefix: str, attention: AttentionSpec, names: Collection[str]
) -> Iterable[Link]:
    """Llama's projections, or q, k and v stacked in one matrix where the file has it so."""
    if f"{prefix}mha.in_proj.weight" not in names:
        yield from renamed(prefix, prefix, llama.LAYER)
        return
    yield from renamed(prefix, prefix, {**_SHARED, "mixer.o_proj.*": "mha.out_proj.*"})
    kv = attention.n_kv_heads * attention.head_dim
    sizes = [attention.n_heads * attention.head_dim, kv, kv]
    for leaf in ("weight", "bias"):
        yield Link(
            tuple(f"{prefix}mixer.{p}_proj.{leaf}" for p in "qkv"),
            (f"{prefix}mha.in_proj.{leaf}",),
            read=lambda whole: whole.split(sizes),
            write=lambda q, k, v: (torch.cat((q, k, v)),),
        )


def _row_blocks(mixer: Mamba1Spec) -> list[int]:
    """Rows of z, x, B, C and the low-rank dt in our in_proj."""
    shared = (mixer.n_kv_groups or mixer.n_groups) * mixer.d_state
    return [mixer.d_inner, shared, shared, mixer.n_groups * mixer.d_state, mixer.dt_rank]


def _write(config: TambaConfig) -> dict[str, Any]:
    family = "mamba_in_llama"
    blocks = config.block_specs
    attention = [b for b in blocks if isinstance(b.mixer, AttentionSpec)]
    require(bool(attention), "a model without attention (its sizes are Llama's)", family)
    mixer = same_everywhere(
        (b.mixer for b in blocks if not isinstance(b.mixer, AttentionSpec)), "the mixer", family
    )
    require(mixer.gate and mixer.conv_activation == "silu", "a mixer without gate or SiLU", family)
    require(not mixer.proj_bias, "biases", family)
    if isinstance(mixer, Mamba2Spec):
        heads = mixer.n_heads
        require(mixer.n_groups == heads == mixer.norm_groups, "grouped heads or norms", family)
        require(mixer.head_dim == mixer.d_state, "a d_state other than head_dim", family)
        require(mixer.dt_limit is None and mixer.norm_eps == 1e-5, "dt limits or epsilons", family)
        d_xb = (mixer.n_kv_heads or heads) * mixer.head_dim
        ssm: dict[str, Any] = {"expand": 1, "ngroups": heads, "d_state": mixer.d_state}
    else:
        require(mixer.dt_from == "input", "dt from the convolved x", family)
        require(mixer.repeat_span == 1, "slices repeated by whole heads", family)
        d_xb = (mixer.n_kv_groups or mixer.n_groups) * mixer.d_state
        ssm = {"expand": 1}
    ssm |= {"d_conv": mixer.d_conv, "conv_bias": mixer.conv_bias}
    out = llama.LLAMA.write_config(_replace_layers(config, attention[0]))
    out[MAMBA_CONFIG] = {
        "d_model": config.hidden_size,
        "ssm_cfg": ssm,
        "rms_norm_eps": config.final_norm_spec.eps,
        "vocab_size": None,
        "d_inner": mixer.d_inner,
        "d_xb": d_xb,
        "intermediate_size": out["intermediate_size"],
        "hidden_act": out["hidden_act"],
        "n_layer": config.num_hidden_layers,
        "attn_layers": [i for i, b in enumerate(blocks) if isinstance(b.mixer, AttentionSpec)],
    }
    return out


def _replace_layers(config: TambaConfig, block: BlockSpec) -> TambaConfig:
    """`config` with `block` for every layer: the Transformer that a conversion started from."""
    data = config.to_dict()
    data["blocks"] = {"attention": block.to_dict()}
    data["layers"] = ["attention"] * config.num_hidden_layers
    return TambaConfig.from_dict(data)


MAMBA_IN_LLAMA = Family(
    name="mamba_in_llama",
    matches=lambda config, names: MAMBA_CONFIG in config,
    read_config=_read,
    links=_links,
    write_config=_write,
    ignored=llama.IGNORED,
)
