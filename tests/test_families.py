"""Every family reads as its own class computes, and writes back what was read.

The independent truth is transformers; for the layouts that it does not know, the formulas of the
papers, written out here token by token in float64.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compare import assert_same
from hf_models import CONFIGS, some_ids, tiny_hf_model
from tamba.checkpoint import load, open_checkpoint
from tamba.errors import UserError
from tamba.families import family_for, gpt_neox, llama, mamba2
from tamba.model.config import Mamba1Spec, Mamba2Spec
from tamba.model.tokens import locate


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def write_folder(folder, config: dict, tensors: dict[str, Tensor], **files: dict):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs = tiny_hf_model(case)
    ours, _ = load(saved(theirs, tmp_path))
    assert_same(logits(ours, some_ids()), logits(theirs, some_ids()), "fp32")


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_round_trip_gives_back_every_tensor_and_the_configuration(case, tmp_path):
    theirs = tiny_hf_model(case)
    checkpoint = open_checkpoint(saved(theirs, tmp_path / "theirs"))
    config, family = checkpoint.tamba_config, checkpoint.family
    back = {}
    for name, origin in family.tensors(config, checkpoint.parameters).items():
        sources = [checkpoint.read_parameter(source) for source in origin.sources]
        back[name] = sources[0] if origin.make is None else origin.make(*sources)
    assert set(back) == set(checkpoint.names())
    for name, tensor in back.items():
        assert_same(tensor, checkpoint.read(name), "exact")
    written = family.to_family_config(config)
    again = family.to_tamba_config(written, {k: tuple(v.shape) for k, v in back.items()})
    assert again.to_dict() == config.to_dict()
    # And their own class reads what was written, to the bit.
    reloaded = AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "ours", written, back))
    assert_same(logits(reloaded, some_ids()), logits(theirs, some_ids()), "exact")


def stacked(fused: Tensor, n_heads: int) -> tuple[Tensor, ...]:
    return fused.chunk(3)


FAULTS = {
    "q, k, v stacked and not per head": ("gpt_neox", gpt_neox, "split_heads", stacked),
    "gate and up swapped": (
        "llama",
        llama,
        "LAYER",
        {
            **llama.LAYER,
            "mlp.gate_proj.*": "mlp.up_proj.*",
            "mlp.up_proj.*": "mlp.gate_proj.*",
        },
    ),
    "windows ignored": ("qwen2-window", llama, "window_layers", lambda hf: [None] * 3),
    "rope scaling ignored": (
        "llama-llama3",
        llama,
        "read_rope",
        lambda hf, dim, where: ({"rope_type": "default", "rope_theta": 1e4}, dim),
    ),
    "dt limit ignored": ("mamba2-limit-tied", mamba2, "_limit", lambda pair: None),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_the_comparison_sees_faults(fault, tmp_path, monkeypatch):
    case, module, name, wrong = FAULTS[fault]
    theirs = tiny_hf_model(case)
    monkeypatch.setattr(module, name, wrong)
    if name == "window_layers":  # imported by name where it is used
        monkeypatch.setattr("tamba.families.qwen2.window_layers", wrong)
    ours, _ = load(saved(theirs, tmp_path))
    with pytest.raises(AssertionError):
        assert_same(logits(ours, some_ids()), logits(theirs, some_ids()), "fp32")


@pytest.mark.parametrize(
    "flat",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ],
)
def test_flat_rope_keys_mean_what_nested_ones_mean(flat):
    nested = {"rope_type": "default", **flat.get("rope_scaling", {}), "rope_theta": 5e5}
    nested["rope_type"] = nested.pop("type", nested["rope_type"])
    plain = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32}
    read = llama.LLAMA.to_tamba_config
    a = read({**plain, **flat}, {}).block_specs[0].mixer
    b = read({**plain, "rope_parameters": nested}, {}).block_specs[0].mixer
    assert a == b
    assert a.rope["rope_theta"] == 5e5


# What the hub's configurations hold beside what shapes the model (as published).
PUBLISHED = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {}},
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "initializer_range": 0.041666666666666664,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "pythia-1.4b": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "mamba-1.4b": {
        "d_model": 2048,
        "n_layer": 48,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    },
    "mamba2-1.3b": {
        "d_model": 2048,
        "d_intermediate": 0,
        "n_layer": 48,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    },
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configurations_are_understood(name):
    config = PUBLISHED[name]
    ours = family_for(config).to_tamba_config(config, {})
    assert ours.num_hidden_layers == config.get("num_hidden_layers", config.get("n_layer"))
    if name == "pythia-1.4b":
        block = ours.block_specs[0]
        assert (block.mixer.rotary_dim, block.residual, block.norm.kind) == (
            32,
            "parallel",
            "layer",
        )
        assert ours.dtype == torch.float16
    if name == "mamba-1.4b":
        mixer = ours.block_specs[0].mixer
        assert (mixer.d_inner, mixer.d_state, mixer.dt_rank) == (4096, 16, 128)
        assert ours.vocab_size == 50280
        assert ours.residual_in_fp32
    if name == "mamba2-1.3b":
        mixer = ours.block_specs[0].mixer
        assert (mixer.n_heads, mixer.head_dim, mixer.d_state) == (64, 64, 128)
        assert ours.vocab_size == 50288


NOT_UNDERSTOOD = [
    ("llama", {"logit_soft_cap": 30.0}, "logit_soft_cap", "not understood"),
    ("llama", {"num_key_value_head": 2}, "num_key_value_head", "num_key_value_heads"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved", "not supported"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config", "unquantised"),
    ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map", "never run"),
    ("llama", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope", "spiral"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "config.json", "factor"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", ""),
    ("llama", {"hidden_act": "gelo"}, "hidden_act", "gelu"),
    ("llama", {"hidden_size": 33}, "config.json", "33"),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types", "not understood"),
    ("qwen2", {"use_mrope": True}, "use_mrope", "not supported"),
    ("gpt_neox", {"rotary_ndims": 4}, "rotary_ndims", "not understood"),
    ("mamba", {"hidden_act": "relu"}, "hidden_act", "silu"),
    ("mamba2", {"norm_before_gate": True}, "norm_before_gate", "not supported"),
    ("gemma3_text", {}, "config.json", "unsupported family 'gemma3_text'"),
]


@pytest.mark.parametrize(("model_type", "extra", "where", "says"), NOT_UNDERSTOOD)
def test_a_key_that_is_not_understood_is_an_error(model_type, extra, where, says):
    config = {"model_type": model_type, **extra}
    with pytest.raises(UserError) as caught:
        family_for(config).to_tamba_config(config, {})
    assert where in caught.value.where
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"attn_layer_idx": [3]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"d_stat": 8}}, "d_state"),
        ({"n_layer": "two"}, "n_layer"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "names no model_type"),
    ],
)
def test_original_configurations_are_read_as_strictly(extra, says):
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 61, **extra}
    with pytest.raises(UserError, match=says):
        family_for(config).to_tamba_config(config, {})


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> those of state-spaces."""
    return {k.replace("backbone.embeddings", "backbone.embedding"): v for k, v in tensors.items()}


