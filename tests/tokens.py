"""A tokenizer small enough for the tiny models: one token a character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzT .,!?<>|\n"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Ids 0 (unknown), 1 (end), then `LETTERS`; 38 tokens in all."""
    vocabulary = {"[unk]": 0, "<|end|>": 1} | {c: i for i, c in enumerate(LETTERS, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="[unk]"
    )
    if chat:
        fast.chat_template = CHAT
    return fast
