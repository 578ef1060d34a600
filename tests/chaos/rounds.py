"""Rounds of chaos: a study with faults in it is run to its end and compared with one without."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.faults import FAULTS, FILLED, ON_SERVER, ON_TEAM
from tests.chaos.study import Disturbed
from tests.disks import small_disk
from tests.servers import MlflowServer

MEGABYTES = 128
FAULTS_EACH = 3


class Chaos:
    """Studies in folders of their own, and what they come to undisturbed.

    A seed sets which faults come, after which part of the time that the study takes undisturbed.
    outage: how many seconds MLflow is away, 0 for up to 20 at random.
    """

    def __init__(self, folder: Path, seed: int, *, outage: float = 0) -> None:
        self._folder, self.chance, self._outage = folder, random.Random(seed), outage
        self._expected: dict[int, tuple[dict[str, object], float]] = {}
        self._rounds = 0

    def rounds(self, names: Sequence[str], count: int) -> list[list[str]]:
        """Draw faults, each as often as any other, for studies that can have them."""
        drawn: list[str] = []
        while len(drawn) < count:
            drawn += self.chance.sample(names, len(names))
        team = [name for name in drawn[:count] if name in ON_TEAM]
        alone = [name for name in drawn[:count] if name not in ON_TEAM]
        return [
            part[i : i + FAULTS_EACH]
            for part in (alone, team)
            for i in range(0, len(part), FAULTS_EACH)
        ]

    def round(self, faults: Sequence[str]) -> tuple[list[str], str]:
        """Disturb a study; return which faults came in time, and what was lost by them."""
        workers = 2 if set(faults) & set(ON_TEAM) else 1
        expected, seconds = self._undisturbed(workers)
        study = self._new(workers, on_server=bool(set(faults) & set(ON_SERVER)))
        disk = small_disk(study.results, MEGABYTES) if set(faults) & set(FILLED) else None
        with disk or contextlib.nullcontext(), contextlib.closing(study):
            try:
                injected = self._injected(study, faults, seconds)
            except AssertionError as error:
                return [*faults], str(error)
            if not study.finish():
                return injected, f"the command does not end well:\n{study.said()[-3000:]}"
            found = study.outcome()
            differing = [name for name, value in expected.items() if found[name] != value]
            return injected, f"other {', '.join(differing)}" if differing else ""

    def _injected(self, study: Disturbed, faults: Sequence[str], seconds: float) -> list[str]:
        injected = []
        for name in faults:
            study.start()
            if not study.wait_for(study.is_under_way):
                break
            time.sleep(self.chance.uniform(0, seconds / 2))
            if FAULTS[name](study, self.chance):
                injected.append(name)
        return injected

    def _undisturbed(self, workers: int) -> tuple[dict[str, object], float]:
        if workers not in self._expected:
            with contextlib.closing(self._new(workers, on_server=False)) as study:
                study.start()
                assert study.wait_for(study.is_under_way), study.said()
                began = time.monotonic()
                assert study.ended() == 0, study.said()
                self._expected[workers] = study.outcome(), time.monotonic() - began
        return self._expected[workers]

    def _new(self, workers: int, *, on_server: bool) -> Disturbed:
        self._rounds += 1
        folder = self._folder / f"study-{self._rounds}"
        folder.mkdir(parents=True)
        server = MlflowServer(folder / "server") if on_server else None
        if server:
            server.start()
        return Disturbed(folder, workers, server, self._outage)