ORIGINAL = {
    "mamba": {"ssm_cfg": {"d_state": 4}, "tie_embeddings": True},
    "mamba-biases-untied": {
        "ssm_cfg": {"d_state": 4, "bias": True, "conv_bias": False, "dt_rank": 3, "d_conv": 3},
        "tie_embeddings": False,
    },
    "mamba2": {
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "chunk_size": 8},
        "tie_embeddings": False,
    },
    "mamba2-groups": {
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2, "chunk_size": 8},
        "tie_embeddings": False,
    },
}


@pytest.mark.parametrize("case", sorted(ORIGINAL.keys() & CONFIGS.keys()))
def test_the_original_layout_of_state_spaces(case, tmp_path):
    theirs = tiny_hf_model(case)
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 61, **ORIGINAL[case]}  # padded to 64
    tensors = original_names(theirs.state_dict())
    folder = write_folder(tmp_path / "theirs", config, tensors)
    ours, _ = load(folder)
    assert_same(logits(ours, some_ids()), logits(theirs, some_ids()), "fp32")
    checkpoint = open_checkpoint(folder)
    written = checkpoint.family.to_family_config(checkpoint.tamba_config)
    again = checkpoint.family.to_tamba_config(written, {})
    assert again.block_specs == checkpoint.tamba_config.block_specs
    assert again.vocab_size == 64
    # A head that is tied is stored in these files all the same, and not written back.
    written_names = set(checkpoint.family.tensors(again, checkpoint.parameters))
    assert written_names == set(tensors) - (
        {"lm_head.weight"} if again.tie_word_embeddings else set()
    )


