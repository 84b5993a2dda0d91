"""Write weights: safetensors, the Hugging Face layout, open_clip checkpoints. A file appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from merge_ray.checkpoints.weight_files import PICKLED, SAFETENSORS, SHARD_INDEX
from merge_ray.errors import CheckpointError

COMPANION_SUFFIXES = (".json", ".txt", ".model")
COMPANION_BYTES = 32 * 2**20  # tokenizers and configurations are far smaller, weights far larger


def write_safetensors(
    path: str | Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `state` with text metadata and give the path.

    Raises CheckpointError where the state cannot be written or the disk is full; an existing file is kept then.
    """
    path = Path(path)
    metadata = _checked_metadata(path, metadata)
    tensors = _plain(path, state)
    with _replacing(path) as partial:
        save_file(tensors, partial, metadata)
    return path


@contextmanager
def stream_safetensors(
    path: str | Path, name: str, shape: Sequence[int], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Write one float32 tensor ``name`` that need not fit in memory: yields ``append(part)``, in C order.

    Raises CheckpointError where it cannot be written, or the parts do not make up `shape`; an existing file is kept
    then.
    """
    path = Path(path)
    size = 4 * math.prod(shape)
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": _checked_metadata(path, metadata), name: entry}).encode()
    header += b" " * (-len(header) % 8)
    # Whoever writes computes the parts meanwhile: a RuntimeError is theirs.
    with _replacing(path, (OSError,)) as partial, partial.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)

        def append(part: torch.Tensor) -> None:
            stream.write(part.detach().cpu().float().contiguous().numpy().data)

        yield append
        if (written := stream.tell() - 8 - len(header)) != size:
            raise CheckpointError(f"{path}: {written} bytes were given for {name} {tuple(shape)}, which takes {size}")


def write_huggingface(
    directory: str | Path,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, object] | None = None,
    source: str | Path | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write `model.safetensors` and `config.json` as transformers loads them, and give the directory.

    `state` has the names of the transformers model. `source` is a directory whose tokenizer and preprocessing files
    are copied, and its `config.json` where no `config` is given. Raises CheckpointError.
    """
    directory, source = Path(directory), None if source is None else Path(source)
    if config is None:
        if source is None or not (source / "config.json").is_file():
            raise CheckpointError(f"{directory}: needs a config, or a source directory that has a config.json")
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # transformers refuses files that do not say that they come from PyTorch.
    write_safetensors(directory / "model.safetensors", state, {"format": "pt", **(metadata or {})})
    for companion in sorted(source.iterdir()) if source else ():
        if _is_companion(companion):
            with _replacing(directory / companion.name) as partial:
                shutil.copyfile(companion, partial)
    with _replacing(directory / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory


def write_open_clip(
    path: str | Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a checkpoint that `open_clip.create_model(..., pretrained=path)` loads, and give the path.

    `state` has open_clip's names. The suffix chooses between safetensors and torch's format, which keeps the metadata
    beside the weights. Raises CheckpointError.
    """
    path = Path(path)
    if path.suffix == SAFETENSORS:
        return write_safetensors(path, state, metadata)
    if path.suffix not in PICKLED:
        raise CheckpointError(f"{path}: open_clip loads files named {', '.join((SAFETENSORS, *PICKLED[:3]))}")
    # torch.save writes whole storages: a view of a large one must become a tensor of its own.
    tensors = {
        name: value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        for name, value in _plain(path, state).items()
    }
    content = {"state_dict": tensors, "metadata": _checked_metadata(path, metadata)}
    with _replacing(path) as partial, partial.open("wb") as stream:
        torch.save(content, stream)
    return path


def _is_companion(path: Path) -> bool:
    return (
        path.is_file()
        and path.suffix in COMPANION_SUFFIXES
        and path.name != "config.json"
        and not path.name.endswith(SHARD_INDEX)
        and path.stat().st_size <= COMPANION_BYTES
    )


def _checked_metadata(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    wrong = [key for key, value in (metadata or {}).items() if not isinstance(key, str) or not isinstance(value, str)]
    if wrong:
        raise CheckpointError(f"{path}: metadata must be text; not so: {', '.join(map(repr, wrong))}")
    return dict(metadata or {})


def _plain(path: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors on the CPU; a tensor that stands under two names is copied for the second."""
    if not state:
        raise CheckpointError(f"{path}: there are no tensors to write")
    if wrong := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"{path}: these are no tensors: {', '.join(map(repr, wrong))}")
    plain: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        plain[name] = tensor.clone() if tensor.data_ptr() in addresses else tensor
        addresses.add(tensor.data_ptr())
    return plain


@contextmanager
def _replacing(
    path: Path, errors: tuple[type[Exception], ...] = (OSError, SafetensorError, RuntimeError)
) -> Iterator[Path]:
    """Give a name in the same folder to write to; it takes the place of `path` once it is safely on the disk.

    errors: what is raised when it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        # safetensors puts a file that only its owner may read in the place of this one.
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except errors as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); the place keeps what it held before") from error
    finally:
        with suppress(OSError):
            partial.unlink()
