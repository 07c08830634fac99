"""The one model class of the project: train, decode and verify, for every mix of layers.

Class names must not contain "mamba": `generate` would pass the cache under another argument name.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tamba.model.attention import AttentionWeights, takes_documents
from tamba.model.block import Block
from tamba.model.cache import TambaCache, adopt, expect_rollback
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.layers import make_norm
from tamba.model.recurrent import RecurrentMixer
from tamba.model.rotary import RotaryAngles, rotary_key
from tamba.model.tokens import Tokens, locate, restart_positions, segments


class TambaPreTrainedModel(PreTrainedModel):
    """What Hugging Face's machinery asks of a model class."""

    config: TambaConfig
    config_class = TambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = list(RecurrentMixer.FLOAT32)  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Block,
        "attentions": AttentionWeights,
    }
    # Our recurrent layers roll back, so assisted generation is allowed (see cache.py).
    _is_stateful = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecurrentMixer):
            module.reset_ssm_parameters()


class TambaModel(TambaPreTrainedModel):
    """Embedding, blocks and final norm: ids [B, T] -> hidden [B, T, D]."""

    def __init__(self, config: TambaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        specs = config.block_specs
        self.layers = nn.ModuleList([Block(config, spec, i) for i, spec in enumerate(specs)])
        self.final_norm = make_norm(config.final_norm_spec, config.hidden_size)
        attention = [
            s.mixer for s in specs if isinstance(s.mixer, AttentionSpec) and s.mixer.rotary_dim
        ]
        self._rotary = {
            rotary_key(spec): RotaryAngles(spec, config.max_position_embeddings)
            for spec in attention
        }
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the stack.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: [B, cached + T], 0 at padding, which may stand anywhere.
            position_ids: [B, T]; by default counted over real tokens. Positions that restart within
                a row (no mask, no cache) mark packed documents.
            past_key_values: a cache; recurrent layers of stock caches are replaced by ours.
            seq_idx: [B, T], document of each token in packed rows; nothing crosses a boundary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is not None:
            adopt(past_key_values, self.config)
        elif use_cache:
            past_key_values = TambaCache(self.config)
        tokens = self._locate(hidden, attention_mask, position_ids, past_key_values, seq_idx)
        for layer in islice(self.layers, self.config.num_hidden_layers):
            # By name: transformers leaves the cache out where a layer is computed twice.
            hidden = layer(hidden, past_key_values=past_key_values, tokens=tokens, **kwargs)
        hidden = self.final_norm(hidden.to(self.embed_tokens.weight.dtype))
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _locate(
        self,
        hidden: Tensor,
        mask: Tensor | Mapping[str, Tensor | None] | None,
        positions: Tensor | None,
        cache: Cache | None,
        seq_idx: Tensor | None,
        edges: Tensor | None = None,
    ) -> Tokens:
        """Where tokens stand; `edges` are their `segments`, where somebody has counted them."""
        rows, length = hidden.shape[:2]
        kinds = set(self.config.layer_types)
        ready: Mapping[str, Tensor | None] | None = None
        if isinstance(mask, Mapping) or (mask is not None and mask.dim() == 4):
            # Masks ready for attention: one for all layers, or one for each of their kinds.
            if "linear_attention" in kinds:
                raise ValueError(
                    "a 4-D attention mask says nothing to recurrent layers; pass [B, S]"
                )
            ready = mask if isinstance(mask, Mapping) else dict.fromkeys(kinds, mask)
            mask = None
        past = int(cache.get_seq_length()) if cache is not None and len(cache.layers) else 0
        mask = _full_mask(mask, cache, past, rows, length)
        tokens = locate(
            length,
            past,
            rows=rows,
            # `generate` numbers padding too when it hands over ready masks or a cache of its own.
            restarts=ready is None and (cache is None or isinstance(cache, TambaCache)),
            mask=mask,
            positions=positions,
            seq_idx=seq_idx,
            device=hidden.device,
        )
        if isinstance(cache, TambaCache):
            cache.mask = mask if tokens.documents is None else _last_document(tokens)
        elif cache is not None and tokens.documents is not None:
            raise ValueError("packed rows need a TambaCache, which knows what may be seen later")
        tokens.rotary = {
            key: angles(tokens.positions, hidden.dtype) for key, angles in self._rotary.items()
        }
        if kinds & {"full_attention", "sliding_attention"}:
            alone = mask is None and ready is None and not past and not _static(cache)
            if tokens.starts is not None and alone and takes_documents(self.config, hidden):
                if edges is None and not torch.compiler.is_compiling():  # which cannot count
                    edges = segments(tokens.starts)
                if edges is not None:
                    tokens.segments = edges
                    return tokens
            tokens.attention_masks = self._attention_masks(hidden, mask, ready, tokens, cache, past)
        return tokens

    def _attention_masks(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        ready: Mapping[str, Tensor | None] | None,
        tokens: Tokens,
        cache: Cache | None,
        past: int,
    ) -> dict[str, Tensor | None]:
        """A mask for each kind of attention layer, in the form its implementation expects."""
        documents = None
        if tokens.documents is not None:
            if past:
                raise ValueError(
                    "documents cannot begin on a filled cache when there are attention layers"
                )
            if "flash" in (self.config._attn_implementation or "") and hidden.shape[0] > 1:
                raise ValueError("packed rows under flash attention need batch 1; use sdpa or flex")
            # transformers reads boundaries from restarting positions, without mask and cache.
            starts = torch.ones_like(tokens.documents, dtype=torch.bool)
            starts[:, 1:] = tokens.documents.diff(dim=1) != 0
            documents, mask, cache = restart_positions(starts), None, None
        # Of whole rows sdpa needs no mask. transformers 5.17 writes one out while a CUDA graph is
        # recorded: other work than that of the passes before, and slower attention.
        whole = mask is None and documents is None and not past and not _static(cache)
        whole &= self.config._attn_implementation == "sdpa" and not torch.compiler.is_exporting()
        window, length = self.config.sliding_window, hidden.shape[1]
        masks: dict[str, Tensor | None] = {}
        for kind, make in (
            ("full_attention", create_causal_mask),
            ("sliding_attention", create_sliding_window_causal_mask),
        ):
            if kind not in (kinds := self.config.layer_types):
                continue
            if ready is not None:
                masks[kind] = ready[kind]
            elif whole and (kind == "full_attention" or window is None or length <= window):
                masks[kind] = None
            else:
                masks[kind] = make(
                    config=self.config,
                    inputs_embeds=hidden,
                    attention_mask=mask,
                    past_key_values=cache,
                    position_ids=documents,
                    layer_idx=kinds.index(kind),
                    allow_is_causal_skip=not _static(cache),
                )
        return masks


def _static(cache: Cache | None) -> bool:
    """Whether layers have places beyond the tokens so far, which only a written-out mask hides."""
    return cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)


