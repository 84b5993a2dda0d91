"""Find the weights in what a pickle held: a state dict, one nested in a training checkpoint, or a whole module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from merge_ray.checkpoints.records import Record, TensorRecord
from merge_ray.errors import CheckpointError

# Where training scripts put the weights, the first that is there counts.
NESTED_NAMES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")


def collect_weights(root: object, source: Path) -> dict[str, TensorRecord]:
    """Collect the tensors under their state-dict names, in the order of the file.

    A module gives what its ``state_dict()`` would: parameters and persistent buffers, with the names of the
    sub-modules before them. Raises CheckpointError where no weights, or several sets of weights, are found.
    """
    if isinstance(root, Record) and _is_module(root):
        return _checked(dict(_module_tensors(root, "", (), source)), source)
    mapping = _mapping(root)
    if mapping is None:
        raise CheckpointError(f"{source}: holds {_describe(root)}, where a state dict or a module is expected")
    nested = {name: value for name, value in mapping.items() if isinstance(name, str) and _holds_weights(value)}
    for name in NESTED_NAMES:
        if name in nested:
            return collect_weights(nested[name], source)
    tensors = {name: value for name, value in mapping.items() if isinstance(value, TensorRecord)}
    if not tensors and len(nested) == 1:
        return collect_weights(next(iter(nested.values())), source)
    if not tensors and nested:
        raise CheckpointError(
            f"{source}: holds several sets of weights ({', '.join(map(repr, nested))}) and none under a usual name "
            f"({', '.join(map(repr, NESTED_NAMES))}); save the one that is meant by itself"
        )
    return _checked(tensors, source)


def _checked(tensors: Mapping[object, TensorRecord], source: Path) -> dict[str, TensorRecord]:
    if not tensors:
        raise CheckpointError(f"{source}: holds no tensors")
    if wrong := [name for name in tensors if not isinstance(name, str)]:
        raise CheckpointError(f"{source}: its tensors are not named by text, but by {wrong[0]!r}")
    return {str(name): tensor for name, tensor in tensors.items()}


def _mapping(value: object) -> Mapping[object, object] | None:
    """The entries of a dict, or of a record of a class that was one."""
    if isinstance(value, Record):
        return value.entries or None
    return value if isinstance(value, Mapping) else None


def _is_module(value: object) -> bool:
    return isinstance(value, Record) and isinstance(value.state.get("_modules"), Mapping)


def _holds_weights(value: object) -> bool:
    """Whether there are tensors below, looking only where weights can be."""
    if _is_module(value):
        return True
    entries = _mapping(value)
    return entries is not None and any(
        isinstance(entry, TensorRecord) or (name in NESTED_NAMES and _holds_weights(entry))
        for name, entry in entries.items()
    )


def _module_tensors(
    module: Record, prefix: str, above: tuple[Record, ...], source: Path
) -> Iterator[tuple[str, TensorRecord]]:
    """The module's state dict; `prefix` is its name with a dot, `above` the modules that contain it."""
    if any(module is other for other in above):
        raise CheckpointError(f"{source}: damaged: the module {prefix!r} contains itself")
    hidden = module.state.get("_non_persistent_buffers_set")
    buffers = _members(module, "_buffers")
    for name in hidden if isinstance(hidden, set | frozenset) else ():
        buffers.pop(name, None)
    for name, value in (_members(module, "_parameters") | buffers).items():
        if not isinstance(value, TensorRecord):
            raise CheckpointError(f"{source}: {prefix + name!r} is {_describe(value)}, where a tensor is expected")
        yield prefix + name, value
    for name, child in _members(module, "_modules").items():
        if not isinstance(child, Record):
            raise CheckpointError(f"{source}: {prefix + name!r} is {_describe(child)}, where a module is expected")
        yield from _module_tensors(child, f"{prefix}{name}.", (*above, module), source)


def _members(module: Record, kind: str) -> dict[str, object]:
    """What a module registered as `kind`, without the empty places such as the bias of a layer without one."""
    members = module.state.get(kind)
    if not isinstance(members, Mapping):
        return {}
    return {str(name): value for name, value in members.items() if value is not None}


def _describe(value: object) -> str:
    if isinstance(value, TensorRecord):
        return "a single tensor"
    if isinstance(value, type) and issubclass(value, Record):
        return f"the name {value.path}"
    return f"an instance of {value.path if isinstance(value, Record) else type(value).__name__}"
