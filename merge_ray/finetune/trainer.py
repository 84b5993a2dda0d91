"""One training loop: AdamW on flat parameters, resumable, over one worker or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from merge_ray.checkpoints import write_safetensors
from merge_ray.errors import CheckpointError, MergeRayError
from merge_ray.finetune.spec import Recipe

WEIGHTS, MOMENTS = "weights.", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Workers:
    """This process's place among those that train one model together.

    sum: adds up a tensor over all workers, in place. Every worker takes its share of each batch, and the
    sum of the workers' gradients is the gradient of the whole batch.
    """

    rank: int = 0
    count: int = 1
    sum: Callable[[Tensor], object] = lambda tensor: tensor

    def share(self, rows: np.ndarray) -> np.ndarray:
        """The part of a batch's rows that this worker takes."""
        return rows[self.rank :: self.count]


ALONE = Workers()


class Trainer:
    """Trains a module's parameters as one flat vector.

    AdamW treats elements alike, so one vector gives the same steps as many tensors, and workers exchange
    gradients in one message.

    checkpoint: where the state is kept while training (safetensors: weights and moments, float32); training
    goes on from it if it is there. identity: what the training is determined by; a checkpoint of another
    identity raises :class:`CheckpointError`. steps: the length of the training.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        steps: int,
        checkpoint: Path,
        identity: str,
        checkpoint_every: int,
        workers: Workers = ALONE,
    ) -> None:
        self.module = module.train()
        self.recipe = recipe
        self.steps = steps
        self.checkpoint = checkpoint
        self.identity = identity
        self.checkpoint_every = checkpoint_every
        self.workers = workers
        self.parameter, self.gradient = flatten_parameters(module)
        self.optimizer = torch.optim.AdamW([self.parameter], weight_decay=recipe.weight_decay)
        self.state = self.optimizer.state[self.parameter]
        self.state.update(
            step=torch.tensor(0.0), **{moment: torch.zeros_like(self.parameter.data) for moment in MOMENTS}
        )
        if checkpoint.exists():
            self._restore()

    @property
    def step(self) -> int:
        """The steps taken so far."""
        return int(self.state["step"])

    def run(self, loss: Callable[[int], Tensor]) -> Iterator[int]:
        """Train to the end, yielding the number of steps taken after each.

        ``loss(step)`` is the sum of this worker's samples' losses divided by the size of the whole batch; it
        must depend on nothing but the weights and ``step``, so that a continued training repeats itself.
        """
        while self.step < self.steps:
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.recipe, self.steps, self.step)
            self.gradient.zero_()
            loss(self.step).backward()
            self.workers.sum(self.gradient)
            norm = float(self.gradient.norm())
            if not math.isfinite(norm):
                raise MergeRayError(
                    f"{self.checkpoint.stem}: training diverged at step {self.step} (the gradient is not finite); "
                    f"a learning_rate below {self.recipe.learning_rate:g} may help"
                )
            self.gradient.mul_(min(1.0, self.recipe.max_gradient_norm / max(norm, 1e-12)))
            self.optimizer.step()
            if self.workers.rank == 0 and (self.step % self.checkpoint_every == 0 or self.step == self.steps):
                self._save()
            yield self.step
        self.module.eval()

    def _save(self) -> None:
        state = {WEIGHTS + name: tensor for name, tensor in self.module.state_dict().items()}
        state |= {moment: self.state[moment] for moment in MOMENTS}
        write_safetensors(self.checkpoint, state, {"identity": self.identity, "step": str(self.step)})

    def _restore(self) -> None:
        with safe_open(self.checkpoint, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != self.identity:
                raise CheckpointError(
                    f"{self.checkpoint} belongs to a training with other settings, data or base; "
                    "remove it to start over, or choose another output"
                )
            for name, tensor in self.module.state_dict().items():
                tensor.copy_(file.get_tensor(WEIGHTS + name))
            for moment in MOMENTS:
                self.state[moment].copy_(file.get_tensor(moment))
            self.state["step"].fill_(int(metadata["step"]))


def flatten_parameters(module: nn.Module) -> tuple[nn.Parameter, Tensor]:
    """Make a module's parameters, and their gradients, views of two flat vectors ``[P]``; returns both."""
    parameters = list(module.requires_grad_(True).parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    gradient = torch.zeros_like(flat.data)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, view, slope in zip(parameters, flat.data.split(sizes), gradient.split(sizes), strict=True):
        parameter.data = view.view(parameter.shape)
        parameter.grad = slope.view(parameter.shape)
    flat.grad = gradient
    return flat, gradient


def learning_rate(recipe: Recipe, steps: int, step: int) -> float:
    """The rate of ``step`` (from 0) of ``steps``: linear warm-up, then half a cosine."""
    warmup = min(recipe.warmup_steps, steps // 5)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def batch_rows(samples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """The rows of a step's batch: epochs of random order strung together, a function of its arguments alone."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows = np.empty_like(positions)
    for epoch in np.unique(positions // samples):
        order = np.random.default_rng((seed, int(epoch))).permutation(samples)
        inside = positions // samples == epoch
        rows[inside] = order[positions[inside] % samples]
    return rows
