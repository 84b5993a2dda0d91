"""Tasks: image classification data sets, their splits, their words, and the cache of their decoded images."""

from merge_ray.tasks.cache import CachedSplit, cache_directory, overlap
from merge_ray.tasks.facts import TASK_LISTS
from merge_ray.tasks.spec import SOURCES, TaskSpec
from merge_ray.tasks.task import Task, open_task

__all__ = ["SOURCES", "TASK_LISTS", "CachedSplit", "Task", "TaskSpec", "cache_directory", "open_task", "overlap"]
