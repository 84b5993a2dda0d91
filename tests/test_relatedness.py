"""ModelGiF against numbers recorded from the authors' code (tests/golden/modelgif), and what `relatedness` promises."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from test_goldens import GOLDEN, Case, load
from torch import Tensor, nn
from typer.testing import CliRunner

from merge_ray.checkpoints import read_weights, stream_safetensors, write_safetensors
from merge_ray.cli import app
from merge_ray.errors import CheckpointError, MergeRayError, SpecError
from merge_ray.families import find_family
from merge_ray.families.taskonomy import RELATEDNESS_TASKS, TaskonomyFamily
from merge_ray.families.taskonomy_network import TaskonomyNetwork
from merge_ray.progress import Progress
from merge_ray.relatedness import FieldJob, RelatednessSpec, compute_here, relate
from merge_ray.relatedness.correlation import correlate, find_reference
from merge_ray.relatedness.distances import field_distances
from merge_ray.relatedness.fields import FieldSpec, attributions, gradient_field, pair_samples, quadrature
from merge_ray.relatedness.pictures import draw_heat_map, draw_tree, similarity_linkage
from merge_ray.relatedness.samples import cutmix
from merge_ray.spec_files import check_spec, load_any, load_spec

CASES = {path.name: path.name for path in sorted((GOLDEN / "modelgif").iterdir())}
TARGETS = {1: "map_maxima", 5: "best_channel", 6: "all_outputs"}
QUADRATURES = {
    "gausslegendre": "gauss_legendre", "riemann_trapezoid": "trapezoid", "riemann_left": "riemann_left",
    "riemann_right": "riemann_right", "riemann_middle": "riemann_middle",
}  # fmt: skip


def cases(prefix: str) -> list[str]:
    return [name for name in CASES if name.startswith(prefix)]


def load_case(name: str) -> Case:
    case = load(f"modelgif/{name}")
    case.about.setdefault("exact_keys", [])
    return case


def make_network(case: Case, index: int) -> nn.Module:
    layers: list[nn.Module] = []
    for text in case.parameters["network"]:
        kind, _, arguments = text.rstrip(")").partition("(")
        words = [word for word in arguments.split(",") if word]
        named = {key: int(value) for key, value in (word.split("=") for word in words if "=" in word)}
        layers.append(getattr(nn, kind)(*(int(word) for word in words if "=" not in word), **named))
    network = nn.Sequential(*layers)
    prefix = f"model{index}/"
    state = {key.removeprefix(prefix): value for key, value in case.inputs.items() if key.startswith(prefix)}
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def prepare(images: Tensor) -> Tensor:
    return images.float() / 255 * 2 - 1


def field_spec(parameters: dict[str, Any]) -> FieldSpec:
    return FieldSpec.model_validate(
        {
            "target": TARGETS[parameters["exp"]],
            "top": parameters["topk"],
            "steps": parameters["n_steps"],
            "quadrature": QUADRATURES[parameters["method"]],
            "baseline": parameters["baseline"],
            "seed": parameters["seed"],
            "cumulative": parameters["cumulative"],
        }
    )


@pytest.mark.parametrize("name", cases("field_exp"))
@pytest.mark.parametrize("batch_size", [7, 64])
def test_fields(name: str, batch_size: int) -> None:
    case = load_case(name)
    spec, images = field_spec(case.parameters), case.inputs["images"].permute(0, 3, 1, 2)
    case.check("baseline_index", pair_samples(len(images), spec.seed))
    if "alphas" in case.expected:
        alphas, weights = quadrature(spec.quadrature, spec.steps)
        case.check("alphas", alphas)
        case.check("step_sizes", weights)
    for index in range(case.parameters["n_models"]):
        parts = gradient_field(make_network(case, index), prepare, images, spec, batch_size)
        field = torch.cat(list(parts))
        if case.parameters["integrated_gradients"]:
            field = field[:, -1].view(len(images), *images.shape[2:])
        case.check(f"field/{index}", field)
    if case.parameters["keep_raw"]:
        inputs = prepare(images)
        raw = attributions(make_network(case, 0), inputs[:1], inputs[case.expected["baseline_index"][:1]], spec, 3)
        case.check("attribution_model0_image0", raw)


def test_pairing() -> None:
    case = load_case("baseline_pairing")
    for count in case.parameters["counts"]:
        for seed in case.parameters["seeds"]:
            case.check(f"baseline_index/n{count}_seed{seed}", pair_samples(count, seed))


def test_cutmix() -> None:
    case = load_case("cutmix")
    parameters, images = case.parameters, case.inputs["images"].permute(0, 3, 1, 2)
    partners = [case.expected[f"partner/{batch}"] for batch in range(len(case.keys("partner/")))]
    mixed = cutmix(images, parameters["seed"], parameters["batch_size"], parameters["beta"], partners)
    case.check("mixed", mixed.permute(0, 2, 3, 1))
    again = [cutmix(images, 3, 8), cutmix(images, 3, 8), cutmix(images, 4, 8)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def matrix(fields: dict[str, Any], **how: Any) -> Tensor:
    names = list(fields)
    found = field_distances(fields, [(a, b) for i, a in enumerate(names) for b in names[i:]], **how)
    return torch.tensor([[found[min(i, j), max(i, j)] for j in names] for i in names], dtype=torch.float64)


def read_fields(case: Case) -> dict[str, Tensor]:
    return {
        f"{index:02}": case.inputs[f"field/{index}"]
        for index in range(len(case.inputs))
        if f"field/{index}" in case.inputs
    }


@pytest.mark.parametrize("block", [2**28, 1])
def test_distances(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_ray.relatedness.distances.BLOCK_BYTES", block)
    case = load_case("field_distances")
    for key in case.expected:
        group, _, name = key.partition("/")
        case.check(key, matrix(read_fields(case), distance=name, steps="all" if group == "distance" else "last"))


@pytest.mark.parametrize("name", cases("affinity"))
def test_affinities(name: str) -> None:
    case = load_case(name)
    steps = "second_half" if case.parameters["last_half"] else "all"
    found = matrix(read_fields(case), distance=case.parameters["distance_name"], steps=steps)
    case.check("affinity", found)
    check_correlation(case, found)


def test_published_distances() -> None:
    case = load_case("published_distance_matrix")
    check_correlation(case, case.inputs["distance"])
    shipped = find_reference("published", case.parameters["tasks"])
    assert np.array_equal(shipped.to_numpy(), case.inputs["reference_affinity"].numpy())


def check_correlation(case: Case, distances: Tensor) -> None:
    tasks = case.parameters["tasks"]
    frames = [pd.DataFrame(part.numpy(), tasks, tasks) for part in (distances, case.inputs["reference_affinity"])]
    found = correlate(*frames)
    case.check("spearman_per_task", np.array(found["spearman"]))
    case.check("spearman_mean", np.array([found["spearman"].mean()]))
    own = np.corrcoef(frames[0].iloc[:, 3], frames[1].iloc[:, 3])[0, 1]
    assert found["pearson"].iloc[3] == pytest.approx(own)


def test_quadratures_integrate_a_line() -> None:
    for rule, value in [
        ("gauss_legendre", 0.5),
        ("riemann_left", 0.375),
        ("riemann_middle", 0.5),
        ("riemann_right", 0.625),
    ]:
        points, weights = quadrature(rule, 4)  # type: ignore[arg-type]
        assert float((points * weights).sum()) == pytest.approx(value)


def test_features_are_maps_of_one_position() -> None:
    spec = FieldSpec(target="best_channel", steps=1, baseline="zero", quadrature="riemann_right")
    images = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])
    [field] = gradient_field(lambda x: x.flatten(1) * torch.tensor([4.0, 1, 1]), lambda x: x, images, spec, 4)
    assert field.flatten().tolist() == pytest.approx([4 / 3])  # channel 0 answers most, and only its input counts


def test_a_position_that_never_changes_counts_as_zero() -> None:
    first, second = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    first[:, :, 2] = 7
    value = field_distances({"a": first, "b": second}, [("a", "b")], "cosine_standardised")["a", "b"]
    assert np.isfinite(value)


def test_too_many_maxima_and_strange_outputs() -> None:
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(SpecError, match="3 maxima are asked for, a feature map has 1 positions"):
        list(gradient_field(lambda x: x.mean((2, 3)), lambda x: x, images, FieldSpec(top=3), 8))
    with pytest.raises(SpecError, match=r"answers with \(1, 3, 4\)"):
        list(gradient_field(lambda x: x.mean(3), lambda x: x, images, FieldSpec(), 8))


def write_spec(folder: Path, **changes: Any) -> RelatednessSpec:
    raw = {
        "name": "three",
        "results": str(folder),
        "architecture": "builtin:quickstart/config.json",
        "models": {name: f"builtin:quickstart/{name}.safetensors" for name in ("digits", "letters", "shapes")},
        "samples": {"tasks": ["digits", "shapes"], "count": 6, "mix": "cutmix"},
        "field": {"target": "best_channel", "steps": 3},
        "device": "cpu",
        **changes,
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_spec(RelatednessSpec, path)


class Counting:
    """Computes fields and remembers which."""

    def __init__(self) -> None:
        self.models: list[str] = []

    def __call__(self, jobs: list[FieldJob], progress: Progress) -> None:
        self.models += [job.model for job in jobs]
        for job in jobs:
            job.run("cpu")


def test_a_second_distance_or_model_costs_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Counting()
    with Progress() as progress:
        found = relate(write_spec(tmp_path), progress, compute)
        assert compute.models == ["digits", "letters", "shapes"]
        relate(write_spec(tmp_path, distance="euclidean"), progress, compute)
        assert len(compute.models) == 3
        compared = []

        def count(fields: Any, pairs: Any, *how: Any) -> Any:
            compared.extend(pairs)
            return field_distances(fields, pairs, *how)

        monkeypatch.setattr("merge_ray.relatedness.jobs.field_distances", count)
        models = {name: f"builtin:quickstart/{name}.safetensors" for name in ("greek", "shapes", "digits", "letters")}
        more = relate(write_spec(tmp_path, models=models), progress, compute)
    assert compute.models[3:] == ["greek"] and len(compared) == 4
    again = more.distances.loc[found.distances.index, found.distances.columns]
    pd.testing.assert_frame_equal(again, found.distances, check_names=False)
    stored = pd.read_parquet(more.directory / "distances.parquet").set_index("model")
    pd.testing.assert_frame_equal(stored, more.distances)
    assert np.allclose(np.diag(stored), 0, atol=1e-6) and bool((stored.mask(np.eye(4) > 0, 1) > 1e-3).all(axis=None))
    for picture in ("heat_map.png", "tree.png"):
        with Image.open(more.directory / picture) as image:
            assert min(image.size) > 100


def test_correlation_with_a_matrix_of_ones_own(tmp_path: Path) -> None:
    names = ["shapes", "digits", "letters"]
    affinity = pd.DataFrame([[9.0, 1, 2], [1, 9, 5], [2, 5, 9]], pd.Index(names, name="model"), names)
    affinity.to_csv(tmp_path / "affinity.csv")
    spec = write_spec(tmp_path, correlate_with=str(tmp_path / "affinity.csv"))
    with Progress() as progress:
        found = relate(spec, progress)
    assert found.correlation is not None and list(found.correlation.index) == ["digits", "letters", "shapes"]
    assert bool((found.correlation["spearman"] < 0).all())
    assert found.table().row_count == 4
    with pytest.raises(SpecError, match=r"knows nothing of 'digits'; .*Valid: .*'autoencoding'"):
        write_spec(tmp_path, correlate_with="published")
    (tmp_path / "affinity.csv").write_text("model,a,b\na,1,2\nc,3,4\n")
    with pytest.raises(SpecError, match="names of the rows and those of the columns differ"):
        find_reference(str(tmp_path / "affinity.csv"), ["a"])
    (tmp_path / "affinity.csv").write_text("model,a\na,much\n")
    with pytest.raises(MergeRayError, match="not a table of names and numbers"):
        find_reference(str(tmp_path / "affinity.csv"), ["a"])


def test_samples_from_files(tmp_path: Path) -> None:
    for index in range(5):
        Image.new("RGB", (40, 50), (index, 0, 0)).save(tmp_path / f"{index}.png")
    spec = write_spec(tmp_path, samples={"files": str(tmp_path), "count": 3, "size": 32})
    with Progress() as progress:
        found = relate(spec, progress)
    images = read_weights(found.directory / "samples.safetensors")["images"]
    reds = images[:, 0, 0, 0].tolist()
    assert images.shape == (3, 3, 32, 32) and reds == sorted(reds)
    spec = write_spec(tmp_path, samples={"files": str(tmp_path / "*.png"), "count": 6})
    with pytest.raises(MergeRayError, match=r"5 images at .*; 6 are wanted"), Progress() as progress:
        relate(spec, progress)


def test_broken_field_and_short_field(tmp_path: Path) -> None:
    spec = write_spec(tmp_path)
    compute = Counting()
    with Progress() as progress:
        found = relate(spec, progress, compute)
    path = next((found.directory / "fields").glob("digits-*"))
    path.write_bytes(path.read_bytes()[:-8])
    (found.directory / "pairs.parquet").unlink()
    with (
        pytest.raises(CheckpointError, match=r"not a whole field .*remove it to compute it again"),
        Progress() as progress,
    ):
        relate(spec, progress, compute)
    with (
        pytest.raises(CheckpointError, match="8 bytes were given for field"),
        stream_safetensors(path, "field", (3,)) as append,
    ):
        append(torch.zeros(2))
    write_safetensors(path, {"field": torch.ones(1, 2, 3)})
    with pytest.raises(CheckpointError, match=r"is \(1, 2, 3\)"), Progress() as progress:
        relate(spec, progress, compute)


def test_mistakes_of_a_spec(tmp_path: Path) -> None:
    def mistakes(**changes: Any) -> str:
        with pytest.raises(SpecError) as raised:
            write_spec(tmp_path, **changes)
        return str(raised.value)

    assert "did you mean 'cosine'" in mistakes(distance="cosin")
    assert "field.target: 'map_maximum'; did you mean 'map_maxima'" in mistakes(field={"target": "map_maximum"})
    assert "at least two are needed" in mistakes(models={"a": "b"})
    assert "give either 'tasks' or 'files'" in mistakes(samples={})
    assert "{task}" in mistakes(models="builtin:quickstart/digits.safetensors", tasks=["digits"])
    assert "unknown key; did you mean 'distance'" in mistakes(distances="cosine")


def test_pictures_put_similar_models_side_by_side() -> None:
    rng = np.random.default_rng(0)
    groups = np.array([0, 1, 0, 1, 0])
    values = np.where(groups[:, None] == groups, 0.2, 0.9) + 0.01 * rng.random((5, 5))
    names = list("abcde")
    distances = pd.DataFrame((values + values.T) / 2, names, names)
    assert similarity_linkage(distances)[-1, 2] > 0.8
    ticks = [label.get_text() for label in draw_heat_map(distances, "distance").axes[0].get_xticklabels()]
    assert abs(ticks.index("b") - ticks.index("d")) == 1 and ticks.index("b") in (0, 1, 3, 4)
    assert draw_tree(distances, "distance").axes[0].get_xlabel() == "mean distance"


def test_pictures_of_two_models() -> None:
    distances = pd.DataFrame([[0.0, 0.4], [0.4, 0.0]], ["a", "b"], ["a", "b"])
    for figure in (draw_heat_map(distances, "distance"), draw_tree(distances, "distance")):
        figure.savefig(io.BytesIO())


@pytest.mark.ray
def test_fields_on_ray(tmp_path: Path, ray_cluster: dict[str, Any]) -> None:
    from merge_ray.cluster.fields import compute_on_ray

    models = {name: f"builtin:quickstart/{name}.safetensors" for name in ("digits", "shapes")}
    with Progress() as progress:
        here = relate(write_spec(tmp_path, models=models), progress)
        there = relate(write_spec(tmp_path, name="ray", models=models), progress, compute_on_ray)
        pd.testing.assert_frame_equal(here.distances, there.distances, rtol=1e-5)
        torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "broken.pt")
        spec = write_spec(tmp_path, models={**models, "broken": str(tmp_path / "broken.pt")}, field={"steps": 2})
        with pytest.raises(MergeRayError, match="the gradient field of 'broken' failed: the weights do not fit"):
            relate(spec, progress, compute_on_ray)
        compute = Counting()
        relate(write_spec(tmp_path, models=models, field={"steps": 2}), progress, compute)
    assert compute.models == []


def test_the_command_prints_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merge_ray.cluster.fields.compute_on_ray", compute_here)
    write_spec(tmp_path)
    result = CliRunner().invoke(app, ["relatedness", str(tmp_path / "spec.yaml"), "--set", "distance=absolute"])
    output = result.output.replace("\n", "")  # long paths are wrapped
    assert result.exit_code == 0 and "digits" in output and "heat_map.png" in output


@pytest.mark.parametrize("name, models", [("relatedness_quickstart", 6), ("relatedness_taskonomy", 5)])
def test_shipped_specs_are_valid(name: str, models: int) -> None:
    path = Path(__file__).parents[1] / "sweeps" / f"{name}.yaml"
    assert len(check_spec(RelatednessSpec, yaml.safe_load(path.read_text()), path).locations) == models


def test_the_papers_experiment_is_valid() -> None:
    path = Path(__file__).parents[1] / "sweeps" / "modelgif_taskonomy.yaml"
    [spec] = load_any(path)
    assert isinstance(spec, RelatednessSpec) and tuple(spec.locations) == RELATEDNESS_TASKS
    assert spec.field == FieldSpec() and spec.samples.mix == "cutmix" and spec.samples.size == 128
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.output.strip() == "valid modelgif_taskonomy: 17 models"
    result = CliRunner().invoke(app, ["validate", str(path), "--set", "field.target=best_chanel"])
    assert "did you mean 'best_channel'" in str(result.exception)


def test_encoders_of_taskonomy(tmp_path: Path) -> None:
    family = find_family("taskonomy", "slim")
    assert isinstance(family, TaskonomyFamily)
    encoders = {}
    for seed, name in enumerate(("normal", "reshading")):
        torch.manual_seed(seed)
        network = TaskonomyNetwork(family.encoder(), family.decoder(name))
        encoders[name] = network.encoder.eval()
        # One model's file is of the encoder alone, the other's of the whole network.
        state = network.state_dict() if seed else network.encoder.state_dict()
        write_safetensors(tmp_path / f"{name}.safetensors", state)
    rooms = {"name": "rooms", "taskonomy": "builtin:rooms", "buildings": {"val": ["maple"]}, "val_size": 10}
    spec = write_spec(
        tmp_path,
        family="taskonomy",
        architecture="slim",
        models=str(tmp_path / "{task}.safetensors"),
        tasks=list(encoders),
        samples={"tasks": [rooms], "count": 4, "size": 32},
        field={"target": "map_maxima", "steps": 2},
    )
    with Progress() as progress:
        found = relate(spec, progress)
    assert 0 < found.distances.to_numpy()[0, 1] < 2
    images = read_weights(found.directory / "samples.safetensors")["images"]
    assert images.shape == (4, 3, 32, 32) and images.float().std() > 10
    [path] = (found.directory / "fields").glob("reshading-*.safetensors")
    own = torch.cat(list(gradient_field(encoders["reshading"], prepare, images, spec.field, 64)))
    torch.testing.assert_close(read_weights(path)["field"], own, rtol=1e-4, atol=1e-6)
