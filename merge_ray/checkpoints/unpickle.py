"""An unpickler that imports nothing, calls nothing but its own reconstructors, and keeps the rest as records.

The rule, for every name in a pickle:

- a name in `RECONSTRUCTORS` gives our own function of the same meaning;
- a name from Python's standard library that is not listed as harmless is refused where it is named: there lies
  everything that runs commands or code, and no weights need it;
- any other name (torch, open_clip, the authors' own modules) becomes an inert record class. Creating an instance of
  it stores data. Calling it is taken as creating an instance where the name looks like a class; a call of what looks
  like a function is refused, as its result cannot be known without running it.

Refusing is a courtesy to the reader of the error: nothing would be run in any case.
"""

from __future__ import annotations

import pickle
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from typing import IO, Any

import torch

from merge_ray.checkpoints.records import (
    PlainDict,
    Reconstructor,
    Record,
    RefusalError,
    StorageRecord,
    TensorRecord,
    inert_class,
)
from merge_ray.errors import CheckpointError

# Modules of the standard library whose classes are plain data, and which modules hold as attributes.
HARMLESS_MODULES = {
    "argparse",
    "collections",
    "collections.abc",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "itertools",
    "logging",
    "math",
    "numbers",
    "pathlib",
    "random",
    "re",
    "typing",
    "uuid",
}
# Names in lower case that make plain values when called.
HARMLESS_CALLS = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": ("bool", "float", "int", "object", "range", "slice", "str"),
        "collections": ("deque",),
        "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
        "functools": ("partial",),
        "itertools": ("count",),
        "logging": ("getLogger",),
        "re": ("_compile",),
        "torch": ("device", "serialization._get_layout"),
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("scalar", "_reconstruct"),
        "numpy._core.multiarray": ("scalar", "_reconstruct"),
    }.items()
    for name in names
)
HARMLESS_NAMES = HARMLESS_CALLS | {"builtins.Ellipsis", "builtins.NotImplemented", "types.SimpleNamespace"}

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


def _dtype_named(path: str) -> torch.dtype:
    dtype = getattr(torch, path.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path} is not a dtype that this version of torch has")
    return dtype


def _storage(value: object) -> StorageRecord:
    if not isinstance(value, StorageRecord):
        raise ValueError("a tensor without a storage")
    return value


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object = None,
    hooks: object = None,
    flags: object = None,
) -> TensorRecord:
    if flags:
        raise ValueError(f"a tensor with the flags {flags}: save it after .resolve_conj().resolve_neg()")
    storage = _storage(storage)
    return TensorRecord(storage, offset, shape, stride, storage.dtype)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: type[Record],
    flags: object = None,
) -> TensorRecord:
    return TensorRecord(_storage(storage), offset, shape, stride, _dtype_named(dtype.path))


def _first(value: object, *others: object) -> object:
    """A parameter is its data: torch's function also sets requires_grad, hooks and attributes."""
    return value


def _rebuild_from_type(function: object, kind: object, arguments: tuple[object, ...], state: object) -> object:
    """A tensor of a subclass is the plain tensor below it."""
    if not isinstance(function, Reconstructor):
        raise RefusalError(f"call {getattr(function, 'path', repr(function))}")
    return function(*arguments)


def _plain_dict(entries: Any = (), *others: object) -> PlainDict:
    return PlainDict(entries)


def _default_dict(factory: object = None, *others: object) -> PlainDict:
    return PlainDict()


def _reconstruct_object(kind: Any, base: object, state: object) -> object:
    """copyreg's function for classes pickled with protocols 0 and 1."""
    if not _is_record_class(kind):
        raise RefusalError("call copyreg._reconstructor on something that is no class")
    record = Record.__new__(kind)
    if isinstance(state, Mapping):
        record.entries.update(state)
    return record


def _attribute_of_record(owner: Any, name: object) -> type[Record]:
    """Python 3.11 pickles an enum member as getattr(class, name); on anything but a record it is an escape."""
    path = owner.path if isinstance(owner, Record) or _is_record_class(owner) else None
    if path is None or not isinstance(name, str) or name.startswith("__"):
        raise RefusalError(f"call builtins.getattr(..., {name!r})")
    return inert_class(f"{path}.{name}", _looks_like_class(name))


