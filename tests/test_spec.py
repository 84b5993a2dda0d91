"""A spec says all its mistakes at once, each with its place, the value, the valid set and the nearest match."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from merge_ray.errors import MergeRayError, SpecError
from merge_ray.finetune import FinetuneSpec
from merge_ray.space import Choice, Float, Int, PerTask
from merge_ray.spec import SweepSpec
from merge_ray.spec_files import load_spec, load_sweeps, read_yaml

SWEEPS = Path(__file__).parents[1] / "sweeps"
MODELS = {"architecture": "ViT-B-32", "base": "base.pt", "finetuned": "{task}.pt"}
VALID: dict[str, Any] = {
    "name": "small",
    "models": MODELS,
    "tasks": ["digits", "letters"],
    "studies": {"ties": None},
}


def load(tmp_path: Path, overrides: Sequence[str] = (), **changes: Any) -> list[SweepSpec]:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**VALID, **changes}, sort_keys=False))
    return load_sweeps(path, overrides)


def mistakes(tmp_path: Path, overrides: Sequence[str] = (), **changes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, overrides, **changes)
    return str(caught.value)


def test_every_shipped_sweep_is_valid() -> None:
    files = [path for path in SWEEPS.glob("*.yaml") if "studies" in path.read_text()]
    assert files
    for path in files:
        assert load_sweeps(path)


def test_a_finetuning_spec_has_task_defaults_too() -> None:
    changes = ["tasks=[a, b]", "task_defaults.parquet=data/{task}/{split}.parquet"]
    spec = load_spec(FinetuneSpec, SWEEPS / "quickstart_text_models.yaml", changes)
    assert [task.parquet for task in spec.tasks] == ["data/a/{split}.parquet", "data/b/{split}.parquet"]


def test_search_gives_every_study_its_defaults(tmp_path: Path) -> None:
    studies = {"ties": None, "mine": {"method": "task_arithmetic", "trials": 3}}
    [spec] = load(tmp_path, search={"searcher": "random", "trials": 7}, studies=studies)
    assert [(study.method, study.searcher, study.trials) for study in spec.studies.values()] == [
        ("ties", "random", 7),
        ("task_arithmetic", "random", 3),
    ]


def test_spaces_in_yaml(tmp_path: Path) -> None:
    space = {
        "density": {"low": 0, "high": 1, "points": 3},
        "disjoint": ["mean", "sum"],
        "scaling_coefficient": {"low": 0.1, "high": 1.0, "log": True},
    }
    [spec] = load(tmp_path, studies={"ties": {"space": space}})
    assert spec.studies["ties"].search_space() == {
        "density": Float(0.0, 1.0, points=3),
        "disjoint": Choice(("mean", "sum")),
        "scaling_coefficient": Float(0.1, 1.0, log=True),
    }


def test_a_spec_that_is_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    space = {"density": {"low": 0.1, "high": 0.5, "points": 3}, "disjoint": ["mean", "sum"]}
    vector = {"space": {"scaling_coefficient": {"per_task": {"low": 0.0, "high": 1.0}}}, "method": "task_arithmetic"}
    [spec] = load(tmp_path, studies={"ties": {"space": space}, "vector": vector})
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_range_of_an_integer_parameter_holds_integers(tmp_path: Path) -> None:
    [spec] = load(tmp_path, studies={"consensus": {"space": {"min_tasks": {"low": 1, "high": 3}}}})
    assert spec.studies["consensus"].search_space()["min_tasks"] == Int(1, 3)


def test_a_space_per_task(tmp_path: Path) -> None:
    space = {"scaling_coefficient": {"per_task": {"low": 0.0, "high": 1.0}}}
    [spec] = load(tmp_path, studies={"task_arithmetic": {"searcher": "cmaes", "space": space}})
    assert spec.studies["task_arithmetic"].search_space()["scaling_coefficient"] == PerTask(Float(0.0, 1.0))


def test_a_fixed_parameter_is_not_searched(tmp_path: Path) -> None:
    [spec] = load(tmp_path, studies={"ties": {"parameters": {"density": 0.2}}})
    assert "density" not in spec.studies["ties"].search_space()


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = mistakes(
        tmp_path,
        tasks=["digits", "leters"],
        evaluation={"batch_sise": 3},
        studies={"ties": {"searcher": "grit"}, "tise": None, "task_arithmetic": {"parameters": {"scaling": 1}}},
    )
    assert "5 mistakes" in text
    assert "unknown task 'leters'" in text and "'letters'" in text
    assert "evaluation.batch_sise: unknown key; did you mean 'batch_size'?" in text
    assert "studies.ties.searcher: 'grit'; did you mean 'grid'?" in text
    assert "studies.tise.method: 'tise'" in text and "did you mean 'ties'?" in text
    assert "task_arithmetic has no parameter 'scaling'; did you mean 'scaling_coefficient'?" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"studies": {"ties": {"parameters": {"density": 1.5}}}}, "density=1.5 is not in"),
        ({"studies": {"ties": {"space": {"density": [0.1, 7]}}}}, "density=7 is not in"),
        ({"studies": {"ties": {"space": {"density": {"low": 3, "high": 1}}}}}, "low not above high"),
        ({"studies": {"ties": {"parameters": {"density": 0.2}, "space": {"density": [0.1]}}}}, "both fixed"),
        (
            {"studies": {"ties": {"searcher": "cmaes", "space": {"disjoint": ["mean", "sum"]}}}},
            "cmaes searches numbers only",
        ),
        ({"studies": {"ties": {"trials": None}}}, "a search needs a budget"),
        ({"evaluation": {"select_on": "test"}}, "selecting on the test split would overstate every result"),
        ({"evaluation": {"objective": "normalised_mean"}}, "did you mean 'normalized_mean'?"),
        ({"tasks": ["digits", "digits"]}, "named twice: digits"),
        ({"name": "a/b"}, "a name is made of letters"),
        ({"models": {**MODELS, "finetuned": "x.pt"}}, "must hold {task}"),
        ({"models": {**MODELS, "finetuned": {"digits": "x.pt"}}}, "given for ['digits'], but the tasks are"),
        ({"models": {**MODELS, "family": "clap"}}, "unknown family 'clap'; did you mean 'clip'?"),
        ({"num_tasks": 9, "tasks": None}, "Valid: '14', '20', '8'"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in mistakes(tmp_path, **changes)


def test_overrides_replace_values(tmp_path: Path) -> None:
    [spec] = load(tmp_path, ["search.trials=3", "evaluation.shards=2", "name=other"])
    assert (spec.name, spec.studies["ties"].trials, spec.evaluation.shards) == ("other", 3, 2)


@pytest.mark.parametrize("location", ["{task}.pt", "{task}", "models/{task}.pt", "[{task}].pt", "a: b: {task}"])
def test_an_override_may_hold_placeholders(tmp_path: Path, location: str) -> None:
    [spec] = load(tmp_path, [f"models.finetuned={location}"])
    assert spec.models.finetuned_location("digits") == location.replace("{task}", "digits")


def test_an_override_may_be_a_mapping(tmp_path: Path) -> None:
    [spec] = load(tmp_path, ["evaluation={shards: 2, batch_size: 3}", 'task_defaults={parquet: "{task}/{split}"}'])
    assert (spec.evaluation.shards, spec.evaluation.batch_size) == (2, 3)


def test_an_override_without_a_value_is_told_so(tmp_path: Path) -> None:
    assert "--set name: write key.inner=value" in mistakes(tmp_path, ["name"])


def test_num_tasks_makes_one_sweep_a_list(tmp_path: Path) -> None:
    folder = {"RESISC45": {"image_folder": "data/RESISC45"}}
    sweeps = load(tmp_path, name="papers_{num_tasks}", num_tasks=[8, 14, 20], tasks=folder)
    assert [(sweep.name, len(sweep.tasks)) for sweep in sweeps] == [
        ("papers_8", 8),
        ("papers_14", 14),
        ("papers_20", 20),
    ]
    assert sweeps[0].task_names[:3] == ["SUN397", "Cars", "RESISC45"]


def test_task_defaults_fill_in_the_tasks(tmp_path: Path) -> None:
    defaults = {"parquet": "data/{task}/{split}.parquet", "val_size": 5}
    [spec] = load(tmp_path, tasks=["one", {"name": "two", "val_size": 7}], task_defaults=defaults)
    assert [(task.parquet, task.val_size) for task in spec.tasks] == [
        ("data/one/{split}.parquet", 5),
        ("data/two/{split}.parquet", 7),
    ]


def test_files_that_parameters_name_are_known(tmp_path: Path) -> None:
    space = {"mapping": ["a.npz", "b.safetensors"]}
    study = {"method": "dict_fusion", "parameters": {"feature_extractor": "base"}, "space": space, "searcher": "grid"}
    masks = {"method": "tall_mask", "parameters": {"masks": "masks.npz"}, "searcher": "grid"}
    (spec,) = load(tmp_path, studies={"mapping": study, "masks": masks})
    named = [study.named_files() for study in spec.studies.values()]
    assert named == [{"a.npz", "b.safetensors"}, {"masks.npz"}]


def test_saved_steps_are_searched_as_the_results_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "results" / "README.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    [spec] = load(tmp_path, **yaml.safe_load(example))
    assert [Path(value).stem for value in spec.studies["steps"].search_space()["mapping"].grid()] == [
        "step-50",
        "step-100",
    ]


def test_a_file_may_hold_several_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump_all([{**VALID, "name": name} for name in ("first", "second")]))
    assert [spec.name for spec in load_sweeps(path)] == ["first", "second"]
    with pytest.raises(SpecError, match=r"two.yaml: holds 2 documents, where one is wanted"):
        read_yaml(path)


def write_distances(folder: Path) -> None:
    names = ["digits", "letters", "greek", "shapes"]
    values = [[0, 0.5, 0.9, 0.2], [0.5, 0, 0.3, 0.8], [0.9, 0.3, 0, 0.7], [0.2, 0.8, 0.7, 0]]
    pd.DataFrame(values, pd.Index(names, name="model"), names).reset_index().to_parquet(folder / "distances.parquet")


def test_models_are_chosen_by_relatedness(tmp_path: Path) -> None:
    write_distances(tmp_path)
    locations = {task: f"{task}.pt" for task in ("digits", "letters", "greek", "shapes")}
    models = {**MODELS, "finetuned": locations, "relatedness": str(tmp_path)}
    [whole] = load(tmp_path, models=models, tasks=list(locations))
    assert whole.task_names == list(locations)
    [spec] = load(tmp_path, models={**models, "nearest": 2, "to": "greek"}, tasks=list(locations))
    assert spec.task_names == ["letters", "greek", "shapes"]
    assert set(spec.models.finetuned) == {"letters", "greek", "shapes"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(json.loads(spec.model_dump_json())))
    assert load_sweeps(tmp_path / "again.yaml") == [spec]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nearest": 1}, "give both"),
        ({"nearest": 1, "to": "digits", "relatedness": None}, "'nearest' needs 'relatedness'"),
        ({"nearest": 1, "to": "digit"}, "models.to: 'digit' is no task; did you mean 'digits'?"),
        ({"nearest": 2, "to": "digits"}, "2 models are asked for beside that of 'digits'; there are 1"),
        ({"relatedness": "published"}, "published: no such file"),
    ],
)
def test_mistakes_about_relatedness(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_distances(tmp_path)
    with pytest.raises(MergeRayError) as caught:
        load(tmp_path, models={**MODELS, "relatedness": str(tmp_path), **changes})
    assert said in str(caught.value)


def test_a_relatedness_of_other_tasks(tmp_path: Path) -> None:
    write_distances(tmp_path)
    models = {**MODELS, "relatedness": str(tmp_path / "distances.parquet")}
    assert "knows nothing of 'textures'; did you mean" in mistakes(
        tmp_path, models=models, tasks=["digits", "textures"]
    )


def test_broken_yaml_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: [")
    with pytest.raises(SpecError, match="is not YAML"):
        load_sweeps(path)
    with pytest.raises(SpecError, match=r"cannot read .*nothing.yaml: No such file"):
        load_sweeps(tmp_path / "nothing.yaml")
