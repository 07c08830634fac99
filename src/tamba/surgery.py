"""Making a Mamba layer out of an attention layer, tensor by tensor.

Attention without softmax is a linear recurrence with Q as its C, K as its B and V as its x (*The
Mamba in the Llama*, arXiv 2408.15237, section 2). Grouped queries carry over: keys and values stay
shared, `n_kv_heads` says among how many. What attention has and the recurrence has no place for
(rotation, the softmax and its scale, q/k norm, windows) is left behind, and `lost` names it.

Knows tensors and layer templates; nothing of files, plans or whole models.
Shape letters: `H` heads, `G` kv heads, `P` head_dim, `N` d_state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tamba.errors import UserError
from tamba.model.block import Block
from tamba.model.config import AttentionSpec, BlockSpec, Mamba1Spec, Mamba2Spec, TambaConfig
from tamba.model.mamba1 import mamba1_in_proj_slices
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.plan import ConvertOptions, Mixer

LONGEST_MEMORY = 2048
"""Tokens after which the slowest head has forgotten all but 1/e, unless `decay` is ``paper``."""
SHORTEST_MEMORY = 2
OPEN_GATE = 1.278464542761074
"""Where SiLU is one."""


How = Literal["copied", "transformed", "new"]


@dataclass(frozen=True)
class Piece:
    """One tensor of a new mixer.

    Args:
        tensor: its value.
        sources: the attention's tensors that it holds, by name; none for fresh numbers.
        n_new: how many of its numbers are fresh.
    """

    tensor: Tensor
    sources: tuple[str, ...] = ()
    n_new: int = 0

    @property
    def how(self) -> How:
        """``copied``, ``transformed`` (cut, joined or filled up) or ``new``."""
        if not self.sources:
            return "new"
        return "copied" if len(self.sources) == 1 and not self.n_new else "transformed"


def converted_block(
    block: BlockSpec, options: ConvertOptions, d_model: int, mixer: Mixer | None = None
) -> BlockSpec:
    """The template of an attention layer after conversion: another mixer, the rest as it was.

    Args:
        block: a template with attention.
        options: what the new mixer is like.
        d_model: width of the residual stream.
        mixer: ``mamba1`` or ``mamba2``; None for the one that `options` says.

    Raises:
        UserError: the layer has no attention, or `options.d_state` does not divide its heads.
    """
    attention = block.mixer
    if not isinstance(attention, AttentionSpec):
        raise UserError("convert", f"the layer has no attention, it is {attention.kind} already")
    if (mixer or options.mixer) == "mamba2":
        return replace(block, mixer=_mamba2(attention, options, block.norm.eps))
    return replace(block, mixer=_mamba1(attention, options, d_model))


def _needs_bias(attention: AttentionSpec, options: ConvertOptions) -> bool:
    return attention.qkv_bias or attention.out_bias or options.gate == "open"


def _mamba2(attention: AttentionSpec, options: ConvertOptions, eps: float) -> Mamba2Spec:
    heads = attention.n_heads
    return Mamba2Spec(
        n_heads=heads,
        head_dim=attention.head_dim,
        d_state=attention.head_dim,
        n_groups=heads,
        n_kv_heads=attention.n_kv_heads,
        d_conv=options.d_conv,
        conv_activation=options.conv_activation,
        gate=options.gate != "none",
        norm_groups={"none": None, "head": heads, "all": 1}[options.norm],
        norm_eps=eps,
        proj_bias=_needs_bias(attention, options),
    )


def _mamba1(attention: AttentionSpec, options: ConvertOptions, d_model: int) -> Mamba1Spec:
    head_dim, d_state = attention.head_dim, options.d_state
    if head_dim % d_state:
        raise UserError(
            "build.convert.d_state",
            f"{d_state} does not divide the head size {head_dim}",
            "a head is cut into slices of d_state",
        )
    slices = head_dim // d_state
    return Mamba1Spec(
        d_inner=attention.n_heads * head_dim,
        d_state=d_state,
        dt_rank=math.ceil(d_model / 16),
        d_conv=options.d_conv,
        n_groups=attention.n_heads * slices,
        n_kv_groups=attention.n_kv_heads * slices,
        repeat_span=slices if options.slices == "head" else 1,
        dt_from="input",
        conv_activation=options.conv_activation,
        gate=options.gate != "none",
        proj_bias=_needs_bias(attention, options),
    )


def layer_seed(seed: int, layer: int) -> int:
    """The seed of a student layer's fresh numbers, which depend on no other layer."""
    return seed * 1_000_003 + layer