# The Mamba in the Llama.

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, RANK, D_STATE = 32, 4, 2, 8, 2, 4


def ssm_reference(x, dt, A, B, C, D):
    """x, dt [T, D]; A, B, C [T or 1, D, N] -> [T, D]: the recurrence, one token after the other."""
    state = torch.zeros(x.shape[1], B.shape[-1], dtype=x.dtype)
    out = []
    for t in range(x.shape[0]):
        decay = torch.exp(dt[t, :, None] * A)
        state = decay * state + dt[t, :, None] * B[t] * x[t, :, None]
        out.append((state * C[t]).sum(-1) + D * x[t])
    return torch.stack(out)


def conv_reference(x, weight, bias):
    """Causal depthwise convolution of x [T, C] with weight [C, 1, W], then SiLU."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = sum(padded[i : i + len(x)] * weight[:, 0, i] for i in range(width)) + bias
    return F.silu(y)


def mamba2_reference(hidden, w):
    """Section 1.3 of the notes on the released code: z | x | B | C | dt, SiLU on x, B and C, x and
    B repeated head by head after the convolution, gate, then RMSNorm of each head."""
    d_inner, d_xb = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = [d_inner, d_xb, d_xb, d_inner, HEADS]
    z, x, B, C, dt = (hidden @ w["in_proj.weight"].T).split(sizes, dim=-1)
    mixed = conv_reference(torch.cat((x, B, C), -1), w["conv1d.weight"], w["conv1d.bias"])
    x, B, C = mixed.split([d_xb, d_xb, d_inner], dim=-1)
    repeat = HEADS // KV_HEADS
    heads = [h // repeat for h in range(HEADS)]
    x, B = x.view(-1, KV_HEADS, HEAD_DIM)[:, heads], B.view(-1, KV_HEADS, HEAD_DIM)[:, heads]
    C = C.view(-1, HEADS, HEAD_DIM)
    dt = F.softplus(dt + w["dt_bias"])
    wide = {"x": x.flatten(1), "dt": dt.repeat_interleave(HEAD_DIM, -1)}
    A = -torch.exp(w["A_log"]).repeat_interleave(HEAD_DIM)[:, None].expand(-1, HEAD_DIM)
    B, C = (s.repeat_interleave(HEAD_DIM, dim=1) for s in (B, C))
    y = ssm_reference(wide["x"], wide["dt"], A, B, C, w["D"].repeat_interleave(HEAD_DIM))
    y = (y * F.silu(z)).view(-1, HEADS, HEAD_DIM)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
    return (y.flatten(1) * w["norm.weight"]) @ w["out_proj.weight"].T


def mamba1_reference(hidden, w):
    """Section 1.4: slices of d_state channels, x and B repeated slice by slice, x before the
    convolution; B and C are not convolved; dt comes from the layer input; gate, no norm."""
    d_inner = HEADS * HEAD_DIM
    groups, kv_groups = d_inner // D_STATE, KV_HEADS * HEAD_DIM // D_STATE
    slices = [c // (groups // kv_groups) for c in range(groups)]
    x, z, B, C = (
        hidden @ w[f"{name}.weight"].T for name in ("in_proj_x", "in_proj_z", "B_proj", "C_proj")
    )
    x = x.view(-1, kv_groups, D_STATE)[:, slices].flatten(1)
    B = B.view(-1, kv_groups, D_STATE)[:, slices]
    C = C.view(-1, groups, D_STATE)
    low = hidden @ w["dt_proj_down.weight"].T
    dt = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    x = conv_reference(x, w["conv1d.weight"], w["conv1d.bias"])
    B, C = (s.repeat_interleave(D_STATE, dim=1) for s in (B, C))
    y = ssm_reference(x, dt, -torch.exp(w["A_log"]), B, C, w["D"])
    return (y * F.silu(z)) @ w["out_proj.weight"].T


def released(kind: str, seed: int = 0) -> tuple[LlamaForCausalLM, dict, dict, dict[int, dict]]:
    """A Llama, its tensors with layers 0 and 2 converted as the released code does, the content of
    mamba_config.json, and the mixers' weights by layer."""
    generator = torch.Generator().manual_seed(seed)
    d_inner, d_xb = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def rand(*shape, scale=0.3):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=D_MODEL,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=48,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).double().eval()
    mixers = {}
    for layer in (0, 2):
        if kind == "mamba2":
            channels = d_inner + 2 * d_xb
            weights = {
                "in_proj.weight": rand(2 * d_inner + 2 * d_xb + HEADS, D_MODEL),
                "dt_bias": rand(HEADS, scale=1.0),
                "A_log": rand(HEADS, scale=1.0),
                "D": rand(HEADS, scale=1.0),
                "norm.weight": 1 + rand(d_inner),
            }
        else:
            channels = d_inner
            weights = {
                "in_proj_x.weight": rand(d_xb, D_MODEL),
                "in_proj_z.weight": rand(d_inner, D_MODEL),
                "B_proj.weight": rand(d_xb, D_MODEL),
                "C_proj.weight": rand(d_inner, D_MODEL),
                "dt_proj_down.weight": rand(RANK, D_MODEL),
                "dt_proj.weight": rand(d_inner, RANK),
                "dt_proj.bias": rand(d_inner, scale=1.0),
                "A_log": rand(d_inner, D_STATE, scale=1.0),
                "D": rand(d_inner, scale=1.0),
            }
        weights |= {
            "conv1d.weight": rand(channels, 1, 4),
            "conv1d.bias": rand(channels),
            "out_proj.weight": rand(D_MODEL, d_inner),
        }
        mixers[layer] = weights
    tensors = {
        k: v
        for k, v in model.state_dict().items()
        if not any(f"layers.{i}.self_attn" in k for i in mixers) and k != "lm_head.weight"
    }
    for layer, weights in mixers.items():
        tensors |= {f"model.layers.{layer}.mamba.{k}": v for k, v in weights.items()}
    ssm = (
        {"expand": 1, "ngroups": HEADS, "d_state": HEAD_DIM} if kind == "mamba2" else {"expand": 1}
    )
    extra = {
        "d_model": D_MODEL,
        "ssm_cfg": ssm,
        "rms_norm_eps": 1e-5,
        "vocab_size": None,
        "d_inner": d_inner if kind == "mamba2" else None,
        "d_xb": d_xb,
        "intermediate_size": 48,
        "hidden_act": "silu",
        "n_layer": 4,
        "attn_layers": [1, 3],
    }
    return model, tensors, extra, mixers


