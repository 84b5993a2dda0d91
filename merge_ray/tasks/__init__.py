"""Tasks: data sets of images and texts, their splits, their words, and the cache of what is prepared of them."""

from merge_ray.caches import cache_directory
from merge_ray.tasks.cache import CachedSplit, PreparedSplit, overlap
from merge_ray.tasks.facts import TASK_LISTS
from merge_ray.tasks.scenes import SceneSplit, prepare_scenes
from merge_ray.tasks.spec import SOURCES, TaskSpec
from merge_ray.tasks.task import Task, open_task
from merge_ray.tasks.text import TextSplit, prepare_text, split_texts

__all__ = [
    "SOURCES",
    "TASK_LISTS",
    "CachedSplit",
    "PreparedSplit",
    "SceneSplit",
    "Task",
    "TaskSpec",
    "TextSplit",
    "cache_directory",
    "open_task",
    "overlap",
    "prepare_scenes",
    "prepare_text",
    "split_texts",
]
