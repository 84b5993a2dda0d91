"""Kill what runs, at random, until a sweep is complete: what was recorded stays, nothing is scored twice.

The sweep is the quickstart's (its models, tasks and seven studies) with fewer images and on two hosts, or that of
another SPEC. It runs once in peace. Then, every round, it starts anew in an empty directory, and something of it is
sent SIGKILL at a random moment: the driver, a host, the process of a trial, the ledger's actor, the raylet, or several
of them at once. A command that ended is given again, until one ends well. A row counts as acknowledged once it can be
read from the ledger. With ``--s3`` the results lie on an S3 server on this machine, which stops answering now and then.

    python benchmarks/faults.py [SPEC] [--rounds 50] [--seed 0] [--images 20] [--s3] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from merge_ray.errors import LedgerError
from merge_ray.leaderboard import rank, read_rows
from merge_ray.s3 import client

SPEC = Path(__file__).parents[1] / "sweeps" / "quickstart.yaml"
TARGETS = {
    "driver": r"-m merge_ray sweep",
    "host": r"ray::\w*ModelHost",
    "trial": r"ray::\w*Trainable",
    "ledger": r"ray::\w*ResultsActor",
    "raylet": r"\S*/raylet/raylet ",
}
"""What is killed, by its command line."""
LONGEST_OUTAGE = 30.0
"""Seconds."""
BUCKET = "faults"
MOST_KILLS = 4
"""Kills a round: what is left of it runs in peace."""
PATIENCE = 900.0
"""Seconds after which a command that has not ended counts as one that hangs."""
FAREWELL = 90.0
"""Seconds in which all processes of a command that ended are gone. Two agents of Ray's take a minute where raylet and
driver were killed at once: they report the raylet's end to a head that is gone too."""

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
    """A sweep as a user starts it: in a process of its own, with a Ray of its own.

    folder: where its results are, or else its output and its copy of results on the S3 server ``s3``.
    """

    spec: Path
    overrides: tuple[str, ...]
    folder: Path
    s3: psutil.Process | None = None

    @property
    def results(self) -> str:
        """Where its results are."""
        return f"s3://{BUCKET}/{self.folder.name}" if self.s3 else str(self.folder)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command; what it says goes to a file ``output`` in the results."""
        settings = ("name=faults", f"results={self.results}", "hosts.count=2", *self.overrides)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Another than this process has, which looks at the results from outside.
        cache = {"MERGE_RAY_CACHE": str(self.folder.parent / "sweeps")} if self.s3 else {}
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "merge_ray", "sweep", str(self.spec), *(f"--set={text}" for text in settings)],
                env={**os.environ, "RAY_ADDRESS": "local", **cache},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def rows(self) -> dict[tuple[str, str], Row]:
        """The rows that can be read, by study and identity."""
        try:
            rows: list[Any] = read_rows(f"{self.results}/faults").to_dict("records")
        except LedgerError:
            return {}
        return {(row["study"], row["identity"]): row for row in rows}

    def leaderboard(self) -> list[tuple[Any, ...]]:
        """What must not depend on what was killed."""
        columns = ["study", "parameters", "identity", "validation_identity", "score", "mean", "rank"]
        return [tuple(row) for row in rank(read_rows(f"{self.results}/faults"))[columns].astype(str).to_numpy()]


def main() -> None:
    """Run the rounds and print a table; the status is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, nargs="?", default=SPEC)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=20, help="of each task and split")
    parser.add_argument("--s3", action="store_true", help="results on an S3 server, with outages")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="as of merge-ray sweep")
    arguments = parser.parse_args()
    limits = (f"evaluation.max_samples={arguments.images}", f"task_defaults.test_size={arguments.images}")
    overrides = (*limits, *arguments.overrides)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        s3 = stack.enter_context(s3_server(folder)) if arguments.s3 else None
        rounds = run(arguments.spec, overrides, folder, arguments.rounds, arguments.seed, s3)
    show(rounds)
    sys.exit(not all(item.passed for item in rounds))


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[psutil.Process]:
    """A server in a process of its own, the only one that this process and those that it starts will ask."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        AWS_ACCESS_KEY_ID="any",
        AWS_SECRET_ACCESS_KEY="any",
        AWS_DEFAULT_REGION="us-east-1",
        MERGE_RAY_CACHE=str(folder / "cache"),
    )
    with (folder / "s3").open("w") as log:
        process = psutil.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        client().create_bucket(Bucket=BUCKET)
        yield process
    finally:
        process.kill()


def run(
    spec: Path, overrides: tuple[str, ...], folder: Path, rounds: int, seed: int, s3: psutil.Process | None
) -> list[Round]:
    """An undisturbed sweep in ``folder``, and so many rounds that must end like it."""
    peace = Sweep(spec, overrides, folder / "peace", s3)
    started = time.monotonic()
    if peace.start().wait(PATIENCE):
        raise RuntimeError((peace.folder / "output").read_text())
    lasts, expected = time.monotonic() - started, peace.leaderboard()
    done = []
    for index in range(rounds):
        generator = random.Random(f"{seed}/{index}")
        done.append(one_round(Sweep(spec, overrides, folder / str(index), s3), lasts, expected, generator))
        print(f"round {index}: {done[-1]}" if not done[-1].passed else f"round {index}: {done[-1].kills}", flush=True)
    return done


def one_round(sweep: Sweep, lasts: float, expected: list[tuple[Any, ...]], generator: random.Random) -> Round:
    """Kill and start again until a command ends well.

    lasts: the seconds of an undisturbed sweep; a kill comes within half of it.
    """
    found = Round()
    acknowledged: dict[tuple[str, str], Row] = {}
    planned = generator.randint(1, MOST_KILLS)
    status = None
    while status != 0 and found.commands <= 2 * MOST_KILLS:
        process = sweep.start()
        found.commands += 1
        ends, family = False, _family(process.pid)
        while not ends and len(found.kills) < planned and _runs_for(process, generator.uniform(0, lasts / 2)):
            acknowledged |= sweep.rows()
            family = _family(process.pid)
            killed = kill(family, _targets(generator), generator)
            if sweep.s3 and generator.random() < 0.5:
                killed.append("s3")
                sweep.s3.suspend()
                threading.Timer(generator.uniform(0, LONGEST_OUTAGE), sweep.s3.resume).start()
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
        found.left += [names[item] for item in psutil.wait_procs(names, timeout=FAREWELL)[1] if _lives(item)]
    if status != 0:
        found.output = (sweep.folder / "output").read_text()[-2000:]
        return found
    rows = sweep.rows()
    found.lost = len(acknowledged.keys() - rows.keys())
    found.changed = sum(rows[key]["time"] != row["time"] for key, row in acknowledged.items() if key in rows)
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
