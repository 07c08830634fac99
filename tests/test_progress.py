"""Long work is silent by itself, and says how far it is when somebody wants to see it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tamba import progress


def test_silent_without_a_display(capsys):
    assert list(progress.track(range(3), "work")) == [0, 1, 2]
    with progress.task("work") as advance:
        advance(2, note="loss 1.0")
    assert capsys.readouterr() == ("", "")


def test_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with (
        progress.shown(Console(file=out, force_terminal=False), seconds_between_lines=0),
        progress.task("fit", total=4) as advance,
    ):
        advance()
        advance(2, note="loss 0.5")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("fit: 1/4, ")
    assert lines[0].endswith(" left")
    assert lines[1].startswith("fit: 3/4, ")
    assert lines[1].endswith(", loss 0.5")
    assert lines[2].startswith("fit: done in ")
    assert len(lines) == 3


def test_of_several_processes_the_first_shows(monkeypatch):
    shown = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        out = io.StringIO()
        with progress.shown(Console(file=out, force_terminal=False), seconds_between_lines=0):
            assert list(progress.track(range(3), "work")) == [0, 1, 2]
        shown.append(out.getvalue())
    assert shown[0] and not shown[1]


def test_bars_on_a_terminal():
    out = io.StringIO()
    with progress.shown(Console(file=out, force_terminal=True, width=100)):
        for _ in progress.track([1, 2], "score"):
            pass
    assert "score" in out.getvalue()
    assert "2/2" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (8.26, "8.3 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3720, "1 h 02 min"),
    ],
)
def test_clock(seconds, text):
    assert progress.clock(seconds) == text