def lost(attention: AttentionSpec) -> list[str]:
    """What of the attention its recurrence leaves behind, in words."""
    gone = ["softmax and its scale"]
    if attention.rotary_dim:
        gone.append("rotary positions")
    if attention.qk_norm is not None:
        gone.append("q/k norm")
    if attention.sliding_window is not None:
        gone.append(f"window of {attention.sliding_window}")
    return gone


def convert_mixer(
    read: Callable[[str], Tensor],
    attention: AttentionSpec,
    block: BlockSpec,
    options: ConvertOptions,
    config: TambaConfig,
    seed: int,
) -> dict[str, Piece]:
    """The tensors of a converted layer's mixer.

    Args:
        read: gives the attention's tensors by name (``q_proj.weight``, ``o_proj.bias``, ...).
        attention: the attention's template.
        block: the new layer's template, from `converted_block`.
        options: those that `block` was made with.
        config: of a model that holds such layers (its width and initialisation count).
        seed: of the fresh numbers; equal seeds give equal layers.

    Returns:
        Name within the mixer -> its value and where it comes from. What is copied whole keeps the
        type it is read in; the rest is float32.
    """
    spec = block.mixer
    assert isinstance(spec, Mamba1Spec | Mamba2Spec)
    fresh = _fresh_mixer(block, attention.n_heads, options, config, seed)
    pieces = {name: Piece(tensor, (), tensor.numel()) for name, tensor in fresh.items()}
    if options.weights == "random":
        return pieces
    slices = _slices(spec)
    for name, tensor in fresh.items():
        if name == "in_proj.weight" or (name == "in_proj.bias" and attention.qkv_bias):
            pieces[name] = _filled(tensor, read, name.rpartition(".")[2], slices)
        elif name == "out_proj.weight" or (name == "out_proj.bias" and attention.out_bias):
            source = name.replace("out_proj", "o_proj")
            pieces[name] = Piece(read(source), (source,))
    return pieces


def convert_layer(
    layer: Block,
    config: TambaConfig,
    options: ConvertOptions,
    index: int,
    *,
    mixer: Mixer | None = None,
    seed: int = 0,
) -> Block:
    """A converted layer beside the one it is made of, to try it in its place.

    Args:
        layer: a layer with attention; it is left as it is.
        config: of the model that holds it.
        options: how to convert.
        index: the layer's place, which its cache goes by.
        mixer: ``mamba1`` or ``mamba2``; None for the one that `options` says.
        seed: as for `build`; equal seeds give the layer that a build would make.

    Returns:
        A layer of the same type and device with a mixer of its own; norms and MLP are shared.
    """
    spec = converted_block(layer.spec, options, config.d_model, mixer)
    attention = layer.spec.mixer
    assert isinstance(attention, AttentionSpec)
    weights = layer.mixer.state_dict()
    pieces = convert_mixer(
        weights.__getitem__, attention, spec, options, config, layer_seed(seed, index)
    )
    example = weights["o_proj.weight"]
    with torch.device("meta"):
        converted = Block(config, spec, index)
    for name, piece in pieces.items():
        path, _, leaf = name.rpartition(".")
        keep = leaf in RecurrentMixer.FLOAT32 and example.element_size() < 4
        dtype = torch.float32 if keep else example.dtype
        tensor = piece.tensor.to(device=example.device, dtype=dtype)
        # A copied projection must not be the attention's own: training would move both.
        tensor = tensor.clone() if piece.how == "copied" else tensor
        setattr(converted.mixer.get_submodule(path), leaf, torch.nn.Parameter(tensor))
    converted.norm, converted.mlp_norm, converted.mlp = layer.norm, layer.mlp_norm, layer.mlp
    return converted.train(layer.training)


