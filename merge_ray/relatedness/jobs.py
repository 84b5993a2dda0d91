"""The jobs of ``merge-ray relatedness``: samples, one field a model, distances, tables and pictures.

What is made is kept under the spec's directory by a fingerprint of what it was made from: the same command with another
distance computes no field, and with another model only that model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
import yaml
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_ray.bank import digest
from merge_ray.candidate import fingerprint_of
from merge_ray.checkpoints import fingerprint_file, read_weights, stream_safetensors, write_safetensors
from merge_ray.errors import CheckpointError, SpecError
from merge_ray.families import Family, ImageEncoder, Preprocessing, find_family
from merge_ray.progress import Progress
from merge_ray.relatedness.correlation import correlate, find_reference
from merge_ray.relatedness.distances import field_distances
from merge_ray.relatedness.fields import gradient_field
from merge_ray.relatedness.nearest import DISTANCES
from merge_ray.relatedness.samples import SamplesSpec, make_samples
from merge_ray.relatedness.spec import RelatednessSpec
from merge_ray.tasks import cache_directory

SAMPLES = "samples.safetensors"
PAIRS = "pairs.parquet"
FIELD = "field"


@runtime_checkable
class EncoderFamily(Protocol):
    """What relatedness asks of a family: an encoder of images, whose tower gives feature maps or features."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared for it."""

    def is_of_encoder(self, name: str) -> bool:
        """Whether the encoder may use a saved tensor of this name."""

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state`` in native names."""

    def image_encoder(self, state: Mapping[str, Tensor], device: torch.device | str) -> ImageEncoder:
        """The encoder with the weights of ``state``."""


@dataclass(frozen=True)
class FieldJob:
    """One model's field: which file it is kept in, by all that it depends on."""

    spec: RelatednessSpec
    model: str
    key: str

    @property
    def path(self) -> Path:
        return self.spec.directory / "fields" / f"{self.model}-{self.key}.safetensors"

    def run(self, device: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute the field and write it; ``progress(done, total)`` counts samples."""
        family = _family(self.spec)
        state = read_weights(self.spec.locations[self.model], family.is_of_encoder)
        encoder = family.image_encoder(family.rename(state), device)
        encoder.eval().requires_grad_(False)
        images = read_weights(self.spec.directory / SAMPLES)["images"]
        parts = gradient_field(encoder.tower, encoder.prepare, images, self.spec.field, self.spec.batch_size)
        shape = (len(images), self.spec.field.steps, images.shape[2] * images.shape[3])
        about = {"model": self.model, "settings": self.spec.field.model_dump_json()}
        done = 0
        with stream_safetensors(self.path, FIELD, shape, about) as append:
            for part in parts:
                append(part)
                done += len(part)
                if progress is not None:
                    progress(done, len(images))


class StoredField:
    """A field ``[N, steps, P]`` in a file, read as it is sliced. Raises :class:`CheckpointError` for a broken file."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                self._slice = file.get_slice(FIELD)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole field ({error}); remove it to compute it again") from error
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())

    def __getitem__(self, samples: slice, /) -> Tensor:
        part: Tensor = self._slice[samples]
        return part


def compute_here(jobs: list[FieldJob], progress: Progress) -> None:
    """Compute fields one after the other in this process."""
    device = jobs[0].spec.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for job in jobs:
        with progress.counted(f"gradient field of {job.model}") as update:
            job.run(device, update)


@dataclass(frozen=True)
class Relatedness:
    """The distances between models ``[T, T]``, the smaller the more related; what they are correlated with, if any.

    correlation: a row a model, with ``spearman`` and ``pearson``.
    """

    distances: pd.DataFrame
    correlation: pd.DataFrame | None
    directory: Path

    def table(self) -> Table:
        """Every model's nearest other and, where asked for, the correlations and their means."""
        table = Table()
        table.add_column("model")
        table.add_column("nearest")
        for column in ("distance", *(() if self.correlation is None else self.correlation.columns)):
            table.add_column(column, justify="right")
        for model in self.distances.columns:
            others = self.distances[model].drop(model)
            correlations = () if self.correlation is None else self.correlation.loc[model]
            table.add_row(model, str(others.idxmin()), *(f"{value:.4f}" for value in (others.min(), *correlations)))
        if self.correlation is not None:
            table.add_section()
            table.add_row("mean", "", "", *(f"{value:.4f}" for value in self.correlation.mean()))
        return table


