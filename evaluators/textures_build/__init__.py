"""The builder of texture dictionaries: `python -m evaluators.textures_build`."""
