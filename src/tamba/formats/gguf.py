"""GGUF files: metadata, tensors and tokenizer, under the names that Hugging Face folders use.

A GGUF holds a model in llama.cpp's words. Here it is read back as what it was made from: a
`config.json` (`GGUFFile.config`), tensors by their Hugging Face names, dequantised one at a time,
and a tokenizer. Llama's q and k rows, which the format stores permuted for another rotary layout,
come back in half-split order; Mamba's ``A`` comes back as its logarithm.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tamba.errors import UserError, nearest
from tamba.formats.safetensors import TensorSpec, fill

_DAMAGED = "fetch the file again"
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_AT_ONCE = 1 << 22  # numbers
# Types whose values are numbers as they stand; everything else is blocks to be dequantised.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MAMBA_OUTER = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
}
_MAMBA_LAYER = {
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_out": "mixer.out_proj",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "mamba")

# Metadata of each architecture, without its prefix, and where it goes in config.json.
_DECODER_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_MAMBA_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.inner_size": "intermediate_size",
    "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank",
    "vocab_size": "vocab_size",
}
# Read apart from the tables above, or known at certain values only.
_HANDLED = {"attention.value_length", "rope.dimension_count"}
_SCALING = {"type", "factor", "original_context_length", "finetuned"}
_ONLY: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scale_linear": (1.0,),
    "ssm.dt_b_c_rms": (False,),
}
_MAMBA_ONLY: dict[str, tuple[Any, ...]] = {
    "feed_forward_length": (0,),
    "attention.head_count": (0,),
}


class GGUFFile:
    """One GGUF file, open for reading.

    Attributes:
        metadata: all key-value pairs, arrays as lists.
        config: the model's configuration as a Hugging Face `config.json` would hold it.
        specs: shape and type of each tensor, by Hugging Face name; quantised ones are float32.

    Raises:
        UserError: no GGUF, cut short, of an unsupported architecture, or with metadata that changes
            the numbers and is not understood.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, tensors, start = _read_header(path)
        self._tensors: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int, int]] = {}
        size = path.stat().st_size
        for name, shape, kind, offset in tensors:
            nbytes = _byte_count(path, name, shape, kind)
            if start + offset + nbytes > size:
                raise UserError(
                    str(path),
                    f"cut short: '{name}' ends at byte {start + offset + nbytes} of {size}",
                    _DAMAGED,
                )
            self._tensors[name] = (kind, shape, start + offset, nbytes)
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in _ARCHITECTURES:
            raise UserError(
                str(path),
                f"unsupported GGUF architecture {self.architecture!r}",
                nearest(self.architecture, _ARCHITECTURES),
            )
        if self.metadata.get("split.count", 1) > 1:
            raise UserError(str(path), "one part of a split GGUF", "merge the parts first")
        self.config = self._config()
        self._names = self._hf_names()
        self.specs = {hf: self._spec(name) for hf, name in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor with the Hugging Face name `name`, dequantised where it is quantised."""
        theirs = self._names[name]
        kind, shape, offset, nbytes = self._tensors[theirs]
        raw = np.empty(nbytes, dtype=np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            fill(file, raw.data, self.path, theirs)
        if kind.name in _PLAIN:
            tensor = torch.from_numpy(raw).view(_PLAIN[kind.name]).view(shape)
        else:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            rows = raw.reshape(-1, shape[-1] // block * block_bytes)
            tensor = torch.empty(rows.shape[0], shape[-1])
            # Dequantising takes several times the memory of its result, so not all at once.
            step = max(1, _AT_ONCE // shape[-1])
            for first in range(0, rows.shape[0], step):
                part = dequantize(rows[first : first + step], kind)
                tensor[first : first + step] = torch.from_numpy(part)
            tensor = tensor.view(shape)
        transform = self._transform(theirs)
        return tensor if transform is None else transform(tensor)

    def _spec(self, name: str) -> TensorSpec:
        kind, shape, _, _ = self._tensors[name]
        if name.endswith("ssm_conv1d.weight"):
            shape = (shape[0], 1, *shape[1:])
        return TensorSpec(shape, _PLAIN.get(kind.name, torch.float32))

    def _transform(self, name: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What turns a stored tensor back into the one it was made from."""
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if self.architecture == "llama" and part in ("attn_q", "attn_k"):
            key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            heads = self.config[key]
            return lambda t: t.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        if part == "ssm_a":
            return lambda t: torch.log(-t)
        if part == "ssm_conv1d" and name.endswith("weight"):
            return lambda t: t.unsqueeze(1)
        return None

    def _hf_names(self) -> dict[str, str]:
        """Hugging Face name -> name in the file."""
        mamba = self.architecture == "mamba"
        outer, layer = (_MAMBA_OUTER, _MAMBA_LAYER) if mamba else (_OUTER, _LAYER)
        stem = "backbone.layers" if mamba else "model.layers"
        names = {}
        for name in self._tensors:
            parts = name.split(".")
            if name == "rope_freqs.weight":  # read into the configuration
                continue
            if parts[0] == "blk" and len(parts) >= 3 and parts[2] in layer:
                hf = ".".join([stem, parts[1], layer[parts[2]], *parts[3:]])
            elif parts[0] in outer:
                hf = ".".join([outer[parts[0]], *parts[1:]])
            else:
                raise UserError(str(self.path), f"unknown tensor '{name}'")
            names[hf] = name
        return names

    def _config(self) -> dict[str, Any]:
        """`config.json` from the metadata. Raises UserError for metadata that is not understood."""
        arch = self.architecture
        mamba = arch == "mamba"
        table = _MAMBA_KEYS if mamba else _DECODER_KEYS
        has_bias = self._has("attn_output.bias")
        config: dict[str, Any] = {"model_type": arch, "attention_bias": has_bias}
        scaling: dict[str, Any] = {}
        for full, value in self.metadata.items():
            if not full.startswith(f"{arch}."):
                continue
            key = full.removeprefix(f"{arch}.")
            only = {**_ONLY, **(_MAMBA_ONLY if mamba else {})}
            if key in only:
                if value not in only[key]:
                    raise UserError(f"{self.path}: {full}", f"{value!r} is not supported")
            elif key in table:
                if not isinstance(value, int | float):
                    raise UserError(f"{self.path}: {full}", "differs between layers, not supported")
                config[table[key]] = _shortest(value)
            elif key.startswith("rope.scaling.") and key.split(".")[-1] in _SCALING:
                scaling[key.split(".")[-1]] = _shortest(value)
            elif key not in _HANDLED:
                raise UserError(f"{self.path}: {full}", f"{value!r} is not understood")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(str(self.path), "has no token embedding", _DAMAGED)
        config["vocab_size"] = embedding[1][0]
        config["tie_word_embeddings"] = "output.weight" not in self._tensors
        for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{key}_token_id"] = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        needed = [k for k in ("hidden_size", "num_hidden_layers") if k not in config]
        if needed:
            raise UserError(str(self.path), f"metadata does not say {', '.join(needed)}", _DAMAGED)
        if mamba:
            del config["attention_bias"]
            config["expand"] = config["intermediate_size"] // config["hidden_size"]
            # llama.cpp keeps the residual stream in float32 throughout.
            config["residual_in_fp32"] = True
            return config
        return self._decoder_config(config, scaling)

    def _decoder_config(self, config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
        arch = self.architecture
        heads = config.get("num_attention_heads")
        if not heads:
            raise UserError(str(self.path), "the metadata does not say how many heads", _DAMAGED)
        config.setdefault("num_key_value_heads", heads)
        config.setdefault("head_dim", config["hidden_size"] // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            value = self.metadata.get(f"{arch}.{key}", config["head_dim"])
            if value != config["head_dim"]:
                raise UserError(
                    f"{self.path}: {arch}.{key}", f"{value} is not head_dim = {config['head_dim']}"
                )
        if arch == "llama":
            config["mlp_bias"] = self._has("ffn_down.bias")
            if config.get("sliding_window") is not None:
                config["model_type"] = "mistral"
                del config["mlp_bias"], config["attention_bias"]
        elif arch == "qwen2":
            del config["attention_bias"], config["head_dim"]
        if arch != "llama" and config.pop("sliding_window", None) is not None:
            raise UserError(f"{self.path}: {arch}.attention.sliding_window", "is not supported")
        rope = self._rope_scaling(config, scaling)
        if rope is not None:
            config["rope_scaling"] = rope
        return config

    def _rope_scaling(
        self, config: dict[str, Any], scaling: dict[str, Any]
    ) -> dict[str, Any] | None:
        kind = scaling.get("type", "none")
        if "rope_freqs.weight" in self._tensors:
            return self._llama3_scaling(config)
        if kind == "none":
            return None
        needed = {"linear": ["factor"], "yarn": ["factor", "original_context_length"]}
        for key in needed.get(str(kind), []):
            if not isinstance(scaling.get(key), int | float):
                raise UserError(
                    f"{self.path}: {self.architecture}.rope.scaling.{key}",
                    f"is {scaling.get(key)!r}, which {kind} scaling needs as a number",
                    _DAMAGED,
                )
        if kind == "linear":
            return {"rope_type": "linear", "factor": float(scaling["factor"])}
        if kind == "yarn":
            return {
                "rope_type": "yarn",
                "factor": float(scaling["factor"]),
                "original_max_position_embeddings": scaling["original_context_length"],
            }
        raise UserError(f"{self.path}: rope.scaling.type", f"{kind!r} is not supported")

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling from the divisors of the frequencies, which is how the format keeps it.

        The divisors must be those of the published setting (low 1, high 4, 8192 tokens) for some
        factor; others cannot be told from the numbers alone.
        """
        kind, shape, offset, nbytes = self._tensors["rope_freqs.weight"]
        if kind.name != "F32":
            raise UserError(str(self.path), f"'rope_freqs.weight' of type {kind.name}")
        with self.path.open("rb") as file:
            file.seek(offset)
            divisors = np.frombuffer(file.read(nbytes), dtype="<f4").astype(np.float64)
        factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
        dim, theta = config["head_dim"], float(config.get("rope_theta", 10000.0))
        turns = original * theta ** (-np.arange(0, dim, 2) / dim) / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if shape != (dim // 2,) or not np.allclose(divisors, expected, rtol=1e-4):
            raise UserError(str(self.path), "its rotary frequencies follow no known scaling")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _has(self, suffix: str) -> bool:
        return any(name.endswith(suffix) for name in self._tensors)


def _shortest(value: Any) -> Any:
    """A float32 of the file as the short decimal it was meant to be (1e-05, not 9.99999974e-06)."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _byte_count(path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise UserError(str(path), f"'{name}' of shape {list(shape)} is no whole number of blocks")
    return math.prod(shape) // block * block_bytes


class _Cursor:
    """A position in mapped bytes that refuses to leave them."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EOFError
        out = self.data[self.at : self.at + count]
        self.at += count
        return out

    def number(self, code: str, count: int = 1) -> tuple[Any, ...]:
        form = struct.Struct(f"<{count}{code}")
        return form.unpack(self.take(form.size))

    def text(self) -> str:
        return self.take(self.number("Q")[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"value of type {kind}")
        inner, count = self.number("I")[0], self.number("Q")[0]
        if count > len(self.data) - self.at:  # every element takes at least one byte
            raise EOFError
        if inner in _SCALARS:
            return list(self.number(_SCALARS[inner], count))
        return [self.value(inner) for _ in range(count)]


_Tensor = tuple[str, tuple[int, ...], GGMLQuantizationType, int]


def _read_header(path: Path) -> tuple[dict[str, Any], list[_Tensor], int]:
    """Metadata, the table of tensors (name, shape, type, offset), and where their data begins."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, _Cursor(data))
    except EOFError as error:
        raise UserError(str(path), "cut short in its header", _DAMAGED) from error
    except RecursionError as error:  # arrays in arrays in arrays
        raise UserError(str(path), "its metadata is nested too deeply", _DAMAGED) from error
    except ValueError as error:  # an empty file, a bad type, bytes that are no text
        if isinstance(error, UserError):
            raise
        raise UserError(str(path), f"not a GGUF file, or damaged ({error})", _DAMAGED) from error


def _parse(path: Path, cursor: _Cursor) -> tuple[dict[str, Any], list[_Tensor], int]:
    if cursor.take(4) != b"GGUF":
        raise UserError(str(path), "not a GGUF file", "it does not begin with 'GGUF'")
    version = cursor.number("I")[0]
    if version not in (2, 3):
        raise UserError(str(path), f"GGUF version {version} is not supported, only 2 and 3")
    n_tensors, n_pairs = cursor.number("Q", 2)
    metadata = {}
    for _ in range(n_pairs):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I")[0])
    tensors: list[_Tensor] = []
    for _ in range(n_tensors):
        name = cursor.text()
        dims = cursor.number("Q", cursor.number("I")[0])
        kind, offset = cursor.number("I")[0], cursor.number("Q")[0]
        # The format lists the fastest-moving dimension first.
        tensors.append((name, tuple(reversed(dims)), GGMLQuantizationType(kind), offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    return metadata, tensors, -(-cursor.at // alignment) * alignment


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> Any:
    """The tokenizer that a GGUF's metadata describes, for transformers; None without one.

    Built here and not through transformers' `gguf_file=`, which parses the file several times (10 s
    for 49,152 tokens) and does not know every pre-tokenizer, which silently changes token ids.

    Raises:
        UserError: a kind of tokenizer or pre-tokenizer that is not supported.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    from transformers import PreTrainedTokenizerFast

    get = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}.get
    tokens: list[str] = get("tokens") or []
    kind = get("model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level_bpe(get, where)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(get), True
    else:
        raise UserError(where, f"a tokenizer of kind {kind!r} is not supported")
    _add_special_tokens(backend, tokens, get("token_type") or [])

    named = {}
    for word, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = get(f"{key}_token_id")
        if index is not None and 0 <= index < len(tokens):
            named[f"{word}_token"] = tokens[index]
    if get("add_bos_token", adds_bos) and "bos_token" in named:
        from tokenizers import processors

        bos, index = named["bos_token"], get("bos_token_id")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
        )
    arch = metadata.get("general.architecture")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{arch}.context_length", int(1e30)),
        **named,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


_GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merging, by the name the format has for it. "" is GPT-2's own pattern,
# "digits" is that with every digit on its own.
_SPLITS = {
    "default": "",
    "gpt-2": "",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": _GPT4_STYLE % "1,3",
    "llama3": _GPT4_STYLE % "1,3",
    "llama-v3": _GPT4_STYLE % "1,3",
    "smaug-bpe": _GPT4_STYLE % "1,3",
    "qwen2": _GPT4_STYLE.replace("{%s}", ""),
    "deepseek-r1-qwen": _GPT4_STYLE.replace("{%s}", ""),
}
_WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "smaug-bpe"}
_NFC = {"qwen2", "deepseek-r1-qwen"}


def _byte_level_bpe(get: Callable[..., Any], where: str) -> tuple[Any, bool]:
    """A byte-level BPE tokenizer, and whether it begins texts with its BOS unless told."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    split = get("pre", "default")
    if split not in _SPLITS:
        raise UserError(where, f"unknown pre-tokenizer {split!r}", nearest(split, _SPLITS))
    vocab = {token: index for index, token in enumerate(get("tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges") or []]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=split in _WHOLE_WORDS_FIRST)
    )
    pattern = _SPLITS[split]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in ("", "digits"))
    if pattern == "":
        backend.pre_tokenizer = plain
    else:
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == "digits"
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, plain])
    if split in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, split in _WHOLE_WORDS_FIRST


def _sentencepiece(get: Callable[..., Any]) -> Any:
    """Llama 1, 2 and Mistral: BPE over characters, whose merges follow from the tokens' scores.

    A token's score says when it is made: the best-scored pair merges first. So every way to cut a
    token into two known tokens is a merge of that token's rank.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = get("tokens")
    scores: list[float] = get("scores") or [-float(i) for i in range(len(tokens))]
    vocab = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right))
    ranked.sort()
    merges = [(tokens[left], tokens[right]) for _, left, right in ranked]
    unknown = tokens[get("unknown_token_id", 0)]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("\u2581")] if get("add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


_CONTROL, _USER_DEFINED = 3, 4


def _add_special_tokens(backend: Any, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that text is never cut into pieces of: control ones, and those added by users."""
    from tokenizers import AddedToken

    special, plain = [], []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
