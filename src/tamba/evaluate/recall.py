"""Recall, scored by what the model writes: copying, phone book, needle, associations, key-value.

Copying and the phone book are those of *E-Tamba* (sections on copying and on phone-book retrieval;
what the paper leaves open is said at each task). Prompts are made of tokens, not of text, so that
their lengths are exact. Decoding is greedy; an answer that has gone wrong is not continued, which
changes no score. Cases depend on the seed, the task and the length alone: all models see the same.
"""

from __future__ import annotations

import functools
import json
import random
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tamba import progress
from tamba.data import text_digest
from tamba.decoding import decode
from tamba.errors import UserError
from tamba.evaluate.measure import ItemMeasure, Items, Request, Role, Subject
from tamba.evaluate.statistics import mean_score
from tamba.evaluate.texts import read_enough
from tamba.report import Curve, Point
from tamba.store import Store

Draw = Callable[[random.Random, int], "Case"]


@dataclass(frozen=True)
class Case:
    """One prompt and what must come out.

    Args:
        answer: the tokens that must come next, where only one continuation is right.
        pattern: else what is looked for in the text of the answer; its first match must be `text`.
        new_tokens: most tokens to write.
        place: where in the prompt the answer stands, 0 at its beginning and 1 at its end.
    """

    prompt: list[int]
    new_tokens: int
    place: float
    answer: tuple[int, ...] | None = None
    pattern: str = ""
    text: str = ""


@dataclass(frozen=True)
class RecallTask:
    """A task swept over a size.

    Args:
        axis: what the size counts.
        sizes: those of the default sweep; those beyond the model's positions are left out.
        make: draws a case of a size, given the tokenizer and the text of the user, if any.
    """

    about: str
    axis: str
    sizes: tuple[int, ...]
    make: Callable[[PreTrainedTokenizerBase, Sequence[str]], Draw]


# Copying


