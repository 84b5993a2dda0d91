"""The Flan-T5 family: its weights, its text tasks, and how answers are scored."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_text
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import T5ForConditionalGeneration

from merge_ray.bank import Layout, ModelBank
from merge_ray.checkpoints import read_finetuned, read_weights, write_adapter
from merge_ray.errors import CheckpointError, DataError, SpecError
from merge_ray.evaluate import Evaluator
from merge_ray.families import find_family
from merge_ray.families.flan_t5 import FlanT5Family, T5Skeleton
from merge_ray.families.text_data import TextData, answer_tokens, score_answers
from merge_ray.merging import merge
from merge_ray.methods.base import MergeInputs, available_methods, make_method
from merge_ray.models import load_bank
from merge_ray.progress import Progress
from merge_ray.spec import ModelsSpec
from merge_ray.spec_files import load_sweeps
from merge_ray.tasks import TASK_LISTS, TaskSpec, open_task, overlap, split_texts

GOLDEN = Path(__file__).parent / "golden" / "dict_fusion" / "flan_t5_T3"


@pytest.fixture
def family(tmp_path: Path) -> FlanT5Family:
    return tiny_text.write_architecture(tmp_path / "models")


@pytest.fixture
def task(tmp_path: Path) -> TaskSpec:
    tiny_text.write_texts(tmp_path / "data")
    return TaskSpec(name="colours", parquet=str(tmp_path / "data"))


def fill(family: FlanT5Family, state: dict[str, Tensor], names: set[str] | None = None) -> T5Skeleton:
    """A skeleton with ``state`` in its flat buffer, or only ``names`` of it and the rest as extras."""
    merged = {name: tensor for name, tensor in state.items() if names is None or name in names}
    extras = {name: tensor for name, tensor in state.items() if name not in merged}
    layout = Layout.of(merged)
    skeleton = family.assemble(layout, extras, "cpu")
    skeleton.flat.copy_(layout.flatten(merged))
    assert isinstance(skeleton, T5Skeleton)
    return skeleton


def data_of(family: FlanT5Family, spec: TaskSpec, cache: Path, split: str = "test") -> TextData:
    prepared = family.open_split(open_task(spec), split, cache)
    data = family.task_data(prepared, None, torch.device("cpu"), None)
    assert isinstance(data, TextData)
    return data


def reference(family: FlanT5Family, state: dict[str, Tensor], folder: Path) -> Any:
    """transformers' own model of an export."""
    weights, config = family.export_huggingface(state, "T5ForConditionalGeneration")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return T5ForConditionalGeneration.from_pretrained(folder).eval()


IDS = torch.tensor([[3, 7, 8, 9, 1], [4, 7, 1, 0, 0], [10, 11, 12, 1, 0]])


@pytest.mark.parametrize("tied", [False, True])
def test_the_skeleton_answers_as_transformers_does(tmp_path: Path, tied: bool) -> None:
    family = tiny_text.write_architecture(tmp_path / "models", tie_word_embeddings=tied)
    state = tiny_text.make_state(family)
    assert ("lm_head.weight" in state) != tied
    model, skeleton = reference(family, state, tmp_path / "export"), fill(family, state)
    start = torch.zeros(3, 1, dtype=torch.long)
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=IDS != 0, decoder_input_ids=start).logits[:, 0]
    torch.testing.assert_close(skeleton(IDS), expected, atol=1e-5, rtol=1e-5)
    # Padding changes nothing, and writing into the buffer changes the model at once.
    torch.testing.assert_close(skeleton(IDS[1:2, :3]), expected[1:2], atol=1e-5, rtol=1e-5)
    skeleton.flat.zero_()
    assert not skeleton(IDS).any()


def test_names_survive_the_way_through_transformers(family: FlanT5Family, tmp_path: Path) -> None:
    state = tiny_text.make_state(family)
    back = family.rename(reference(family, state, tmp_path / "export").state_dict())
    assert set(back) == set(state) == set(fill(family, state).native_state())
    assert all(back[name].equal(state[name]) for name in state)
    # A checkpoint may name the embeddings by any of their names, and lack an output layer that was tied.
    odd = {name: tensor for name, tensor in state.items() if name not in ("shared.weight", "lm_head.weight")}
    renamed = family.rename({**odd, "encoder.embed_tokens.weight": state["shared.weight"]})
    assert set(renamed) == set(state) and renamed["lm_head.weight"].equal(state["shared.weight"])
    with pytest.raises(CheckpointError, match=r"decoder.embed_tokens.weight differs from shared.weight"):
        family.rename({**state, "decoder.embed_tokens.weight": state["shared.weight"] + 1})


