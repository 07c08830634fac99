"""What a hybrid is made of, as data: named block templates and a list naming one for each layer.

A template says everything that shapes the maths of a layer (norm, residual form, mixer, MLP), so a
Llama with some Mamba-2 layers and a Pythia–Mamba–Pythia sandwich are two lists, not two classes.
Nothing here knows about tensors.

Shape letters: `D` d_model, `H` heads, `G` groups, `P` head_dim, `N` d_state, `W` d_conv.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import (
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tamba.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A normalisation: `rms` (weight only) or `layer` (weight and bias)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class MLPSpec:
    """The channel-mixing half of a block.

    `gated` gives ``down(act(gate(x)) * up(x))`` (SwiGLU when `activation` is ``silu``), otherwise
    ``down(act(up(x)))``. `activation` is a name of transformers' `ACT2FN`.
    """

    d_mlp: int
    gated: bool = True
    activation: str = "silu"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Softmax attention with `n_kv_heads` shared key/value heads (GQA).

    Args:
        rotary_dim: leading dimensions of each head that are rotated; 0 for none.
        rope: transformers' `rope_parameters` (`rope_type`, `rope_theta`, and what the type needs).
        qk_norm: RMSNorm over each head of q and k before rotation (Qwen3), or None.
        sliding_window: keys further back than this are not seen, or None.
        scale: factor on q·k; None for ``head_dim ** -0.5``.
    """

    kind: ClassVar[str] = "attention"

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e4}
    )
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    sliding_window: int | None = None
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mamba1Spec:
    """Selective scan (Gu and Dao 2023, arXiv 2312.00752, section 3), B and C maybe grouped.

    The plain form has one group and computes dt, B and C from the convolved x (`x_proj`). The form
    that *The Mamba in the Llama* (arXiv 2408.15237) makes of attention computes them from the layer
    input, gives each slice of `d_state` channels its own C (`n_groups = d_inner / d_state`), and
    shares x and B among query heads as GQA does (`n_kv_groups`).

    Args:
        n_groups: groups of channels with their own C (and B when `n_kv_groups` is None).
        n_kv_groups: groups that x and B are stored with; each is repeated to reach `n_groups`.
        repeat_span: groups that are repeated together. ``head_dim / d_state`` repeats whole heads,
            which is what GQA means; 1 is the pairing of the released checkpoints (`legacy`).
        dt_from: ``inner`` (from the convolved x) or ``input`` (from the layer input).
    """

    kind: ClassVar[str] = "mamba1"

    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int = 4
    n_groups: int = 1
    n_kv_groups: int | None = None
    repeat_span: int = 1
    dt_from: Literal["inner", "input"] = "inner"
    conv_bias: bool = True
    proj_bias: bool = False
    conv_activation: Literal["silu", "identity"] = "silu"
    gate: bool = True


@dataclass(frozen=True, kw_only=True)
class Mamba2Spec:
    """State-space duality mixer (Dao and Gu 2024, arXiv 2405.21060), one scalar decay a head.

    ``in_proj`` rows are ``[z | x | B | C | dt]``. With `n_kv_heads` set, x has `n_kv_heads` heads
    and B `n_kv_heads` groups, repeated after the convolution, while C has `n_groups` groups:
    this is grouped-query attention read as a state-space layer (Q→C, K→B, V→x).

    Args:
        n_groups: groups sharing C (and B when `n_kv_heads` is None); divides `n_heads`.
        gate: multiply by ``silu(z)``; without it there are no z rows.
        norm_groups: groups of the output RMSNorm over d_inner (`n_heads` normalises each head, 1
            all of it); None for no norm.
        norm_before_gate: norm first, then gate (the papers gate first).
        conv_activation: after the convolution, ``silu`` (the papers) or ``identity``.
        dt_limit: clamp of dt after softplus; None for none.
    """

    kind: ClassVar[str] = "mamba2"

    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int
    n_kv_heads: int | None = None
    d_conv: int = 4
    conv_bias: bool = True
    conv_activation: Literal["silu", "identity"] = "silu"
    gate: bool = True
    norm_groups: int | None = None
    norm_eps: float = 1e-5
    norm_before_gate: bool = False
    proj_bias: bool = False
    chunk_size: int = 64
    dt_limit: tuple[float, float] | None = None

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def in_proj_slices(self) -> dict[str, slice]:
        """Rows of ``in_proj`` by name, in the order z, x, B, C, dt (z is empty without a gate)."""
        kv = self.n_kv_heads
        sizes = {
            "z": self.d_inner if self.gate else 0,
            "x": (self.n_heads if kv is None else kv) * self.head_dim,
            "B": (self.n_groups if kv is None else kv) * self.d_state,
            "C": self.n_groups * self.d_state,
            "dt": self.n_heads,
        }
        slices, start = {}, 0
        for name, size in sizes.items():
            slices[name] = slice(start, start + size)
            start += size
        return slices

    @property
    def d_conv_channels(self) -> int:
        """Channels of the convolution, over x, B and C."""
        s = self.in_proj_slices
        return s["C"].stop - s["x"].start


