"""Kill what runs, at random, until a sweep is complete: what was recorded stays, nothing is scored twice.

The sweep is the quickstart's (its models, tasks and seven studies) with fewer images and on two hosts, or that of
another SPEC. It runs once in peace. Then, every round, it starts anew in an empty directory, and something of it is
sent SIGKILL at a random moment: the driver, a host, the process of a trial, the ledger's actor, the raylet, or several
of them at once. A command that ended is given again, until one ends well. A row counts as acknowledged once it can be
read from the ledger.

    python benchmarks/faults.py [SPEC] [--rounds 50] [--seed 0] [--images 20] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from merge_ray.errors import LedgerError
from merge_ray.leaderboard import rank, read_rows

SPEC = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
TARGETS = {
    "driver": r"-m merge_ray sweep",
    "host": r"ray::\w*ModelHost",
    "trial": r"ray::\w*Trainable",
    "ledger": r"ray::\w*ResultsActor",
    "raylet": r"\S*/raylet/raylet ",
}
"""What is killed, by its command line."""
MOST_KILLS = 4
"""Kills a round: what is left of it runs in peace."""
PATIENCE = 900.0
"""Seconds after which a command that has not ended counts as one that hangs."""

Row = dict[str, Any]


@dataclass
class Round:
    """What one round did and found; a kill may find nothing of its kind."""

    kills: list[str] = field(default_factory=list)
    commands: int = 0
    lost: int = 0
    changed: int = 0
    twice: int = 0
    failed: int = 0
    same_leaderboard: bool = False
    left: list[str] = field(default_factory=list)
    hung: int = 0
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether the round kept every promise."""
        return self.same_leaderboard and not (
            self.lost or self.changed or self.twice or self.failed or self.left or self.hung
        )


@dataclass(frozen=True)
class Sweep:
    """A sweep as a user starts it: in a process of its own, with a Ray of its own."""

    spec: Path
    overrides: tuple[str, ...]
    results: Path

    @property
    def directory(self) -> Path:
        """Its results directory."""
        return self.results / "faults"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command; what it says goes to a file ``output`` in the results."""
        settings = ("name=faults", f"results={self.results}", "hosts.count=2", *self.overrides)
        self.results.mkdir(parents=True, exist_ok=True)
        with (self.results / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "merge_ray", "sweep", str(self.spec), *(f"--set={text}" for text in settings)],
                env={**os.environ, "RAY_ADDRESS": "local"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def rows(self) -> dict[tuple[str, str], Row]:
        """The rows that can be read, by study and identity."""
        try:
            rows: list[Any] = read_rows(self.directory).to_dict("records")
        except LedgerError:
            return {}
        return {(row["study"], row["identity"]): row for row in rows}

    def leaderboard(self) -> list[tuple[Any, ...]]:
        """What must not depend on what was killed."""
        columns = ["study", "parameters", "identity", "validation_identity", "score", "mean", "rank"]
        return [tuple(row) for row in rank(read_rows(self.directory))[columns].astype(str).to_numpy()]


def main() -> None:
    """Run the rounds and print a table; the status is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, nargs="?", default=SPEC)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=20, help="of each task and split")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="as of merge-ray sweep")
    arguments = parser.parse_args()
    limits = (f"evaluation.max_samples={arguments.images}", f"task_defaults.test_size={arguments.images}")
    with tempfile.TemporaryDirectory() as folder:
        rounds = run(arguments.spec, (*limits, *arguments.overrides), Path(folder), arguments.rounds, arguments.seed)
    show(rounds)
    sys.exit(not all(item.passed for item in rounds))


def run(spec: Path, overrides: tuple[str, ...], folder: Path, rounds: int, seed: int) -> list[Round]:
    """An undisturbed sweep in ``folder``, and so many rounds that must end like it."""
    peace = Sweep(spec, overrides, folder / "peace")
    started = time.monotonic()
    if peace.start().wait(PATIENCE):
        raise RuntimeError((peace.results / "output").read_text())
    lasts, expected = time.monotonic() - started, peace.leaderboard()
    done = []
    for index in range(rounds):
        generator = random.Random(f"{seed}/{index}")
        done.append(one_round(Sweep(spec, overrides, folder / str(index)), lasts, expected, generator))
        print(f"round {index}: {done[-1]}" if not done[-1].passed else f"round {index}: {done[-1].kills}", flush=True)
    return done


