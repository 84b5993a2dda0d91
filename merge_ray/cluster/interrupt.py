"""Ctrl-C while a search runs: once to end it in order, twice to end it now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruption(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; the second raises KeyboardInterrupt, as without this.

    Only the main thread can take signals, and a command in the background of a script may be told to ignore Ctrl-C:
    then the event stays as it is.
    """
    asked = threading.Event()
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        asked.set()
        say("Ctrl-C: no more candidates are started, and those that hosts have are finished; once more stops them, too")

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own throws running trials away
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
