"""A process that ends in the middle of its work, as a power cut would end it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable

import torch


def die() -> None:
    """End this process without a word: nothing is closed, written out or cleared up."""
    os.kill(os.getpid(), signal.SIGKILL)


def assert_killed(work: Callable[..., object], *arguments: object) -> None:
    """Run `work`, which calls `die` before it is done, in a process of its own.

    A function at the top of its module, with arguments that pickle: where a GPU is in use already
    the process is a fresh one. Elsewhere it is forked, and need not import torch again.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    process = context.Process(target=work, args=arguments)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads whose locks a fork could inherit; those of pytest-xdist, that
        # wait for messages, have none that `work` takes.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
