"""Make the golden values anew by the reference, for `git diff`: `python -m tests.golden`."""

from __future__ import annotations

import json

import torch

from tests.golden import FOLDER, RECIPES
from tests.golden.reference import values

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in RECIPES:
        (FOLDER / f"{name}.json").write_text(json.dumps(values(name), indent=1) + "\n")
