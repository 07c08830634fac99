"""The registry: what can be measured, by name, and sets of names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tamba.errors import UserError, nearest
from tamba.evaluate import chat, harness, memory, recall, speed, windows
from tamba.evaluate.measure import Measure, Request


@dataclass(frozen=True)
class Suite:
    """Something to measure.

    Args:
        about: what it finds, in a line.
        data: what ``--data`` is for it, or nothing.
        prepare: checks the request and hands back the measure.
        reads_text: bare ``--data`` without a suite's name is meant for it.
    """

    name: str
    about: str
    data: str
    prepare: Callable[[Request], Measure]
    reads_text: bool = False


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("ppl", "perplexity, bits per byte", "text", windows.prepare_ppl, True),
        Suite("kl", "divergence from the teacher", "text", windows.prepare_kl, True),
        Suite("position", "loss by position", "text", windows.prepare_position, True),
        *(
            Suite(name, task.about, "rows, or none for the hub", harness.prepare)
            for name, task in harness.TASKS.items()
        ),
        *(
            Suite(name, task.about, "text, where wanted", recall.prepare)
            for name, task in recall.TASKS.items()
        ),
        Suite("memory", "memory by cause, beside the floor", "", memory.prepare),
        Suite("speed", "tokens a second, break-even", "", speed.prepare),
        *(
            Suite(name, about, data, prepare)
            for name, about, data, prepare in (
                ("mt_bench", "two-turn answers, judged or not", "questions", chat.prepare_mt_bench),
                ("alpaca_eval", "answers to instructions", "instructions", chat.prepare_alpaca),
                ("preference", "chosen against rejected answers", "pairs", chat.prepare_preference),
            )
        ),
    )
}

SETS: dict[str, tuple[str, ...]] = harness.SETS | {
    "recall": tuple(recall.TASKS),
    "chat": ("mt_bench", "preference"),
}


def find_suites(names: Iterable[str]) -> list[tuple[Suite, int | None]]:
    """Suites by name, sets taken apart, each once; with the worked examples of ``NAME@N``.

    Raises:
        UserError: an unknown name, with the nearest known one, or no name at all.
    """
    found: dict[str, tuple[Suite, int | None]] = {}
    for name in names:
        for part in SETS.get(name, (name,)):
            plain, at, shots = part.partition("@")
            if plain not in SUITES:
                near = nearest(plain, [*SUITES, *SETS])
                raise UserError("--suite", f"no suite called '{part}'", f"{near}; see --list")
            if at and (plain not in harness.TASKS or not shots.isdigit()):
                raise UserError(
                    "--suite", f"'{part}' is no task with a number of worked examples", "NAME@5"
                )
            found[part] = (replace(SUITES[plain], name=part), int(shots) if at else None)
    if not found:
        raise UserError("--suite", "names no suite", "see --list")
    return list(found.values())


def assign_data(
    suites: Sequence[str], data: Iterable[str], text_suites: Iterable[str]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Which data goes to which suite: by ``NAME=FILE``, by the name of the file, or as text.

    ``NAME.train=FILE`` is a second file of the same suite. A bare file named after a suite at hand
    (``lambada.jsonl``) is that suite's; every other one is text, for all suites that read text.

    Returns:
        By suite, and there by part: ``""`` for what it measures on.

    Raises:
        UserError: data for a suite that is not at hand, or that nothing reads.
    """
    plain = {name.partition("@")[0] for name in suites}
    found: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in plain}
    text = [name for name in text_suites if name in plain]

    def give(name: str, part: str, source: str) -> None:
        found[name][part] = (*found[name].get(part, ()), source)

    for source in data:
        key, equals, file = source.partition("=")
        if equals and "/" not in key and "\\" not in key:
            name, _, part = key.partition(".")
            if name not in plain:
                raise UserError(
                    f"--data {source}", f"no suite '{name}' is asked for", nearest(name, plain)
                )
            give(name, part, file)
            continue
        stem = source.replace("\\", "/").rpartition("/")[2].partition(".")[0]
        if stem in plain:
            give(stem, "", source)
        elif text:
            for name in text:
                give(name, "", source)
        else:
            raise UserError(
                f"--data {source}", "no suite that is asked for reads text", "NAME=FILE says whose"
            )
    return found
