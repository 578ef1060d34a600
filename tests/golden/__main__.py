"""Make the golden values anew by the reference, and say what changed: `python -m tests.golden`."""

from __future__ import annotations

import json

import torch

from tests.golden import FOLDER, RECIPES, stored
from tests.golden.reference import values


def main() -> None:
    """Write each recipe's file and print which of its values are not as they were."""
    torch.set_num_threads(1)
    for name in RECIPES:
        path = FOLDER / f"{name}.json"
        before = stored(name) if path.exists() else {}
        now = values(name)
        changed = [key for key in now if before.get(key) != now[key]]
        print(f"{name}: {', '.join(changed) or 'nothing'} changed")
        for key in changed:
            print(f"  {key}: {str(before.get(key))[:100]} -> {str(now[key])[:100]}")
        path.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    main()
