"""Text that a model writes itself, as training data for its own student.

Where no suitable text is at hand, the teacher's samples are text from exactly the distribution
that the student is to copy. An instruct model answers short requests (its chat template frames
them), any model can continue openings of text that is given.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from tamba import progress
from tamba.data import TokenBlocks
from tamba.decoding import Sampling, decode
from tamba.errors import UserError

REQUESTS = (
    "Explain {} to a curious beginner.",
    "Write a short story in which {} plays a part.",
    "What are three common mistakes people make about {}?",
    "Give me a step-by-step introduction to {}.",
    "Write a friendly letter to a friend about {}.",
    "Summarise what is known about {} in one paragraph.",
    "Write a conversation between two people who disagree about {}.",
    "List five interesting questions about {} and answer each of them briefly.",
    "How has {} changed over the last hundred years?",
    "Write a short encyclopedia article about {}.",
    "What should I know before I start learning about {}?",
    "Compare {} with something similar, and say where they differ.",
)

TOPICS = (
    "the water cycle",
    "baking bread",
    "the French Revolution",
    "prime numbers",
    "photosynthesis",
    "a lighthouse by the sea",
    "the history of writing",
    "learning a new language",
    "the human heart",
    "black holes",
    "growing tomatoes",
    "the Roman Empire",
    "volcanoes",
    "playing the piano",
    "how computers store numbers",
    "the stock market",
    "an old railway station",
    "vaccines",
    "the rules of chess",
    "climate and weather",
    "the capital cities of Europe",
    "dinosaurs",
    "writing clear Python functions",
    "the night sky",
    "good manners",
    "electric cars",
    "the ocean floor",
    "a lost letter",
    "democracy",
    "sleep",
    "gravity",
    "the invention of printing",
    "recycling",
    "a small village market",
    "sorting a list of words",
    "elephants",
    "the United Nations",
    "running a small business",
    "friendship",
    "the periodic table",
    "medieval castles",
    "bees and pollination",
    "fractions and percentages",
    "classical music",
    "the Amazon rainforest",
    "a journey by train",
    "renewable energy",
    "the immune system",
    "maps and navigation",
    "cooking rice",
    "the moon landing",
    "testing software",
    "coral reefs",
    "the ancient Egyptians",
    "keeping a diary",
    "bridges",
    "evolution",
    "a winter morning",
    "the internet",
    "football",
    "probability",
    "the Renaissance",
    "taking photographs",
    "healthy food",
    "databases",
    "rivers and lakes",
    "Shakespeare's plays",
    "saving money",
    "sound and hearing",
    "a forgotten garden",
)


def write_blocks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    tokens: int | None = None,
    seconds: float | None = None,
    openings: Sequence[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
) -> TokenBlocks:
    """Let a model write until a budget is spent, and pack what it wrote into blocks.

    A text ends with the end-of-sequence token if the model wrote that.

    Args:
        length: tokens a block.
        tokens: stop when there are this many tokens, prompts included.
        seconds: stop when this much time has passed; a batch under way is cut short. The amount
            then depends on the machine, so keep the blocks (`TokenBlocks.save`) to repeat a run.
        openings: texts to continue. None for requests on many topics in the model's chat template,
            which it must then have.
        max_new_tokens: tokens written a text, at most.
        temperature: of sampling; 0 takes the likeliest token each time.
        top_k: sample among so many likeliest tokens; 0 for all.
        seed: of the order of prompts and of sampling; the caller's random state is left alone.

    Raises:
        UserError: no budget, no chat template and no openings, no end-of-sequence token, or a
            budget too small for one block.
    """
    if tokens is None and seconds is None:
        raise UserError("teacher-written text", "no budget", "give tokens, seconds or both")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError("tokenizer", "has no end-of-sequence token")
    prompts = _prompts(tokenizer, openings, seed)
    # Sorting a vocabulary for a nucleus would cost as much as a step of a small model.
    sampling = Sampling(temperature, top_k, seed=seed)
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    documents: list[list[int]] = []
    written = 0
    with progress.task("teacher writes", tokens) as advance:
        while (tokens is None or written < tokens) and time.monotonic() < deadline:
            batch = [next(prompts) for _ in range(batch_size)]
            first = len(documents)
            answers: dict[int, list[int]] = {}
            for some in decode(
                model,
                batch,
                [max_new_tokens] * len(batch),
                ends=[end],
                stop=lambda *_: time.monotonic() >= deadline,
                choose=sampling.chooser([str(first + i) for i in range(len(batch))]),
                tokens_at_once=batch_size * (max(map(len, batch)) + max_new_tokens),
            ):
                answers |= some
            # What was cut off does not end there, and is not taught to.
            documents += [[*p, *answers[i]] for i, p in enumerate(batch)]
            size = sum(map(len, documents[first:]))
            written += size
            advance(size)
    return TokenBlocks.from_tokens(documents, length, separator=end, max_tokens=tokens)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, openings: Sequence[str] | None, seed: int
) -> Iterator[list[int]]:
    """Prompts as tokens without end, every one of the list once before any comes again."""
    if openings is not None:
        texts = [text for text in openings if text.strip()]
        if not texts:
            raise UserError("openings", "hold no text")
        special = True
    elif tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": request.format(topic)}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for request, topic in product(REQUESTS, TOPICS)
        ]
        # The template has put in what special tokens there are.
        special = False
    else:
        raise UserError("tokenizer", "has no chat template", "give openings of text to continue")

    def endless() -> Iterator[list[int]]:
        rng = random.Random(seed)
        while True:
            for text in rng.sample(texts, len(texts)):
                ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
                if ids:
                    yield ids

    return endless()