MixerSpec = AttentionSpec | Mamba1Spec | Mamba2Spec
MIXERS: dict[str, type[AttentionSpec] | type[Mamba1Spec] | type[Mamba2Spec]] = {
    spec.kind: spec for spec in (AttentionSpec, Mamba1Spec, Mamba2Spec)
}


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One layer: ``x + mixer(norm x)`` then ``x + mlp(norm x)``; `parallel` adds both at once."""

    mixer: MixerSpec
    mlp: MLPSpec | None
    norm: NormSpec = NormSpec()
    residual: Literal["sequential", "parallel"] = "sequential"

    def cache_bytes(self, context: int, bytes_per_value: int) -> int:
        """Bytes that the layer's cache holds of one sequence after `context` tokens.

        Args:
            bytes_per_value: of keys, values and convolution windows; SSM states are float32.
        """
        mixer = self.mixer
        if isinstance(mixer, AttentionSpec):
            # A window's last place is the next token's own.
            window = mixer.sliding_window
            seen = context if window is None else min(context, window - 1)
            return 2 * mixer.n_kv_heads * mixer.head_dim * seen * bytes_per_value
        channels = mixer.d_inner if isinstance(mixer, Mamba1Spec) else mixer.d_conv_channels
        return 4 * mixer.d_inner * mixer.d_state + channels * (mixer.d_conv - 1) * bytes_per_value

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file; `from_dict` reads it back."""
        out = dataclasses.asdict(self)
        out["mixer"] = {"kind": self.mixer.kind, **out["mixer"]}
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> BlockSpec:
        """Read what `to_dict` wrote. UserError for an unknown, missing or impossible entry."""
        data = _table(data, where)
        mixer = _table(data.pop("mixer", {}), f"{where}.mixer")
        kind = mixer.pop("kind", None)
        if not isinstance(kind, str) or kind not in MIXERS:
            raise UserError(
                f"{where}.mixer.kind", f"unknown mixer {kind!r}", nearest(str(kind), MIXERS)
            )
        if mixer.get("qk_norm") is not None:
            mixer["qk_norm"] = _read(NormSpec, mixer["qk_norm"], f"{where}.mixer.qk_norm")
        if isinstance(limit := mixer.get("dt_limit"), list):
            mixer["dt_limit"] = tuple(limit)
        mlp = data.pop("mlp", None)
        spec = _read(
            cls,
            {
                **data,
                "mixer": _read(MIXERS[kind], mixer, f"{where}.mixer"),
                "mlp": None if mlp is None else _read(MLPSpec, mlp, f"{where}.mlp"),
                "norm": _read(NormSpec, data.get("norm", {}), f"{where}.norm"),
            },
            where,
        )
        _check_mixer(spec.mixer, f"{where}.mixer")
        return spec


def _table(value: Any, where: str) -> dict[str, Any]:
    """A copy of a table; UserError for anything else."""
    if not isinstance(value, Mapping):
        raise UserError(where, f"must be a table, not {value!r}")
    return dict(value)


_NOT_COUNTS = {"rotary_dim": 0}
"""Whole numbers that may be less than 1, and how little they may be."""
_POSITIVE = ("eps", "norm_eps")