def _copy(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Draw:
    """``s_1..s_L s_1..s_L s_1``; the model must go on with ``s_2..s_L``, all of it.

    Tokens are drawn uniformly from those that are a whole word, or, where text is given, taken from
    it as they follow one another. No token is put before them.
    """
    words = whole_words(tokenizer)
    stream = [t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def draw(rng: random.Random, length: int) -> Case:
        if stream:
            if len(stream) <= length:
                raise UserError("data", f"{len(stream)} tokens of text, {length} are to be copied")
            first = rng.randrange(len(stream) - length)
            tokens = stream[first : first + length]
        else:
            tokens = [rng.choice(words) for _ in range(length)]
        prompt = [*tokens, *tokens, tokens[0]]
        return Case(prompt, length - 1, place=0.0, answer=tuple(tokens[1:]))

    return draw


# Phone book


def _phonebook(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Draw:
    """Lines ``<Jack, 123-456-7890>``, then ``<NAME,`` for one of them; its number must follow.

    Names are different, digits uniform, the position asked for uniform. The first number of the
    answer counts.
    """
    names = _names()

    def draw(rng: random.Random, entries: int) -> Case:
        if entries > len(names):
            raise UserError("lengths", f"there are {len(names)} names, not {entries}", "use fewer")
        picked = rng.sample(names, entries)
        numbers = ["".join(rng.choices(string.digits, k=10)) for _ in picked]
        numbers = [f"{n[:3]}-{n[3:6]}-{n[6:]}" for n in numbers]
        asked = rng.randrange(entries)
        book = "".join(f"<{n}, {number}>\n" for n, number in zip(picked, numbers, strict=True))
        prompt = _tokens(tokenizer, f"{book}<{picked[asked]},")
        room = max(len(_tokens(tokenizer, f" {number}>")) for number in numbers)
        return Case(
            prompt,
            room + 4,
            place=asked / max(1, entries - 1),
            pattern=r"(?<!\d)\d{3}-\d{3}-\d{4}(?!\d)",
            text=numbers[asked],
        )

    return draw


_BEGIN = "B Br C Ch D Dr F G Gr H J K L M N P R S St T Tr V W Z"


@functools.cache
def _names() -> list[str]:
    """8,000 different names that can be said, in an order that depends on nothing."""
    rng = random.Random("names")
    begin = _BEGIN.split()
    middle = "a e i o u ai ee oa ar en il or el".split()  # noqa: SIM905
    last = "mi d ker l lan m mon n na ra ric s son ta th ven ver vin x".split()  # noqa: SIM905
    found = [a + b + c for a in begin for b in middle for c in last]
    rng.shuffle(found)
    more = [a + b.lower() for a, b in zip(found, reversed(found), strict=True)]
    return list(dict.fromkeys([*found, *more]))[:8000]


# Needle


_FILLER = (
    "The road went on between the fields and nobody was to be seen. "
    "A light wind moved the grass on both sides of it. "
    "Somewhere far away a dog barked twice and was still again. "
    "The houses of the village lay in the afternoon sun. "
    "It had not rained for many days, and the dust was white. "
    "Old men sat before their doors and spoke of the harvest. "
)


def _needle(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Draw:
    """One sentence with a number of seven digits, anywhere in a text of exactly so many tokens.

    The text is that of the user, else a few sentences over and over. The first number of seven
    digits in the answer counts.
    """
    filler = _tokens(tokenizer, "\n\n".join(texts) if texts else _FILLER)

    def draw(rng: random.Random, length: int) -> Case:
        word, number = rng.choice(_names()), str(rng.randrange(10**6, 10**7))
        needle = _tokens(tokenizer, f"\nThe secret number of {word} is {number}.\n")
        question = _tokens(
            tokenizer, f"\nWhat is the secret number of {word}? The secret number of {word} is"
        )
        room = length - len(needle) - len(question)
        if room < 0:
            least = len(needle) + len(question)
            raise UserError("lengths", f"{length} tokens have no room for a needle of {least}")
        before = rng.randrange(room + 1)
        first = rng.randrange(len(filler))
        hay = [filler[(first + k) % len(filler)] for k in range(room)]
        prompt = [*hay[:before], *needle, *hay[before:], *question]
        return Case(
            prompt, 16, place=before / max(1, room), pattern=r"(?<!\d)\d{7}(?!\d)", text=number
        )

    return draw


# Associations


def _mqar(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Draw:
    """Multi-query associative recall (Arora et al. 2023, Zoology): pairs of words, then queries.

    ``k_1 v_1 .. k_n v_n``, then the keys of eight pairs (or of all) in another order, each followed
    by its value but for the last, whose value is asked. Keys and values are different words.
    """
    words = whole_words(tokenizer)

    def draw(rng: random.Random, pairs: int) -> Case:
        if 2 * pairs > len(words):
            raise UserError("lengths", f"{len(words)} words are too few for {pairs} pairs")
        picked = rng.sample(words, 2 * pairs)
        keys, values = picked[:pairs], picked[pairs:]
        queries = rng.sample(range(pairs), min(8, pairs))
        prompt = [t for pair in zip(keys, values, strict=True) for t in pair]
        for query in queries[:-1]:
            prompt += [keys[query], values[query]]
        asked = queries[-1]
        prompt.append(keys[asked])
        return Case(prompt, 1, place=asked / max(1, pairs - 1), answer=(values[asked],))

    return draw


def _kv(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Draw:
    """Key-value retrieval (Liu et al. 2023, Lost in the Middle): a JSON object of random UUIDs.

    One key is asked; the first UUID of the answer counts.
    """

    def draw(rng: random.Random, pairs: int) -> Case:
        ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * pairs)]
        keys, values = ids[:pairs], ids[pairs:]
        asked = rng.randrange(pairs)
        body = json.dumps(dict(zip(keys, values, strict=True)), indent=0)
        prompt = _tokens(
            tokenizer,
            f'Find the value of one key in this JSON object.\n\n{body}\n\nKey: "{keys[asked]}"\n'
            'Value: "',
        )
        room = max(len(_tokens(tokenizer, f'{value}"')) for value in values)
        digits = "-".join(f"[0-9a-f]{{{n}}}" for n in (8, 4, 4, 4, 12))
        pattern = f"(?<![0-9a-f]){digits}(?![0-9a-f])"
        return Case(
            prompt, room + 4, place=asked / max(1, pairs - 1), pattern=pattern, text=values[asked]
        )

    return draw


TASKS: dict[str, RecallTask] = {
    "copy": RecallTask(
        "copying a sequence of words exactly (E-Tamba)",
        "tokens to copy",
        (8, 16, 32, 64, 128, 192, 256, 320, 384, 512, 640),
        _copy,
    ),
    "phonebook": RecallTask(
        "the number of a name in a phone book (E-Tamba)",
        "entries",
        (5, 10, 20, 30, 40, 60, 80, 100, 120),
        _phonebook,
    ),
    "needle": RecallTask(
        "a number said once in a long text",
        "tokens of the prompt",
        (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768),
        _needle,
    ),
    "mqar": RecallTask(
        "values of keys, all asked in turn (associative recall)",
        "pairs",
        (4, 8, 16, 32, 64, 128, 256),
        _mqar,
    ),
    "kv": RecallTask("a value in a JSON object of UUIDs", "pairs", (2, 5, 10, 25, 50, 75), _kv),
}


def prepare(request: Request) -> RecallMeasure:
    """A task of `TASKS`: its cases are drawn and their lengths checked. Raises UserError."""
    request.check_vocabulary()
    task, options = TASKS[request.suite], request.options
    if options.cases < 1:
        raise UserError("cases", f"{options.cases} cases leave nothing to measure", "use 1 or more")
    texts = read_enough(request.data, options.text_key, None) if request.data else []
    asked = options.sizes(request.suite)
    sizes = asked or task.sizes
    if min(sizes) < 2:
        raise UserError("lengths", f"{min(sizes)} is too short to recall from", "use 2 or more")
    draw = task.make(request.tokenizer, texts)
    cases: dict[str, tuple[int, Case]] = {}
    left_out = []
    for size in sorted(set(sizes)):
        drawn = [
            draw(random.Random(f"{request.suite} {options.seed} {size} {k}"), size)
            for k in range(options.cases)
        ]
        longest = max(len(case.prompt) + case.new_tokens for case in drawn)
        if request.positions is not None and longest > request.positions:
            if asked:
                request.check_length(longest, f"suite {request.suite}, length {size}: tokens")
            left_out.append(size)
            continue
        cases |= {f"{size}/{k}": (size, case) for k, case in enumerate(drawn)}
    if not cases:
        raise UserError(
            f"suite {request.suite}",
            f"no length fits in the model's {request.positions} positions",
            "give shorter ones with --lengths",
        )
    settings = {
        "axis": task.axis,
        "lengths": sorted({size for size, _ in cases.values()}),
        "left_out": left_out,
        "cases": options.cases,
        "seed": options.seed,
        "text": text_digest(texts) if texts else None,
        "decoding": "greedy",
    }
    return RecallMeasure(request.suite, task, cases, settings)


class RecallMeasure(ItemMeasure):
    """Accuracy at each size; an item also keeps its place, its prompt's length and its answer."""

    metrics = ("acc",)

    def __init__(
        self,
        name: str,
        task: RecallTask,
        cases: Mapping[str, tuple[int, Case]],
        settings: dict[str, Any],
    ) -> None:
        self.name, self.task, self.cases, self.settings = name, task, cases, settings

    def answer(self, subject: Subject, store: Store) -> Items:
        names = [name for name in self.cases if name not in store]
        cases = [self.cases[name][1] for name in names]

        def settled(index: int, tokens: list[int]) -> bool:
            case = cases[index]
            if case.answer is not None:
                return tokens[-1] != case.answer[len(tokens) - 1]
            # Complete once something else follows it.
            return re.search(f"{case.pattern}.", subject.tokenizer.decode(tokens), re.S) is not None

        with progress.task(f"{self.name}, {subject.role}", len(self.cases)) as advance:
            advance(len(self.cases) - len(names))
            for batch in decode(
                subject.model,
                [case.prompt for case in cases],
                [case.new_tokens for case in cases],
                stop=settled,
                tokens_at_once=4 * subject.tokens_at_once,
            ):
                store.add(
                    {names[k]: _graded(cases[k], t, subject.tokenizer) for k, t in batch.items()}
                )
                advance(len(batch))
        return {name: store[name] for name in self.cases}

    def curves(self, items: Mapping[Role, Items]) -> dict[str, Curve]:
        metrics = ["acc"] + ["right_before_error"] * (self.name == "copy")
        return {
            metric: Curve(
                axis=self.task.axis,
                points={role: self._points(found, metric) for role, found in items.items()},
            )
            for metric in metrics
        }

    def _points(self, items: Items, metric: str) -> list[Point]:
        by_size: dict[int, list[float]] = {}
        for name, (size, _) in self.cases.items():
            by_size.setdefault(size, []).append(float(items[name][metric]))
        return [
            Point(x=size, **mean_score(values).model_dump()) for size, values in by_size.items()
        ]


def _graded(case: Case, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    said = tokenizer.decode(tokens)
    facts: dict[str, Any] = {"place": round(case.place, 4), "prompt": len(case.prompt)}
    if case.answer is None:
        found = re.search(case.pattern, said)
        return facts | {"acc": int(found is not None and found.group() == case.text), "said": said}
    right = 0
    for got, want in zip(tokens, case.answer, strict=False):
        if got != want:
            break
        right += 1
    return facts | {
        "acc": int(right == len(case.answer)),
        "right_before_error": right / len(case.answer),
    }


def whole_words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are a space and a word of lower-case letters, in order of their ids.

    Tokenizers without such tokens (characters, bytes) give their letters.

    Raises:
        UserError: there is neither.
    """
    special = set(tokenizer.all_special_ids)
    texts = {
        i: tokenizer.decode([i]) for i in sorted(tokenizer.get_vocab().values()) if i not in special
    }
    words = [i for i, text in texts.items() if re.fullmatch(r" [a-z]{3,}", text)]
    if len(words) < 64:
        words = [i for i, text in texts.items() if re.fullmatch(r"[A-Za-z]", text)]
    if not words:
        raise UserError("tokenizer", "has no token that is a word or a letter")
    return words


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
