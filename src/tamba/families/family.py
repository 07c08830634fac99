"""What a pretrained family is to the rest of the project: two maps, each readable both ways.

A `Family` knows how its `config.json` reads as a `TambaConfig`, and how its tensors are named and
cut compared with ours. It never touches a file: recipes for tensors (`Origin`) name what to read
and how to reshape it, so whoever holds the checkpoint can stream it one tensor at a time.

A key of a configuration is either understood, known not to touch the numbers of a forward pass, or
allowed at certain values only. Anything else is an error: a key that this project does not know may
well change the model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tamba.errors import UserError, nearest
from tamba.model.config import (
    AttentionSpec,
    BlockSpec,
    Mamba1Spec,
    Mamba2Spec,
    MLPSpec,
    NormSpec,
    TambaConfig,
)

M = TypeVar("M", AttentionSpec, Mamba1Spec, Mamba2Spec)
V = TypeVar("V")

Shapes = Mapping[str, tuple[int, ...]]


def words(text: str) -> frozenset[str]:
    """The words of `text`: a table of keys that reads as a paragraph."""
    return frozenset(text.split())


# Bookkeeping of transformers' configurations: nothing here enters a forward pass of the text model.
HARMLESS = words(
    """
    _name_or_path architectures model_type dtype torch_dtype transformers_version use_cache
    attn_implementation _attn_implementation _attn_implementation_autoset
    keys_to_ignore_at_inference
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id tokenizer_class prefix tie_encoder_decoder is_encoder_decoder is_decoder
    add_cross_attention cross_attention_hidden_size chunk_size_feed_forward problem_type id2label
    label2id num_labels finetuning_task task_specific_params torchscript use_bfloat16 pruned_heads
    output_attentions output_hidden_states return_dict gradient_checkpointing tf_legacy_loss
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop initializer_range
    transformers.js_config is_llama_config unsloth_version unsloth_fixed pretraining_tp
    """
)


@dataclass(frozen=True)
class Keys:
    """What a family says about the keys of its configuration, beyond `HARMLESS`."""

    understood: frozenset[str]
    harmless: frozenset[str] = frozenset()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that are known, at the values that are supported."""

    def check(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        """Refuse a key that is not understood, unless it is None or holds the family's default."""
        for key, value in config.items():
            if key in self.understood or key in self.harmless or key in HARMLESS or value is None:
                continue
            if key in self.only:
                if value not in self.only[key]:
                    allowed = " or ".join(repr(v) for v in self.only[key])
                    raise UserError(
                        f"{where}: {key}", f"{value!r} is not supported, only {allowed}"
                    )
            elif key == "auto_map":
                raise UserError(
                    f"{where}: {key}",
                    "this checkpoint brings model code of its own, which is never run",
                    "remove the key if the architecture is the stock one",
                )
            elif key == "quantization_config":
                raise UserError(
                    f"{where}: {key}",
                    "quantised weights",
                    "use the unquantised checkpoint, or GGUF",
                )
            elif key not in defaults or defaults[key] != value:
                raise UserError(
                    f"{where}: {key}",
                    f"{_short(value)} is not understood and may change the model's numbers",
                    f"{nearest(key, self.understood).rstrip('?')}; else remove the key, if it is "
                    "bookkeeping",
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Origin:
    """Where one tensor comes from: names on the other side, and how they become it."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor] | None = None
    """Takes the sources in order; None for the one source itself."""


@dataclass(frozen=True)
class Link:
    """Tensors of ours and of theirs that hold the same numbers.

    `read` turns theirs into ours and `write` ours into theirs, both tuple to tuple; None where the
    two are one and the same tensor.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., tuple[torch.Tensor, ...]] | None = None
    write: Callable[..., tuple[torch.Tensor, ...]] | None = None


@dataclass(frozen=True)
class Family:
    """One pretrained family, as two maps that read both ways.

    Args:
        name: what messages and `inspect` call it.
        matches: whether a configuration (and the names of the tensors) are of this family.
        read_config: their configuration, tensor shapes and a place for messages -> ours.
        links: our configuration and their tensor names (empty when writing) -> the name map.
        write_config: ours -> theirs; raises UserError where the family cannot say it.
        ignored: their tensors that carry no weights (rotary tables, causal masks), as suffixes.
    """

    name: str
    matches: Callable[[Mapping[str, Any], Collection[str]], bool]
    read_config: Callable[[Mapping[str, Any], Shapes, str], TambaConfig]
    links: Callable[[TambaConfig, Collection[str]], Iterable[Link]]
    write_config: Callable[[TambaConfig], dict[str, Any]]
    ignored: tuple[str, ...] = ()

    def to_tamba_config(
        self, config: Mapping[str, Any], shapes: Shapes, where: str = "config.json"
    ) -> TambaConfig:
        """Read their configuration.

        Raises:
            UserError: a key that is not understood, or a value that is not supported.
        """
        _check_depth(config, shapes, where)
        ours = self.read_config(config, shapes, where)
        dtype = config.get("dtype") or config.get("torch_dtype")
        if isinstance(dtype, str):
            ours.dtype = getattr(torch, dtype.removeprefix("torch."), None)
        return ours

    def to_family_config(self, config: TambaConfig) -> dict[str, Any]:
        """Our configuration in their words, as a `config.json` holds it.

        Raises:
            UserError: the layer list is not one that this family can express.
        """
        out = self.write_config(config)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            out[key] = getattr(config, key)
        if config.dtype is not None:
            out["dtype"] = str(config.dtype).removeprefix("torch.")
        return out

    def weights(
        self, config: TambaConfig, names: Collection[str], ours: Collection[str]
    ) -> dict[str, Origin]:
        """For each of our parameters `ours`, how to make it from their tensors `names`.

        A parameter that this family has no word for is absent from the result.
        """
        return _origins(self.links(config, names), ours, reading=True)

    def tensors(self, config: TambaConfig, ours: Collection[str]) -> dict[str, Origin]:
        """For each of their tensors, how to make it from our parameters `ours`."""
        return _origins(self.links(config, ()), ours, reading=False)

    def is_ignored(self, name: str) -> bool:
        """Whether their tensor `name` carries no weights."""
        return name.endswith(self.ignored) if self.ignored else False


def _check_depth(config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """Refuse a number of layers that no model, or not this one, has, before any is described."""
    for key in ("num_hidden_layers", "n_layer"):
        n = config.get(key)
        if n is None:
            continue
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise UserError(f"{where}: {key}", f"must be a whole number above 0, not {n!r}")
        if n > len(shapes) > 0:  # a layer has a tensor at least
            raise UserError(
                f"{where}: {key}", f"says {n} layers, and there are {len(shapes)} tensors in all"
            )


def _origins(links: Iterable[Link], ours: Collection[str], *, reading: bool) -> dict[str, Origin]:
    out = {}
    for link in links:
        if any(name not in ours for name in link.ours):
            continue
        made, sources = (link.ours, link.theirs) if reading else (link.theirs, link.ours)
        function = link.read if reading else link.write
        for index, name in enumerate(made):
            out[name] = Origin(sources, function and functools.partial(_pick, function, index))
    return out


def _pick(function: Callable[..., tuple[torch.Tensor, ...]], index: int, *sources: Any) -> Any:
    return function(*sources)[index]


def renamed(prefix_ours: str, prefix_theirs: str, table: Mapping[str, str]) -> list[Link]:
    """Links of tensors that differ in name alone; ``*`` at the end is for weight and bias."""
    links = []
    for ours, theirs in table.items():
        leaves = ("weight", "bias") if ours.endswith("*") else ("",)
        for leaf in leaves:
            a = ours.removesuffix("*") + leaf
            b = theirs.removesuffix("*") + leaf
            links.append(Link((prefix_ours + a,), (prefix_theirs + b,)))
    return links


def read_with_transformers(
    model_type: str, config: Mapping[str, Any], keys: Keys, where: str
) -> Any:
    """Their configuration as transformers reads it: defaults filled in, rope parameters nested.

    Raises:
        UserError: a key that `keys` does not cover, or a value that transformers refuses.
    """
    cls = transformers.CONFIG_MAPPING[model_type]
    data = {k: v for k, v in copy.deepcopy(dict(config)).items() if k not in ("auto_map",)}
    keys.check(config, cls().to_dict(), where)
    try:
        return cls.from_dict(data)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise UserError(where, f"not a valid {model_type} configuration: {error}") from error


# What each kind of rotary scaling may say; transformers checks that what it needs is there.
_ROPE_KEYS = words(
    """
    rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
    attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor
    low_freq_factor high_freq_factor
    """
)


def read_rope(hf: Any, head_dim: int, where: str) -> tuple[dict[str, Any], int]:
    """Rotary parameters as `AttentionSpec.rope` holds them, and how many dimensions they turn.

    `partial_rotary_factor` becomes the second result, except in ``proportional`` scaling, which
    turns the whole head at frequencies that the factor shapes.
    """
    rope = {k: v for k, v in dict(hf.rope_parameters or {}).items() if v is not None}
    rope["rope_type"] = rope.pop("type", None) if "rope_type" not in rope else rope["rope_type"]
    rope.pop("type", None)
    kind = rope["rope_type"] or "default"
    rope["rope_type"] = kind
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        known = ["default", *ROPE_INIT_FUNCTIONS]
        raise UserError(f"{where}: rope_parameters", f"unknown kind {kind!r}", nearest(kind, known))
    for key in rope:
        if key not in _ROPE_KEYS:
            raise UserError(
                f"{where}: rope_parameters.{key}", "not understood", nearest(key, _ROPE_KEYS)
            )
    if kind == "proportional":
        return rope, head_dim
    return rope, int(head_dim * rope.pop("partial_rotary_factor", 1.0))


def write_rope(attention: AttentionSpec) -> dict[str, Any]:
    """Rotary parameters nested and flat, so that every reader finds them where it looks."""
    rope = dict(attention.rope)
    if rope.get("rope_type") != "proportional" and attention.rotary_dim != attention.head_dim:
        rope["partial_rotary_factor"] = attention.rotary_dim / attention.head_dim
    out = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = dict(rope)
    return out


def check_activation(name: str, where: str) -> str:
    """`name` if transformers knows it as an activation. Raises UserError otherwise."""
    if name not in ACT2FN:
        raise UserError(where, f"unknown activation {name!r}", nearest(str(name), ACT2FN))
    return name


def make_config(
    hf: Any, layers: Iterable[tuple[str, BlockSpec]], final_norm: NormSpec, **more: Any
) -> TambaConfig:
    """A `TambaConfig` of named blocks, with what every transformers configuration calls alike."""
    layers = list(layers)
    return TambaConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        blocks={name: block.to_dict() for name, block in layers},
        layers=[name for name, _ in layers],
        final_norm=dataclasses.asdict(final_norm),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        initializer_range=hf.initializer_range,
        bos_token_id=hf.bos_token_id,
        eos_token_id=hf.eos_token_id,
        pad_token_id=hf.pad_token_id,
        **more,
    )


def mixers_of(config: TambaConfig, kind: type[M], family: str) -> list[M]:
    """The mixer of every layer. Raises UserError unless all are of `kind`."""
    mixers = [b.mixer for b in config.block_specs]
    found = [m for m in mixers if isinstance(m, kind)]
    require(len(found) == len(mixers), f"a layer that is not {kind.kind}", family)
    return found


def mlps_of(config: TambaConfig, family: str) -> list[MLPSpec]:
    """The MLP of every layer. Raises UserError unless all have one."""
    found = [b.mlp for b in config.block_specs if b.mlp is not None]
    require(len(found) == config.num_hidden_layers, "a layer without an MLP", family)
    return found


def same_everywhere(values: Iterable[V], what: str, family: str) -> V:
    """The one value that all layers share. Raises UserError when they differ."""
    values = list(values)
    if not values:
        raise UserError(family, "a model without layers cannot be written")
    if any(v != values[0] for v in values):
        raise UserError(family, f"{what} differs between layers, which {family} cannot say")
    return values[0]


def require(condition: bool, what: str, family: str) -> None:
    """Raise UserError unless `condition`: the family cannot express `what`."""
    if not condition:
        raise UserError(family, f"{family} cannot say {what}")
