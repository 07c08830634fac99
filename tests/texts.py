"""A tokenizer and texts for the tests: one token a byte, so that every length is known by eye."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 256

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, end: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """Bytes 0 to 255 (in GPT-2's order), and END as end of sequence unless told otherwise."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>" if end else None)
    if chat:
        fast.chat_template = CHAT
    return fast


WORDS = tuple("the quick brown fox jumps over the lazy dog and runs far from a river".split())  # noqa: SIM905


def document(seed: int, paragraphs: int = 4, words: int = 30) -> str:
    """Prose of a kind, different for every seed."""
    lines = []
    for p in range(paragraphs):
        picked = [WORDS[(seed * 7 + p * 5 + i * (seed + p + 3)) % len(WORDS)] for i in range(words)]
        lines.append(f"Story {seed}, part {p}: " + " ".join(picked) + ".")
    return "\n\n".join(lines)
