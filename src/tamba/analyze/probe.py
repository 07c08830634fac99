"""A probe of recall that one forward pass scores: pairs of words, listed twice in two orders.

Each row reads ``key value`` lines, all different, and then the same lines in another order. In the
second list the value after a key can only be known by looking the key up in the first, so the
share of values that a model finds likeliest there is its recall. No generation is needed, so a
layer can be tried in a fraction of a second.

Shape letters: `n` rows, `T` tokens of a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tamba.data import TokenBlocks
from tamba.errors import UserError


@dataclass(frozen=True, eq=False)
class Probe:
    """Rows to read, and which of their tokens must be recalled.

    Args:
        blocks: rows of one document each.
        answers: [n, T] bool, tokens that the model should find likeliest one place before.
    """

    blocks: TokenBlocks
    answers: Tensor

    def __post_init__(self) -> None:
        assert self.answers.shape == self.blocks.tokens.shape
        assert bool(self.answers.any(1).all()) and not bool(self.answers[:, 0].any())


def word_probe(
    tokenizer: PreTrainedTokenizerBase, *, pairs: int = 16, rows: int = 16, seed: int = 0
) -> Probe:
    """A probe of English words that are one token each.

    Args:
        pairs: to remember in a row.
        rows: of pairs drawn anew.

    Raises:
        UserError: a tokenizer with too few words, or none for the end of a line.
    """
    words = _words(tokenizer)
    if len(words) < 2 * pairs:
        raise UserError(
            "tokenizer",
            f"has {len(words)} words that are one token, and {2 * pairs} are needed",
            "score without recall",
        )
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not line:
        raise UserError("tokenizer", "has no token for the end of a line", "score without recall")
    generator = torch.Generator().manual_seed(seed)
    known = torch.tensor(words)
    tokens, answers = [], []
    for _ in range(rows):
        drawn = known[torch.randperm(len(known), generator=generator)[: 2 * pairs]].view(pairs, 2)
        again = drawn[torch.randperm(pairs, generator=generator)]
        end = torch.tensor(line).expand(2 * pairs, -1)
        text = torch.cat([torch.cat([drawn, again]), end], dim=1)
        asked = torch.zeros_like(text, dtype=torch.bool)
        asked[pairs:, 1] = True
        tokens.append(text.flatten())
        answers.append(asked.flatten())
    starts = torch.zeros(rows, len(tokens[0]), dtype=torch.bool)
    starts[:, 0] = True
    blocks = TokenBlocks(torch.stack(tokens).int(), starts, starts.numel())
    return Probe(blocks, torch.stack(answers))


def _words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that are a space and three to nine small letters, in order of their ids."""
    ids = range(len(tokenizer))
    decoded = tokenizer.batch_decode([[i] for i in ids])
    return [i for i, word in zip(ids, decoded, strict=True) if re.fullmatch(r" [a-z]{3,9}", word)]
