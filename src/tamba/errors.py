"""The one exception for mistakes in what the user gave.

`UserError` is raised before any work starts and reads as one line: where, what is wrong, what to
do about it. The command line prints it without a traceback and exits with code 2. Programming
errors are not wrapped: they keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is wrong.

    Args:
        where: the file, key or argument at fault, e.g. ``"recipe.toml: build.mixer"``.
        problem: what is wrong there, what was found and what was expected.
        remedy: what to do about it; may be empty when the problem says it.
    """

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        self.where = where
        self.problem = problem
        self.remedy = remedy
        line = f"{where}: {problem}" + (f"; {remedy}" if remedy else "")
        super().__init__(" ".join(line.split()))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `word`, or lists the known words if none is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(names)
