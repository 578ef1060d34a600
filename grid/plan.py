"""Recipe x axes -> trials: apply, refuse with a reason, share, order. Pure: no Ray, no clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from evaluators import EVALUATORS, PGD_LENGTHS, answering, evaluator_of
from grid.axes import at_key, axis_value, check_settings, format_settings, with_settings
from grid.space import BASE, Labels
from grid.study import Study
from grid.table import Row, Table
from trainables.data.listing import EMBEDDED, DataSource
from trainables.data.registry import REDUCED
from trainables.recipe import Preprocessing, Recipe, check_known, nearest, problem
from trainables.scale import Scale, scale_named

Refused = tuple[str, str]  # a combination of axes that cannot be, and why
Check = Callable[[Recipe], None]  # ValueError where a recipe cannot be trained
MOST_RECIPES = 100_000
SHORT = 6  # digits of a digest in a trial's name
LONGEST_WARMUP = 10  # epochs, of the study's recipes
STUDYS_EPOCHS = 100  # that --epochs stands for
ADVERSARIAL_SEEDS = 3
# The axes that a recipe's description tells of.
DESCRIBED = {
    *("family", "size", "model", "activation", "optimizer", "scheduler", "augmentation", "epochs"),
    *("augmentations", "training", "norm", "protocol", "precision", "seed"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a quick look, 0 where nothing is cut; `why` says where they are from."""

    train_images: int = 0
    eval_images: int = 0
    epochs: int = 0
    why: str = ""

    def described(self, scale: Scale) -> str:
        """Say the sizes beside those of a scale; '' where nothing is cut."""
        there, planned = scale.data_set.train_images, round(STUDYS_EPOCHS * scale.epochs_factor)
        parts = (
            (self.train_images, f"of {there:,} train images"),
            (self.epochs, f"epochs in place of {planned}"),
            (self.eval_images, "held-out images"),
        )
        text = ", ".join(f"{size:,} {of_all}" for size, of_all in parts if size)
        return text and f"Quick look: {text}"


class Request(NamedTuple):
    """A recipe as it is trained, what it serves and the evaluators of its columns.

    model: the study's, for which that of the recipe may stand. labels: of its values in a grid.
    label: of a table's row.
    """

    recipe: Recipe
    purpose: str
    evaluators: tuple[str, ...] = ()
    model: str = ""
    labels: Mapping[str, str] = {}
    seeds: int = 1
    label: str = ""


@dataclass(frozen=True)
class Trial:
    """One recipe of a study, the table rows it serves and the evaluators that judge it.

    Its `name` is that of its first row, or says its recipe, with a short digest. stops_from: the
    first epoch after which it can be stopped early, 0 where never. images: by evaluator, how many
    it draws, where that is not the scale's number.
    """

    recipe: Recipe
    digest: str
    name: str
    serves: tuple[str, ...]
    evaluators: tuple[str, ...]
    cost: float
    checkpoints: tuple[int, ...] = ()  # the epochs whose weights are judged, too
    along: tuple[str, ...] = ()  # by which evaluators
    stops_from: int = 0
    images: Mapping[str, int] = field(default_factory=Counter)

    @property
    def geometry(self) -> Preprocessing:
        """How images are brought to the model's size, where that is not the scale's way."""
        return self.recipe.preprocessing.geometry()

    @property
    def tables(self) -> dict[str, None]:
        """The names of the tables that it serves, in order."""
        return dict.fromkeys(place.split()[0] for place in self.serves)


@dataclass(frozen=True)
class Plan:
    """The trials of a study, those that need no training and then the longest first.

    `requests` counts rows, combinations and their needs before equal ones are shared; `tables` hold
    the recipes as they are trained at the scale, and how often; `seeds` has each combination of a
    grid; `notes` say what was adapted to what is set;
    `longest_chain` is the cost of the trainings that need one another; `grid` has by a trial's
    digest the labels of its values on a grid's axes.
    """

    trials: tuple[Trial, ...]
    refused: tuple[Refused, ...] = ()
    requests: int = 0
    tables: tuple[Table, ...] = ()
    seeds: int = 1
    notes: tuple[str, ...] = ()
    longest_chain: float = 0.0
    grid: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def makeup(self) -> str:
        """Count the trainings, and the models that need none, in words."""
        untrained = sum(not trial.recipe.epochs for trial in self)
        as_they_are = f" and {untrained} models as they are" if untrained else ""
        return f"{len(self.trials) - untrained} trainings{as_they_are}"

    @property
    def evaluators(self) -> set[str]:
        """The evaluators that judge one trial or more."""
        return {name for trial in self for name in trial.evaluators}

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)


