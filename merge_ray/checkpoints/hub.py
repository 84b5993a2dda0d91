"""Files of the Hugging Face hub, through huggingface_hub and its cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from merge_ray.checkpoints.weight_files import SHARD_INDEX, SMALL_FILES, weight_files
from merge_ray.errors import CheckpointError, MissingError, choose_from

FORM = re.compile(r"(?P<data>datasets/)?(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<inside>.*))?")
ANSWER_SECONDS = 15


@dataclass(frozen=True)
class HubLocation:
    """A repository at a revision, and the file or folder inside that is meant ("" means the repository itself)."""

    kind: str
    repo: str
    revision: str
    inside: str

    @classmethod
    def parse(cls, name: str) -> HubLocation:
        """Read ``[datasets/]owner/name[@revision][/inside]``; a slash in the revision is written %2F."""
        form = FORM.fullmatch(name)
        if form is None:
            raise CheckpointError(
                f"hf://{name}: expected hf://owner/name[@revision][/file] or hf://datasets/owner/name[@revision][/file]"
            )
        inside = (form["inside"] or "").strip("/")
        return cls("dataset" if form["data"] else "model", form["repo"], unquote(form["revision"] or "main"), inside)

    def __str__(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        return f"hf://{kind}{self.repo}@{self.revision}/{self.inside}".rstrip("/")


def open_hub(name: str) -> Path:
    """Download what ``hf://`` + `name` means, unless it is in the cache already, and give its local path.

    Of a model's repository or folder only the weights that would be read and the small files beside them are fetched;
    of a data set everything in it. Where the hub cannot be reached, the cache answers alone. Raises CheckpointError.
    """
    location = HubLocation.parse(name)
    endpoint = os.environ.get("HF_ENDPOINT") or None  # huggingface_hub itself reads it only when it is imported
    try:
        # Not list_repo_files, which tries for half a minute where there is no network.
        api = HfApi(endpoint=endpoint)
        look_up = api.dataset_info if location.kind == "dataset" else api.model_info
        info = look_up(location.repo, revision=location.revision, timeout=ANSWER_SECONDS)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        return _download(location, files, endpoint)
    except CheckpointError:
        raise
    except Exception as error:  # the exceptions of the transport differ between versions of huggingface_hub
        if (refusal := _refusal(location, error)) is not None:
            raise CheckpointError(f"{location}: {refusal}") from error
        return _cached(location, endpoint, error)


def _download(location: HubLocation, files: list[str], endpoint: str | None) -> Path:
    wanted = _wanted(location, files)
    local = [
        Path(
            hf_hub_download(location.repo, file, revision=location.revision, repo_type=location.kind, endpoint=endpoint)
        )
        for file in wanted
    ]
    snapshot = local[0].parents[len(PurePosixPath(wanted[0]).parts) - 1]
    return snapshot / location.inside


def _wanted(location: HubLocation, files: list[str]) -> list[str]:
    """The repository's files that the location means."""
    folder = PurePosixPath(location.inside)
    below = [file for file in files if folder in PurePosixPath(file).parents]
    if location.inside in files:
        return [location.inside, *_shards(location.inside, files)]
    if not below:
        raise MissingError(f"{location}: no such file or folder; {choose_from(location.inside, files)}")
    if location.kind == "dataset":
        return below
    here = [file for file in below if PurePosixPath(file).parent == folder]
    names = weight_files(PurePosixPath(file).name for file in here)
    if not names:
        held = ", ".join(sorted(PurePosixPath(file).name for file in here)) or "only folders"
        raise CheckpointError(f"{location}: a folder without weights; it holds {held}")
    weights = [str(folder / name) for name in names]
    small = [file for file in here if PurePosixPath(file).suffix in SMALL_FILES and not file.endswith(SHARD_INDEX)]
    return [*weights, *(shard for file in weights for shard in _shards(file, files)), *small]


def _shards(file: str, files: list[str]) -> list[str]:
    """The shards of `file`, where it is an index: ``model-00001-of-00002.safetensors`` and so on."""
    if not file.endswith(SHARD_INDEX):
        return []
    stem, suffix = os.path.splitext(file.removesuffix(SHARD_INDEX))
    return [shard for shard in files if shard.startswith(f"{stem}-") and shard.endswith(suffix)]


def _cached(location: HubLocation, endpoint: str | None, cause: Exception) -> Path:
    """What an earlier download left in the cache."""
    try:
        snapshot = Path(
            snapshot_download(location.repo, revision=location.revision, repo_type=location.kind, local_files_only=True)
        )
    except Exception as error:
        raise CheckpointError(_offline(location, endpoint, cause)) from error
    path = snapshot / location.inside
    if not path.exists():
        raise CheckpointError(_offline(location, endpoint, cause))
    return path


def _offline(location: HubLocation, endpoint: str | None, cause: Exception) -> str:
    return (
        f"{location}: the hub at {endpoint or 'huggingface.co'} cannot be reached ({type(cause).__name__}: {cause}), "
        "and nothing of that name is in the local cache; go online once, or give a local path"
    )


def _refusal(location: HubLocation, error: Exception) -> str | None:
    """What the hub answered, or None where it did not answer."""
    if isinstance(error, GatedRepoError):
        return "the repository is gated: ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such {location.kind} on the hub, or it is private and needs `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {location.revision!r}"
    if isinstance(error, HFValidationError):
        return str(error)
    if isinstance(error, HfHubHTTPError) and 400 <= error.response.status_code < 500:
        return f"the hub refuses it ({error})"
    return None
