"""Pickles that want to run something are refused by name, and nothing runs."""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import pickletools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import Call, write_pickle

from merge_ray.checkpoints import read_weights
from merge_ray.checkpoints.records import PlainDict, Record
from merge_ray.checkpoints.unpickle import SafeUnpickler
from merge_ray.errors import CheckpointError

CONTAINERS = ("bare", "zip", "legacy")
MARKER = "ran.txt"
TOUCH = f"touch {MARKER}"
OPEN = f"open({MARKER!r}, 'w')"

CALLS = {
    "os.system": (Call(os.system, TOUCH), f"{os.name}.system"),
    "os.popen": (Call(os.popen, TOUCH), "os.popen"),
    "eval": (Call(eval, OPEN), "builtins.eval"),
    "exec": (Call(exec, OPEN), "builtins.exec"),
    "open": (Call(open, MARKER, "w"), "(io|_io).open"),
    "compile": (Call(compile, OPEN, "x", "eval"), "builtins.compile"),
    "import": (Call(__import__, "antigravity"), "builtins.__import__"),
    "import_module": (Call(importlib.import_module, "antigravity"), "importlib.import_module"),
    "run_path": (Call(runpy.run_path, "setup.py"), "runpy.run_path"),
    "Popen": (Call(subprocess.Popen, ["touch", MARKER]), "subprocess.Popen"),
    "check_output": (Call(subprocess.check_output, ["touch", MARKER]), "subprocess.check_output"),
    "getattr chain": (Call(getattr, Call(__import__, "os"), "system"), "builtins.__import__"),
    "getattr of a container": (Call(getattr, [], "append"), r"builtins.getattr\(..., 'append'\)"),
    "getattr of a dunder": (Call(getattr, torch.nn.Linear, "__init__"), r"builtins.getattr\(..., '__init__'\)"),
    "call of an attribute": (Call(Call(getattr, torch.nn.Linear, "forward"), 1), "torch.nn.modules.linear.Linear.forw"),
    "partial": (Call(functools.partial, os.system, TOUCH), f"{os.name}.system"),
    "nested load": (Call(pickle.loads, b"."), "_?pickle.loads"),
    "torch.load": (Call(torch.load, "other.pt"), "torch.serialization.load"),
    "torch.hub": (Call(torch.hub.load, "owner/repository", "model"), "torch.hub.load"),
    "type": (Call(type, "Name", (), {}), "builtins.type"),
    "globals": (Call(globals), "builtins.globals"),
    "modules": (Call(vars, Call(sys.intern, "a")), "(builtins.vars|sys.intern)"),
}


@pytest.fixture(autouse=True)
def inside_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def assert_refused(path: Path, wanted: str) -> None:
    with pytest.raises(CheckpointError, match=f"refused, and nothing in it was run: its pickle wants to {wanted}") as e:
        read_weights(path)
    assert str(e.value).startswith(str(path))
    assert not Path(MARKER).exists()
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused(name: str, container: str, protocol: int, tmp_path: Path) -> None:
    call, wanted = CALLS[name]
    write_pickle(tmp_path / "model.pt", pickle.dumps(call, protocol), container)
    assert_refused(tmp_path / "model.pt", f"call {wanted}")


class Hidden:
    """Runs a command from its state, as a class of a published checkpoint might."""

    def __getstate__(self) -> dict[str, object]:
        return {"_modules": {}, "hook": Call(os.system, TOUCH)}


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(2), "extra": Call(os.system, TOUCH)},
        {"state_dict": {"weight": torch.ones(2)}, "arguments": [({Call(os.system, TOUCH)},)]},
        {"weight": torch.ones(2), Call(os.system, TOUCH): 1},
        {"model": Hidden()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_calls_beside_weights_are_refused(content: object, zipped: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_refused(tmp_path / "model.pt", f"call {os.name}.system")


RAW = {
    "INST": (b"(S'touch ran.txt'\nios\nsystem\n.", "call os.system"),
    "OBJ": (b"(cos\nsystem\nS'touch ran.txt'\no.", "call os.system"),
    "Python 2": (b"c__builtin__\neval\n(S'1'\ntR.", "call builtins.eval"),
    "a name with dots": (b"\x80\x04\x8c\x07logging\x8c\x09os.system\x93)R.", "call logging.os.system"),
    "a name with dots and a class": (
        b"\x80\x04\x8c\x05torch\x8c\x10subprocess.Popen\x93)R.",
        "call torch.subprocess.Popen",
    ),
    "a dunder": (b"\x80\x04\x8c\x0bcollections\x8c\x1aOrderedDict.__subclasses__\x93)R.", "call collections.Ordered"),
    "another codec": (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibtR.", "call _codecs.encode"),
    "change of a reconstructor": (
        b"ctorch._utils\n_rebuild_parameter\n}U\x09_functionK\x01sb.",
        "change the state of a Reconstructor",
    ),
    "_reconstructor without a class": (b"ccopy_reg\n_reconstructor\n(K\x01K\x01NtR.", "call copyreg._reconstructor"),
    "a persistent reference": (b"\x80\x02U\x06modulecos\nsystem\n\x86Q.", "call os.system"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", RAW)
def test_hand_written_pickles_are_refused(name: str, container: str, tmp_path: Path) -> None:
    content, wanted = RAW[name]
    pickletools.dis(content, io.StringIO())  # it is a valid pickle
    write_pickle(tmp_path / "model.pt", content, container)
    assert_refused(tmp_path / "model.pt", wanted)


@pytest.mark.parametrize(
    "content",
    [
        b"(lp0\n0g0\ng0\na.",  # a list that holds itself
        b"\x80\x02}q\x00U\x05modelh\x00s.",  # a dict that holds itself as its model
        b"cos.path\n.",
        b"\x80\x02cmodels\nNet\n)\x81q\x00}(U\x08_modules}U\x01ah\x00sub.",  # a module that contains itself
        b"\x80\x02r\xff\xff\xff\x7fN.",  # a memo of two thousand million places
        b"\x80\x02K\x01)R.",  # a call of a number
        b"\x80\x02N}b.",  # state for None
        b"\x80\x02\x82\x01.",  # copyreg's extension registry
    ],
)
def test_other_traps_end_in_an_error(content: bytes, tmp_path: Path) -> None:
    write_pickle(tmp_path / "model.pt", content, "zip")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        read_weights(tmp_path / "model.pt")


def test_no_file_can_change_what_the_next_one_sees(tmp_path: Path) -> None:
    """State given to classes and stand-ins stays with one unpickler."""
    poison = b"\x80\x02ctorch.nn\nLinear\n}U\x04pathU\x01xsb."
    write_pickle(tmp_path / "poison.pt", poison, "zip")
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "poison.pt")
    assert Record.path == ""
    torch.save(torch.nn.Linear(2, 3), tmp_path / "model.pt")
    assert list(read_weights(tmp_path / "model.pt")) == ["weight", "bias"]


def test_every_object_in_a_pickle_is_plain_or_ours() -> None:
    content = pickle.dumps([torch.nn.Linear, {"a": torch.float16, "b": Path("x")}, {1}, torch.Size([2])], 4)
    root = SafeUnpickler(io.BytesIO(content)).load()
    assert issubclass(root[0], Record)
    assert root[0].path == "torch.nn.modules.linear.Linear"
    assert isinstance(root[1]["b"], Record)
    assert root[1]["b"].arguments == ("x",)
    assert root[3] == (2,)
    assert isinstance(SafeUnpickler(io.BytesIO(b"ccollections\nOrderedDict\n)R.")).load(), PlainDict)
