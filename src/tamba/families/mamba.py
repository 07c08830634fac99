"""Mamba-1, in transformers' layout and in the original layout of state-spaces.

Both hold the same tensors under nearly the same names; what differs is the configuration: the
original one names the width `d_model`, keeps the mixer's options in `ssm_cfg`, and gives the
vocabulary before padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from tamba.errors import UserError
from tamba.families.family import (
    Family,
    Keys,
    Link,
    M,
    Shapes,
    make_config,
    mixers_of,
    read_with_transformers,
    renamed,
    require,
    same_everywhere,
    words,
)
from tamba.model.config import BlockSpec, Mamba1Spec, NormSpec, TambaConfig

LAYER = {
    "norm.*": "norm.*",
    "mixer.in_proj.*": "mixer.in_proj.*",
    "mixer.conv1d.*": "mixer.conv1d.*",
    "mixer.x_proj.weight": "mixer.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.A_log": "mixer.A_log",
    "mixer.D": "mixer.D",
    "mixer.norm.weight": "mixer.norm.weight",
    "mixer.out_proj.*": "mixer.out_proj.*",
}
# Shape the random initialisation and pick kernels; a trained checkpoint has forgotten them.
INITIALISATION = words(
    """
    dt_min dt_max dt_init dt_scale dt_init_floor conv_init A_init_range
    use_fast_path use_mem_eff_path
    time_step_min time_step_max time_step_floor time_step_init_scheme time_step_scale
    rescale_prenorm_residual use_mambapy use_associative_scan fused_add_norm
    """
)
ORIGINAL_KEYS = words(
    """
    d_model n_layer vocab_size ssm_cfg rms_norm residual_in_fp32 pad_vocab_size_multiple
    tie_embeddings norm_epsilon
    """
)
ORIGINAL_ONLY: dict[str, tuple[Any, ...]] = {
    "d_intermediate": (0,),
    "attn_layer_idx": ([], ()),
    "attn_cfg": ({},),
}


def backbone_links(embedding: str) -> Callable[[TambaConfig, Collection[str]], Iterable[Link]]:
    """The name map of a stack of mixers, given what its embedding is called."""

    def links(config: TambaConfig, names: Collection[str]) -> Iterable[Link]:
        outer = {
            "model.embed_tokens.weight": f"backbone.{embedding}.weight",
            "model.final_norm.*": "backbone.norm_f.*",
            "lm_head.weight": "lm_head.weight",
        }
        yield from renamed("", "", outer)
        for i, block in enumerate(config.block_specs):
            # Mamba-1 keeps the bias of dt with its projection; Mamba-2 has no projection.
            bias = "dt_proj.bias" if isinstance(block.mixer, Mamba1Spec) else "dt_bias"
            table = {**LAYER, "mixer.dt_bias": f"mixer.{bias}"}
            yield from renamed(f"model.layers.{i}.", f"backbone.layers.{i}.", table)

    return links


def read_original(config: Mapping[str, Any], keys: Keys, where: str) -> SimpleNamespace:
    """The part of an original configuration that Mamba-1 and Mamba-2 share.

    The result has the attribute names of transformers' configurations, plus `ssm` (the mixer's own
    options) and `norm`.
    """
    keys.check(config, {}, where)
    for key in ("d_model", "n_layer", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise UserError(f"{where}: {key}", f"{config.get(key)!r} is not a number of anything")
    # The tables are padded so that their rows divide evenly among devices.
    multiple = config.get("pad_vocab_size_multiple") or 8
    vocab = config["vocab_size"]
    norm = NormSpec(
        kind="rms" if config.get("rms_norm", True) else "layer",
        eps=config.get("norm_epsilon", 1e-5),
    )
    tied = config.get("tie_embeddings", True)
    return SimpleNamespace(
        vocab_size=math.ceil(vocab / multiple) * multiple,
        hidden_size=config["d_model"],
        num_hidden_layers=config["n_layer"],
        residual_in_fp32=bool(config.get("residual_in_fp32", True)),
        tie_word_embeddings=True if tied is None else tied,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        ssm=dict(config.get("ssm_cfg") or {}),
        norm=norm,
    )


def original_config(config: TambaConfig, norm: NormSpec, ssm_cfg: dict[str, Any]) -> dict[str, Any]:
    """What both original configurations say alike."""
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 1,
        "ssm_cfg": ssm_cfg,
        "rms_norm": norm.kind == "rms",
        "norm_epsilon": norm.eps,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "tie_embeddings": config.tie_word_embeddings,
        "d_intermediate": 0,
        "attn_layer_idx": [],
        "attn_cfg": {},
    }


def only_mixer(config: TambaConfig, kind: type[M], family: str) -> M:
    """The mixer of a stack of one kind without MLPs. Raises UserError for any other stack."""
    block = same_everywhere(config.block_specs, "the block", family)
    mixer = mixers_of(config, kind, family)[0]
    require(block.mlp is None and block.residual == "sequential", "an MLP", family)
    require(block.norm == config.final_norm_spec, "norms of two kinds", family)
    return mixer


_KEYS = Keys(
    understood=words(
        """
        vocab_size hidden_size state_size num_hidden_layers layer_norm_epsilon expand conv_kernel
        use_bias use_conv_bias residual_in_fp32 time_step_rank tie_word_embeddings intermediate_size
        """
    ),
    # The converted checkpoints on the hub repeat the original configuration beside their own.
    harmless=INITIALISATION
    | {
        "d_inner",
        "d_model",
        "n_layer",
        "ssm_cfg",
        "pad_vocab_size_multiple",
        "max_position_embeddings",
    },
    only={"hidden_act": ("silu", "swish"), "rms_norm": (True,)},
)


def _read(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    hf = read_with_transformers("mamba", config, _KEYS, where)
    norm = NormSpec(kind="rms", eps=hf.layer_norm_epsilon)
    mixer = Mamba1Spec(
        d_inner=hf.intermediate_size,
        d_state=hf.state_size,
        dt_rank=int(hf.time_step_rank),
        d_conv=hf.conv_kernel,
        conv_bias=bool(hf.use_conv_bias),
        proj_bias=bool(hf.use_bias),
    )
    block = BlockSpec(mixer=mixer, mlp=None, norm=norm)
    return make_config(
        hf,
        [("mamba1", block)] * hf.num_hidden_layers,
        norm,
        residual_in_fp32=bool(hf.residual_in_fp32),
    )


def _plain_mixer(config: TambaConfig, family: str) -> Mamba1Spec:
    mixer = only_mixer(config, Mamba1Spec, family)
    require(mixer.dt_from == "inner" and mixer.n_groups == 1, "grouped B and C", family)
    require(mixer.gate and mixer.conv_activation == "silu", "a mixer without gate or SiLU", family)
    return mixer


def _write(config: TambaConfig) -> dict[str, Any]:
    mixer = _plain_mixer(config, "mamba")
    norm = config.final_norm_spec
    require(norm.kind == "rms", "LayerNorm", "mamba")
    require(mixer.d_inner % config.hidden_size == 0, "a d_inner of no whole expansion", "mamba")
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "state_size": mixer.d_state,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_norm_epsilon": norm.eps,
        "expand": mixer.d_inner // config.hidden_size,
        "intermediate_size": mixer.d_inner,
        "conv_kernel": mixer.d_conv,
        "use_bias": mixer.proj_bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "residual_in_fp32": config.residual_in_fp32,
        "time_step_rank": mixer.dt_rank,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


MAMBA = Family(
    name="mamba",
    matches=lambda config, names: config.get("model_type") == "mamba",
    read_config=_read,
    links=backbone_links("embeddings"),
    write_config=_write,
)

_ORIGINAL_KEYS = Keys(understood=ORIGINAL_KEYS, harmless=INITIALISATION, only=ORIGINAL_ONLY)
_SSM_KEYS = Keys(
    understood=words("d_state d_conv expand dt_rank conv_bias bias"),
    harmless=INITIALISATION,
    only={"layer": ("Mamba1",)},
)


def _read_original(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    base = read_original(config, _ORIGINAL_KEYS, where)
    ssm = base.ssm
    _SSM_KEYS.check(ssm, {}, f"{where}: ssm_cfg")
    rank = ssm.get("dt_rank", "auto")
    mixer = Mamba1Spec(
        d_inner=int(ssm.get("expand", 2) * base.hidden_size),
        d_state=ssm.get("d_state", 16),
        dt_rank=math.ceil(base.hidden_size / 16) if rank == "auto" else rank,
        d_conv=ssm.get("d_conv", 4),
        conv_bias=ssm.get("conv_bias", True),
        proj_bias=ssm.get("bias", False),
    )
    block = BlockSpec(mixer=mixer, mlp=None, norm=base.norm)
    return make_config(
        base,
        [("mamba1", block)] * base.num_hidden_layers,
        base.norm,
        residual_in_fp32=base.residual_in_fp32,
    )


def _write_original(config: TambaConfig) -> dict[str, Any]:
    mixer = _plain_mixer(config, "state-spaces mamba")
    return original_config(
        config,
        config.final_norm_spec,
        {
            "layer": "Mamba1",
            "d_state": mixer.d_state,
            "d_conv": mixer.d_conv,
            "expand": mixer.d_inner / config.hidden_size,
            "dt_rank": mixer.dt_rank,
            "conv_bias": mixer.conv_bias,
            "bias": mixer.proj_bias,
        },
    )


def is_original(config: Mapping[str, Any], layer: str) -> bool:
    """Whether this is a state-spaces configuration whose mixers are `layer` (Mamba1 by default)."""
    if "model_type" in config or not {"d_model", "n_layer"} <= config.keys():
        return False
    return ((config.get("ssm_cfg") or {}).get("layer") or "Mamba1") == layer


STATE_SPACES_MAMBA = Family(
    name="state-spaces mamba",
    matches=lambda config, names: is_original(config, "Mamba1"),
    read_config=_read_original,
    links=backbone_links("embedding"),
    write_config=_write_original,
)