def every_token(length: int):
    """The tokens of one whole, unpadded row."""
    cpu = torch.device("cpu")
    return locate(length, 0, mask=None, positions=None, seq_idx=None, device=cpu)


REFERENCES = {"mamba2": mamba2_reference, "mamba1": mamba1_reference}


class Referenced(nn.Module):
    """A reference mixer in the place of Llama's attention."""

    def __init__(self, kind, weights):
        super().__init__()
        self.mix = lambda row: REFERENCES[kind](row, weights)

    def forward(self, hidden_states, **_):
        return torch.stack([self.mix(row) for row in hidden_states]), None


def write_released(folder, model, tensors, extra):
    return write_folder(folder, model.config.to_dict(), tensors, mamba_config=extra)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_released_mixers_compute_what_their_code_computes(kind, tmp_path):
    model, tensors, extra, mixers = released(kind)
    ours, _ = load(write_released(tmp_path, model, tensors, extra), dtype=torch.float64)
    spec = ours.config.block_specs[0].mixer
    assert isinstance(spec, Mamba1Spec if kind == "mamba1" else Mamba2Spec)
    hidden = torch.randn(1, 19, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        got = ours.model.layers[0].mixer(hidden, None, every_token(19))
    want = REFERENCES[kind](hidden[0], mixers[0])[None]
    assert_same(got, want, "fp64")
    with pytest.raises(AssertionError):  # another head order is another mixer
        assert_same(got.flip(1), want, "fp64")


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_released_checkpoints_load_whole(kind, tmp_path):
    model, tensors, extra, mixers = released(kind)
    ours, _ = load(write_released(tmp_path, model, tensors, extra), dtype=torch.float32)
    for layer, weights in mixers.items():
        model.model.layers[layer].self_attn = Referenced(kind, weights)
    assert_same(logits(ours, some_ids()).double(), logits(model, some_ids()).double(), "decode")


def test_whole_heads_repeated_would_not_be_the_released_pairing(tmp_path):
    model, tensors, extra, mixers = released("mamba1")
    folder = write_released(tmp_path, model, tensors, extra)
    ours, _ = load(folder, dtype=torch.float64)
    mixer = ours.model.layers[0].mixer
    object.__setattr__(mixer.spec, "repeat_span", HEAD_DIM // D_STATE)
    hidden = torch.randn(1, 19, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        got = mixer(hidden, None, every_token(19))
    with pytest.raises(AssertionError):
        assert_same(got, mamba1_reference(hidden[0], mixers[0])[None], "fp64")


def test_the_fused_layout_is_the_same_model(tmp_path):
    model, tensors, extra, _ = released("mamba1")
    plain, _ = load(write_released(tmp_path / "plain", model, tensors, extra))
    fused = dict(tensors)
    for i in range(4):
        prefix = f"model.layers.{i}."
        if i in (0, 2):
            parts = ("in_proj_z", "in_proj_x", "B_proj", "C_proj", "dt_proj_down")
            rows = [fused.pop(f"{prefix}mamba.{part}.weight") for part in parts]
            fused[f"{prefix}mamba.in_proj.weight"] = torch.cat(rows)
        else:
            rows = [fused.pop(f"{prefix}self_attn.{p}_proj.weight") for p in "qkv"]
            fused[f"{prefix}mha.in_proj.weight"] = torch.cat(rows)
            fused[f"{prefix}mha.out_proj.weight"] = fused.pop(f"{prefix}self_attn.o_proj.weight")
    other, _ = load(write_released(tmp_path / "fused", model, fused, extra))
    assert_same(logits(other, some_ids()), logits(plain, some_ids()), "exact")


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_released_layout_round_trip(kind, tmp_path):
    model, tensors, extra, _ = released(kind)
    checkpoint = open_checkpoint(write_released(tmp_path, model, tensors, extra))
    config, family = checkpoint.tamba_config, checkpoint.family
    back = {}
    for name, origin in family.tensors(config, checkpoint.parameters).items():
        sources = [checkpoint.read_parameter(source) for source in origin.sources]
        back[name] = sources[0] if origin.make is None else origin.make(*sources)
    assert set(back) == set(tensors)
    for name, tensor in back.items():
        assert_same(tensor, tensors[name], "exact")
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    again = family.to_tamba_config(family.to_family_config(config), shapes)
    assert again.block_specs == config.block_specs


def test_a_released_layer_without_mixer_is_an_error(tmp_path):
    model, tensors, extra, _ = released("mamba1")
    checkpoint = open_checkpoint(
        write_released(tmp_path, model, tensors, extra | {"attn_layers": [1]})
    )
    with pytest.raises(UserError, match="layer 3"):
        checkpoint.tamba_config  # noqa: B018


def test_what_a_family_cannot_say_is_an_error(tmp_path):
    neox = open_checkpoint(saved(tiny_hf_model("gpt_neox"), tmp_path)).tamba_config
    with pytest.raises(UserError, match="llama cannot say a parallel residual"):
        llama.LLAMA.to_family_config(neox)
    with pytest.raises(UserError, match="mamba2 cannot say a layer that is not mamba2"):
        mamba2.MAMBA2.to_family_config(neox)


def test_infinite_limits_are_no_limit():
    assert mamba2._limit([0.0, math.inf]) is None
    assert mamba2._limit([0.0, {"__float__": "Infinity"}]) is None
    assert mamba2._limit([0.01, math.inf]) == (0.01, math.inf)
