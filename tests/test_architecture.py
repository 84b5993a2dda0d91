"""The house of DESIGN section 1: imports run downward without circles, and Ray stays in its rooms."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "merge_ray"

# From the top of the house to its foundations; a module may import only rooms below its own.
ROOMS = [
    "__main__", "cli", "sweep", "export", "report", "cluster", "leaderboard", "study", "models", "spec_files", "spec",
    "relatedness", "finetune", "fetch", "compress", "merging", "candidate", "search", "evaluate", "results", "lock",
    "families", "tasks", "methods", "features", "statistics", "matching", "bank", "kernels", "checkpoints",
    "s3", "caches", "memory", "progress", "space", "errors",
]  # fmt: skip

# Libraries whose import has another name than their distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "botocore": "boto3",
    "open_clip": "open_clip_torch",
    "skimage": "scikit_image",
    "sklearn": "scikit_learn",
    "yaml": "pyyaml",
}

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_modules(module: str) -> Iterator[str]:
    """The full names that a module imports, wherever in the file; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import; write the full name"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, itself excluded."""
    found: set[str] = set()
    for name in imported_modules(module):
        parent = name.rpartition(".")[0]
        found.update(candidate for candidate in (name, parent) if candidate in MODULES)
    return found - {module, "merge_ray"}


def room(module: str) -> str:
    return module.split(".")[1]


INNER = [module for module in MODULES if module != "merge_ray"]


@pytest.mark.parametrize("module", INNER)
def test_module_lives_in_a_known_room(module: str) -> None:
    assert room(module) in ROOMS, f"{module} is not in the house of DESIGN section 1"


@pytest.mark.parametrize("module", INNER)
def test_imports_run_downward(module: str) -> None:
    here = ROOMS.index(room(module))
    upward = [other for other in own_imports(module) if ROOMS.index(room(other)) < here]
    assert not upward, f"{module} imports rooms above its own: {upward}"


def test_imports_have_no_circles() -> None:
    # A package imports its modules to gather them, and they import one another: the package is their front door.
    graph = {module: {other for other in own_imports(module) if not module.startswith(f"{other}.")} for module in INNER}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_only_the_cluster_and_the_sweep_import_ray(module: str) -> None:
    uses_ray = any(name.split(".")[0] == "ray" for name in imported_modules(module))
    assert not uses_ray or room(module) in ("cluster", "sweep"), f"{module} imports ray"


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("torch", "merge_ray.cluster.host, merge_ray.cluster.trial, merge_ray.leaderboard, merge_ray.results"),
        ("boto3", "merge_ray.cluster.host, merge_ray.cluster.trial"),
    ],
)
def test_processes_of_trials_and_of_the_ledger_start_without_what_they_do_not_need(library: str, modules: str) -> None:
    # Hosts wait for them, and with torch each would take three seconds and half a gigabyte more.
    look = f"import sys, {modules}; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0, f"something that they import is {library}"


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=~! ]", text)[0].lower().replace("-", "_") for text in project["dependencies"]}
    imported = {name.split(".")[0] for module in MODULES for name in imported_modules(module)}
    imported -= {"merge_ray", *sys.stdlib_module_names}
    undeclared = {name for name in imported if DISTRIBUTIONS.get(name, name).lower() not in declared}
    assert not undeclared, f"imported, but not a dependency in pyproject.toml: {sorted(undeclared)}"


@pytest.mark.parametrize("module", MODULES)
def test_module_is_one_room(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= 400, f"{module} has {lines} lines: split it by meaning"


@pytest.mark.parametrize("module", MODULES)
def test_public_definitions_have_docstrings(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [node.name]
    assert not missing, f"{module}: no docstring on {missing}"