def one_round(sweep: Sweep, lasts: float, expected: list[tuple[Any, ...]], generator: random.Random) -> Round:
    """Kill and start again until a command ends well.

    lasts: the seconds of an undisturbed sweep, within which kills fall.
    """
    found = Round()
    acknowledged: dict[tuple[str, str], Row] = {}
    planned = generator.randint(1, MOST_KILLS)
    status = None
    while status != 0 and found.commands <= 2 * MOST_KILLS:
        process = sweep.start()
        found.commands += 1
        ends, family = False, _family(process.pid)
        while not ends and len(found.kills) < planned and _runs_for(process, generator.uniform(0, lasts)):
            acknowledged |= sweep.rows()
            family = _family(process.pid)
            killed = kill(family, _targets(generator), generator)
            if killed:
                found.kills.append("+".join(killed))
            ends = bool({"driver", "raylet"} & set(killed))
        names = {item: _command_line(item) for item in _family(process.pid) or family}
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            found.hung += 1
        # Nothing of a command that ended may write any more when the next begins.
        found.left += [names[item] for item in psutil.wait_procs(names, timeout=60)[1] if _lives(item)]
    if status != 0:
        found.output = (sweep.results / "output").read_text()[-2000:]
        return found
    rows = sweep.rows()
    found.lost = len(acknowledged.keys() - rows.keys())
    found.changed = sum(str(rows[key]) != str(row) for key, row in acknowledged.items() if key in rows)
    scored = Counter(row["identity"] for row in rows.values() if row["seconds_total"])
    found.twice = sum(count > 1 for count in scored.values())
    found.failed = sum(row["status"] == "failed" for row in rows.values())
    found.same_leaderboard = sweep.leaderboard() == expected
    return found


def _runs_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a process is still running after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _targets(generator: random.Random) -> list[str]:
    """One kind of process, or several at once."""
    count = generator.choice((1, 1, 1, 2, 3))
    return generator.sample(sorted(TARGETS), count)


def kill(family: list[psutil.Process], targets: list[str], generator: random.Random) -> list[str]:
    """Send SIGKILL to one process of each kind that there is; returns the kinds."""
    killed = []
    for target in targets:
        found = [process for process in family if re.match(f".*{TARGETS[target]}", _command_line(process))]
        if found:
            generator.choice(found).kill()
            killed.append(target)
    return killed


def _family(driver: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(driver)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _lives(process: psutil.Process) -> bool:
    """Whether a process is more than an entry that its new parent, a container's first process say, has not read."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def show(rounds: list[Round]) -> None:
    """Print what was killed how often, and what came of it."""
    kinds = Counter(kind for item in rounds for kind in item.kills)
    killed = Table("killed", "times")
    for kind, times in sorted(kinds.items()):
        killed.add_row(kind, str(times))
    promises = Table("promise", "rounds kept", "of")
    for name, kept in {
        "no acknowledged row is lost": [not item.lost for item in rounds],
        "no acknowledged row is scored again": [not item.changed for item in rounds],
        "no candidate has two scored rows": [not item.twice for item in rounds],
        "no process is left behind": [not item.left for item in rounds],
        "every command ends": [not item.hung for item in rounds],
        "no candidate failed": [not item.failed for item in rounds],
        "the leaderboard is that of the undisturbed sweep": [item.same_leaderboard for item in rounds],
    }.items():
        promises.add_row(name, str(sum(kept)), str(len(rounds)))
    console = Console()
    console.print(killed)
    console.print(promises)
    console.print(f"{sum(item.commands for item in rounds)} commands for {len(rounds)} sweeps")


if __name__ == "__main__":
    main()
