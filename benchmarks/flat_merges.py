"""What flat merges cost: time as a multiple of reading the models once, memory as a multiple of one model.

The floor is the time in which the same threads read the same task vectors once and do nothing else. All figures
are ratios within one run, so they carry over between machines better than seconds do. Run

    python benchmarks/flat_merges.py --tasks 8 --parameters 88_000_000 --threads 2
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated

import numpy as np
import psutil
import torch
import typer
from numba import njit
from rich.console import Console
from rich.progress import track
from rich.table import Table

from merge_ray.bank import Layout, ModelBank
from merge_ray.kernels.threads import over_columns
from merge_ray.methods.base import MergeInputs, Method, make_method
from merge_ray.methods.merge_cache import MergeCache

TENSOR = 768 * 3072
"""Weights in one tensor of the bank: a matrix of a ViT-B block."""


@njit(nogil=True, cache=True)
def _read(rows, start, stop):  # type: ignore[no-untyped-def]
    """Touch every value of some columns; the cheapest use of them that a compiler cannot drop."""
    bits = np.int32(0)
    for task in range(len(rows)):
        row = rows[task, start:stop]
        for column in range(len(row)):
            bits ^= row[column]
    return bits


def make_bank(tasks: int, parameters: int) -> ModelBank:
    """A bank of heavy-tailed task vectors whose tensors differ in scale; filled tensor by tensor."""
    shapes = {f"layer.{start // TENSOR:04d}": min(TENSOR, parameters - start) for start in range(0, parameters, TENSOR)}
    layout = Layout.of({name: torch.empty(size, device="meta") for name, size in shapes.items()})
    arrays = {"base": np.empty(parameters, np.float32), "task_vectors": np.empty((tasks, parameters), np.float32)}
    generator = np.random.default_rng(0)
    for entry in track(layout.entries, "make models", transient=True):
        columns = slice(entry.offset, entry.offset + entry.size)
        arrays["base"][columns] = 0.02 * generator.standard_normal(entry.size, dtype=np.float32)
        for row in arrays["task_vectors"]:
            # A normal over the root of a uniform has a tail like Student's t with two degrees of freedom.
            spread = np.sqrt(generator.random(entry.size, dtype=np.float32) + 1e-6)
            scale = 1e-4 * generator.uniform(0.2, 5)
            row[columns] = scale * generator.standard_normal(entry.size, dtype=np.float32) / spread
    names = tuple(f"task{index}" for index in range(tasks))
    return ModelBank.from_arrays(arrays, layout, names, {}, "benchmark")


@dataclass(frozen=True)
class Case:
    """A line of the table: a merge to time, after another that may have filled the host's cache.

    limit: the multiple of the floor that it is meant to stay below. masks: make all packed masks as well.
    """

    name: str
    limit: float | None
    method: Method
    after: Method | None = None
    masks: bool = False


def _cases() -> list[Case]:
    def ties(density: float, scaling_coefficient: float = 1.0) -> Method:
        return make_method("ties", {"density": density, "scaling_coefficient": scaling_coefficient})

    tall = make_method("tall_mask", {"mask_lambda": 0.4})
    consensus = make_method("consensus", {"mask_lambda": 0.4})
    return [
        Case("weighted sum", 2, make_method("task_arithmetic", {})),
        Case("TIES, first density", 12, ties(0.2)),
        Case("TIES, further density", 6, ties(0.1), after=ties(0.2)),
        Case("TIES, further coefficient", None, ties(0.2, 0.3), after=ties(0.2)),
        Case("TIES, trimmed per tensor", None, make_method("ties", {"trim": "tensor"})),
        Case("TALL masks of all tasks", 6, tall, masks=True),
        Case("TALL masks of all tasks, further lambda", 6, make_method("tall_mask", {"mask_lambda": 0.5}), tall, True),
        Case("TALL weights of one task, further", None, tall, after=tall),
        Case("consensus", None, consensus),
        Case("magnitude mask, weights of one task", None, make_method("magnitude_mask", {})),
    ]


@dataclass
class Bench:
    """A bank to merge, and the resident memory with nothing but it."""

    bank: ModelBank
    resident: int

    def floor(self) -> float:
        """Seconds to read the task vectors once."""
        rows = self.bank.task_vectors.numpy().view(np.int32)
        started = time.perf_counter()
        over_columns(_read, rows.shape[1], rows)
        return time.perf_counter() - started

    def run(self, case: Case) -> tuple[float, int]:
        """Seconds, and the peak of resident memory beyond the bank: result, cached vectors, temporaries."""
        out = torch.from_numpy(np.zeros(self.bank.layout.size, dtype=np.float32))
        out += 0  # touched, as the buffer of a host that has merged before is
        cache = MergeCache(self.bank.base.nbytes)
        if case.after:
            case.after.merge(MergeInputs(self.bank, out=out, cache=cache))
        with PeakMemory() as memory:
            started = time.perf_counter()
            merged = case.method.merge(MergeInputs(self.bank, out=out, cache=cache))
            if case.masks:
                merged.artifacts()
            elif not merged.shared:
                merged.write(self.bank.tasks[0], out)
            seconds = time.perf_counter() - started
        return seconds, memory.peak - self.resident


class PeakMemory:
    """The most resident memory seen within a ``with`` block, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.peak = resident_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """The memory of this process that is in RAM."""
    return psutil.Process().memory_info().rss


def main(
    tasks: Annotated[int, typer.Option(help="Fine-tuned models.")] = 8,
    parameters: Annotated[str, typer.Option(help="Weights of one model, such as 88_000_000.")] = "88_000_000",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each merge; the fastest counts.")] = 3,
) -> None:
    """Print what flat merges cost."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    for case in _cases():
        Bench(make_bank(2, 1 << 18), 0).run(case)
    first = time.perf_counter() - started
    before = resident_bytes()
    bank = make_bank(tasks, int(parameters))
    Bench(bank, 0).floor()
    bench = Bench(bank, resident_bytes())
    table = Table(title=f"{tasks} x {int(parameters):,} float32, {threads} threads")
    for column in ("merge", "x floor", "limit", "memory beyond the bank (x one model)"):
        table.add_column(column, justify="left" if column == "merge" else "right")
    floors = []
    for case in track(_cases(), "merge", transient=True):
        runs = [(bench.floor(), *bench.run(case)) for _ in range(repeats)]
        floor = min(run[0] for run in runs)
        floors.append(floor)
        ratio, memory = min(run[1] for run in runs) / floor, max(run[2] for run in runs) / bank.base.nbytes
        table.add_row(case.name, f"{ratio:.2f}", f"{case.limit or ''}", f"{memory:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"floor: {min(floors):.3f} s ({bank.task_vectors.nbytes / min(floors) / 1e9:.1f} GB/s); bank in memory: "
        f"{(bench.resident - before) / bank.base.nbytes:.2f} x one model; first calls of all kernels on small models, "
        f"compiling included if not cached: {first:.1f} s"
    )


if __name__ == "__main__":
    typer.run(main)