def relate(
    spec: RelatednessSpec, progress: Progress, compute: Callable[[list[FieldJob], Progress], None] = compute_here
) -> Relatedness:
    """Compare the spec's models and write tables and pictures into its directory (``results/README.md`` lists them).

    compute: how fields that are missing are computed. Raises :class:`merge_ray.errors.MergeRayError` for models or
    samples that cannot be used.
    """
    with spec.s3.applied():
        return _relate(spec, progress, compute)


def _relate(
    spec: RelatednessSpec, progress: Progress, compute: Callable[[list[FieldJob], Progress], None]
) -> Relatedness:
    spec = spec.model_copy(update={"results": spec.results.expanduser().absolute()})
    spec.directory.mkdir(parents=True, exist_ok=True)
    with progress.step("make the samples"):
        images = make_samples(spec.samples, _family(spec).preprocessing, cache_directory())
        samples = digest(images)
        write_safetensors(spec.directory / SAMPLES, {"images": images})
    jobs = [FieldJob(spec, model, _field_key(spec, model, samples)) for model in spec.locations]
    if missing := [job for job in jobs if not job.path.exists()]:
        compute(missing, progress)
    with progress.step("compare the fields"):
        distances = _distances(spec, jobs)
    reference = None if spec.correlate_with is None else find_reference(spec.correlate_with, list(spec.locations))
    found = Relatedness(distances, None if reference is None else correlate(distances, reference), spec.directory)
    _write(spec, found)
    return found


def read_images(location: str, family: Family, count: int) -> Tensor:
    """``count`` images of a folder or glob as ``family`` takes them: uint8 ``[count, 3, S, S]``."""
    return make_samples(SamplesSpec(files=location, count=count), _encoder(family).preprocessing, cache_directory())


def _family(spec: RelatednessSpec) -> EncoderFamily:
    return _encoder(find_family(spec.family, spec.architecture))


def _encoder(family: Family) -> EncoderFamily:
    if not isinstance(family, EncoderFamily):
        raise SpecError(f"the family {family.name!r} has no encoder of images")
    return family


def _field_key(spec: RelatednessSpec, model: str, samples: str) -> str:
    parts: dict[str, Any] = {
        "family": spec.family,
        "architecture": spec.architecture,
        "weights": fingerprint_file(spec.locations[model]),
        "samples": samples,
        "field": spec.field.model_dump(),
    }
    return fingerprint_of(parts)[:16]


def _distances(spec: RelatednessSpec, jobs: list[FieldJob]) -> pd.DataFrame:
    """The matrix; pairs that were compared before are looked up."""
    path, columns = spec.directory / PAIRS, ["first", "second", "distance", "steps", "value"]
    table = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=columns)
    same = table[(table["distance"] == spec.distance) & (table["steps"] == spec.steps)]
    known = dict(zip(zip(same["first"], same["second"], strict=True), same["value"], strict=True))
    names, keys = [job.model for job in jobs], [job.key for job in jobs]
    pairs = combinations_with_replacement(sorted(set(keys)), 2)
    if missing := [pair for pair in pairs if pair not in known]:
        fields = {job.key: StoredField(job.path) for job in jobs}
        new = field_distances(fields, missing, spec.distance, spec.steps)
        rows = [(*pair, spec.distance, spec.steps, value) for pair, value in new.items()]
        added = pd.DataFrame(rows, columns=columns)
        _save(path, pd.concat([table, added], ignore_index=True) if len(table) else added)
        known |= new
    matrix = [[known[min(a, b), max(a, b)] for b in keys] for a in keys]
    return pd.DataFrame(matrix, index=pd.Index(names, name="model"), columns=names)


def _write(spec: RelatednessSpec, found: Relatedness) -> None:
    # Imported here: workers that compute fields have no use for matplotlib.
    from merge_ray.relatedness.pictures import draw_heat_map, draw_tree

    _save(spec.directory / DISTANCES, found.distances.reset_index())
    (spec.directory / "correlation.parquet").unlink(missing_ok=True)
    if found.correlation is not None:
        _save(spec.directory / "correlation.parquet", found.correlation.reset_index())
    settings = spec.model_dump(mode="json", exclude_unset=True)
    (spec.directory / "relatedness.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    label = f"{spec.distance.replace('_', ' ')} distance"
    draw_heat_map(found.distances, label).savefig(spec.directory / "heat_map.png", dpi=150)
    draw_tree(found.distances, label).savefig(spec.directory / "tree.png", dpi=150)


def _save(path: Path, table: pd.DataFrame) -> None:
    aside = path.with_name(f".{path.name}.partial")
    table.to_parquet(aside, index=False)
    aside.replace(path)
