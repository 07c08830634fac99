"""Mamba-2, in transformers' layout and in the original layout of state-spaces.

The gated output norm is taken over each group of B and C, as in the original code and its kernels,
and in transformers since 5.23; earlier releases of transformers normalise all of d_inner at once,
which is the same for one group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tamba.errors import UserError
from tamba.families.family import (
    Family,
    Keys,
    Shapes,
    make_config,
    read_with_transformers,
    require,
    words,
)
from tamba.families.mamba import (
    INITIALISATION,
    ORIGINAL_KEYS,
    ORIGINAL_ONLY,
    backbone_links,
    is_original,
    only_mixer,
    original_config,
    read_original,
)
from tamba.model.config import BlockSpec, Mamba2Spec, NormSpec, TambaConfig

_KEYS = Keys(
    understood=words(
        """
        vocab_size hidden_size state_size num_hidden_layers layer_norm_epsilon expand conv_kernel
        use_bias use_conv_bias residual_in_fp32 tie_word_embeddings num_heads head_dim n_groups
        time_step_limit chunk_size
        """
    ),
    # `time_step_rank` is carried over from Mamba-1, where dt was low-rank; nothing reads it here.
    harmless=INITIALISATION | {"time_step_rank", "max_position_embeddings"},
    only={"hidden_act": ("silu", "swish"), "norm_before_gate": (False,), "rms_norm": (True,)},
)


def _limit(pair: Any) -> tuple[float, float] | None:
    """A clamp of dt as a pair of numbers; None where it clamps nothing."""
    if pair is None:
        return None
    low, high = (float(v["__float__"]) if isinstance(v, dict) else float(v) for v in pair)
    return None if low <= 0 and math.isinf(high) else (low, high)


def _read(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    limit = _limit(config.get("time_step_limit"))
    plain = {k: v for k, v in config.items() if k != "time_step_limit"}
    hf = read_with_transformers("mamba2", plain, _KEYS, where)
    norm = NormSpec(kind="rms", eps=hf.layer_norm_epsilon)
    mixer = Mamba2Spec(
        n_heads=hf.num_heads,
        head_dim=hf.head_dim,
        d_state=hf.state_size,
        n_groups=hf.n_groups,
        d_conv=hf.conv_kernel,
        conv_bias=bool(hf.use_conv_bias),
        norm_groups=hf.n_groups,
        norm_eps=hf.layer_norm_epsilon,
        proj_bias=bool(hf.use_bias),
        chunk_size=hf.chunk_size,
        dt_limit=limit,
    )
    block = BlockSpec(mixer=mixer, mlp=None, norm=norm)
    return make_config(
        hf,
        [("mamba2", block)] * hf.num_hidden_layers,
        norm,
        residual_in_fp32=bool(hf.residual_in_fp32),
    )


def _plain_mixer(config: TambaConfig, family: str) -> Mamba2Spec:
    mixer = only_mixer(config, Mamba2Spec, family)
    require(mixer.n_kv_heads is None, "x and B shared among heads", family)
    require(mixer.gate and mixer.conv_activation == "silu", "a mixer without gate or SiLU", family)
    return mixer


def _write(config: TambaConfig) -> dict[str, Any]:
    mixer = _plain_mixer(config, "mamba2")
    norm = config.final_norm_spec
    require(norm.kind == "rms" and norm.eps == mixer.norm_eps, "norms of two kinds", "mamba2")
    require(mixer.norm_groups == mixer.n_groups, "output norm groups of their own", "mamba2")
    require(not mixer.norm_before_gate, "a norm before the gate", "mamba2")
    require(mixer.d_inner % config.hidden_size == 0, "a d_inner of no whole expansion", "mamba2")
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_heads": mixer.n_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.d_state,
        "n_groups": mixer.n_groups,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_norm_epsilon": norm.eps,
        "expand": mixer.d_inner // config.hidden_size,
        "conv_kernel": mixer.d_conv,
        "chunk_size": mixer.chunk_size,
        "use_bias": mixer.proj_bias,
        "use_conv_bias": mixer.conv_bias,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        "residual_in_fp32": config.residual_in_fp32,
        "time_step_limit": list(mixer.dt_limit or (0.0, math.inf)),
        "tie_word_embeddings": config.tie_word_embeddings,
    }


MAMBA2 = Family(
    name="mamba2",
    matches=lambda config, names: config.get("model_type") == "mamba2",
    read_config=_read,
    links=backbone_links("embeddings"),
    write_config=_write,
)

_ORIGINAL_KEYS = Keys(understood=ORIGINAL_KEYS, harmless=INITIALISATION, only=ORIGINAL_ONLY)
_SSM_KEYS = Keys(
    understood=words(
        """
        layer d_state d_conv expand headdim ngroups rmsnorm norm_before_gate dt_limit bias conv_bias
        chunk_size d_ssm
        """
    ),
    harmless=INITIALISATION,
    only={"D_has_hdim": (False,)},
)


def _read_original(config: Mapping[str, Any], shapes: Shapes, where: str) -> TambaConfig:
    base = read_original(config, _ORIGINAL_KEYS, where)
    ssm = base.ssm
    _SSM_KEYS.check(ssm, {}, f"{where}: ssm_cfg")
    d_inner = int(ssm.get("expand", 2) * base.hidden_size)
    if ssm.get("d_ssm") not in (None, d_inner):
        raise UserError(
            f"{where}: ssm_cfg.d_ssm",
            f"{ssm['d_ssm']} of {d_inner} channels go through the scan; it must be all",
        )
    head_dim, groups = ssm.get("headdim", 64), ssm.get("ngroups", 1)
    mixer = Mamba2Spec(
        n_heads=d_inner // head_dim,
        head_dim=head_dim,
        d_state=ssm.get("d_state", 128),
        n_groups=groups,
        d_conv=ssm.get("d_conv", 4),
        conv_bias=ssm.get("conv_bias", True),
        norm_groups=groups if ssm.get("rmsnorm", True) else None,
        norm_eps=1e-5,
        norm_before_gate=ssm.get("norm_before_gate", False),
        proj_bias=ssm.get("bias", False),
        chunk_size=ssm.get("chunk_size", 256),
        dt_limit=_limit(ssm.get("dt_limit")),
    )
    block = BlockSpec(mixer=mixer, mlp=None, norm=base.norm)
    return make_config(
        base,
        [("mamba2", block)] * base.num_hidden_layers,
        base.norm,
        residual_in_fp32=base.residual_in_fp32,
    )


def _write_original(config: TambaConfig) -> dict[str, Any]:
    family = "state-spaces mamba2"
    mixer = _plain_mixer(config, family)
    require(mixer.norm_groups in (None, mixer.n_groups), "output norm groups of their own", family)
    require(mixer.norm_eps == 1e-5, "an output norm epsilon of its own", family)
    ssm_cfg: dict[str, Any] = {
        "layer": "Mamba2",
        "d_state": mixer.d_state,
        "d_conv": mixer.d_conv,
        "expand": mixer.d_inner / config.hidden_size,
        "headdim": mixer.head_dim,
        "ngroups": mixer.n_groups,
        "rmsnorm": mixer.norm_groups is not None,
        "norm_before_gate": mixer.norm_before_gate,
        "conv_bias": mixer.conv_bias,
        "bias": mixer.proj_bias,
        "chunk_size": mixer.chunk_size,
    }
    if mixer.dt_limit is not None:
        ssm_cfg["dt_limit"] = list(mixer.dt_limit)
    return original_config(config, config.final_norm_spec, ssm_cfg)


STATE_SPACES_MAMBA2 = Family(
    name="state-spaces mamba2",
    matches=lambda config, names: is_original(config, "Mamba2"),
    read_config=_read_original,
    links=backbone_links("embedding"),
    write_config=_write_original,
)
