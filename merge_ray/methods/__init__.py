"""One module per published merging method; :mod:`merge_ray.methods.base` says what a method is."""
