"""What a model remembers between calls, as transformers cache layers.

Attention layers use transformers' own layers. A recurrent layer (`RecurrentLayer`) holds the live
convolution and SSM state and, while it records the past, a checkpoint of both some tokens back and
a ring of the mixer inputs since. Rolling back moves the end of the ring, row by row; the live state
is replayed from the checkpoint at the next call (Algorithm 2 of *The Mamba in the Llama*, arXiv
2408.15237). So stock `generate`, beams and assisted generation work on hybrids without loss.

This module knows tensors and positions, not mixers: a mixer passes its scan as a function.
Shape letters: `B` batch, `T` tokens, `R` tokens in the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticLayer,
)

from tamba.model.config import TambaConfig
from tamba.model.tokens import padding_first

DEFAULT_ROLLBACK = 64
"""Tokens that a recording layer can take back at least when nobody said how many (assisted
generation; longer drafts are told by `expect_rollback`)."""

# (inputs, conv_state, ssm_state, starts, padding) -> (output, conv_state, ssm_state)
Scan = Callable[
    [Sequence[Tensor], Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor, Tensor],
]


class RecurrentLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """State of one recurrent mixer.

    Args:
        max_rollback: tokens that can be taken back; 0 records nothing until
            `activate_past_recording`.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, max_rollback: int = 0) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.max_rollback = max_rollback
        self.record_past = max_rollback > 0
        self._forget()

    def _forget(self) -> None:
        self.length = 0
        self.conv_state: Tensor | None = None
        self.ssm_state: Tensor | None = None
        self._stale = False  # the live state must be replayed before use
        self._base: tuple[Tensor | None, Tensor | None] = (None, None)
        self._base_is_start = True
        self._ring: list[Tensor] | None = (
            None  # mixer inputs, then document starts; each [B, R, ...]
        )
        self._ring_padding: Tensor | None = None
        self.has_previous_state: dict[int, bool] = {0: False}

    # -- the mixer's side ---------------------------------------------------------------------

    def advance(
        self, scan: Scan, inputs: Sequence[Tensor], starts: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """Run `scan` over new inputs (each [B, T, ...]) from the state and keep the new state."""
        self._replay(scan)
        new = inputs[0].shape[1]
        if not self.record_past:
            output = self._step(scan, inputs, starts, padding)
        else:
            # Only the last `max_rollback` tokens are kept; a long prompt is run in two pieces so
            # that the checkpoint lies right before them.
            head = max(new - self.max_rollback, 0)
            outputs = []
            if head:
                outputs.append(
                    self._step(
                        scan,
                        [x[:, :head] for x in inputs],
                        None if starts is None else starts[:, :head],
                        None if padding is None else padding.clamp_max(head),
                    )
                )
                self._checkpoint()
                inputs = [x[:, head:] for x in inputs]
                starts = None if starts is None else starts[:, head:]
                padding = None if padding is None else (padding - head).clamp_min(0)
            self._make_room(scan, new - head)
            outputs.append(self._step(scan, inputs, starts, padding))
            self._remember(inputs, starts, padding)
            output = torch.cat(outputs, dim=1) if head else outputs[0]
        self.length += new
        self.has_previous_state = {0: True}
        return output

    def _step(
        self, scan: Scan, inputs: Sequence[Tensor], starts: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        output, self.conv_state, self.ssm_state = scan(
            inputs, self.conv_state, self.ssm_state, starts, padding
        )
        return output

    def _replay(self, scan: Scan) -> None:
        if not self._stale:
            return
        self.conv_state, self.ssm_state = self._base
        self._stale = False
        if self._ring is not None and self._ring[0].shape[1]:
            *inputs, starts = self._ring
            self._step(scan, inputs, starts, self._ring_padding)

    def _checkpoint(self) -> None:
        """The live state becomes the checkpoint; nothing before it can be taken back."""
        self._base = (self.conv_state, self.ssm_state)
        self._base_is_start = self._base_is_start and self.conv_state is None
        self._ring, self._ring_padding = None, None

    def _make_room(self, scan: Scan, coming: int) -> None:
        """Fold the oldest of the ring into the checkpoint once it would exceed twice the window."""
        held = 0 if self._ring is None else self._ring[0].shape[1]
        if self._ring is None or held + coming <= 2 * self.max_rollback:
            return
        fold = held + coming - self.max_rollback
        if fold >= held:
            self._checkpoint()
            return
        *inputs, starts = [x[:, :fold] for x in self._ring]
        padding = None if self._ring_padding is None else self._ring_padding.clamp_max(fold)
        _, *base = scan(inputs, *self._base, starts, padding)
        self._base = (base[0], base[1])
        self._base_is_start = False
        self._ring = [x[:, fold:] for x in self._ring]
        if self._ring_padding is not None:
            self._ring_padding = (self._ring_padding - fold).clamp_min(0)

    def _remember(
        self, inputs: Sequence[Tensor], starts: Tensor | None, padding: Tensor | None
    ) -> None:
        if starts is None:
            starts = torch.zeros(inputs[0].shape[:2], dtype=torch.bool, device=inputs[0].device)
        new = [*(x.detach() for x in inputs), starts]
        if self._ring is None:
            self._ring, self._ring_padding = new, padding
            return
        if padding is not None or self._ring_padding is not None:
            # Padding between the two would break replay: move all of it to the front.
            valid = torch.cat(
                [_valid(self._ring[0], self._ring_padding), _valid(new[0], padding)], dim=1
            )
            order = padding_first(valid)
            joined = [torch.cat(pair, dim=1) for pair in zip(self._ring, new, strict=True)]
            self._ring = [_take(x, order) for x in joined]
            self._ring_padding = valid.shape[1] - valid.sum(dim=1)
        else:
            self._ring = [torch.cat(pair, dim=1) for pair in zip(self._ring, new, strict=True)]

    # -- the cache's side ---------------------------------------------------------------------

    def check_rollback(self, n: int | Tensor) -> None:
        """Raise ValueError when `n` tokens (a count, or one a row [B]) cannot be taken back."""
        counts = torch.as_tensor(n)
        most = int(counts.max())
        if most == 0 and int(counts.min()) == 0:
            return
        held = 0 if self._ring is None else self._ring[0].shape[1]
        recorded = torch.as_tensor(held)
        if self._ring_padding is not None:
            recorded = held - self._ring_padding.to(counts.device)
        # Once every token is in the ring, places before them are padding and may be taken back too.
        whole = self._base_is_start and held == self.length
        if (
            int(counts.min()) < 0
            or most > self.length
            or not (whole or bool((counts <= recorded).all()))
        ):
            raise ValueError(
                f"cannot take back {most} tokens: {int(recorded.min())} are recorded; make the "
                f"cache with TambaCache(config, max_rollback={most}) or more"
            )

    def rollback(self, n: int | Tensor) -> None:
        """Forget the last `n` tokens, a count or one count for each row [B] (0 to `max_rollback`).

        Raises:
            ValueError: more tokens than are recorded.
        """
        self.check_rollback(n)
        counts = n if isinstance(n, Tensor) else None
        least = int(counts.min()) if counts is not None else int(n)
        if self._ring is None or (least == 0 and (counts is None or not bool(counts.any()))):
            return
        held = self._ring[0].shape[1]
        if counts is None:
            self._ring = [x[:, : held - least] for x in self._ring]
            if self._ring_padding is not None:
                self._ring_padding = self._ring_padding.clamp_max(held - least)
        else:
            extra = counts.to(self._ring[0].device) - least
            kept = [x[:, : held - least] for x in self._ring]
            self._ring = [shift_right(x, extra) for x in kept]
            padding = extra if self._ring_padding is None else self._ring_padding + extra
            self._ring_padding = padding.clamp_max(held - least)
        self.length -= least
        self._stale = True

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' spelling of `rollback`: a count that is zero or negative."""
        n = -int(tokens_to_remove)  # some versions pass a tensor
        if n < 0:
            raise ValueError(
                f"crop takes minus the number of tokens to remove, got {tokens_to_remove}"
            )
        if self.length:
            self.rollback(n)

    def activate_past_recording(self) -> None:
        """Start recording, so that `crop` can take back the tokens that come from now on."""
        if not self.record_past:
            self.record_past = True
            self.max_rollback = self.max_rollback or DEFAULT_ROLLBACK
            self._checkpoint()

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    def _tensors(self) -> Iterator[Tensor]:
        live = (
            self.conv_state,
            self.ssm_state,
            *self._base,
            *(self._ring or ()),
            self._ring_padding,
        )
        yield from {id(t): t for t in live if t is not None}.values()

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        def apply(t: Tensor | None) -> Tensor | None:
            return None if t is None else change(t)

        self.conv_state, self.ssm_state = apply(self.conv_state), apply(self.ssm_state)
        self._base = (apply(self._base[0]), apply(self._base[1]))
        self._ring = None if self._ring is None else [change(t) for t in self._ring]
        self._ring_padding = apply(self._ring_padding)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`."""
        self._map_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self._forget()

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Recurrent states are small and needed at every token: they stay where they are."""

    def prefetch(self) -> None:
        """See `offload`."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate: states are what the first scan returns."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a recurrent layer has no keys and values; its mixer calls `advance`")

    update_conv_state = update
    update_recurrent_state = update


class WindowLayer(DynamicSlidingWindowLayer):
    """Keys and values that a sliding window can still reach, and those a rollback may uncover.

    transformers' own layer keeps everything while it records, until it is cropped.

    Args:
        sliding_window: keys that a token sees, itself included.
        max_rollback: tokens that can be taken back; 0 for none until `activate_past_recording`.
    """

    def __init__(self, sliding_window: int, max_rollback: int = 0) -> None:
        super().__init__(sliding_window=sliding_window)
        self.keys: Tensor
        self.values: Tensor
        self.max_rollback = max_rollback
        self.record_past = max_rollback > 0

    def activate_past_recording(self) -> None:
        """Start keeping what `crop` may uncover."""
        self.record_past = True
        self.max_rollback = self.max_rollback or DEFAULT_ROLLBACK

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add [B, G, T, P] keys and values; give back those that the new tokens may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, reach = key_states.shape[-2], self.sliding_window - 1
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += new
        held = reach + self.max_rollback
        self.keys, self.values = _last(keys, held), _last(values, held)
        if keys.shape[-2] > 2 * held:
            # A view would keep all of a long prompt.
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return _last(keys, reach + new), _last(values, reach + new)

    def check_rollback(self, n: int) -> None:
        """Raise ValueError when the last `n` tokens cannot be taken back."""
        if not self.is_initialized:
            return
        needed = min(self.sliding_window - 1, self.cumulative_length - n)
        if self.keys.shape[-2] - n < needed:
            raise ValueError(
                f"cannot take back {n} tokens: the window has moved on; make the cache with "
                f"TambaCache(config, max_rollback={n}) or more"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: zero or minus their number."""
        n = -int(tokens_to_remove)
        self.check_rollback(n)
        if n and self.is_initialized:
            end = self.keys.shape[-2] - n
            self.keys, self.values = self.keys[..., :end, :], self.values[..., :end, :]
            self.cumulative_length -= n


class TambaCache(Cache):
    """The state of a whole stack, one layer of the right kind for each layer of the model.

    Args:
        config: the model's configuration.
        max_rollback: tokens that `rollback` can take back. 0 keeps nothing for it.
    """

    def __init__(self, config: TambaConfig, max_rollback: int = 0) -> None:
        super().__init__(layers=[_make_layer(k, config, max_rollback) for k in config.layer_types])
        self.max_rollback = max_rollback
        self.mask: Tensor | None = None
        """[B, S] bool, False at places that hold no token (padding, uneven rollback); or None."""

    def rollback(self, n: int | Tensor) -> None:
        """Forget the last `n` tokens: a count, or one count for each row [B].

        After an uneven rollback rows differ in length: the shorter ones are moved to the right, and
        `mask` says where they begin (later calls need no attention mask).

        Raises:
            ValueError: a layer has recorded fewer tokens.
        """
        least = int(n.min()) if isinstance(n, Tensor) else n
        most = int(n.max()) if isinstance(n, Tensor) else n
        if least < 0 or most > self.get_seq_length():
            raise ValueError(f"cannot take back {n} of {self.get_seq_length()} tokens")
        for layer in self.layers:  # all checks come before the first change
            if isinstance(layer, WindowLayer):
                layer.check_rollback(most)
            elif isinstance(layer, RecurrentLayer):
                layer.check_rollback(n)
        places = self.get_seq_length()
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.rollback(n)
            elif layer.is_initialized:
                layer.crop(-least)
                if isinstance(n, Tensor):
                    extra = n.to(layer.keys.device) - least
                    layer.keys = shift_right(layer.keys.transpose(1, 2), extra).transpose(1, 2)
                    layer.values = shift_right(layer.values.transpose(1, 2), extra).transpose(1, 2)
        self._crop_mask(least)
        if isinstance(n, Tensor) and most > least:
            extra = n - least
            if self.mask is None:
                self.mask = torch.ones(len(n), places - least, dtype=torch.bool, device=n.device)
            extra = extra.to(self.mask.device)
            entered = torch.arange(self.mask.shape[1], device=self.mask.device) < extra[:, None]
            self.mask = shift_right(self.mask, extra) & ~entered

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' spelling of an even `rollback`: zero or minus the number of tokens."""
        self.rollback(-int(tokens_to_remove))

    def _crop_mask(self, n: int) -> None:
        if self.mask is not None and n:
            self.mask = self.mask[:, : self.mask.shape[1] - n]

    @property
    def nbytes(self) -> int:
        """Bytes held now by keys, values and states."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                total += layer.nbytes
            elif layer.keys is not None:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_mask(lambda m: m[beam_idx.to(m.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_mask(lambda m: m.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_mask(lambda m: m[indices.to(m.device)])

    def _map_mask(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.mask is not None:
            self.mask = change(self.mask)

    def reset(self) -> None:
        super().reset()
        self.mask = None


def adopt(cache: Cache, config: TambaConfig) -> Cache:
    """Give a stock transformers cache the recurrent layers of `config`, in place.

    `generate` builds a `DynamicCache` from `config.layer_types`; its recurrent layers cannot be
    rolled back, repeated or asked for their length. Filled layers of another kind are an error.
    """
    if isinstance(cache, TambaCache):
        return cache
    kinds: dict[str, tuple[type, ...]] = {
        "linear_attention": (RecurrentLayer,),
        "sliding_attention": (WindowLayer, StaticLayer),
    }
    for index, kind in enumerate(config.layer_types):
        if index < len(cache.layers) and isinstance(
            cache.layers[index], kinds.get(kind, (object,))
        ):
            continue  # the common case, once a token
        made = _make_layer(kind, config, 0)
        if index >= len(cache.layers):
            cache.layers.append(made)
            continue
        layer = cache.layers[index]
        if isinstance(made, RecurrentLayer):
            if not isinstance(layer, LinearAttentionLayer) or any(
                layer.has_previous_state.values()
            ):
                raise ValueError(
                    f"cache layer {index} is a filled {type(layer).__name__}, not a RecurrentLayer"
                )
        elif layer.is_initialized:
            continue  # stock windows work, but for recording in some versions
        if layer.record_past:
            made.activate_past_recording()
        cache.layers[index] = made
    return cache


def expect_rollback(cache: Cache | None, n: int) -> None:
    """Let the layers that record the past keep what taking back `n` tokens from now on needs."""
    for layer in [] if cache is None else cache.layers:
        if isinstance(layer, RecurrentLayer | WindowLayer) and layer.record_past:
            layer.max_rollback = max(layer.max_rollback, n)


def _make_layer(kind: str, config: TambaConfig, max_rollback: int) -> Any:
    if kind == "linear_attention":
        return RecurrentLayer(max_rollback)
    if kind == "sliding_attention" and config.sliding_window is not None:
        return WindowLayer(config.sliding_window, max_rollback)
    return DynamicLayer()


def _last(x: Tensor, n: int) -> Tensor:
    """The last `n` places of [B, G, S, P], or all when there are fewer."""
    return x[..., max(x.shape[-2] - n, 0) :, :]


def shift_right(x: Tensor, by: Tensor) -> Tensor:
    """Move row b of x [B, T, ...] right by `by[b]` places; what enters on the left is undefined."""
    index = (torch.arange(x.shape[1], device=x.device) - by[:, None]).clamp_min(0)
    return _take(x, index)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def _valid(x: Tensor, padding: Tensor | None) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    if padding is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return places >= padding[:, None]
