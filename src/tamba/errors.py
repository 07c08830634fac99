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


_SHOWN = 8
"""Names that a message lists at most."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word closest to `word`, or lists some known words if none is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    rest = len(names) - _SHOWN
    # One more is as short as saying that there is one more.
    shown = names if rest <= 1 else names[:_SHOWN]
    return "known: " + ", ".join(shown) + (f" and {rest} more" if rest > 1 else "")
