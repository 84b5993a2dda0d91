"""Make fine-tuned models: the spec, and the training loops, which know nothing of Ray."""

from merge_ray.finetune.jobs import TaskResult, finetune_task, make_base, prepare_data, read_result, write_results
from merge_ray.finetune.spec import FinetuneSpec, PretrainSpec, Recipe
from merge_ray.finetune.trainer import Trainer, Workers

__all__ = [
    "FinetuneSpec",
    "PretrainSpec",
    "Recipe",
    "TaskResult",
    "Trainer",
    "Workers",
    "finetune_task",
    "make_base",
    "prepare_data",
    "read_result",
    "write_results",
]
