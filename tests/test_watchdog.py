"""The watchdog on a real process that works, rests, works again and then hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import time
from trainables.watchdog import beat, counting_steps
with counting_steps(2.5):
    for _ in range(12):
        time.sleep(0.3)
        beat()
    print("worked")
time.sleep(3)
beat()
print("rested", flush=True)
with counting_steps(2.5):
    sum(range(10**13))  # holds Python's lock all the time
"""


def test_a_process_that_works_or_rests_is_left_alone_and_one_that_hangs_ends_with_its_stacks():
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.split() == ["worked", "rested"]
    assert ended.returncode == 1
    assert 'File "<string>", line 13' in ended.stderr
