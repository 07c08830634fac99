"""Progress of long work, shown only when the command line asks for it.

A step wraps its loop in `task` or `track`; nothing is printed until somebody above opens `shown`,
so the same function is silent in a library and has a bar with time left on a terminal. Where there
is no terminal (a log file, a pipe) a line every few seconds says the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

T = TypeVar("T")

Advance = Callable[..., None]
"""``advance(n=1, note="")``: n more units are done; `note` is a figure to show beside the bar."""


class _Display(Protocol):
    def task(self, label: str, total: float | None) -> AbstractContextManager[Advance]: ...


_display: ContextVar[_Display | None] = ContextVar("tamba_progress_display", default=None)


def leads() -> bool:
    """Whether this process speaks for all that do one work; `torchrun` counts them in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def shown(console: Console | None = None, *, seconds_between_lines: float = 10.0) -> Iterator[None]:
    """Show every `task` opened inside, on `console` (stderr by default).

    Of several processes that do one work the first shows it.
    """
    if not leads():
        yield
        return
    console = console or Console(stderr=True)
    if not console.is_terminal:
        display: _Display = _Lines(console, seconds_between_lines)
        token = _display.set(display)
        try:
            yield
        finally:
            _display.reset(token)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        token = _display.set(_Bars(bars))
        try:
            yield
        finally:
            _display.reset(token)


@contextmanager
def task(label: str, total: float | None = None) -> Iterator[Advance]:
    """One piece of work of `total` units (None: unknown); yields the function that advances it."""
    display = _display.get()
    if display is None:
        yield _silent
        return
    with display.task(label, total) as advance:
        yield advance


def track(items: Iterable[T], label: str, total: float | None = None) -> Iterator[T]:
    """Iterate over `items` as one `task`; `total` is their length where they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(label, total) as advance:
        for item in items:
            yield item
            advance()


def _silent(n: float = 1, note: str = "") -> None:
    pass


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Advance]:
        bar = self.bars.add_task(label, total=total, note="")

        def advance(n: float = 1, note: str = "") -> None:
            if note:
                self.bars.update(bar, advance=n, note=note)
            else:
                self.bars.update(bar, advance=n)

        yield advance
        self.bars.stop_task(bar)


class _Lines:
    def __init__(self, console: Console, seconds: float) -> None:
        self.console = console
        self.seconds = seconds

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Advance]:
        begun = said = time.monotonic()
        done = 0.0
        latest = ""

        def say(line: str) -> None:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

        def advance(n: float = 1, note: str = "") -> None:
            nonlocal done, said, latest
            done += n
            latest = note or latest
            now = time.monotonic()
            if now - said < self.seconds:
                return
            said = now
            count = f"{round(done)}" if total is None else f"{round(done)}/{round(total)}"
            left = ""
            if total is not None and 0 < done <= total:
                left = f", {clock((now - begun) / done * (total - done))} left"
            say(f"{label}: {count}{left}" + (f", {latest}" if latest else ""))

        yield advance
        took = clock(time.monotonic() - begun)
        say(f"{label}: done in {took}" + (f", {latest}" if latest else ""))


def clock(seconds: float) -> str:
    """Seconds as people say them: ``8.3 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