def test_tensors_outside_the_layout_come_from_the_extras(family: FlanT5Family) -> None:
    state = tiny_text.make_state(family)
    some = {name for name in state if "SelfAttention.q" in name}
    part = fill(family, state, some)
    assert part.flat.numel() == 2 * 16 * 16
    assert part(IDS).equal(fill(family, state)(IDS))
    with pytest.raises(CheckpointError, match=r"lm_head.weight \(23, 16\) is missing"):
        fill(family, {name: tensor for name, tensor in state.items() if name != "lm_head.weight"})


def test_gradients_of_shared_embeddings_meet_in_the_buffer(family: FlanT5Family) -> None:
    state = tiny_text.make_state(family)
    skeleton = fill(family, state)
    with skeleton.gradient() as gradient:
        skeleton(IDS).square().mean().backward()
    model = family.load({name: tensor.clone() for name, tensor in state.items()}, "cpu")
    model.requires_grad_(True)
    start = torch.zeros(3, 1, dtype=torch.long)
    model(input_ids=IDS, attention_mask=IDS != 0, decoder_input_ids=start).logits.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, view in skeleton.layout.views(gradient).items():
        torch.testing.assert_close(view, expected[name], atol=1e-5, rtol=1e-4)


def test_task_arithmetic_meets_the_golden(tmp_path: Path) -> None:
    about = json.loads((GOLDEN / "case.json").read_text())
    inputs, expected = (safetensors.torch.load_file(GOLDEN / f"{name}.safetensors") for name in ("inputs", "expected"))
    family = tiny_text.write_architecture(tmp_path, num_decoder_layers=2, **about["parameters"]["t5_config"])
    base = {key.removeprefix("base/"): tensor for key, tensor in inputs.items() if key.startswith("base/")}
    names = about["task_vector_order"]
    tuned = {f"task{t}": {name: base[name] + inputs[f"tv{t}/{name}"] for name in names} for t in range(3)}
    bank = ModelBank.build(family.rename(base), tuned)
    assert set(bank.layout.names) == set(names)
    skeleton = family.skeleton(bank, "cpu")
    # The mappings' first coefficients are 0.3 for every task and layer: task arithmetic.
    make_method("task_arithmetic", {"scaling_coefficient": 0.3}).merge(MergeInputs(bank, out=skeleton.flat))
    for task in range(3):
        ids, mask = inputs["eval_input_ids"][task], inputs["eval_attention_mask"][task]
        with torch.no_grad():
            got = skeleton(ids.masked_fill(mask == 0, 0)[:, : int(mask.sum(1).max())])
        for kind in ("logits_by_batch", "logits_per_sample"):
            want = expected[f"task_wise/initial/{kind}/task{task}"]
            torch.testing.assert_close(got, want, rtol=about["rtol"], atol=about["atol"])


def test_texts_are_tokenized_once_and_mapped(family: FlanT5Family, task: TaskSpec, tmp_path: Path) -> None:
    opened, calls = open_task(task), []
    split = family.open_split(opened, "val", tmp_path / "cache", lambda *told: calls.append(told))
    assert opened.classes == list(tiny_text.CLASSES) and len(split) == 24
    assert calls == [(24, 24, "tokenizing colours val")]
    texts, labels = split_texts(opened, "val")
    assert texts[2].endswith("deep blue\nWhich of these is it: red, green or deep blue?")
    assert split.labels.tolist() == labels.tolist() == [0, 1, 2] * 8
    own = split.tokens[split.offsets[2] : split.offsets[3]].tolist()
    assert own == family.encode([texts[2]])[0] and own[-1] == 1
    again = family.open_split(opened, "val", tmp_path / "cache", lambda *told: calls.append(told))
    copy = pickle.loads(pickle.dumps(again))
    assert len(calls) == 1 and copy.fingerprint == split.fingerprint and isinstance(copy.tokens, np.memmap)
    assert overlap(split, split) == 24