def _encode(text: str, encoding: str) -> bytes:
    """Protocol 2 pickles bytes as text in Latin 1."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusalError(f"call _codecs.encode(..., {encoding!r})")
    return text.encode("latin1")


def _bytes(content: Any = b"", encoding: str = "latin1") -> bytes:
    """For bytes and bytearray; a bare length is not taken, as it could ask for any amount of memory."""
    if isinstance(content, int):
        raise ValueError("bytes given by their number alone")
    return _encode(content, encoding) if isinstance(content, str) else bytes(content)


RECONSTRUCTORS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": tuple,
    "collections.OrderedDict": _plain_dict,
    "collections.Counter": _plain_dict,
    "collections.defaultdict": _default_dict,
    "copyreg._reconstructor": _reconstruct_object,
    "builtins.getattr": _attribute_of_record,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.dict": _plain_dict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "_codecs.encode": _encode,
}


def _is_record_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Record)


def _looks_like_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _is_refused(module: str, name: str) -> bool:
    """Whether a pickle may not even mention the name."""
    *owners, last = name.split(".")
    # The name may have dots (protocol 4), which reach through a harmless module: ("logging", "os.system").
    if any(part in sys.stdlib_module_names for part in owners) or (last.startswith("__") and last.endswith("__")):
        return True
    if module in HARMLESS_MODULES or f"{module}.{name}" in HARMLESS_NAMES:
        return False
    return module.partition(".")[0] in sys.stdlib_module_names


class SafeUnpickler(pickle._Unpickler):
    """Python's own unpickler, with every name looked up in our tables instead of in modules.

    The one written in Python, not in C: that one's memo is an array as long as the file says, which lets a few bytes
    ask for all memory, and the pickles of weights are short.

    `element_sizes` are the bytes per element of each storage that was referred to.
    """

    proto: int  # of the pickle, set by the base class

    def __init__(self, stream: IO[bytes]) -> None:
        # Latin 1 never fails on the byte strings of Python 2, and names of tensors are ASCII.
        super().__init__(stream, encoding="latin1")
        self._found: dict[str, Reconstructor | type[Record]] = {}
        self.element_sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Reconstructor | type[Record]:
        """Give our stand-in for a name. A new one for each file, so that no file can alter another's."""
        if self.proto < 3:  # written with the names that Python 2 had
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        if path not in self._found:
            if path in RECONSTRUCTORS:
                self._found[path] = Reconstructor(RECONSTRUCTORS[path])
            elif _is_refused(module, name):
                raise RefusalError(f"call {path}")
            else:
                self._found[path] = inert_class(path, _looks_like_class(name) or path in HARMLESS_CALLS)
        return self._found[path]

    def persistent_load(self, saved_id: Any) -> object:
        """torch's references to what lies outside the pickle: storages, and the source text of module classes."""
        kind, *rest = saved_id
        if kind == "module":
            return rest[0]
        if kind != "storage":
            raise ValueError(f"a reference of unknown kind {kind!r}")
        storage_class, key, _device, length, *view = rest
        dtype = STORAGE_DTYPES.get(storage_class.path.rpartition(".")[2])
        if dtype is None:
            raise ValueError(f"a storage of unknown type {storage_class.path}")
        self.element_sizes[str(key)] = dtype.itemsize
        if not view or view[0] is None:
            return StorageRecord(str(key), dtype, length)
        _view_key, start, view_length = view[0]
        return StorageRecord(str(key), dtype, view_length, start)


def unpickle(stream: IO[bytes], source: object) -> tuple[Any, dict[str, int]]:
    """Read the next pickle in `stream` as plain containers and records.

    Returns it with the bytes per element of each storage that it refers to. Raises CheckpointError naming `source`
    where the pickle is damaged or wants to run something.
    """
    unpickler = SafeUnpickler(stream)
    try:
        return unpickler.load(), unpickler.element_sizes
    except RefusalError as refusal:
        raise CheckpointError(
            f"{source}: refused, and nothing in it was run: its pickle wants to {refusal}. "
            "merge-ray reads tensors, plain containers and modules; if you trust the file's maker, "
            "ask for the weights as safetensors or a state dict"
        ) from None
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise CheckpointError(
            f"{source}: truncated or damaged: its pickle cannot be read ({type(error).__name__}: {error})"
        ) from error
