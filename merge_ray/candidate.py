"""A candidate: one parameterised merge with an identity, and the ledger row that records it."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merge_ray.methods.base import Method


@dataclass(frozen=True)
class Fingerprints:
    """What a score depends on beside the candidate: models, data of each split, and how samples are taken.

    files: the content's hash of every file that a parameter may name, by its location.
    """

    bank: str
    data: Mapping[str, str]
    protocol: str
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One merge to score: ``parameters`` are complete and canonical (see :meth:`Candidate.of`).

    pair: the two tasks whose models are merged, of a sweep over pairs; otherwise those of all tasks are.
    """

    sweep: str
    study: str
    method: str
    parameters: Mapping[str, Any]
    seed: int
    split: str
    fingerprints: Fingerprints
    pair: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        sweep: str,
        study: str,
        method: Method,
        seed: int,
        split: str,
        fingerprints: Fingerprints,
        pair: tuple[str, ...] = (),
    ) -> Candidate:
        """The candidate that scores ``method`` on ``split``."""
        return cls(sweep, study, method.name, method.parameters(), seed, split, fingerprints, pair)

    @cached_property
    def identity(self) -> str:
        """The hash of all that determines the score; the same for equal candidates of different studies."""
        named = {value for value in self.parameters.values() if isinstance(value, str)}
        files = {place: content for place, content in self.fingerprints.files.items() if place in named}
        parts = {
            "method": self.method,
            "parameters": self.parameters,
            "seed": self.seed,
            "split": self.split,
            "bank": self.fingerprints.bank,
            "data": self.fingerprints.data[self.split],
            # Choices on validation data make any score depend on them; they are part of every identity.
            "validation": self.fingerprints.data["val"],
            "protocol": self.fingerprints.protocol,
        }
        # What few candidates have is left out of the others, so that ledgers from before it existed stay valid.
        parts |= {name: value for name, value in (("pair", list(self.pair)), ("files", files)) if value}
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]

    @property
    def label(self) -> str:
        """A readable name: the study and the parameters."""
        values = ",".join(f"{name}={_short(value)}" for name, value in self.parameters.items() if value is not None)
        return f"{self.search}({values})" if values else self.search

    @property
    def search(self) -> str:
        """What this candidate is searched for by: its study, and its pair where there is one."""
        return f"{self.study}@{'+'.join(self.pair)}" if self.pair else self.study

    def make(self) -> Method:
        """The method with its parameters, checked."""
        # Imported here: trials carry candidates about and have no use for torch.
        from merge_ray.methods.base import make_method

        return make_method(self.method, self.parameters)

    def on(self, split: str, parameters: Mapping[str, Any] | None = None) -> Candidate:
        """The same merge on another split, with other parameters if given."""
        return replace(self, split=split, parameters=self.parameters if parameters is None else parameters)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and without spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "[" + " ".join(_short(item) for item in value.values()) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(map(_short, value)) + "]"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def ledger_row(candidate: Candidate, status: str, **measured: Any) -> dict[str, Any]:
    """A row for the ledger: what the candidate is, how it ended, and what was measured."""
    return {
        "identity": candidate.identity,
        "sweep": candidate.sweep,
        "study": candidate.study,
        "method": candidate.method,
        "pair": list(candidate.pair),
        "parameters": canonical_json(candidate.parameters),
        "resolved": canonical_json(candidate.parameters),
        "seed": candidate.seed,
        "split": candidate.split,
        "status": status,
        "error": None,
        "notes": [],
        "tasks": [],
        "curve": [],
        "losses": [],
        "steps": [],
        "samples": 0,
        "artifacts": [],
        "transductive": False,
        "bank_fingerprint": candidate.fingerprints.bank,
        "data_fingerprint": candidate.fingerprints.data[candidate.split],
        "host": socket.gethostname(),
        "versions": _versions(),
        "time": datetime.now(UTC),
        **measured,
    }


@cache
def _versions() -> str:
    packages = {name: version(name) for name in ("merge-ray", "torch", "ray", "numpy")}
    return canonical_json({**packages, "python": platform.python_version()})


def fingerprint_of(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]