def _last_document(tokens: Tokens) -> Tensor:
    """[B, T] bool, True at the last document of each packed row: all that later tokens may see."""
    assert tokens.documents is not None
    real = (
        torch.ones_like(tokens.documents, dtype=torch.bool) if tokens.mask is None else tokens.mask
    )
    last = (tokens.documents * real).amax(dim=1, keepdim=True)
    return (tokens.documents == last) & real


def _full_mask(
    mask: Tensor | None, cache: Cache | None, past: int, rows: int, length: int
) -> Tensor | None:
    """[B, past + T] bool over cached and new places, or None when all of them hold tokens.

    The caller's mask may cover both or the new tokens alone; what it leaves out, a `TambaCache`
    remembers.
    """
    before = cache.mask if isinstance(cache, TambaCache) else None
    if mask is not None:
        mask = mask.to(torch.bool)
        if mask.shape[1] not in (length, past + length):
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns; expected {length} (new tokens) or "
                f"{past + length} (with the cached ones)"
            )
    if mask is None and before is None:
        return None
    if mask is None or mask.shape[1] < past + length:
        known = [m for m in (before, mask) if m is not None]
        if before is None:
            before = known[0].new_ones(rows, past)
        if mask is None:
            mask = known[0].new_ones(rows, length)
        mask = torch.cat([before, mask], dim=1)
    return None if bool(mask.all()) else mask


class TambaForCausalLM(TambaPreTrainedModel, GenerationMixin):
    """A language model over any stack of attention, Mamba-1 and Mamba-2 layers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TambaConfig) -> None:
        super().__init__(config)
        self.model = TambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any
    ) -> None:
        # `generate` looks at the cache before the first forward (can it be compiled, cropped?).
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache):
            adopt(cache, self.config)
            if getattr(generation_config, "is_assistant", False):
                # A draft, all of which may be refused, and the token before it.
                expect_rollback(cache, (generation_config.max_new_tokens or 0) + 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] (or of the last `logits_to_keep` positions), and the loss for `labels`.

        Arguments are those of `TambaModel.forward`; `labels` [B, T] are shifted here and -100 is
        not scored.
        """
        if isinstance(logits_to_keep, int) and logits_to_keep > 1:
            # Whoever wants logits of several tokens verifies a draft, and may refuse all of it.
            expect_rollback(past_key_values, logits_to_keep)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
