"""Text from a prompt, through transformers' own `generate` over our state.

Chat models get their chat template; base models continue the prompt as it stands. Text is handed
out as it comes, and the two phases are timed apart: the prompt pass, and the loop of one token
each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from tamba.checkpoint import load
from tamba.decoding import Sampling
from tamba.errors import UserError


@dataclass(frozen=True)
class Generation:
    """What came out, and how fast.

    Args:
        finished: the model ended its answer by itself.
        prefill_seconds: from the call to the first new token.
        decode_seconds: from the first new token to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finished: bool
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decode loop alone; None for fewer than two new tokens."""
        if self.new_tokens < 2 or self.decode_seconds <= 0:
            return None
        return (self.new_tokens - 1) / self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the speed included."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def generate(
    model: str | Path | Any,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool | None = None,
    system: str | None = None,
    stream: Callable[[str], None] | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Generation:
    """Answer a prompt.

    Args:
        model: a checkpoint folder, GGUF file or hub name; or a loaded model with its `tokenizer`.
        new_tokens: longest answer; it ends where the model has no more positions, too.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among so many; 0 for all.
        top_p: sample among the likeliest that hold this share together.
        seed: of sampling, 64 bits; the caller's random state is left alone when one is given.
        chat: frame the prompt by the tokenizer's chat template; None where it has one.
        system: system message, for chat.
        stream: gets the text piece by piece as it comes.
        dtype: type to compute in, for a model that is opened here.
        device: where to run it; None for a GPU if there is one.

    Raises:
        UserError: an empty prompt or one beyond the model's positions, a setting that cannot be, or
            a checkpoint that cannot be opened.
    """
    _check(prompt, new_tokens)
    Sampling(temperature, top_k, top_p)  # refuses what cannot be
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError("seed", f"{seed} is not a number of 64 bits", "use 0 or more, below 2**64")
    if isinstance(model, str | Path):
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        place = str(model)
        model, tokenizer = load(place, dtype=dtype, device=device)
        if tokenizer is None:
            raise UserError(place, "has no tokenizer", "put tokenizer.json beside the weights")
    if tokenizer is None:
        raise UserError("generate", "has no tokenizer", "pass the one that belongs to the model")
    ids, mask = _encode(tokenizer, prompt, chat, system)
    # A model of another library looks after its positions itself.
    room = getattr(model.config, "positions", None)
    if room is not None and ids.shape[1] >= room:
        raise UserError(
            "prompt",
            f"its {ids.shape[1]:,} tokens leave no room in the model's {room:,} positions",
            "shorten it",
        )
    ids, mask = ids.to(model.device), mask.to(model.device)
    timer = _Timer(tokenizer, stream)
    settings: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ends = end_tokens(model, tokenizer)
    with torch.inference_mode(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        timer.start()
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens if room is None else min(new_tokens, room - ids.shape[1]),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            streamer=timer,
            **settings,
        )
    new = output[0, ids.shape[1] :].tolist()
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        finished=bool(new) and new[-1] in ends,
        prefill_seconds=timer.first - timer.begun,
        decode_seconds=timer.last - timer.first,
    )


def _check(prompt: str, new_tokens: int) -> None:
    if not prompt.strip():
        raise UserError("prompt", "is empty", "say something to the model")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of a shell that are no text come as lone surrogates
        raise UserError("prompt", "is not UTF-8 text", "convert it to UTF-8") from None
    if new_tokens < 1:
        raise UserError("new_tokens", f"{new_tokens} is not a positive number")


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None, system: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of the framed prompt, [1, T] each."""
    has_template = bool(tokenizer.chat_template)
    if (chat or system) and not has_template:
        raise UserError(
            "chat", "the tokenizer has no chat template", "leave out --chat and --system"
        )
    if chat is False or not has_template:
        encoded = tokenizer(prompt, return_tensors="pt")
    else:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # damaged, or it refuses such messages
            if not type(error).__module__.startswith("jinja2."):  # templates need it, we do not
                raise
            raise UserError(
                "chat", f"the tokenizer's chat template says: {error}", "use --raw, or no --system"
            ) from error
    ids = encoded["input_ids"]
    if not ids.shape[1]:
        raise UserError("prompt", "holds no tokens", "say something to the model")
    return ids, encoded["attention_mask"]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: what the checkpoint says, and the tokenizer's own."""
    said = model.generation_config.eos_token_id
    ends = [said] if isinstance(said, int) else list(said or [])
    if isinstance(tokenizer.eos_token_id, int) and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


class _Timer(TextStreamer):
    """Hands out text as it comes and notes when the first and the last token came."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], None] | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream
        self._prompt_seen = False

    def start(self) -> None:
        self.begun = self.first = self.last = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            now = time.perf_counter()
            if self.first == self.begun:
                self.first = now
            self.last = now
        self._prompt_seen = True
        if self.stream is not None:
            super().put(value)

    def end(self) -> None:
        if self.stream is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stream is not None and text:
            self.stream(text)