def _slices(spec: Mamba1Spec | Mamba2Spec) -> dict[str, slice]:
    return spec.in_proj_slices if isinstance(spec, Mamba2Spec) else mamba1_in_proj_slices(spec)


def _filled(
    out: Tensor, read: Callable[[str], Tensor], leaf: str, slices: dict[str, slice]
) -> Piece:
    """in_proj with v, k and q in the rows of x, B and C; z and dt stay as they are."""
    n_new, sources = out.numel(), []
    for rows, name in (("x", "v_proj"), ("B", "k_proj"), ("C", "q_proj")):
        source = read(f"{name}.{leaf}")
        out = out.to(torch.promote_types(out.dtype, source.dtype))
        out[slices[rows]] = source.to(out.dtype)
        sources.append(f"{name}.{leaf}")
        n_new -= source.numel()
    return Piece(out, tuple(sources), n_new)


def _fresh_mixer(
    block: BlockSpec, n_heads: int, options: ConvertOptions, config: TambaConfig, seed: int
) -> dict[str, Tensor]:
    """A mixer as `options` begin it, in float32, before anything of the attention goes in."""
    spec = block.mixer
    assert isinstance(spec, Mamba1Spec | Mamba2Spec)
    slices = _slices(spec)
    drawn = fresh_block(replace(block, mlp=None), config, seed)
    fresh = {k.removeprefix("mixer."): v for k, v in drawn.items() if k.startswith("mixer.")}
    for name in ("in_proj.bias", "out_proj.bias"):
        if name in fresh:
            fresh[name].zero_()
    if options.gate == "open":
        fresh["in_proj.weight"][slices["z"]] = 0.0
        fresh["in_proj.bias"][slices["z"]] = OPEN_GATE
    _first_convolution(fresh, options, seed)
    if options.decay != "paper":
        memory = _memories(n_heads, options)
        if isinstance(spec, Mamba2Spec):
            fresh["in_proj.weight"][slices["dt"]] = 0.0
        else:
            # The low-rank rows stay random: were both factors zero, neither would ever learn.
            fresh["dt_proj.weight"].zero_()
            memory = memory.repeat_interleave(spec.d_inner // n_heads)
        # With A = -1 a step of dt = 1/m makes the state a running mean over about m tokens, so its
        # size does not depend on m or on the length of the text.
        fresh["dt_bias"] = torch.log(torch.expm1(1.0 / memory))
        fresh["A_log"].zero_()
        fresh["D"].zero_()
    return fresh


def _memories(n_heads: int, options: ConvertOptions) -> Tensor:
    """[H] tokens that each head remembers at first."""
    if options.decay == "slow":
        return torch.full((n_heads,), float(LONGEST_MEMORY))
    low, high = math.log(SHORTEST_MEMORY), math.log(LONGEST_MEMORY)
    return torch.linspace(low, high, n_heads).exp()


def _first_convolution(fresh: dict[str, Tensor], options: ConvertOptions, seed: int) -> None:
    """Taps that pass each token through, or torch's own draw for a convolution."""
    weight, bias = fresh["conv1d.weight"], fresh.get("conv1d.bias")
    if options.conv == "identity":
        weight.zero_()
        weight[:, 0, -1] = 1.0  # the last tap is the present token
        if bias is not None:
            bias.zero_()
        return
    generator = torch.Generator().manual_seed(seed)
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound, generator=generator)
    if bias is not None:
        bias.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def fresh_block(block: BlockSpec, config: TambaConfig, seed: int) -> dict[str, Tensor]:
    """All tensors of a new layer as the model itself would begin it, in float32.

    Args:
        block: the layer's template.
        config: of a model that holds such layers (its width and initialisation count).
        seed: equal seeds give equal layers; the global random state is left alone.
    """
    alone = TambaConfig(
        vocab_size=1,
        hidden_size=config.hidden_size,
        blocks={"block": block.to_dict()},
        layers=["block"],
        initializer_range=config.initializer_range,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = TambaForCausalLM(alone).float()
    prefix = "model.layers.0."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }
