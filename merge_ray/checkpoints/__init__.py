"""Read and write weights. Reading never imports or runs anything that a file names."""

from merge_ray.checkpoints.adapters import is_adapter, read_finetuned, write_adapter
from merge_ray.checkpoints.locations import find_beside, open_location
from merge_ray.checkpoints.read import fingerprint_file, read_metadata, read_weights
from merge_ray.checkpoints.s3_files import nothing
from merge_ray.checkpoints.upload import destination
from merge_ray.checkpoints.write import stream_safetensors, write_huggingface, write_open_clip, write_safetensors

__all__ = [
    "destination",
    "find_beside",
    "fingerprint_file",
    "is_adapter",
    "nothing",
    "open_location",
    "read_finetuned",
    "read_metadata",
    "read_weights",
    "stream_safetensors",
    "write_adapter",
    "write_huggingface",
    "write_open_clip",
    "write_safetensors",
]
