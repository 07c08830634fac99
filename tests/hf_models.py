"""Tiny random models of other people's classes, one for each thing that a family can say."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 64
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_RECURRENT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}


def _rope(kind: str, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


_ORIGINAL = {"original_max_position_embeddings": 16}
_MAMBA2 = {**_RECURRENT, "num_heads": 8, "head_dim": 8, "state_size": 6, "chunk_size": 8}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_GQA),
    "llama-biases-tied": lambda: hf.LlamaConfig(
        **_GQA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rms_norm_eps=1e-5
    ),
    "llama-head_dim-gelu": lambda: hf.LlamaConfig(**_GQA, head_dim=6, hidden_act="gelu"),
    "llama-linear": lambda: hf.LlamaConfig(**_GQA, **_rope("linear", factor=4.0)),
    "llama-dynamic": lambda: hf.LlamaConfig(
        **{**_GQA, "max_position_embeddings": 8}, **_rope("dynamic", factor=4.0)
    ),
    "llama-yarn": lambda: hf.LlamaConfig(**_GQA, **_rope("yarn", factor=4.0, **_ORIGINAL)),
    "llama-longrope": lambda: hf.LlamaConfig(
        **_GQA,
        **_rope(
            "longrope",
            factor=4.0,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            **_ORIGINAL,
        ),
    ),
    "llama-llama3": lambda: hf.LlamaConfig(
        **_GQA,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_ORIGINAL),
    ),
    "llama-llama3-published": lambda: hf.LlamaConfig(
        **_GQA,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama-proportional": lambda: hf.LlamaConfig(
        **_GQA, **_rope("proportional", partial_rotary_factor=0.5)
    ),
    "mistral": lambda: hf.MistralConfig(**_GQA, sliding_window=None),
    "mistral-window": lambda: hf.MistralConfig(**_GQA, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**_GQA, tie_word_embeddings=True),
    "qwen2-window": lambda: hf.Qwen2Config(
        **_GQA, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen2-window-list": lambda: hf.Qwen2Config(
        **_GQA,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": lambda: hf.Qwen3Config(**_GQA, head_dim=16),
    "qwen3-biases": lambda: hf.Qwen3Config(**_GQA, head_dim=8, attention_bias=True),
    "smollm3": lambda: hf.SmolLM3Config(
        **_GQA, no_rope_layer_interval=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "smollm3-window": lambda: hf.SmolLM3Config(
        **_GQA,
        no_rope_layers=[1, 0, 0],
        use_sliding_window=True,
        sliding_window=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "gpt_neox-sequential-tied": lambda: hf.GPTNeoXConfig(
        **_SIZES, use_parallel_residual=False, tie_word_embeddings=True
    ),
    "gpt_neox-full-rotary-unbiased": lambda: hf.GPTNeoXConfig(
        **_SIZES, **_rope("linear", factor=2.0, partial_rotary_factor=1.0), attention_bias=False
    ),
    "mamba": lambda: hf.MambaConfig(**_RECURRENT, state_size=4),
    "mamba-biases-untied": lambda: hf.MambaConfig(
        **_RECURRENT,
        state_size=4,
        use_bias=True,
        use_conv_bias=False,
        time_step_rank=3,
        tie_word_embeddings=False,
        conv_kernel=3,
    ),
    "mamba2": lambda: hf.Mamba2Config(**_MAMBA2, n_groups=1),
    "mamba2-limit-tied": lambda: hf.Mamba2Config(
        **_MAMBA2,
        n_groups=1,
        use_bias=True,
        tie_word_embeddings=True,
        time_step_limit=(0.01, 0.5),
    ),
}
# Releases of transformers before 5.23 normalise all of d_inner together, whatever the groups.
if tuple(int(n) for n in hf.__version__.split(".")[:2]) >= (5, 23):
    CONFIGS["mamba2-groups"] = lambda: hf.Mamba2Config(**_MAMBA2, n_groups=2)


def tiny_hf_model(case: str, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode, in which every weight, bias and norm matters."""
    config: PreTrainedConfig = CONFIGS[case]()
    config.initializer_range = 0.3
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias") or name.endswith(".D"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def some_ids(rows: int = 2, length: int = 23) -> torch.Tensor:
    """[rows, length] token ids."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