def test_the_fingerprint_covers_texts_labels_words_and_answers(family: FlanT5Family, tmp_path: Path) -> None:
    texts, cache = ["a b", "b c", "c a"], tmp_path / "cache"

    def fingerprint(folder: str, texts: list[str], labels: list[int], **changes: Any) -> str:
        tiny_text.write_parquet(tmp_path / folder / "test.parquet", {"text": texts, "label": labels}, ("red", "green"))
        spec = TaskSpec(name="t", parquet=str(tmp_path / folder), **changes)
        return family.open_split(open_task(spec), "test", cache).fingerprint

    first = fingerprint("1", texts, [0, 1, 0])
    assert fingerprint("2", texts, [0, 1, 0]) == first
    others = [
        fingerprint("3", ["a b", "b c", "c b"], [0, 1, 0]),
        fingerprint("4", texts, [0, 1, 1]),
        fingerprint("5", texts, [0, 1, 0], classes=["a", "b"]),
        fingerprint("6", texts, [0, 1, 0], prompt="{text}"),
        fingerprint("7", texts, [0, 1, 0], answer="generate"),
    ]
    assert len({first, *others}) == 6


def test_inputs_are_padded_to_the_longest_of_the_batch(family: FlanT5Family, task: TaskSpec, tmp_path: Path) -> None:
    data = data_of(family, task, tmp_path)
    whole = data.inputs(slice(0, 24))
    few = data.inputs(torch.tensor([3, 5]))
    assert few.shape[1] == int((few != 0).sum(1).max()) <= whole.shape[1]
    assert few[0].tolist() == whole[3, : few.shape[1]].tolist()
    texts, _ = split_texts(open_task(task), "test")
    assert data.samples(slice(3, 4))[0].split()[0] == texts[data.order[3]].split()[0]


def test_scores_are_the_log_likelihoods_of_the_words(family: FlanT5Family, tmp_path: Path) -> None:
    state = tiny_text.make_state(family)
    model = fill(family, state).model
    answers = answer_tokens(family.tokenizer, ["red", "deep blue", "a b c"])
    assert answers == [[3], [5, 6], [7, 8, 9]]
    with torch.no_grad():
        found = score_answers(model, IDS, answers)
        for column, answer in enumerate(answers):
            ids = torch.tensor([[0, *answer[:-1]]] * 3)
            logits = model(input_ids=IDS, attention_mask=IDS != 0, decoder_input_ids=ids).logits.log_softmax(-1)
            likelihoods = logits.gather(2, torch.tensor([answer] * 3)[..., None]).sum((1, 2))
            torch.testing.assert_close(found[:, column], likelihoods, atol=1e-5, rtol=1e-5)
    # The end counts where one answer begins another.
    assert answer_tokens(family.tokenizer, ["a", "a b"]) == [[7, 1], [7, 8, 1]]


def test_scoring_and_writing_agree_on_a_trained_model(family: FlanT5Family, task: TaskSpec, tmp_path: Path) -> None:
    scored = data_of(family, task, tmp_path)
    written = data_of(family, task.model_copy(update={"answer": "generate"}), tmp_path)
    model = family.load({k: 0.2 * v for k, v in tiny_text.make_state(family).items()}, "cpu").requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    ids, labels = scored.inputs(slice(0, 24)), scored.labels
    wanted = torch.tensor([(scored.answers[label] + [1, -100])[:3] for label in labels.tolist()])
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=ids != 0, labels=wanted).loss.backward()
        optimizer.step()
    skeleton = fill(family, {name: tensor.clone() for name, tensor in family.native_names(model).items()})
    with torch.inference_mode():
        first, second = (data.outcomes(skeleton, slice(0, 24)) for data in (scored, written))
        by_token = scored.outcomes_of(scored.logits(skeleton, ids), slice(0, 24))
    assert first.dtype == second.dtype == torch.bool and first.float().mean() > 0.9
    assert second.equal(first) and by_token.equal(first)


