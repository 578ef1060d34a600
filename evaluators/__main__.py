"""The command line: `python -m evaluators` asks evaluators' questions of any checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from evaluators.options import JudgeOptions
from trainables.options import stop_on_signals


def main(arguments: Sequence[str] | None = None, prog: str = JudgeOptions.prog) -> int:
    """Run the command; 0 done, 2 asked wrongly, 130 interrupted."""
    options = JudgeOptions.read(arguments, prog)
    try:
        from evaluators.checkpoint import judge_checkpoint

        return 0 if judge_checkpoint(options) else 130
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
