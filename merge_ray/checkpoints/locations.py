"""The one place where a location is opened."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

from merge_ray.checkpoints.hub import open_hub
from merge_ray.checkpoints.s3_files import Wanted, open_s3
from merge_ray.errors import CheckpointError, MissingError, choose_from


def open_location(location: str | Path, wanted: Wanted | None = None) -> Path:
    """Give the local file or directory for a location, downloading it first where it is remote.

    - a path: as it is (``~`` means the home directory), or the only file that matches it (``*_encoder-*.pth``);
    - ``builtin:quickstart/base.safetensors``: a file that ships with merge-ray;
    - ``torchhub:normal_encoder-*.pth``: a file of torch's own cache, or the only one that matches a pattern;
    - ``hf://owner/name[@revision][/file or folder]``, ``hf://datasets/owner/name...``: from the Hugging Face hub;
    - ``s3://bucket/key``: from S3, see `open_s3`, which alone looks at ``wanted``.

    Raises CheckpointError where there is nothing at the location, or it is of a scheme that is not known.
    """
    text = str(location)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    if isinstance(location, Path) or scheme is None:
        return _open_local(Path(text).expanduser())
    if scheme[1] == "s3":
        return open_s3(text, wanted)
    opened = SCHEMES.get(scheme[1])
    if opened is None:
        raise CheckpointError(
            f"{text}: a location is a local path or starts with a known scheme, not {scheme[1]!r}; "
            f"{choose_from(scheme[1], [*SCHEMES, 's3'])}"
        )
    return opened(text.removeprefix(scheme[0]))


def find_beside(location: str, suffix: str) -> Path | None:
    """The file that has the name of the one at ``location`` but for its suffix; None where there is none."""
    try:
        return open_location(re.sub(r"\.[^./]*$", "", location) + suffix)
    except MissingError:
        return None


def _open_local(path: Path) -> Path:
    folder = path.parent
    try:
        if path.exists():
            return path
        if "*" in path.name:
            return _only_match(path)
        folder_exists = folder.is_dir()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from error
    if not folder_exists:
        raise MissingError(f"{path}: no such file or directory; its folder {folder} does not exist either")
    raise MissingError(f"{path}: no such file or directory{_nearest(path)}")


def _only_match(path: Path) -> Path:
    found = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    if len(found) != 1:
        named = ", ".join(match.name for match in found) or "no file"
        raise CheckpointError(f"{path}: matches {named}, where one file is meant")
    return found[0]


def _nearest(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; the nearest name in that folder is {near[0]!r}" if near else ""


def _open_builtin(name: str) -> Path:
    assets = Path(str(resources.files("merge_ray"))) / "assets"
    path = assets / name
    if ".." in path.parts or not path.exists():
        shipped = [str(file.relative_to(assets).as_posix()) for file in assets.rglob("*") if file.is_file()]
        raise CheckpointError(f"builtin:{name}: does not ship with merge-ray; {choose_from(name, shipped)}")
    return path


def _open_hf(name: str) -> Path:
    return open_hub(name.removeprefix("//"))


def _open_torch_hub(name: str) -> Path:
    return _open_local(Path(torch.hub.get_dir()) / "checkpoints" / name)


SCHEMES: dict[str, Callable[[str], Path]] = {
    "builtin": _open_builtin,
    "hf": _open_hf,
    "torchhub": _open_torch_hub,
}