def test_numbers_are_scored_by_rank(family: FlanT5Family, tmp_path: Path) -> None:
    columns = {"sentence1": ["a b", "b", "c", "a", "b c"], "sentence2": ["a", "b", "c", "b", "c"],
               "label": [0.2, 1.5, 2.0, 0.9, 1.1]}  # fmt: skip
    tiny_text.write_parquet(tmp_path / "data" / "test.parquet", columns)
    spec = {"name": "t", "parquet": str(tmp_path / "data"), "prompt": "{sentence1} : {sentence2}"}
    with pytest.raises(DataError, match="give 'classes'"):
        open_task(TaskSpec.model_validate(spec))
    scored = data_of(family, TaskSpec.model_validate({**spec, "classes": ["0.0", "1.0", "2.0"]}), tmp_path)
    skeleton = fill(family, tiny_text.make_state(family))
    with torch.inference_mode():
        told = scored.outcomes(skeleton, slice(0, 5)).numpy()
    assert scored.metric == "spearman" and set(told) <= {0.0, 1.0, 2.0}
    numbers = np.array([1.0, 2.0, 2.0, 0.0, 1.0])
    value, error = scored.score(numbers)
    expected = spearmanr(numbers, scored.labels.numpy()).statistic
    assert value == pytest.approx(expected)
    assert error == pytest.approx((1 - expected**2) * math.sqrt((1 + expected**2 / 2) / 2))
    assert scored.score(np.ones(5))[0] == 0.0
    # Shards are the first samples of the order.
    assert scored.score(numbers[:4])[0] == pytest.approx(spearmanr(numbers[:4], scored.labels[:4]).statistic)
    written = data_of(
        family, TaskSpec.model_validate({**spec, "classes": ["0.0", "1.0"], "answer": "generate"}), tmp_path
    )
    with torch.inference_mode():
        assert written.outcomes(skeleton, slice(0, 5)).dtype == torch.float64


@pytest.mark.parametrize("name", TASK_LISTS["glue"])
def test_glue_is_known(name: str, tmp_path: Path) -> None:
    pairs = {"MNLI": ("premise", "hypothesis"), "QNLI": ("question", "sentence"), "QQP": ("question1", "question2")}
    columns = pairs.get(name, ("sentence",) if name in ("CoLA", "SST-2") else ("sentence1", "sentence2"))
    labels: list[float] = [0.0, 3.2] if name == "STS-B" else [0, 1]
    rows = {column: [f"{column} {{one}}", f"{column} two"] for column in columns}
    tiny_text.write_parquet(tmp_path / "test.parquet", {**rows, "label": labels, "idx": [0, 1]})
    task = open_task(TaskSpec(name=name, parquet=str(tmp_path)))
    texts, found = split_texts(task, "test")
    assert all(f"{column} two" in texts[1] for column in columns) and f"{columns[0]} {{one}}" in texts[0]
    assert found.tolist() == labels
    assert len(task.classes) == {"MNLI": 3, "STS-B": 26}.get(name, 2)
    alias = open_task(TaskSpec(name=f"glue-{name.replace('-', '').lower()}", parquet=str(tmp_path)))
    assert split_texts(alias, "test")[0] == texts


def test_inputs_and_targets(family: FlanT5Family, tmp_path: Path) -> None:
    columns = {"input": ["a b", "b c", "c"], "target": ["green", "red", "green"]}
    tiny_text.write_parquet(tmp_path / "data" / "test.parquet", columns)
    task = open_task(TaskSpec(name="t", parquet=str(tmp_path / "data")))
    texts, labels = split_texts(task, "test")
    assert texts == columns["input"] and [task.classes[label] for label in labels] == columns["target"]
    many = {"input": ["a"] * 300, "target": [str(number) for number in range(300)]}
    tiny_text.write_parquet(tmp_path / "many" / "test.parquet", many)
    with pytest.raises(DataError, match="300 different answers, too many to score each"):
        data_of(family, TaskSpec(name="t", parquet=str(tmp_path / "many")), tmp_path)


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        ({"text": ["a"], "label": [0]}, {}, "the data do not name their classes"),
        ({"text": ["a"], "label": [2]}, {"classes": ["x", "y"]}, "label 2 is out of range"),
        ({"text": ["a"], "label": [0]}, {"prompt": "{txt}"}, "no column 'txt'.*did you mean 'text'"),
        ({"text": ["a"]}, {}, "no column 'label'"),
        ({"text": [None], "label": [0]}, {"classes": ["x", "y"]}, "row 0: there is no text in column 'text'"),
        ({"text": ["a"], "label": [None]}, {"classes": ["x", "y"]}, "must hold integers, numbers or texts"),
        ({"input": ["a"], "target": ["z"]}, {"classes": ["x", "y"]}, "row 0: 'z' is none of the classes"),
        ({"body": ["a"], "label": [0]}, {"classes": ["x", "y"]}, "no image column 'image'"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, columns: Any, changes: Any, message: str) -> None:
    tiny_text.write_parquet(tmp_path / "test.parquet", columns)
    with pytest.raises(DataError, match=message):
        task = open_task(TaskSpec(name="t", parquet=str(tmp_path), **changes))
        task.cached("test", 8, "bicubic", tmp_path) if "body" in columns else split_texts(task, "test")


