"""What a person sees while work goes on: bars on a terminal, one line a finished step elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

LONG = 2.0
"""Seconds after which a finished step is worth a line."""


class Progress:
    """Shows steps, counted work and studies on one console; use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Work of unknown length."""
        with self.counted(text):
            yield

    @contextmanager
    def counted(self, text: str) -> Iterator[Callable[..., None]]:
        """Work of known length: yields ``update(done, total, note="")``."""
        bar = self._bars.add_task(text, total=None, note="")
        started = time.monotonic()

        def update(done: int, total: int | None, note: str = "") -> None:
            self._bars.update(bar, completed=done, total=total, note=note)

        try:
            yield update
        finally:
            self._bars.remove_task(bar)
        if (seconds := time.monotonic() - started) >= LONG:
            self.line(f"{text} [dim]{seconds:.0f} s[/dim]")

    @contextmanager
    def bars(self, totals: Mapping[str, int | None]) -> Iterator[Callable[..., None]]:
        """Several counts side by side: yields ``update(name, done, total, note="", ended=False)``."""
        bars = {name: self._bars.add_task(name, total=total, note="") for name, total in totals.items()}

        def update(name: str, done: int, total: int | None, note: str = "", ended: bool = False) -> None:
            if name not in bars:
                return
            self._bars.update(bars[name], completed=done, total=total, note=note)
            if ended:
                self._bars.remove_task(bars.pop(name))
                self.line(f"{name}: {done} done, {note}")

        try:
            yield update
        finally:
            for bar in bars.values():
                self._bars.remove_task(bar)

    def line(self, text: str) -> None:
        """Say something that stays on the screen."""
        self.console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """Say something that the user should know."""
        self.console.print(f"[yellow]warning:[/yellow] {text}", highlight=False)
