"""What a candidate has learned so far: it travels with the calls to hosts, and lies beside the ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save


@dataclass(frozen=True)
class Learned:
    """What a candidate has learned so far.

    step: the steps done. state: see :meth:`merge_ray.methods.base.Learner.state`. loss: the mean of the last call's
    steps. seconds: spent learning. curve, losses, steps: the objective, the loss and the steps done at each report so
    far. artifacts: those of a merge with it, which are saved at every step that is saved.
    """

    step: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    curve: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    state: Mapping[str, np.ndarray] = field(default_factory=dict)
    artifacts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """A safetensors file of the state, the rest but for the artifacts as its metadata."""
        about = {name: value for name, value in vars(self).items() if name not in ("state", "artifacts")}
        return _save(self.state, {"learned": json.dumps(about)})

    def step_files(self) -> dict[str, bytes]:
        """The artifacts by suffix: a safetensors file, and a JSON of the step, its loss and what is text in them."""
        texts = {name: array.tolist() for name, array in self.artifacts.items() if array.dtype.kind == "U"}
        numbers = {name: array for name, array in self.artifacts.items() if name not in texts}
        about = {"step": self.step, "loss": self.loss, **texts}
        return {".json": json.dumps(about, indent=2).encode(), ".safetensors": _save(numbers)}

    @classmethod
    def read(cls, path: Path) -> Learned:
        """The inverse of :meth:`to_bytes`, from a file; nothing where there is none."""
        if not path.exists():
            return cls()
        with safe_open(path, "np") as file:
            about = json.loads(file.metadata()["learned"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        reports = {name: tuple(value) for name, value in about.items() if isinstance(value, list)}
        return cls(**{**about, **reports}, state=state)

    def reported(self, objective: float) -> Learned:
        """The same with one more report."""
        return replace(
            self,
            curve=(*self.curve, objective),
            losses=(*self.losses, self.loss),
            steps=(*self.steps, self.step),
        )


def _save(arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata)
