"""``python -m merge_ray`` is the ``merge-ray`` command."""

from merge_ray.cli import main

main()