def transferring(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that judge one another's adversarial images: a recipe's first trainings."""
    of_study = [trial for trial in trials if "transfer" in trial.evaluators]
    return [trial for trial in of_study if not trial.recipe.seed] or of_study


def with_sizes(scale: Scale, sizes: Sizes, *, reduced: bool, reduced_epochs: int = 0) -> Scale:
    """Return a scale with so many train images and epochs; ValueError where there are fewer.

    reduced: its models are cut down as at digits, unless they are already. reduced_epochs: epochs
    for 100 of the study where they are, unless `sizes` has some.
    """
    name, there = scale.name, scale.data_set.train_images
    if sizes.train_images > there:
        raise ValueError(f"--train-images {sizes.train_images}: there are {there:,}")
    if sizes.train_images not in (0, there):
        name += f"-{sizes.train_images}train"
    if reduced and scale.depth_divisor == 1:
        name += REDUCED
    sized = scale_named(name).preprocessed(scale.data_set.departure)
    epochs = sizes.epochs or (reduced_epochs if sized.depth_divisor > 1 else 0)
    factor = Fraction(epochs, STUDYS_EPOCHS) or scale.epochs_factor
    chosen = {name: getattr(scale, name) for name in ("autoattack", "attacks_in")}
    return replace(sized, epochs_factor=factor, **chosen)


def enumerate_trials(
    study: Study, scale: Scale, check: Check | None = None, *, seeds: int = 1
) -> tuple[list[Request], list[Refused]]:
    """Return what a study's grid spans, of a sample no more than its size, and what was refused.

    ValueError where with its seeds it is too large.
    """
    spanned, refused = [], []
    size = min(study.size, study.sample.size if study.sample else study.size)
    if size * seeds > MOST_RECIPES:
        raise ValueError(
            f"{size:,} combinations with {seeds:,} seeds each are more than the "
            f"{MOST_RECIPES:,} recipes that a study can have; a sample of them may be fewer"
        )
    for labels in study.combinations():
        values = {axis: study.axes[axis][label] for axis, label in labels.items() if axis != BASE}
        try:
            base = study.base[labels[BASE]]
            stated = with_settings(base, study.settings, values, study.library)
            recipe = _as_at(scale, study.cut_down(stated, scale))
            if check:
                check(recipe)
        except ValueError as error:
            refused.append((format_settings(_shown(labels, study)), problem(error)))
            continue
        on_axes = {axis: study.label_of(labels, axis) for axis in (BASE, *study.axes)}
        spanned.append(Request(recipe, study.name, model=stated.model, labels=on_axes, seeds=seeds))
        if len(spanned) == size:
            break
    return spanned, refused


def _why_none(study: Study, refused: Sequence[Refused]) -> str:
    if not refused:
        return "`exclude` leaves none"
    first = " ".join(filter(None, (format_settings(study.settings), refused[0][0])))
    return f"all {len(refused)} are refused; the first, {first}: {refused[0][1]}"


def _as_at(scale: Scale, recipe: Recipe) -> Recipe:
    with at_key(f"{recipe.describe()} at scale {scale.name}"):
        return scale.shrink(recipe)


def _shown(labels: Mapping[str, str], study: Study) -> Labels:
    """Return labels without the base's, where there is one base."""
    return {axis: label for axis, label in labels.items() if axis != BASE or len(study.base) > 1}


def build_plan(
    study: Study,
    scale: Scale,
    *,
    tables: Collection[str] = (),
    only: Mapping[str, tuple[str, ...]] | None = None,
    seeds: int | None = None,
    evaluators: Collection[str] = (),
    check: Check | None = None,
    source: DataSource = EMBEDDED,
) -> Plan:
    """Turn a study into trials at a scale; ValueError teaches which request is wrong.

    Equal recipes are one trial. A combination of a grid that `check` raises on is refused. `only`
    keeps recipes whose axes have one of the given values; `evaluators` are the only ones to judge:
    of a grid any, of tables those of their columns. No `tables` or `evaluators`: all. No `seeds`:
    the study's replicates; where it states none, the scale's for rows of headline claims, and one.
    Evaluators whose images the source lacks, and nothing stands in for, are left out.
    """
    seeds = seeds or study.replicates
    check_settings(study.settings, study.axes)
    missing = source.missing(scale.data_set)
    for name in missing & {*evaluators}:
        raise ValueError(f"the images of {name} are not there: --stored {name}=DIR reads them")

    judging = partial(_judging, scale, missing)
    evaluators = judging(evaluators)
    for_all = evaluators if evaluators and study.base else judging(study.for_all)
    chosen = _choose_tables(study, tables)
    in_study = {*study.for_all, *(evaluator_of(name) for table in chosen for name in table.columns)}
    trained = _as_trained(chosen, study, scale, seeds)
    requests = [
        _of_row(table, row, stated, (*for_all, *judging(map(evaluator_of, table.columns))))
        for table, before in zip(trained, chosen, strict=True)
        for row, stated in zip(table.rows, before.rows, strict=True)
    ]
    combinations, refused = enumerate_trials(study, scale, check, seeds=seeds or 1)
    if study.base and not combinations:
        raise ValueError(f"study {study.name!r} has no trial left, {_why_none(study, refused)}")
    requests += [request._replace(evaluators=for_all) for request in combinations]
    requests = [
        request._replace(recipe=request.recipe.with_seed(seed)) if seed else request
        for request in _keep_only(requests, only or {}, study)
        for seed in range(request.seeds if request.recipe.epochs else 1)
    ]
    rows = {request.recipe.digest(): request.recipe for request in requests}
    trials = _shared([*requests, *_needed(rows.values(), for_all)], study, scale, evaluators)
    chains = _longest_chains(trials, scale)
    return Plan(
        tuple(sorted(trials, key=lambda t: (t.recipe.epochs > 0, -chains[t.digest], t.digest))),
        refused=tuple(refused),
        requests=len(requests) + len(trials) - len(rows),
        tables=trained,
        seeds=seeds or 1,
        notes=tuple(_notes(study, scale, trials, trained, len(combinations), in_study & missing)),
        longest_chain=max(chains.values(), default=0.0),
        grid={r.recipe.digest(): shown for r in requests if (shown := _shown(r.labels, study))},
    )


def _judging(scale: Scale, missing: Collection[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the evaluators that answer for others at a scale, or for one length of theirs."""
    whole = (PGD_LENGTHS.get(name, (name,))[0] for name in names)
    return tuple(answering(name, scale) for name in whole if name not in missing)


def _of_row(table: Table, row: Row, stated: Row, judges: tuple[str, ...]) -> Request:
    place, model = f"{table.name} {row.label}", stated.recipe.model
    return Request(row.recipe, place, judges, model, seeds=row.seeds, label=row.label)


def _needed(recipes: Iterable[Recipe], for_all: tuple[str, ...]) -> Iterator[Request]:
    """Yield the teachers and warm starts of recipes, what these need and so on."""
    for recipe in recipes:
        for other in recipe.prerequisites:
            role = "teacher" if other is recipe.teacher else "warm start"
            yield Request(other, f"{role} of {recipe.digest()}", for_all)
            yield from _needed([other], for_all)


def _shared(
    requests: Sequence[Request], study: Study, scale: Scale, evaluators: Collection[str]
) -> list[Trial]:
    """Return one trial for equal recipes, judged by the evaluators of all of them."""
    sharing: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        sharing[request.recipe.digest()].append(request)
    asking = {name for request in requests for name in request.evaluators}
    for name in evaluators:
        if check_known("evaluator", name, EVALUATORS) not in asking:
            others = ", ".join(sorted(asking))
            raise ValueError(f"no trial here asks evaluator {name!r}; they ask {others}")
    chosen = set(evaluators) or asking
    rule = study.early_stop
    needed = {other.digest() for r in requests for other in r.recipe.prerequisites if rule}
    return [
        Trial(
            recipe := alike[0].recipe,
            digest,
            named(_label(alike, study), digest),
            tuple(dict.fromkeys(request.purpose for request in alike)),
            tuple(dict.fromkeys(n for r in alike for n in r.evaluators if n in chosen)),
            scale.cost(recipe),
            study.checkpoints_of(recipe, scale),
            tuple(n for name in study.for_all if (n := answering(name, scale)) in chosen),
            stops_from=rule.first(recipe, scale) if rule and digest not in needed else 0,
        )
        for digest, alike in sharing.items()
    ]


def _choose_tables(study: Study, names: Collection[str]) -> list[Table]:
    known = {table.name: table for table in study.tables}
    if names and not known:
        raise ValueError(f"study {study.name!r} has no tables to choose from")
    with at_key(f"study {study.name!r}"):
        return [known[check_known("table", name, known)] for name in dict.fromkeys(names or known)]


def _as_trained(
    tables: Sequence[Table], study: Study, scale: Scale, seeds: int | None
) -> tuple[Table, ...]:
    """Return tables with their rows' recipes as they are trained, and how often they are.

    Questions tell what is set for every trial and which models stand for others. ValueError where
    what is set cannot be in a row, or where two rows become one trial.
    """
    settings = format_settings(study.settings)
    suffix = f" (every trial: {settings})" if settings else ""
    origins: dict[str, tuple[str, str]] = {}  # of a trained recipe: its row's digest and name
    trained: dict[tuple[str, str], Recipe] = {}
    for table in tables:
        for row in table.rows:
            recipe = _with_settings(row, study, scale)
            origin = row.recipe.digest(), f"{table.name} {row.label}"
            other = origins.setdefault(recipe.digest(), origin)
            if other[0] != origin[0]:
                cause = f"--set {settings}" if settings else f"a relative at scale {scale.name}"
                raise ValueError(
                    f"{cause} makes one trial of {other[1]} and {origin[1]}, which the "
                    "study tells apart: leave it out, or choose --tables without one of them"
                )
            trained[table.name, row.label] = _as_at(scale, recipe)
    # Once, but for the rows that headline claims compare. Adversarial training costs several times
    # as much.
    headlines = [c for c in study.claims if c.headline and c.places <= trained.keys()]
    compared = {place for claim in headlines for place in claim.places}

    def shown(table: Table) -> Table:
        rows = []
        for row in table.rows:
            recipe = trained[table.name, row.label]
            several = scale.headline_seeds if (table.name, row.label) in compared else 1
            most = ADVERSARIAL_SEEDS if recipe.adversary else several
            rows.append(Row(row.label, recipe, seeds or min(several, most)))
        question = table.question + suffix + _stand_ins(study, table, scale)
        return table.model_copy(update={"question": question, "rows": tuple(rows)})

    return tuple(map(shown, tables))


def _with_settings(row: Row, study: Study, scale: Scale) -> Recipe:
    """Return a row's recipe, or that of its relative, with what is set for every trial."""
    recipe = study.cut_down(row.recipe, scale)
    if not recipe.epochs:
        for_all = Preprocessing.model_validate(study.settings.get("preprocessing", {}))
        return recipe.replace(preprocessing=for_all | recipe.preprocessing)
    if not study.settings:
        return recipe
    with at_key(f"--set {format_settings(study.settings)}: {recipe.describe()}"):
        return with_settings(recipe, study.settings, library=study.library)


def _stand_ins(study: Study, table: Table, scale: Scale) -> str:
    """Say in brackets which models stand for those of a table's rows; '' where none does."""
    models = {row.recipe.model for row in table.rows} if scale.depth_divisor > 1 else set()
    pairs = [
        f"{r.model} for {model}" if model != r.model else f"{model} of {format_settings(arguments)}"
        for model, r in study.relatives.items()
        if model in models and ((arguments := r.model_args) or model != r.model)
    ]
    return f" (cut down: {', '.join(pairs)})" if pairs else ""


def _keep_only(
    requests: list[Request], only: Mapping[str, tuple[str, ...]], study: Study
) -> list[Request]:
    """Return the requests that have one of the values on each axis: by label where a grid has it.

    A recipe's own value at the scale may be the label of another: epochs 10 of 100, and 1 of 10.
    """
    library = study.library
    for axis, stated in only.items():
        labelled = {request.labels.get(axis) for request in requests}
        values = [
            r.labels.get(BASE, "none") if axis == BASE else axis_value(r.recipe, axis, library)
            for r in requests
        ]
        present = {*labelled, *values} - {None}
        if wrong := [word for word in stated if word not in present]:
            raise ValueError(
                f"no trial of study {study.name!r} left has {axis}={wrong[0]}; "
                f"values there: {', '.join(sorted(map(str, present)))}"
                f"{nearest(wrong[0], map(str, present))}"
            )
        unlabelled = set(stated) - labelled
        requests = [
            request
            for request, value in zip(requests, values, strict=True)
            if request.labels.get(axis, value) in stated or value in unlabelled
        ]
    return requests


def named(label: str, digest: str) -> str:
    """Return the name of a model everywhere: a table's label and a short digest."""
    short = digest[:SHORT]
    return label if label.endswith(f" {short}") else f"{label} {short}"


def _label(alike: Sequence[Request], study: Study) -> str:
    """Return the label of a recipe's row, or describe it.

    The description has the study's axes that it lacks by itself, and the models it stands for.
    """
    recipe = alike[0].recipe
    if alike[0].label:
        return alike[0].label + (f", seed {recipe.seed}" if recipe.seed else "")
    described, labels = recipe.describe(), next((r.labels for r in alike[::-1] if r.labels), {})
    stated = {
        axis: label
        for axis, label in labels.items()
        if axis != BASE and str(study.axes[axis].get(label)) != label
    }
    axes = [axis for axis in {**study.axes, **study.settings} if axis not in DESCRIBED]
    values = {axis: axis_value(recipe, axis, study.library) for axis in axes} | stated
    others = (words for a, v in values.items() if f" {(words := f'{a}={v}')} " not in described)
    models = dict.fromkeys(r.model for r in alike if r.model not in ("", recipe.model))
    return " ".join([described, *others, *([f"for {' or '.join(models)}"] if models else [])])


def _longest_chains(trials: Iterable[Trial], scale: Scale) -> dict[str, float]:
    """Return by digest what a trial costs with the longest chain of trials that need it."""
    chains: dict[str, float] = {}

    def extend(recipe: Recipe, behind: float) -> None:
        digest, cost = recipe.digest(), behind + scale.cost(recipe)
        chains[digest] = max(chains.get(digest, 0.0), cost)
        for other in recipe.prerequisites:
            extend(other, cost)

    for trial in trials:
        extend(trial.recipe, 0.0)
    return chains


def _notes(
    study: Study,
    scale: Scale,
    trials: Collection[Trial],
    tables: Iterable[Table],
    spanned: int,
    missing: Collection[str],
) -> Iterator[str]:
    """Say what is sampled, repeated, stopped, not judged or adapted: warm-ups, models as they are.

    missing: the evaluators whose images are not there.
    """
    if missing:
        yield f"their images are not there, so nothing is judged by {', '.join(sorted(missing))}"
    if scale.depth_divisor > 1 and study.reduced_epochs == scale.epochs_factor * STUDYS_EPOCHS:
        yield f"the study's file has {study.reduced_epochs} epochs here for 100 at full size"
    seeds = {row.seeds for table in tables for row in table.rows if row.recipe.epochs}
    if len(seeds) > 1:
        times = " or ".join(map(str, sorted(seeds - {1})))
        yield f"the rows of headline claims are trained {times} times, all others once"
    if study.sample and spanned < study.size:
        yield f"the grid is a sample of {spanned:,} of {study.size:,} combinations"
    if study.early_stop:
        firsts = sorted({trial.stops_from for trial in trials} - {0})
        stopping = sum(trial.stops_from > 0 for trial in trials)
        since = f", from epoch {firsts[0]} on" if firsts else ""
        yield f"early_stop may end {stopping} of {len(trials)} trials{since}: none that others need"
    untrained = sum(not trial.recipe.epochs for trial in trials)
    if untrained and study.settings:
        settings = format_settings(study.settings)
        yield f"{settings} changes trainings, not the {untrained} models that need none"
    stated = [*study.axes.get("epochs", {}).values(), study.settings.get("epochs")]
    epochs = [value for value in stated if isinstance(value, int)]
    named = study.axes.keys() | study.settings.keys()
    if "warmup_epochs" not in named and min(epochs, default=LONGEST_WARMUP) < LONGEST_WARMUP:
        yield f"a warm-up of more than {min(epochs)} epochs is shortened in proportion"


def format_seconds(seconds: float) -> str:
    """Write a duration as people say it: '45 s', '12 min', '3.5 h', '2.1 days'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
