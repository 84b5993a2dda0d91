"""SIGKILL for a process of a Ray actor, at a random moment of a search."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def killed(actor: str, results: Path) -> Iterator[None]:
    """Within the block a process of the actor class, of this test's own cluster, is killed once there are five rows."""
    done, victims = threading.Event(), list[int]()

    def kill() -> None:
        while len(list((results / "trials").glob("*.parquet"))) < 5 and not done.wait(0.05):
            pass
        time.sleep(random.uniform(0.0, 0.5))
        while not done.is_set() and not victims:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if re.match(rf"ray::\w*{actor}", "".join(process.cmdline())):
                        process.send_signal(signal.SIGKILL)
                        victims.append(process.pid)
                        break

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        done.set()
        killer.join()
    assert victims, f"no process of {actor} was found in time"
