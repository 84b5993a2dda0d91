"""The papers' protocol done naively, beside merge-ray, on the same models, tasks and settings.

Naive is what research code does: for every setting read all checkpoints again, merge state dicts, load the result into
a model, decode and resize every image, one setting after the other; the best on validation data goes to the test split.

    python benchmarks/papers_protocol.py [SPEC] [--architecture NAME] [--images N] [--points N]

SPEC (by default the quickstart's) names the models and tasks; with ``--architecture`` the models are random ones of
that size, for times alone. Images are first written as PNG files in Parquet, as image sets are published; both sides
read those, and the same float32 checkpoints.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from torch import Tensor
from torchvision import transforms

from merge_ray.checkpoints import read_weights
from merge_ray.families import ImageFamily, find_image_family
from merge_ray.families.clip import ClipFamily
from merge_ray.leaderboard import rank, read_rows
from merge_ray.progress import Progress
from merge_ray.spec import SweepSpec
from merge_ray.spec_files import load_sweeps
from merge_ray.sweep import run_sweep
from merge_ray.tasks import open_task

DENSITY = 0.2
MASK_LAMBDAS = [0.2, 0.3, 0.4, 0.5, 0.6]
BATCH = 128

State = dict[str, Tensor]


# What both sides are given


@dataclass
class Problem:
    """Checkpoints and image sets in a folder, and what is needed to use them."""

    folder: Path
    family: ImageFamily
    tasks: list[str]
    heads: dict[str, Tensor]
    coefficients: list[float]


def read_models(spec: SweepSpec, family: ImageFamily) -> Iterator[tuple[str, State]]:
    """The base and then every fine-tuned model, by name."""
    locations = {"base": str(spec.models.base)} | {
        name: spec.models.finetuned_location(name) for name in spec.task_names
    }
    for name, location in locations.items():
        yield name, {key: tensor.float() for key, tensor in family.rename(read_weights(location)).items()}


def make_models(spec: SweepSpec, architecture: str) -> Iterator[tuple[str, State]]:
    """Random models of an open_clip architecture: a base, and image towers that differ from it a little."""
    family = ClipFamily(architecture)
    base = {name: tensor.float() for name, tensor in family.build().state_dict().items()}
    yield "base", base
    tower = family.tower(base)
    for name in spec.task_names:
        yield name, {key: tensor + 0.01 * tensor.std() * torch.randn_like(tensor) for key, tensor in tower.items()}


def prepare(
    spec: SweepSpec, folder: Path, architecture: str | None, most_images: int, points: int, progress: Progress
) -> tuple[Problem, dict[str, Any]]:
    """Write checkpoints as ``<name>.pt`` and images as Parquet; returns the problem and merge-ray's spec for it."""
    family = find_image_family(spec.models.family, architecture or spec.models.architecture)
    heads, tasks = {}, []
    with progress.counted("write checkpoints and images") as update:
        for name, state in make_models(spec, architecture) if architecture else read_models(spec, family):
            torch.save(state, folder / f"{name}.pt")
        base = torch.load(folder / "base.pt")
        for done, task_spec in enumerate(spec.tasks):
            task = open_task(task_spec)
            heads[task.name] = family.head(base, task.classes, task.templates)
            for split in ("val", "test"):
                shape = family.preprocessing
                cached = task.cached(split, shape.size, shape.interpolation, folder / "raw")
                images, labels = cached.images[:most_images], cached.labels[:most_images]
                if architecture:
                    labels = predictions(family, torch.load(folder / f"{task.name}.pt"), images, heads[task.name])
                write_images(folder / task.name / f"{split}.parquet", images, labels)
            words = {"classes": task.classes, "templates": task.templates}
            tasks.append({"name": task.name, "parquet": f"{folder}/{task.name}/{{split}}.parquet", **words})
            update(done + 1, len(spec.tasks))
    grid = {"low": 0.0, "high": 1.0, "points": points}
    sweep = {
        "name": "papers_protocol",
        "results": str(folder),
        "models": {
            "family": spec.models.family,
            "architecture": family.architecture,
            "base": f"{folder}/base.pt",
            "finetuned": f"{folder}/{{task}}.pt",
        },
        "tasks": tasks,
        "evaluation": {"shards": 1, "batch_size": BATCH, "objective": "mean"},
        "search": {"searcher": "grid"},
        "studies": {
            "task_arithmetic": {"space": {"scaling_coefficient": grid}},
            "ties": {"parameters": {"density": DENSITY}, "space": {"scaling_coefficient": grid}},
            "tall_mask": {"parameters": {"mask_lambdas": MASK_LAMBDAS}, "space": {}},
        },
    }
    coefficients = [float(value) for value in np.linspace(0.0, 1.0, points)]
    return Problem(folder, family, spec.task_names, heads, coefficients), sweep


