"""Results on S3, over HTTP: nothing acknowledged is lost, nothing counts twice, and one driver writes."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from rich.console import Console
from rows import demo_rows, make_row
from s3_server import SECRETS, S3Server, s3_process, s3_server
from test_cli import run
from test_recovery import command, same_leaderboard

from merge_ray import s3
from merge_ray.checkpoints import read_weights
from merge_ray.cluster.learned import Learned
from merge_ray.cluster.ledger import ResultsActor
from merge_ray.errors import LedgerError, SpecError
from merge_ray.finetune import FinetuneSpec
from merge_ray.leaderboard import RowWriter, read_rows
from merge_ray.lock import _Lock, hold_lock
from merge_ray.progress import Progress
from merge_ray.results import Results, open_results, own_results, results_at
from merge_ray.spec_files import load_spec

__all__ = ["s3_process", "s3_server"]

PLACE = "s3://bucket/results/demo"
Actor: Any = ResultsActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]


class Killed(BaseException):
    """What a process does not survive."""


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket, and a machine that has seen nothing of it."""
    another_machine(monkeypatch, tmp_path / "first")
    found = boto3.resource("s3").Bucket("bucket")
    found.create()
    return found


def another_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("MERGE_RAY_CACHE", str(cache))


def quiet() -> Progress:
    return Progress(Console(file=StringIO()))


@contextmanager
def driver(progress: Progress | None = None, beat: float = 5, lease: float = 60) -> Iterator[Results]:
    with own_results(PLACE, progress or quiet(), beat, lease) as results:
        (results.directory / "trials").mkdir(exist_ok=True)
        yield results


def add(writer: RowWriter, *rows: dict[str, Any]) -> None:
    for row in rows:
        writer.add(row["identity"], row)


def candidates(count: int) -> list[dict[str, Any]]:
    return [make_row("ties", {"digits": 0.5}, {"density": step / 1000}, minute=step) for step in range(count)]


