"""A trainable whose process dies again and again; light, for each death imports it anew."""

from __future__ import annotations

import os
from pathlib import Path

from ray import tune

from trainables.trial import trial_config


class Dying(tune.Trainable):
    """Ends at its last epoch; its process dies at every step before, `further` with an epoch done.

    config["trial"], as JSON: digest, teacher, folder, further, epochs.
    """

    def setup(self, config):
        self.trial = trial_config(config)
        self.marks = Path(self.trial["folder"])

    def step(self):
        attempts = self.marks / f"{self.trial['digest']}-attempts"
        done = self.marks / f"{self.trial['digest']}-done"
        if self.iteration == 0:
            with attempts.open("a") as file:
                file.write("x")
        epoch = len(done.read_text()) + 1 if done.exists() else 1
        if not self.trial["further"] or self.iteration == 1:
            os._exit(1)
        with done.open("a") as file:
            file.write("x")
        return {"epoch": epoch, "done": epoch == self.trial["epochs"]}

    def reset_config(self, new_config):
        self.setup(new_config)
        return True
