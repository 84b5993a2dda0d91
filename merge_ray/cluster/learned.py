"""What a candidate has learned so far: it travels with the calls to hosts, and lies beside the ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save


@dataclass(frozen=True)
class Learned:
    """What a candidate has learned so far.

    step: the steps done. state: see :meth:`merge_ray.methods.base.Learner.state`. loss: the mean of the last call's
    steps. seconds: spent learning. curve, losses: the objective and the loss at each report so far.
    """

    step: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    curve: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    state: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """A safetensors file of the state, the rest as its metadata."""
        about = json.dumps({name: value for name, value in asdict(self).items() if name != "state"})
        return save({name: np.asarray(array, order="C") for name, array in self.state.items()}, {"learned": about})

    @classmethod
    def read(cls, path: Path) -> Learned:
        """The inverse of :meth:`to_bytes`, from a file; nothing where there is none."""
        if not path.exists():
            return cls()
        with safe_open(path, "np") as file:
            about = json.loads(file.metadata()["learned"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about.update(curve=tuple(about["curve"]), losses=tuple(about["losses"]))
        return cls(**about, state=state)

    def reported(self, objective: float) -> Learned:
        """The same with one more report."""
        return replace(self, curve=(*self.curve, objective), losses=(*self.losses, self.loss))