def _fault(hint: Any, value: Any) -> str:
    """What is wrong with a value of a field of this type; empty if nothing is."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "" if value in parts else f"{value!r} is not one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        faults = [_fault(part, value) for part in parts]
        return "" if "" in faults else faults[0]
    if origin is tuple:
        fits = isinstance(value, tuple) and len(value) == len(parts)
        fits = fits and not any(map(_fault, parts, value))
        return "" if fits else f"must be {len(parts)} numbers, not {value!r}"
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if number and not math.isnan(value) else f"must be a number, not {value!r}"
    kind = origin or hint
    if isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return ""
    names = {int: "a whole number", bool: "true or false", str: "a word", list: "a list"}
    return f"must be {names.get(kind, 'a table')}, not {value!r}"


def _check_value(name: str, hint: Any, value: Any, where: str) -> None:
    """Refuse a value of another type than `hint`, or a size that nothing can have."""
    fault = _fault(hint, value)
    if not fault and isinstance(value, int) and not isinstance(value, bool):
        least = _NOT_COUNTS.get(name, 1)
        if get_origin(hint) is not Literal and value < least:
            fault = f"must be {least} or more, not {value}"
    if not fault and name in _POSITIVE and not 0 < value < math.inf:
        fault = f"must be a positive number, not {value}"
    if not fault and name == "activation" and value not in ACT2FN:
        raise UserError(where, f"unknown function {value!r}", nearest(value, ACT2FN))
    if fault:
        raise UserError(where, fault)


def _read(cls: type[T], data: Any, where: str) -> T:
    data = _table(data, where)
    hints = get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in data.items():
        if key not in names:
            raise UserError(f"{where}.{key}", "unknown key", nearest(str(key), names))
        _check_value(key, hints[key], value, f"{where}.{key}")
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in data
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(where, f"missing {', '.join(missing)}")
    return cls(**data)


def _check_mixer(mixer: MixerSpec, where: str) -> None:
    """Refuse sizes that no mixer can have: every count positive, every grouping a divisor."""

    def divides(small: str, large: str) -> None:
        a, b = getattr(mixer, small), getattr(mixer, large)
        if a is not None and (a < 1 or b % a):
            raise UserError(f"{where}.{small}", f"{a} does not divide {large} = {b}")

    match mixer:
        case AttentionSpec():
            divides("n_kv_heads", "n_heads")
            _check_rope(mixer.rope, f"{where}.rope")
            if not 0 <= mixer.rotary_dim <= mixer.head_dim or mixer.rotary_dim % 2:
                raise UserError(
                    f"{where}.rotary_dim",
                    f"{mixer.rotary_dim} is not even and from 0 to head_dim = {mixer.head_dim}",
                )
        case Mamba1Spec():
            divides("n_groups", "d_inner")
            divides("n_kv_groups", "n_groups")
            if mixer.n_kv_groups is not None and mixer.dt_from == "inner":
                raise UserError(f"{where}.n_kv_groups", "needs dt_from = 'input'")
            if mixer.n_kv_groups is not None and mixer.n_kv_groups % mixer.repeat_span:
                raise UserError(
                    f"{where}.repeat_span",
                    f"{mixer.repeat_span} does not divide n_kv_groups = {mixer.n_kv_groups}",
                )
        case Mamba2Spec():
            divides("n_groups", "n_heads")
            divides("n_kv_heads", "n_heads")
            divides("norm_groups", "d_inner")


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 1e4)
    known = {"default", *ROPE_INIT_FUNCTIONS}
    if kind not in known:
        raise UserError(f"{where}.rope_type", f"unknown kind {kind!r}", nearest(str(kind), known))
    if fault := _fault(float, theta):
        raise UserError(f"{where}.rope_theta", fault)
    if not 0 < theta < math.inf:
        raise UserError(f"{where}.rope_theta", f"must be a positive number, not {theta}")


def _windows(specs: dict[str, BlockSpec]) -> set[int]:
    mixers = [b.mixer for b in specs.values() if isinstance(b.mixer, AttentionSpec)]
    return {m.sliding_window for m in mixers if m.sliding_window is not None}


def _check_sizes(config: TambaConfig, derived: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type or size, and words that the layer list does not bear out."""
    for name, hint in (
        ("vocab_size", int),
        ("hidden_size", int),
        ("max_position_embeddings", int),
        ("initializer_range", float),
        ("residual_in_fp32", bool),
        ("tie_word_embeddings", bool),
        ("blocks", dict | None),
        ("layers", list | None),
    ):
        _check_value(name, hint, getattr(config, name), f"config: {name}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # A type alone: some checkpoints write -1 for none.
        hint = int | list | None if name == "eos_token_id" else int | None
        if fault := _fault(hint, getattr(config, name)):
            raise UserError(f"config: {name}", fault)
    if not 0 <= config.initializer_range < math.inf:
        raise UserError("config: initializer_range", f"cannot be {config.initializer_range}")
    for index, name in enumerate(config.layers or []):
        if fault := _fault(str, name):
            raise UserError(f"config: layers[{index}]", fault)
    count = derived.get("num_hidden_layers", len(config.layers or []))
    if count != len(config.layers or []):
        raise UserError(
            "config: layers",
            f"lists {len(config.layers or [])} layers and num_hidden_layers says {count}",
            "make them agree",
        )


class TambaConfig(PreTrainedConfig):
    """Configuration of a `TambaForCausalLM`.

    Args:
        vocab_size: rows of the token embedding (and of the head).
        hidden_size: residual width, `d_model` elsewhere in this project.
        blocks: template name -> `BlockSpec` as plain data.
        layers: the template of each layer, bottom first.
        final_norm: the `NormSpec` before the head; kept as plain data.
        residual_in_fp32: keep the residual stream in float32 (Mamba checkpoints are trained so).

    Raises:
        UserError: an unknown key, mixer or template, or sizes that cannot be.
    """

    model_type = "tamba"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 256
    hidden_size: int = 64
    blocks: dict[str, Any] | None = None
    layers: list[str] | None = None
    final_norm: Any = None
    residual_in_fp32: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_sizes(self, kwargs)
        self.blocks = {
            name: block.to_dict()
            if isinstance(block, BlockSpec)
            else _table(block, f"config: blocks.{name}")
            for name, block in (self.blocks or {}).items()
        }
        self.layers = list(self.layers or [])
        if isinstance(self.final_norm, NormSpec):
            self.final_norm = dataclasses.asdict(self.final_norm)
        self.final_norm = _table(
            self.final_norm or dataclasses.asdict(NormSpec()), "config: final_norm"
        )
        self._specs = {
            name: BlockSpec.from_dict(block, f"config: blocks.{name}")
            for name, block in self.blocks.items()
        }
        self._final_norm_spec = _read(NormSpec, self.final_norm, "config: final_norm")
        for index, name in enumerate(self.layers):
            if name not in self._specs:
                raise UserError(
                    f"config: layers[{index}]",
                    f"no block named {name!r}",
                    nearest(name, self._specs),
                )
        if len(windows := _windows(self._specs)) > 1:
            raise UserError(
                "config: blocks",
                f"sliding windows differ ({sorted(windows)}); all must have one width",
            )
        self._depth: int | None = None
        # Derived words for other readers; ours are computed from the layer list.
        for derived in ("layer_types", "num_hidden_layers", "num_attention_heads", "head_dim"):
            kwargs.pop(derived, None)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        for private in ("_specs", "_final_norm_spec", "_depth"):
            out.pop(private, None)
        return out

    @property
    def d_model(self) -> int:
        return self.hidden_size

    @property
    def block_specs(self) -> list[BlockSpec]:
        """The template of each layer, bottom first."""
        return [self._specs[name] for name in self.layers or []]

    @property
    def final_norm_spec(self) -> NormSpec:
        return self._final_norm_spec

    @property
    def num_hidden_layers(self) -> int:
        """Layers that a forward pass goes through: all, but where an early exit is asked for."""
        return len(self.layers or []) if self._depth is None else self._depth

    @num_hidden_layers.setter
    def num_hidden_layers(self, n: int) -> None:
        # transformers drafts with the lower layers (`assistant_early_exit`) by setting this for a
        # while. What the model is made of stays.
        total = len(self.layers or [])
        if not isinstance(n, int) or not 1 <= n <= total:
            raise UserError("num_hidden_layers", f"cannot be {n!r} in a model of {total} layers")
        self._depth = None if n == total else n

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer in the words that transformers' caches understand."""
        words = []
        for block in self.block_specs[: self.num_hidden_layers]:
            if not isinstance(block.mixer, AttentionSpec):
                words.append("linear_attention")
            elif block.mixer.sliding_window is not None:
                words.append("sliding_attention")
            else:
                words.append("full_attention")
        return words

    @property
    def positions(self) -> int | None:
        """Tokens that attention has positions for; None where no layer sees a whole sequence."""
        return self.max_position_embeddings if "full_attention" in self.layer_types else None

    @property
    def num_attention_heads(self) -> int:
        """Heads of the first layer that has any; 1 when none has. Other programs ask."""
        heads = [b.mixer.n_heads for b in self.block_specs if not isinstance(b.mixer, Mamba1Spec)]
        return heads[0] if heads else 1

    @property
    def head_dim(self) -> int:
        dims = [b.mixer.head_dim for b in self.block_specs if not isinstance(b.mixer, Mamba1Spec)]
        return dims[0] if dims else self.hidden_size

    @property
    def sliding_window(self) -> int | None:
        """The window of every sliding layer, or None when no layer slides."""
        return next(iter(_windows(self._specs)), None)
