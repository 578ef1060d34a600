"""The recorder: one thread that writes what trials and evaluators report to MLflow."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from typing import Any

from evaluators import evaluator_named, headlines
from evaluators.base import Evaluator, cell_digest
from evaluators.ledger import from_parquet, judged_by, to_parquet
from evaluators.transfer import TRANSFER, received
from grid.assess import AT, Cell, EvaluatorPool, cell_name
from grid.estimate import work_of
from grid.plan import Plan, Trial, transferring
from grid.status import Progress, ProgressLine
from trainables.data.base import Data
from trainables.data.listing import EMBEDDED, DataSource
from trainables.data.load import load_data
from trainables.options import as_typed
from trainables.recipe import Preprocessing, format_augmentations
from trainables.scale import Scale
from trainables.store.results import SECONDS, WAITING, WAITS
from trainables.store.retries import patiently
from trainables.store.storage import WEIGHTS, read_file, weights_path, write_file
from trainables.store.tracking import OTHER_WEIGHTS, RENEW_SECONDS, STOPPED, Tracker, TrialRun

POLL_SECONDS = 0.2
FLUSH_SECONDS = 10.0
EVENTS_AT_ONCE = 50  # then it is the cells' turn
WITHOUT_WEIGHTS = ("collapsed", STOPPED)
OVER = ("finished", *WITHOUT_WEIGHTS)
FAILED = ("failed", "blocked")
Lease = Enum("Lease", ["ASKED", "OURS", "THEIRS", "OVER"])  # of a trial: over is another's


class Recorder(threading.Thread):
    """Take events from the training driver, write them down in order, and keep cells moving.

    The only writer to MLflow while a study runs. `failures` lists what went wrong and is tried
    again by the next run of the command.
    """

    def __init__(
        self,
        tracker: Tracker,
        plan: Plan,
        *,
        study: str,
        scale: Scale,
        data: Data,
        source: DataSource = EMBEDDED,
        manifest: str = "",
        line: ProgressLine,
    ) -> None:
        super().__init__(name="recorder", daemon=True)
        self.failures: list[str] = []
        self.error: BaseException | None = None
        self._pool: EvaluatorPool
        self.parent = ""  # the id of the study's run in MLflow
        self.tracker, self._line = tracker, line
        self._study, self._plan, self._scale = study, plan, scale
        self._class_names = data.class_names
        self._dataset = {
            "name": data.name,
            "digest": manifest or data.train.ids_hash(),
            "source_type": "code",
            "source": scale.title,
            "profile": json.dumps({"train": len(data.train), "held_out": len(data.held_out)}),
        }
        self._trials = {trial.digest: trial for trial in plan}
        self._runs = {d: r for d, r in tracker.trials().items() if d in self._trials}
        # Once: an evaluator may have to list a stored set's images to identify them.
        self._questions: dict[tuple[Preprocessing, str, int], Question] = {}
        for key in {(t.geometry, name, t.images[name]) for t in plan for name in t.evaluators}:
            shown = scale.preprocessed(key[0])
            shown_data = data if shown == scale else load_data(shown, source)
            evaluator = evaluator_named(key[1], shown, images=key[2])
            self._questions[key] = Question(evaluator, shown_data)
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._leases: dict[str, Lease] = {}
        self._others: set[str] = set()  # commands that train trials of this plan
        self._storage = ""
        self._renewed_at = time.monotonic()
        self._unlogged: dict[str, list[Mapping[str, float]]] = {}
        self._epochs_done: Counter[str] = Counter()
        self._judged: set[tuple[str, int]] = set()  # digests and epochs whose weights are judged
        self._awaited: set[str] = set()  # trials whose cells another command judges
        self._flushed_at = 0.0
        self._received: dict[str, Question] | None = None  # by digest, once all else is judged
        self._training_over = threading.Event()
        self._abandon = threading.Event()
        self._costs = self._cost_of_images(len(data.held_out))
        self._count()

    def _cost_of_images(self, held_out: int) -> dict[str, float]:
        """Return by evaluator what judging an image costs, in the unit of a training's cost."""
        costs: defaultdict[str, float] = defaultdict(float)
        images = Counter[str]()
        for (digest, name), cost in work_of(self._plan, self._scale, held_out).items():
            if name:
                costs[name] += cost
                images[name] += self._question(digest, name).images
        return {name: cost / max(1, images[name]) for name, cost in costs.items()}

    def _count(self) -> None:
        """Count what there is to do."""
        todo = self.trials_to_train()
        missing = [
            (digest, name, epoch)
            for digest in self._trials
            for name, epoch in self._missing(digest)
            if epoch or self._outcome(digest) not in WITHOUT_WEIGHTS
        ]
        self.progress = Progress(
            trials=len(todo),
            cells=len(missing) + sum(self._ahead(trial) for trial in todo),
            epochs=sum(trial.recipe.epochs for trial in todo),
            cost_total=sum(trial.cost for trial in todo),
        )
        self._coming = Counter[str]()  # images that no trial has asked for yet
        for digest, name, epoch in missing:
            self._coming[name] += 0 if epoch else self._question(digest, name).images

    def _ahead(self, trial: Trial) -> int:
        """Count the cells of weights along the way that a trial has not logged yet."""
        run = self._runs.get(trial.digest)
        ahead = set(trial.checkpoints) - (run.checkpoints.keys() if run else set())
        return len(ahead) * len(trial.along)

    @property
    def is_all_done(self) -> bool:
        """Whether MLflow held every trial and every cell of the plan from the beginning."""
        return not (self.progress.trials or self.progress.cells or self._transfers())

    def trials_to_train(self) -> list[Trial]:
        """Return the trials that have no weights yet, in the plan's order."""
        return [t for digest, t in self._trials.items() if self._outcome(digest) not in OVER]

    def _outcome(self, digest: str) -> str:
        """Return how a trial ended; one that was stopped, and may not be, is waiting again."""
        outcome = self._runs[digest].outcome if digest in self._runs else "waiting"
        goes_on = outcome == STOPPED and not self._trials[digest].stops_from
        return "waiting" if goes_on else outcome

    def _missing(self, digest: str) -> list[tuple[str, int]]:
        """Return the evaluators, and the epochs, that have not judged a trial as they do now.

        Epoch 0: of the last weights. Those along the way count once the trial has logged them.
        """
        trial, run = self._trials[digest], self._runs.get(digest)
        cells = run.cells if run else {}
        logged = [epoch for epoch in trial.checkpoints if run and epoch in run.checkpoints]
        wanted = [(name, 0) for name in trial.evaluators]
        wanted += [(name, epoch) for epoch in logged for name in trial.along]
        return [
            (name, epoch)
            for name, epoch in wanted
            if cells.get(cell_name(name, epoch)) != self._question(digest, name).digest
        ]

    def _question(self, digest: str, evaluator: str) -> Question:
        trial = self._trials[digest]
        return self._questions[trial.geometry, evaluator, trial.images[evaluator]]

    def open_study(self) -> None:
        """Open the study's run in MLflow, and note on its trials' runs that they serve it."""
        tables = ", ".join(table.name for table in self._plan.tables) or "no tables"
        described = f"{len(self._trials)} trials of study {self._study} ({tables}) at scale "
        described += self._scale.title
        judging = {name for _, name, _ in self._questions}
        scores = headlines(judging)
        self.parent = self.tracker.open_study(
            self._study, described, scores, self._class_names, as_typed()
        )
        for digest, run in self._runs.items():
            self.tracker.enrol(run, self._study, " ".join(self._trials[digest].tables))

    def mend(self, storage: str) -> None:
        """Continue trials whose weights are damaged, if an evaluator or a student still needs them.

        Evaluators read weights from MLflow, students from the storage, where MLflow's are put back.
        The trial's last checkpoint makes both copies again.
        """
        self._storage, needed = storage, self._needed()
        for digest, run in self._runs.items():
            is_well = run.outcome != "finished" or self._restored(run, for_student=digest in needed)
            if not is_well and not self.tracker.lease(digest)[0]:
                self._line.say(
                    f"the weights of trial {digest} are damaged or missing: they are made again"
                )
                self.tracker.continue_trial(run)
        self._count()

    def _restored(self, run: TrialRun, *, for_student: bool) -> bool:
        """Put a student's weights back where they are needed; say whether all needed are sound."""
        place, sha256 = weights_path(self._storage, run.digest), run.weights_sha256
        is_lacking = for_student and hashlib.sha256(self._read(place) or b"").hexdigest() != sha256
        judges = self._missing(run.digest) or TRANSFER in self._trials[run.digest].evaluators
        if not (is_lacking or judges):
            return True
        weights = self.tracker.artifact(run.artifact_uri, WEIGHTS) or b""
        if hashlib.sha256(weights).hexdigest() != sha256:
            return False
        if is_lacking:
            patiently(partial(write_file, place, weights), say=self._line.say, stop=self._abandon)
        return True

    def _needed(self) -> set[str]:
        """Return the trials whose weights students still wait for."""
        recipes = (trial.recipe for trial in self.trials_to_train())
        return {other.digest() for recipe in recipes for other in recipe.prerequisites}

    @contextmanager
    def recording(self, pool: EvaluatorPool) -> Iterator[None]:
        """Write down what happens meanwhile, to the last cell, or up to Ctrl-C or an error.

        After those, cells under way are left to the next run.
        """
        self._pool = pool
        self.start()
        try:
            yield
            self._training_over.set()
            while self.is_alive():
                self.join(timeout=0.5)
            if self.error is not None:
                raise self.error
        except BaseException as error:
            # What asks Ray again once it is shut down would start another one.
            self._abandon.set()
            self.tracker.give_up()
            self.join(timeout=30)
            if isinstance(self.error, ValueError | ConnectionError):
                raise self.error from error
            raise
        finally:
            with suppress(Exception):  # else others see in a while that nobody renews its leases
                self.tracker.renew(over=True)

    def lease(self, digest: str) -> Lease:
        """Say whose a trial is; where that is not known, this is asked, and known in a while."""
        if digest not in self._leases:
            self._leases[digest] = Lease.OURS if self.tracker.is_alone else Lease.ASKED
            if not self.tracker.is_alone:
                self._events.put(lambda: self._take(digest))
        return self._leases[digest]

    def _take(self, *digests: str) -> None:
        """Take trials for this command; those that others have ended are judged here, too."""
        holders = {digest: self.tracker.lease(digest) for digest in digests}
        had = [digest for digest, (_, others) in holders.items() if others]
        stored = self.tracker.trials(had[0] if len(had) == 1 else "") if had else {}
        for digest in had:
            if digest in stored:
                self._adopt(stored[digest])
        for digest, (holder, _) in holders.items():
            outcome, run = self._outcome(digest), self._runs.get(digest)
            has_failed = outcome in FAILED
            is_over = outcome in OVER or (has_failed and bool(holder))
            self._leases[digest] = Lease.OVER if is_over else Lease.THEIRS if holder else Lease.OURS
            if holder and has_failed:  # it keeps its lease, and does not try again
                self.failures.append(f"{self._trials[digest].name}: {outcome} in command {holder}")
            elif run and not holder:
                if has_failed:  # in an earlier run: others wait for this one
                    self.tracker.continue_trial(run)
                self._submit_missing_cells(run)
            self._awaited -= {digest}
            if holder and run and outcome in OVER and self._judgeable(run):
                self._awaited |= {digest}
            if holder and holder not in self._others:
                self._others.add(holder)
                self._line.say(
                    f"another command ({holder}) trains and judges trials of this plan: these "
                    "wait; if it has died, they are taken over in 5 min"
                )

    def _adopt(self, run: TrialRun) -> None:
        """Note how far another command has come with a trial."""
        digest, trial = run.digest, self._trials[run.digest]
        was_over, before = self._outcome(digest) in OVER, self._missing(digest)
        self.progress.cells -= len(before) + self._ahead(trial)
        self._runs[digest] = run
        missing = self._missing(digest)
        self.progress.cells += len(missing) + self._ahead(trial)
        judged = (name for name, epoch in before if not epoch and (name, 0) not in missing)
        self._coming -= self._images(digest, judged)
        if self._outcome(digest) in OVER and not was_over:
            if digest in self._needed():
                self._restored(run, for_student=True)
            self.tracker.enrol(run, self._study, " ".join(trial.tables))
            self._ended(run)

    def started(self, digest: str) -> None:
        """Note that a trial began or went on."""
        self._events.put(lambda: self._on_started(digest))

    def check(self) -> None:
        """Raise RuntimeError when nobody writes down any more what happens."""
        if self.error is not None:
            raise RuntimeError("the recorder has stopped") from self.error

    def reported(self, result: Mapping[str, Any]) -> None:
        """Note what a step of a trial returned."""
        handle = self._on_failed if result["outcome"] == "failed" else self._on_reported
        self._events.put(lambda: handle(result["digest"], result))

    def retried(self, digest: str, reason: str) -> None:
        """Note that a trial failed and will be tried again."""
        self._line.say(f"{self._trials[digest].name} is tried again: {reason.partition('. ')[0]}")

    def failed(self, digest: str, reason: str, trace: str = "") -> None:
        """Note that a trial failed for good in this run."""
        self._events.put(lambda: self._on_failed(digest, {"reason": reason, "trace": trace}))

    def run(self) -> None:
        try:
            if self.tracker.is_alone:
                for run in self._runs.values():
                    self._submit_missing_cells(run)
            else:
                over = (run for digest, run in self._runs.items() if self._outcome(digest) in OVER)
                self._take(*(run.digest for run in over if self._judgeable(run)))
            while not self._abandon.is_set():
                self._handle_events(EVENTS_AT_ONCE)
                wait = POLL_SECONDS if self._events.empty() else 0.0
                for cell, ledger, error in self._pool.poll(wait):
                    self._record(cell, ledger, error)
                judged = self._pool.seconds(self._coming, self._costs, self.progress.pace)
                self._line.show(self.progress.line(judged, time.monotonic()))
                if len(self._pool) == 0:
                    waits = self._awaited or not self._events.empty()
                    if self._training_over.is_set() and not (waits or self._submit_transfers()):
                        break
                    time.sleep(wait)
            self._handle_events(self._events.qsize())
            self._flush()
        except BaseException as error:
            self.error = error

    def _handle_events(self, most: int) -> None:
        for _ in range(min(most, self._events.qsize())):
            self._events.get()()
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self._flush()
        if time.monotonic() - self._renewed_at > RENEW_SECONDS:
            lost = {digest for digest in self.tracker.renew() if self._outcome(digest) not in OVER}
            leases = list(self._leases.items())  # Tune's thread adds some
            theirs = (d for d, lease in leases if lease is Lease.THEIRS or d in lost)
            self._take(*dict.fromkeys([*theirs, *self._awaited]))
            if self._awaited and self._training_over.is_set() and not len(self._pool):
                # What it has and does not judge is another's, which may wait for it likewise.
                self.tracker.renew(over=True)
            self._renewed_at = time.monotonic()

    def _on_started(self, digest: str) -> None:
        trial = self._trials[digest]
        self.progress.running.setdefault(digest, trial.name)
        self._runs[digest] = self.tracker.start_trial(
            digest=digest,
            name=trial.name,
            parent=self.parent,
            study=self._study,
            tables=" ".join(trial.tables),
            recipe_json=trial.recipe.model_dump_json(),
            params=_params(trial),
            dataset=self._dataset,
            trained=bool(trial.recipe.epochs),
        )

    def _on_reported(self, digest: str, result: Mapping[str, Any]) -> None:
        trial, run = self._trials[digest], self._runs[digest]
        for note in result.get("notes", ()):
            self._line.say(f"{self._trials[digest].name}: {note}")
        self.tracker.tag_trained(run, result.get("trained", {}))
        unlogged = self._unlogged.setdefault(digest, [])
        unlogged.extend(result["epochs"])
        # A trial that is tried again reports all of its epochs again.
        fresh = max(0, result["epoch"] - self._epochs_done[digest])
        self._epochs_done[digest] += fresh
        self.progress.epochs_done += fresh
        if fresh:
            seconds = sum(entry.get(SECONDS, 0.0) for entry in result["epochs"][-fresh:])
            cost = trial.cost * fresh / trial.recipe.epochs
            self.progress.trained(cost, seconds, time.monotonic())
        latest = {k: v for entry in (run.metrics, *unlogged) for k, v in entry.items()}
        accuracy = latest.get("held_out/accuracy")
        shown = f" {accuracy:.1%}" if accuracy is not None else ""
        if (waits := latest.get(WAITING, 0.0)) >= WAITS:
            shown += f", waits for data {waits:.0%}"
        epoch = f"epoch {result['epoch']}/{trial.recipe.epochs}"
        self.progress.running[digest] = f"{trial.name} {epoch}{shown}"
        for epoch, path in result.get("checkpoints", {}).items():
            # Judged while the trial trains on.
            if epoch not in run.checkpoints and (content := self._read(path)):
                self.tracker.log_checkpoint(run, epoch, content, **self._sizes(run))
                self._submit_missing_cells(run)
        if result["outcome"] != "training":
            self._on_done(run, result)

    def _read(self, place: str) -> bytes | None:
        return patiently(lambda: read_file(place), say=self._line.say, stop=self._abandon)

    def _sizes(self, run: TrialRun) -> dict[str, int]:
        """Return what MLflow notes of a model's input and output."""
        recipe = self._trials[run.digest].recipe
        shown = self._scale.preprocessed(recipe.preprocessing)
        # A head that was not trained here may have other classes than the data.
        classes = shown.num_classes if recipe.epochs else -1
        return {"image_size": shown.image_size, "classes": classes}

    def _on_done(self, run: TrialRun, result: Mapping[str, Any]) -> None:
        self.tracker.log_epochs(run, self._unlogged.pop(run.digest, ()), later=True)
        outcome, reason = result["outcome"], result["reason"]
        if outcome == "finished":
            before = run.weights_sha256
            content = self._read(result["weights"])
            assert content is not None, f"{result['weights']} is gone"
            self.tracker.store_weights(run, content, result["sha256"], **self._sizes(run))
            if before not in ("", result["sha256"]):
                self._forget_cells(run)
        else:
            self._line.say(f"{outcome}: {self._trials[run.digest].name}: {reason}")
        self.tracker.end_trial(run, outcome=outcome, reason=reason)
        self.progress.trials_trained += bool(self._trials[run.digest].recipe.epochs)
        self.progress.running.pop(run.digest, None)
        self._ended(run)
        self._submit_missing_cells(run)

    def _ended(self, run: TrialRun) -> None:
        self.progress.trials_done += 1
        self.progress.cells -= self._ahead(self._trials[run.digest])
        if run.outcome != "finished":  # there are no last weights
            never = [name for name, epoch in self._missing(run.digest) if not epoch]
            self.progress.cells -= len(never)
            self._coming -= self._images(run.digest, never)

    def _forget_cells(self, run: TrialRun) -> None:
        """Mark cells to be judged again: they were judged with other weights of the trial."""
        before = len(self._missing(run.digest))
        for evaluator in (name for name in list(run.cells) if AT not in name):
            self.tracker.forget_cell(run, evaluator, OTHER_WEIGHTS)
        self.progress.cells += len(self._missing(run.digest)) - before

    def _on_failed(self, digest: str, failure: Mapping[str, Any]) -> None:
        reason = failure["reason"]
        self.failures.append(f"{self._trials[digest].name}: {reason}")
        if digest not in self._runs:
            self._on_started(digest)
        self.progress.running.pop(digest, None)
        run = self._runs[digest]
        self.tracker.end_trial(run, outcome="failed", reason=reason, trace=failure["trace"])

    def _images(self, digest: str, evaluators: Iterable[str]) -> Counter[str]:
        """Return of how many images of a trial's evaluators ask."""
        return Counter({name: self._question(digest, name).images for name in evaluators})

    def _judgeable(self, run: TrialRun) -> dict[int, list[str]]:
        """Return by epoch the evaluators that have not judged weights that are there."""
        missing: dict[int, list[str]] = {}
        for name, epoch in self._missing(run.digest):
            if epoch or run.outcome == "finished":
                missing.setdefault(epoch, []).append(name)
        return missing

    def _submit_missing_cells(self, run: TrialRun) -> None:
        """Have the weights that are there of a trial judged, each once."""
        trial = self._trials[run.digest]
        for epoch, names in self._judgeable(run).items():
            if (run.digest, epoch) in self._judged:
                continue
            self._judged.add((run.digest, epoch))
            if not epoch:
                self._coming -= self._images(run.digest, names)
            place = self.tracker.place_of(run, epoch)
            for name, question in ((n, self._question(run.digest, n)) for n in names):
                cell = Cell(
                    *(run.digest, place, name, question.digest),
                    geometry=trial.geometry,
                    epoch=epoch,
                    images=trial.images[name],
                )
                self._pool.submit(cell, question.images, least=question.evaluator.least_shard)

    def _transfers(self) -> list[tuple[Cell, Question]]:
        """Return the cells that judge all models' adversarial images and are not judged yet.

        Models that see images in another way have others among themselves.
        """
        sources: defaultdict[Preprocessing, list[TrialRun]] = defaultdict(list)
        for trial in transferring(self._trials.values()):
            if self._outcome(trial.digest) == "finished":
                question, run = self._question(trial.digest, TRANSFER), self._runs[trial.digest]
                if run.cells.get(TRANSFER) == question.digest:
                    sources[trial.geometry].append(run)
        missing = []
        for geometry, runs in ((g, runs) for g, runs in sources.items() if len(runs) > 1):
            places = tuple((run.digest, run.artifact_uri, run.ledgers[TRANSFER]) for run in runs)
            sha256s = {digest: sha256 for digest, _, sha256 in places}
            for run in runs:
                alone = self._question(run.digest, TRANSFER)
                images = self._trials[run.digest].images[TRANSFER]
                settings: Any = {"images": images, "sources": sha256s}
                asking = evaluator_named(TRANSFER, alone.evaluator.scale, **settings)
                question = Question(asking, alone.data)
                if run.cells.get(received(sha256s)) != question.digest:
                    cell = Cell(
                        *(run.digest, run.artifact_uri, TRANSFER, question.digest),
                        geometry=geometry,
                        images=images,
                        sources=places,
                    )
                    missing.append((cell, question))
        return missing

    def _submit_transfers(self) -> bool:
        """Have models judge one another's adversarial images, once; say whether there is any.

        One command does it, and the others wait for it.
        """
        if self._received is not None or not transferring(self._trials.values()):
            return False
        holder, others = self.tracker.lease(TRANSFER)
        if holder:
            return True
        if others:
            self._runs |= {d: r for d, r in self.tracker.trials().items() if d in self._trials}
        transfers = self._transfers()
        self._received = {question.digest: question for _, question in transfers}
        self.progress.cells += len(transfers)
        for cell, question in transfers:
            self._pool.submit(cell, question.images, least=question.evaluator.least_shard)
        return bool(transfers)

    def _record(self, cell: Cell, content: bytes, error: str) -> None:
        """Write a cell's ledger and scores, or why there are none."""
        run = self._runs[cell.trial]
        question = (self._received or {}).get(cell.question)
        question = question or self._question(cell.trial, cell.evaluator)
        if not error:
            ledger, seconds = from_parquet(content)
            try:
                scores, provenance = question.evaluator.summarize(ledger), judged_by(content)
            except Exception as problem:  # of a plug-in, or of odd verdicts: other cells go on
                error = f"its verdicts have no scores: {problem!r}"
        if error:
            self.failures.append(f"{cell.evaluator} of {self._trials[cell.trial].name}: {error}")
            self.tracker.fail_cell(run, cell.name, error)
            return
        columns = question.evaluator.columns
        shown = {name for c in columns for name in (c.name, c.counterpart_score)}
        self.tracker.record_cell(
            run,
            evaluator=cell.name,
            epoch=cell.epoch,
            cell=cell.question,
            identity=question.identity,
            ledger=to_parquet(ledger, seconds=seconds, judged_by=provenance, scores=scores),
            judged_by=provenance,
            metrics={score.name: score.value for score in scores if score.name in shown},
            seconds=seconds,
        )
        self._pool.settle(cell)
        self.progress.cells_done += 1

    def _flush(self) -> None:
        for digest in list(self._unlogged):
            self.tracker.log_epochs(self._runs[digest], self._unlogged.pop(digest))
        self._flushed_at = time.monotonic()


class Question:
    """An evaluator's question about data as some models see them; `identity` is JSON."""

    def __init__(self, evaluator: Evaluator, data: Data) -> None:
        self.evaluator, self.digest, self.data = evaluator, cell_digest(evaluator, data), data
        self.identity, self.images = json.dumps(evaluator.identity(data)), evaluator.total(data)


def _params(trial: Trial) -> dict[str, Any]:
    recipe = trial.recipe
    fields = recipe.effective()
    if recipe.epochs:
        fields["augmentations"] = format_augmentations(recipe.augmentations)
    if recipe.init:
        fields["init"] = recipe.init
    flat: dict[str, Any] = {"family": recipe.family, "size": recipe.size}
    for name, value in fields.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}".rstrip("."): entry for key, entry in nested}
    return flat
