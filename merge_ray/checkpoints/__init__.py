"""Read and write weights. Reading never imports or runs anything that a file names."""

from merge_ray.checkpoints.locations import open_location
from merge_ray.checkpoints.read import fingerprint_file, read_metadata, read_weights
from merge_ray.checkpoints.write import write_huggingface, write_open_clip, write_safetensors

__all__ = [
    "fingerprint_file",
    "open_location",
    "read_metadata",
    "read_weights",
    "write_huggingface",
    "write_open_clip",
    "write_safetensors",
]
