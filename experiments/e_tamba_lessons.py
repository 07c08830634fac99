"""Lists to copy and phone books to look up, in the format that recall is scored in, to learn from.

Jelassi et al. (2024, *Repeat After Me*, arXiv 2402.01032) compare architectures by training them on
the task itself: a model that was never shown a copy fails at copying whatever its layers could do.
So does the driver, for a few steps, with the documents made here. One document is

    s_1..s_L s_1..s_L s_1..s_L                 words drawn evenly from all whole words, or
    <Jack, 123-456-7890> .. <Jack, 123-456-7890>   a book, a line an entry, then some lines again

and ends with the separator, so that the scored prompt and answer of a size (`tamba evaluate`,
suites `copy` and `phonebook`) are the beginning of a document of that size. What earlier tokens
determine is what is learned: the second and third copy, and the numbers of lines that come again.

Nothing that is scored is taught: names are other names, and a list or number of the scored cases is
drawn again.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tamba.evaluate.recall import Case, whole_words

SHORTEST = {"copy": 4, "phonebook": 2}
"""Sizes of documents to learn from begin here."""
QUERIES = 8
"""Most lines of a phone book that come again."""
_ENTRY = re.compile(r"<(\w+), (\d{3}-\d{3}-\d{4})>")


@dataclass(frozen=True)
class Document:
    """Tokens, and the places of those that earlier ones determine."""

    tokens: list[int]
    answers: list[int]


class Lessons:
    """Documents of both tasks, none of which is a scored case.

    Args:
        scored: cases that must not be taught, by task.

    Raises:
        UserError: the tokenizer has neither words nor letters.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, scored: Mapping[str, Collection[Case]]
    ) -> None:
        self.tokenizer = tokenizer
        self.words = whole_words(tokenizer)
        self.lists = {tuple(case.prompt[: len(case.prompt) // 2]) for case in scored["copy"]}
        # Only of books that can be read back: a tokenizer of letters alone has no digits.
        books = [str(tokenizer.decode(case.prompt)) for case in scored["phonebook"]]
        entries = {entry for book in books for entry in _ENTRY.findall(book)}
        self.numbers = {number for _, number in entries}
        taken = {name for name, _ in entries}
        self.names = [name for name in _other_names() if name not in taken]

    def copy(self, rng: random.Random, length: int) -> Document:
        """`length` words three times."""
        while tuple(words := rng.choices(self.words, k=length)) in self.lists:
            pass
        return Document(words * 3, list(range(length + 1, 3 * length)))

    def phonebook(self, rng: random.Random, entries: int, queries: int = QUERIES) -> Document:
        """A book of so many entries, and at most `queries` of its lines again."""
        names = rng.sample(self.names, entries)
        numbers = [self._number(rng) for _ in names]
        asked = rng.sample(range(entries), min(queries, entries))
        return self.book(names, numbers, asked)

    def book(self, names: list[str], numbers: list[str], asked: list[int]) -> Document:
        """The document of these entries, and of those asked for again."""
        lines = [f"<{n}, {number}>\n" for n, number in zip(names, numbers, strict=True)]
        # What stands before an answer ends as a prompt does, and is cut into the same tokens.
        parts = ["".join(lines) + f"<{names[asked[0]]},"]
        for k, entry in enumerate(asked):
            follows = f"<{names[asked[k + 1]]}," if k + 1 < len(asked) else ""
            parts += [f" {numbers[entry]}>", f"\n{follows}"]
        tokens: list[int] = []
        answers: list[int] = []
        for k, ids in enumerate(self.tokenizer(parts, add_special_tokens=False)["input_ids"]):
            if k % 2:
                answers += range(len(tokens), len(tokens) + len(ids))
            tokens += ids
        return Document(tokens, answers)

    def _number(self, rng: random.Random) -> str:
        while True:
            digits = "".join(rng.choices(string.digits, k=10))
            number = f"{digits[:3]}-{digits[3:6]}-{digits[6:]}"
            if number not in self.numbers:
                return number

    def documents(self, seed: str, longest: Mapping[str, int]) -> Iterator[Document]:
        """Without end, of sizes up to the longest, short ones as often as long ones in logarithm.

        The task whose answers were fewer tokens so far comes next.
        """
        rng = random.Random(seed)
        answered = dict.fromkeys(SHORTEST, 0)
        while True:
            task = min(answered, key=lambda t: answered[t])
            low = min(SHORTEST[task], longest[task])
            size = round(low * (longest[task] / low) ** rng.random())
            document = self.copy(rng, size) if task == "copy" else self.phonebook(rng, size)
            answered[task] += len(document.answers)
            yield document

    def rows(
        self, n: int, length: int, seed: str, longest: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        """Documents one after another, each row beginning with a new one and cutting its last.

        Returns:
            tokens [n, length] int32, and bool of the same shape, True where a token is an answer.
        """
        separator = self.tokenizer.eos_token_id
        tokens = torch.full((n, length), separator, dtype=torch.int32)
        answers = torch.zeros(n, length, dtype=torch.bool)
        documents = self.documents(seed, longest)
        for row in range(n):
            at = 0
            while at < length:
                document = next(documents)
                some = document.tokens[: length - at]
                tokens[row, at : at + len(some)] = torch.tensor(some, dtype=torch.int32)
                places = [at + place for place in document.answers if at + place < length]
                answers[row, places] = True
                at += len(document.tokens) + 1
        return tokens, answers

    def held_out(self, task: str, size: int, n: int) -> list[Document]:
        """Cases as they are scored, but others: one answer each, at the end of a document."""
        rng = random.Random(f"held out {task} {size}")
        found = []
        for _ in range(n):
            if task == "copy":
                document = self.copy(rng, size)
                found.append(Document(document.tokens, document.answers[size:]))
            else:
                document = self.phonebook(rng, size, queries=1)
                last = document.answers[-1] + 1
                found.append(Document(document.tokens[:last], document.answers))
        return found


def batches_of_answers(answers: Tensor, rows: int, seed: int) -> tuple[Tensor, float]:
    """Which tokens a step of `rows` rows learns to say: as many in each step, or shapes would vary.

    Args:
        answers: [n, T] bool, n a multiple of `rows`.

    Returns:
        [n / rows, K] places in the flat [rows * T] of each step, sorted: all answers of the step
        that has fewest, and so many of the others. And the share of answers that are learned from.
    """
    flat = answers.view(len(answers) // rows, -1)
    least = int(flat.sum(1).min())
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(flat.shape, generator=generator).masked_fill(~flat, -1.0)
    return chance.topk(least).indices.sort().values, least * len(flat) / max(1, int(flat.sum()))


def _other_names() -> list[str]:
    """Some thousand names of the same kind as those of the suite, made of other syllables."""
    rng = random.Random("other names")
    begin = "B Bl Br C Cl D F Fl G Gl H J K L M N P Pl R S Sl T V W Y Z".split()  # noqa: SIM905
    middle = "a e i o u ea ie oo al an er on".split()  # noqa: SIM905
    last = "bo ck da dy f go ka la man mo ne nt p rd rin sa sk t tz va vi z".split()  # noqa: SIM905
    found = [a + b + c for a in begin for b in middle for c in last]
    rng.shuffle(found)
    return found