def test_texts_and_images_are_not_taken_for_each_other(family: FlanT5Family, task: TaskSpec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'colours' holds texts; this family of models takes images"):
        open_task(task).cached("test", 8, "bicubic", tmp_path)
    with pytest.raises(DataError, match="'shapes' holds images; this family of models takes texts"):
        family.open_split(open_task(TaskSpec.model_validate("shapes")), "test", tmp_path)


def test_architectures_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file or directory"):
        find_family("flan_t5", str(tmp_path / "absent"))
    with pytest.raises(SpecError, match=r"no config.json in this directory"):
        find_family("flan_t5", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SpecError, match="model_type 'bert' is not T5"):
        find_family("flan_t5", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(tiny_text.CONFIG))
    with pytest.raises(SpecError, match="no tokenizer in"):
        _ = FlanT5Family(str(tmp_path)).tokenizer
    # What is on the hub is not fetched to check a spec.
    find_family("flan_t5", "hf://google/flan-t5-base")


def flat_methods() -> list[str]:
    return [name for name, method in available_methods().items() if method.needs <= {"validation"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    tiny_text.write_world(folder)
    return folder


@pytest.mark.parametrize("name", flat_methods())
def test_flat_methods_are_scored_on_texts(world: Path, name: str) -> None:
    family = FlanT5Family(str(world / "models"))
    read = safetensors.torch.load_file
    bank = ModelBank.build(
        read(world / "models" / "base.safetensors"),
        {task: read(world / "models" / f"{task}.safetensors") for task in tiny_text.TASKS},
    )
    specs = {task: TaskSpec(name=task, parquet=str(world / "data" / task)) for task in tiny_text.TASKS}
    data = {
        split: {task: data_of(family, spec, world / "cache", split) for task, spec in specs.items()}
        for split in ("val", "test")
    }
    evaluator = Evaluator(family.skeleton(bank, "cpu"), data, batch_size=16, shards=2)
    method = make_method(name, {})
    resources = {"validation": evaluator.score}
    merged = method.merge(MergeInputs(bank, out=evaluator.skeleton.flat, resources=resources, needs=method.needs))
    outcomes = evaluator.outcomes(merged, "val")
    halves = [evaluator.outcomes(merged, "val", shard) for shard in range(2)]
    for task, kept in outcomes.items():
        assert np.concatenate([half[task] for half in halves]).tolist() == kept.tolist()
    summary = evaluator.summarize(outcomes, "val", None, "mean")
    assert summary["samples"] == 72 and 0 <= summary["objective"] <= 1


def test_a_spec_over_glue_is_valid(tmp_path: Path) -> None:
    tiny_text.write_models(tmp_path / "models", TASK_LISTS["glue"])
    models = {"family": "flan_t5", "architecture": str(tmp_path / "models"), "base": "b", "finetuned": "{task}"}
    parquet = {"train": "glue/{task}/train.parquet", "test": "glue/{task}/validation.parquet"}
    spec = {"name": "t_{num_tasks}", "num_tasks": "glue", "models": models, "studies": ["ties"],
            "task_defaults": {"parquet": parquet}}  # fmt: skip
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    [loaded] = load_sweeps(tmp_path / "spec.yaml")
    assert loaded.name == "t_glue" and loaded.task_names == list(TASK_LISTS["glue"])
    assert loaded.tasks[0].parquet == {"train": "glue/CoLA/train.parquet", "test": "glue/CoLA/validation.parquet"}


def write_lora(folder: Path, base: dict[str, Tensor], projections: str = "qv", rank: int = 2) -> dict[str, Tensor]:
    """A random adapter of ``projections`` as peft writes it; returns the weights that it makes."""
    generator = torch.Generator().manual_seed(len(str(folder)))
    factors = {}
    for name in sorted(base):
        if name.rpartition(".")[0].endswith(tuple(f"Attention.{letter}" for letter in projections)):
            out, into = base[name].shape
            a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
            factors[name.removesuffix(".weight")] = (a, b)
    write_adapter(folder, factors, alpha=8, base="somewhere")
    return {f"{module}.weight": base[f"{module}.weight"] + 8 / rank * (b @ a) for module, (a, b) in factors.items()}


def test_adapters_become_task_vectors_of_what_they_change(tmp_path: Path) -> None:
    family = tiny_text.write_models(tmp_path / "models")
    base = safetensors.torch.load_file(tmp_path / "models" / "base.safetensors")
    wanted = {task: write_lora(tmp_path / "lora" / task, base) for task in tiny_text.TASKS}
    config = json.loads((tmp_path / "lora" / "ants" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["target_modules"]) == ("LORA", 2, ["q", "v"])
    names = read_weights(tmp_path / "lora" / "ants")
    assert "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in names
    models = {"family": "flan_t5", "architecture": str(tmp_path / "models")}
    models["base"] = str(tmp_path / "models" / "base.safetensors")
    spec = ModelsSpec.model_validate({**models, "finetuned": str(tmp_path / "lora" / "{task}")})
    bank, _ = load_bank(spec, tiny_text.TASKS, Progress())
    assert set(bank.layout.names) == set(wanted["ants"]) and len(bank.layout.names) == 6
    skeleton = family.skeleton(bank, "cpu")
    skeleton.flat.copy_(bank.base + bank.task_vectors[1])
    full = {**base, **wanted["bees"]}
    torch.testing.assert_close(skeleton(IDS), fill(family, full)(IDS), atol=1e-4, rtol=1e-4)
    # Beside a model of full weights the adapters are completed.
    mixed = {task: str(tmp_path / "lora" / task) for task in tiny_text.TASKS}
    mixed["cats"] = str(tmp_path / "models" / "cats.safetensors")
    spec = ModelsSpec.model_validate({**models, "finetuned": mixed})
    bank, _ = load_bank(spec, tiny_text.TASKS, Progress())
    assert set(bank.layout.names) == set(base)
    back = bank.layout.unflatten(bank.base + bank.task_vectors[1])
    assert all(torch.allclose(back[name], full[name], atol=1e-5) for name in full)
    # The Python front door reads them, too.
    once = merge("task_arithmetic", base=base, finetuned={"bees": tmp_path / "lora" / "bees"}, scaling_coefficient=1.0)
    state = once.state_dict()
    assert all(torch.allclose(state[name], full[name], atol=1e-5) for name in full)


def test_adapters_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    base = tiny_text.make_state(tiny_text.write_architecture(tmp_path / "models"))
    write_lora(tmp_path / "lora", base)
    with pytest.raises(CheckpointError, match=r"a LoRA for other modules; the base has no decoder.*SelfAttention.q"):
        read_finetuned(tmp_path / "lora", {name: base[name] for name in base if "SelfAttention.q" not in name})
    wide = {name: torch.zeros(tensor.shape[0], 2 * tensor.shape[-1]) for name, tensor in base.items()}
    with pytest.raises(
        CheckpointError, match=r"a LoRA for another base; the shapes differ in .*\(16 x 16, in the base"
    ):
        read_finetuned(tmp_path / "lora", wide)
    path = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"use_dora": True}, "a LoRA with use_dora"),
        ({"peft_type": "IA3"}, "a IA3 adapter; only LORA"),
        ({"lora_alpha": None}, "not the config of a LoRA"),
        ({"bias": "all"}, "a LoRA with bias"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=message):
            read_finetuned(tmp_path / "lora", base)
    path.write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in read_weights(tmp_path / "lora").items()}
    tensors["base_model.model.shared.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no LoRA of matrices: base_model.model.shared.weight"):
        read_finetuned(tmp_path / "lora", base)


def test_rank_stabilised_adapters_are_scaled_by_the_root(tmp_path: Path) -> None:
    base = {"q.weight": torch.zeros(3, 5)}
    a, b = torch.randn(4, 5), torch.randn(3, 4)
    write_adapter(tmp_path, {"q": (a, b)}, alpha=8, base="somewhere")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    torch.testing.assert_close(read_finetuned(tmp_path, base)["q.weight"], 8 / 4**0.5 * (b @ a))
