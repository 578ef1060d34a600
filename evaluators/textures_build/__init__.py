"""Builds the texture patch attack's dictionary from a data set: `python -m evaluators.textures_build`."""