@torch.inference_mode()
def predictions(family: ImageFamily, state: State, images: np.ndarray, head: Tensor) -> np.ndarray:
    """A model's own answers ``[N]``: the labels under which a random model is a fine-tuned one."""
    encoder = family.image_encoder(state, "cpu").eval()
    return (encoder(torch.from_numpy(np.array(images))) @ head.T).argmax(dim=1).numpy()


def write_images(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write uint8 ``[N, 3, S, S]`` as PNG files in a Parquet set of the hub's layout."""
    path.parent.mkdir(exist_ok=True)
    files = []
    for pixels in images:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    column = pa.array(files, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": column, "label": labels}), path)


# The naive half


class Naive:
    """Research code's way; :meth:`run` gives the accuracies on the test split by method.

    forward_seconds: what its forward passes took.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.forward_seconds = 0.0
        self.encoder = problem.family.image_encoder(torch.load(problem.folder / "base.pt"), "cpu").eval()
        shape = problem.family.preprocessing
        self.transform = transforms.Compose(
            [
                transforms.Resize(shape.size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(shape.size),
                transforms.ToTensor(),
                transforms.Normalize(shape.mean, shape.std),
            ]
        )

    def run(self, progress: Progress) -> dict[str, float]:
        """Search each method's settings on validation data and test the best; mean accuracies by method."""
        methods: dict[str, Callable[[float], Callable[[str], State]]] = {
            "task_arithmetic": self.task_arithmetic,
            "ties": self.ties,
        }
        results = {}
        with progress.counted("naive: settings") as update:
            settings = len(methods) * len(self.problem.coefficients) + len(MASK_LAMBDAS)
            done = iter(range(1, settings + 1))
            for name, method in methods.items():
                scores = {}
                for coefficient in self.problem.coefficients:
                    scores[coefficient] = np.mean(list(self.evaluate(method(coefficient), "val").values()))
                    update(next(done), settings)
                best = max(scores, key=lambda key: scores[key])
                results[name] = float(np.mean(list(self.evaluate(method(best), "test").values())))
            by_lambda = {}
            for mask_lambda in MASK_LAMBDAS:
                by_lambda[mask_lambda] = self.evaluate(self.tall_mask(mask_lambda), "val")
                update(next(done), settings)
            chosen = {task: max(MASK_LAMBDAS, key=lambda item: by_lambda[item][task]) for task in self.problem.tasks}
            masked = {task: self.tall_mask(chosen[task])(task) for task in self.problem.tasks}
            results["tall_mask"] = float(np.mean(list(self.evaluate(masked.__getitem__, "test").values())))
        return results

    def load(self) -> tuple[State, dict[str, State]]:
        """Read the base and every fine-tuned checkpoint; returns the base and the task vectors."""
        base = torch.load(self.problem.folder / "base.pt")
        vectors = {}
        for task in self.problem.tasks:
            finetuned = torch.load(self.problem.folder / f"{task}.pt")
            vectors[task] = {name: finetuned[name] - base[name] for name in finetuned}
        return {name: base[name] for name in finetuned}, vectors

    def task_arithmetic(self, coefficient: float) -> Callable[[str], State]:
        """The base plus the scaled sum of the task vectors."""
        base, vectors = self.load()
        merged = {name: base[name] + coefficient * sum(vector[name] for vector in vectors.values()) for name in base}
        return lambda task: merged

    def ties(self, coefficient: float) -> Callable[[str], State]:
        """TIES with the mean, its thresholds from ``kthvalue`` over stacked copies."""
        base, vectors = self.load()
        stacked = torch.stack([flatten(vector) for vector in vectors.values()])
        below = stacked.shape[1] - int(stacked.shape[1] * DENSITY)
        thresholds = stacked.abs().kthvalue(below, dim=1, keepdim=True).values
        trimmed = stacked * (stacked.abs() >= thresholds)
        signs = torch.sign(trimmed.sum(dim=0))
        signs[signs == 0] = torch.sign(signs.sum())
        agreeing = trimmed * ((trimmed * signs) > 0)
        mean = agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)
        merged = unflatten(flatten(base) + coefficient * mean, base)
        return lambda task: merged

    def tall_mask(self, mask_lambda: float) -> Callable[[str], State]:
        """Every task's masked part of the sum of the task vectors."""
        base, vectors = self.load()
        start, flat = flatten(base), {task: flatten(vector) for task, vector in vectors.items()}
        total = torch.stack(list(flat.values())).sum(dim=0)
        masks = {task: vector.abs() > mask_lambda * (total - vector).abs() for task, vector in flat.items()}
        return lambda task: unflatten(start + masks[task] * total, base)

    @torch.no_grad()
    def evaluate(self, weights: Callable[[str], State], split: str) -> dict[str, float]:
        """Every task's accuracy with the weights that answer it."""
        accuracies = {}
        for task in self.problem.tasks:
            merged = weights(task)
            names = self.encoder.tower.state_dict()
            self.encoder.tower.load_state_dict({name: merged[self.encoder.prefix + name] for name in names})
            head, right, count = self.problem.heads[task], 0, 0
            for images, labels in self.batches(task, split):
                started = time.perf_counter()
                features = torch.nn.functional.normalize(self.encoder.tower(images), dim=-1)
                self.forward_seconds += time.perf_counter() - started
                right += int(((features @ head.T).argmax(dim=1) == labels).sum())
                count += len(labels)
            accuracies[task] = right / count
        return accuracies

    def batches(self, task: str, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode, resize and normalise a split, batch by batch."""
        table = pq.read_table(self.problem.folder / task / f"{split}.parquet")
        labels = torch.tensor(table["label"].to_pylist())
        files = table["image"].combine_chunks().field("bytes")
        for start in range(0, len(labels), BATCH):
            opened = [Image.open(io.BytesIO(file.as_py())).convert("RGB") for file in files[start : start + BATCH]]
            yield torch.stack([self.transform(image) for image in opened]), labels[start : start + BATCH]


def flatten(state: Mapping[str, Tensor]) -> Tensor:
    """One vector of a state dict, in the order of its names."""
    return torch.cat([state[name].flatten() for name in sorted(state)])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> State:
    """The state dict of a vector."""
    names = sorted(like)
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]) for name, part in zip(names, parts, strict=True)}


# Both halves


def main(path: Path, architecture: str | None, most_images: int, points: int) -> None:
    """Run both and print their times, their ratios, and what each found."""
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        folder = Path(name)
        os.environ["MERGE_RAY_CACHE"] = str(folder / "cache")
        problem, sweep = prepare(load_sweeps(path)[0], folder, architecture, most_images, points, progress)
        spec_file = folder / "sweep.yaml"
        spec_file.write_text(yaml.safe_dump(sweep))
        started = time.perf_counter()
        naive = Naive(problem)
        naive_accuracies = naive.run(progress)
        naive_seconds = time.perf_counter() - started
        started = time.perf_counter()
        results = run_sweep(load_sweeps(spec_file)[0], progress)
        seconds = time.perf_counter() - started
        rows = read_rows(results)
        own = rank(rows, "mean").set_index("study")["mean"].to_dict()
    inner = (rows["time"].max() - rows["time"].min()).total_seconds() + rows["seconds_total"].iloc[0]
    settings, tasks = 2 * points + len(MASK_LAMBDAS), len(problem.tasks)
    naive_beyond = (naive_seconds - naive.forward_seconds) / (settings + len(naive_accuracies))
    studied = rows[rows["study"].isin(list(naive_accuracies))]
    beyond = (studied["seconds_total"] - studied["seconds_evaluate"]).sum() / (settings + len(naive_accuracies))
    print(f"{settings} settings over {tasks} tasks of at most {most_images} images, then the best on the test split")
    print(f"{'method':<18}{'naive':>8}{'merge-ray':>11}   mean test accuracy")
    for method, accuracy in naive_accuracies.items():
        print(f"{method:<18}{accuracy:>8.4f}{own[method]:>11.4f}")
    for what, ours, theirs in (
        ("the whole command", seconds, naive_seconds),
        ("first to last candidate", inner, naive_seconds),
        ("a setting, beyond its forward passes", beyond, naive_beyond),
    ):
        print(f"{what:<38}naive {theirs:8.2f} s   merge-ray {ours:7.2f} s   {theirs / ours:6.1f} times as fast")
    print("the whole command includes starting Ray, decoding the images once, and the report")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parent.parent / "sweeps" / "quickstart.yaml"
    parser.add_argument("spec", nargs="?", type=Path, default=default)
    parser.add_argument("--architecture", help="random models of this open_clip architecture, in place of the spec's")
    parser.add_argument("--images", type=int, default=400, help="images of a task's split that are scored, at most")
    parser.add_argument("--points", type=int, default=21, help="coefficients of each method with one")
    arguments = parser.parse_args()
    main(arguments.spec, arguments.architecture, arguments.images, arguments.points)