def identities(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(row["identity"] for row in rows)


def read_identities() -> list[str]:
    return sorted(read_rows(PLACE)["identity"])


def keys(bucket: Any, part: str = "trials/") -> list[str]:
    prefix = "results/demo/"
    return [item.key.removeprefix(prefix) for item in bucket.objects.filter(Prefix=prefix + part)]


def rows_on_s3(bucket: Any) -> list[str]:
    """The identities in all objects, with those that stand twice."""
    bodies = [item.get()["Body"].read() for item in bucket.objects.filter(Prefix="results/demo/trials/")]
    return sorted(name for body in bodies for name in pq.read_table(BytesIO(body))["identity"].to_pylist())


def test_a_row_that_is_acknowledged_is_on_s3(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = candidates(3)
    with driver() as results:
        writer = RowWriter(results)
        for done, row in enumerate(rows, start=1):
            add(writer, row)
            assert rows_on_s3(bucket) == identities(rows[:done])
    another_machine(monkeypatch, tmp_path / "second")
    pd.testing.assert_frame_equal(read_rows(PLACE), read_rows(results.directory))
    assert sorted(pd.read_parquet(f"{PLACE}/trials")["identity"]) == identities(rows)


def test_rows_that_wait_go_together_and_none_is_acknowledged_early(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, may_write, writes = candidates(20), threading.Event(), threading.Semaphore(0)
    put = Results._put

    def slow_put(self: Results, files: dict[str, Path]) -> None:
        writes.release()
        assert may_write.wait(60)
        put(self, files)

    with driver() as results, ThreadPoolExecutor(len(rows)) as pool:
        monkeypatch.setattr(Results, "_put", slow_put)
        writer = RowWriter(results)
        calls = [pool.submit(add, writer, row) for row in rows]
        writes.acquire()
        while len(writer._waiting) < len(rows) - 1:
            time.sleep(0.01)
        assert not any(call.done() for call in calls)
        may_write.set()
        for call in calls:
            call.result()
    assert len(keys(bucket)) == 2
    assert rows_on_s3(bucket) == identities(rows)


def test_small_objects_are_compacted_while_rows_come(bucket: Any) -> None:
    rows = candidates(25)
    with driver() as results:
        writer = RowWriter(results, most_small=8)
        add(writer, *rows)
        assert len(keys(bucket)) <= 9
        writer.compact()
        assert len(keys(bucket)) == 1
        assert writer.find(rows[3]["identity"])["parameters"] == rows[3]["parameters"]
    assert rows_on_s3(bucket) == identities(rows) == read_identities()


def kill_before_put(files: dict[str, Path], put: Callable[[], None]) -> None:
    raise Killed


def kill_after_put(files: dict[str, Path], put: Callable[[], None]) -> None:
    put()
    raise Killed


def kill_before_delete(names: list[str], delete: Callable[[list[str]], None]) -> None:
    raise Killed


def kill_amid_delete(names: list[str], delete: Callable[[list[str]], None]) -> None:
    delete(names[:3])
    raise Killed


def kill_after_delete(names: list[str], delete: Callable[[list[str]], None]) -> None:
    delete(names)
    raise Killed


@pytest.mark.parametrize("same_machine", [True, False])
@pytest.mark.parametrize(
    "kill", [kill_before_put, kill_after_put, kill_before_delete, kill_amid_delete, kill_after_delete]
)
def test_a_crash_while_compacting_loses_and_doubles_nothing(
    bucket: Any, kill: Callable[..., None], same_machine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = candidates(8)
    put, delete = Results._put, Results._delete
    with pytest.raises(Killed), driver() as results:
        add(RowWriter(results), *rows)
        with monkeypatch.context() as patch:
            if "put" in kill.__name__:
                patch.setattr(Results, "_put", lambda self, files: kill(files, lambda: put(self, files)))
            else:
                patch.setattr(Results, "_delete", lambda self, names: kill(names, lambda some: delete(self, some)))
            RowWriter(results).compact()
    if not same_machine:
        another_machine(monkeypatch, tmp_path / "second")
    assert read_identities() == identities(rows)
    with driver() as results:
        assert sorted(read_rows(results)["identity"]) == identities(rows)
        RowWriter(results).compact()
        assert len(keys(bucket)) == 1
    assert rows_on_s3(bucket) == identities(rows) == read_identities()


def test_a_failure_goes_when_its_candidate_is_scored_again(bucket: Any) -> None:
    failed = make_row("ties", None, {"density": 0.2}, minute=5)
    scored = make_row("ties", {"digits": 0.5}, {"density": 0.2}, minute=1)  # by a clock that was set back
    with driver() as results:
        writer = RowWriter(results)
        add(writer, failed, *candidates(2))
        writer.compact()
        add(writer, scored)
        assert read_rows(results)["status"].tolist() == ["complete"] * 3
        writer.compact()
        assert read_rows(results)["status"].tolist() == ["complete"] * 3
        assert len(rows_on_s3(bucket)) == 3


def test_without_permission_to_remove_rows_are_safe(bucket: Any, s3_server: S3Server) -> None:
    rows = candidates(6)
    with driver() as results:
        writer = RowWriter(results, most_small=2)
        s3_server.fail("denied", "denied", method="POST")
        add(writer, *rows)
        assert sorted(read_rows(results)["identity"]) == identities(rows)


def test_a_shared_row_is_found_in_what_was_compacted(bucket: Any) -> None:
    rows = candidates(3)
    with driver() as results:
        actor = Actor(results, {})
        for row in rows:
            actor.record(row)
        actor.compact()
        actor.share(rows[1]["identity"], "other")
    found = read_rows(PLACE).set_index("study").loc["other"]
    assert (found["identity"], found["seconds_total"]) == (rows[1]["identity"], 0)


def test_artifacts_and_what_is_learned_lie_on_s3(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = Learned(step=50, state={"m": np.ones(2)}, artifacts={"coefficient": np.ones(3)})
    with driver() as results:
        actor = Actor(results, {})
        actor.save_learned("ab", learned)
        actor.save_learned("cd", learned)
    another_machine(monkeypatch, tmp_path / "second")
    with driver() as results:
        actor = Actor(results, {})
        np.testing.assert_array_equal(actor.load_learned("ab").state["m"], np.ones(2))
        actor.forget_learned("cd")
        assert actor.keep("ab", "study", {"coefficient": np.ones(3)}, "ab") == "artifacts/ab.npz"
        actor.forget_learned()
    assert keys(bucket, "learning/") == []
    steps = ["artifacts/study/step-50.json", "artifacts/study/step-50.safetensors"]
    assert keys(bucket, "artifacts/") == ["artifacts/ab.npz", "artifacts/study.npz", *steps]
    assert np.load(open_results(PLACE).directory / "artifacts" / "study.npz")["coefficient"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("fault", ["error", "slow_down", "cut", "timeout"])
def test_a_fault_delays_a_row_and_loses_none(
    bucket: Any, s3_server: S3Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "READ_SECONDS", 1)
    s3._client.cache_clear()
    rows = candidates(2)
    with driver() as results:
        s3_server.fail(fault, method="PUT")
        s3_server.fail(fault, method="HEAD")
        add(RowWriter(results), *rows)
        assert rows_on_s3(bucket) == identities(rows)


def test_an_object_that_came_in_half_is_fetched_again(
    bucket: Any, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = candidates(4)
    with driver() as results:
        add(RowWriter(results), *rows)
    another_machine(monkeypatch, tmp_path / "second")
    s3_server.fail("pass", "truncate", "truncate", method="GET")
    assert read_identities() == identities(rows)


def test_what_is_gone_from_s3_is_gone_here_and_what_changed_is_fetched(bucket: Any) -> None:
    rows = candidates(3)
    with driver() as results:
        add(RowWriter(results), *rows)
    bucket.objects.filter(Prefix=f"results/demo/trials/{rows[0]['identity']}").delete()
    [kept] = (results.directory / "trials").glob(f"{rows[1]['identity']}*")
    kept.write_bytes(kept.read_bytes()[::-1])
    assert read_identities() == identities(rows[1:])


def outage_while_a_row_is_added(s3_server: S3Server, bucket: Any, seconds: float, beat: float) -> str:
    console = Console(record=True, file=StringIO(), width=200)
    rows = candidates(2)
    with driver(Progress(console), beat) as results, ThreadPoolExecutor(1) as pool:
        writer = RowWriter(results)
        add(writer, rows[0])
        with s3_server.outage():
            call = pool.submit(add, writer, rows[1])
            time.sleep(seconds)
            assert not call.done()
        call.result()
        assert rows_on_s3(bucket) == identities(rows)
        time.sleep(2 * beat)
    return console.export_text()


def test_an_outage_is_waited_for(s3_server: S3Server, bucket: Any) -> None:
    outage_while_a_row_is_added(s3_server, bucket, 3, beat=5)


@pytest.mark.slow
def test_an_outage_of_a_minute_is_told_and_loses_nothing(s3_server: S3Server, bucket: Any) -> None:
    text = outage_while_a_row_is_added(s3_server, bucket, 60, beat=5)
    assert "warning: s3://bucket/results/demo/.lock" in text and "trying again" in text
    assert "S3 answers again" in text


def test_a_second_driver_is_refused_with_the_name_of_the_first(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    with driver(beat=0.2):
        with pytest.raises(LedgerError, match=r"s3://bucket/results/demo is in use by process \d+"), driver():
            pass
        another_machine(monkeypatch, tmp_path / "second")
        said = r"s3://bucket/results/demo/\.lock is held by process \d+ on node-7 since 20.* UTC; wait for it or end it"
        with pytest.raises(LedgerError, match=said), driver(beat=0.4):
            pass
    with driver():
        pass


def test_a_driver_that_was_replaced_leaves_the_lock_alone(bucket: Any) -> None:
    with ExitStack() as first:
        first.enter_context(driver(beat=0.2))
        with hold_lock("bucket", "results/demo/.lock", holder(bucket), quiet()) as owner:
            time.sleep(1)
            first.close()
            assert holder(bucket) == owner


def holder(bucket: Any) -> str:
    return str(bucket.Object("results/demo/.lock").metadata["owner"])


def abandon_lock() -> str:
    """Take the lock as a driver does that dies at once."""
    place = results_at(PLACE)
    lock = _Lock(place.bucket, f"{place.prefix}/.lock", quiet(), 1, 1)
    lock.acquire("")
    return lock.owner


def test_a_dead_driver_is_replaced_and_writes_no_more(bucket: Any) -> None:
    owner = abandon_lock()
    dead = results_at(PLACE)
    dead = Results(dead.location, dead.directory, dead.bucket, dead.prefix, owner)
    (dead.directory / "trials").mkdir(parents=True)
    add(RowWriter(dead), *candidates(1))
    began = time.monotonic()
    with driver(beat=0.2, lease=1.5) as results:
        assert time.monotonic() - began > 1.5
        said = r"cannot write.*|\.lock is another's now"
        with pytest.raises(LedgerError, match=said):
            add(RowWriter(dead), *candidates(2))
        with pytest.raises(LedgerError, match=said):
            RowWriter(dead).compact(most_small=0)
        add(RowWriter(results), *candidates(3))


def test_a_driver_that_died_on_this_machine_is_replaced_at_once(bucket: Any) -> None:
    with driver() as results:
        pass
    (results.directory / ".owner").write_text(abandon_lock())
    with driver(lease=1000):
        pass


def test_an_answer_to_the_lock_that_got_lost_is_no_other_driver(bucket: Any, s3_server: S3Server) -> None:
    s3_server.fail("lost", method="PUT")
    with driver(beat=0.3) as results:
        s3_server.fail("lost", method="PUT")
        time.sleep(1)
        add(RowWriter(results), *candidates(1))


def test_while_a_sweep_runs_its_copy_is_read_as_it_is(bucket: Any, s3_server: S3Server) -> None:
    with driver() as results:
        add(RowWriter(results), *candidates(2))
        s3_server.requests.clear()
        with s3_server.outage():
            assert read_identities() == identities(candidates(2))


def test_what_s3_refuses_is_said_without_credentials(bucket: Any, s3_server: S3Server) -> None:
    with driver() as results:
        s3_server.fail("denied", method="PUT")
        with pytest.raises(
            LedgerError, match=r"cannot write s3://bucket/results/demo.*run the same command"
        ) as refused:
            add(RowWriter(results), *candidates(1))
        assert not any(secret in str(refused.value) for secret in SECRETS.values())
        assert list((results.directory / "trials").iterdir()) == []


def test_a_place_without_results_and_a_missing_bucket_are_named(bucket: Any) -> None:
    with pytest.raises(LedgerError, match=r"s3://bucket/results/none is not a results directory"):
        read_rows("s3://bucket/results/none")
    with pytest.raises(LedgerError, match=r"cannot read s3://buckt/results.*there is no bucket 'buckt'"):
        read_rows("s3://buckt/results")


def test_commands_take_results_on_s3(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with driver() as results:
        add(RowWriter(results), *demo_rows())
    another_machine(monkeypatch, tmp_path / "second")
    assert "task_arithmetic" in run("leaderboard", PLACE, "--format", "csv")
    assert f"wrote {PLACE}/report.html" in run("report", PLACE)
    assert keys(bucket, "report") == ["report.html"]


def test_a_merge_is_written_to_s3(bucket: Any, tmp_path: Path) -> None:
    tiny.write_models(tmp_path)
    words = [f"{task}={tmp_path / task}.safetensors" for task in tiny.TASKS]
    place = "s3://bucket/merged/model.safetensors"
    run("merge", "weight_average", "--base", tmp_path / "base.safetensors", "--finetuned", *words, "-o", place)
    merged = read_weights(place)
    assert merged.keys() == read_weights(tmp_path / "base.safetensors").keys()


def test_what_cannot_be_written_to_s3_is_refused(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump({"name": "a", "output": "s3://bucket/models", "architecture": "b", "tasks": ["c"]}))
    with pytest.raises(SpecError, match="output: 's3://bucket/models': this is written to a local directory only"):
        load_spec(FinetuneSpec, spec)


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_on_s3_that_is_killed_goes_on_and_is_exported(bucket: Any, tmp_path: Path) -> None:
    studies = {"ties": {"searcher": "optuna", "trials": 12}, "weight_average": {}}
    undisturbed = tmp_path / "undisturbed"
    assert command(tiny.write_world(undisturbed, studies=studies)).wait(600) == 0
    spec = tiny.write_world(tmp_path / "killed", name="demo", results="s3://bucket/results", studies=studies)
    process = command(spec)
    while len(rows_on_s3(bucket)) < 6:
        assert process.poll() is None, spec.with_name("output").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    acknowledged = read_rows(PLACE).set_index(["study", "identity"])["time"]
    assert command(spec).wait(600) == 0, spec.with_name("output").read_text()
    rows = read_rows(PLACE).set_index(["study", "identity"])
    assert not rows.index.has_duplicates
    assert rows.loc[acknowledged.index, "time"].equals(acknowledged)
    assert len(keys(bucket)) == 1
    assert set(keys(bucket, "")) >= {"sweep.yaml", "sweep.json", "leaderboard.parquet", "report.html"}
    same_leaderboard(results_at(PLACE).directory, undisturbed / "results" / "tiny")
    run("export", PLACE, "--study", "ties")
    assert read_weights(f"{PLACE}/export/merged.safetensors").keys()


def test_a_copy_that_was_removed_comes_back(bucket: Any) -> None:
    rows = candidates(2)
    with driver() as results:
        add(RowWriter(results), *rows)
    shutil.rmtree(results.directory)
    assert read_identities() == identities(rows)
