"""All that a report tells, gathered from MLflow: values, comparisons, claims, effects, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grid.plan import Plan
from grid.report.claims import Judgement, judge_claims
from grid.report.effects import Effects, grid_effects
from grid.report.gallery import Example, gallery
from grid.report.plots import (
    Plot,
    corruptions_plot,
    effects_plot,
    patches_plot,
    radii_plot,
    scatter_plot,
    shape_bias_plot,
    size_plot,
    stages_plot,
    steps_plot,
    training_plot,
)
from grid.report.provenance import describe_provenance
from grid.report.tables import FilledTable, fill_tables, images_text, tables_of
from grid.report.verdicts import Comparison, Health, Verdicts
from grid.study import Study, Table
from trainables.scale import Scale
from trainables.store.tracking import Tracker, TrialRun


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found; `provenance` says what trained and judged it."""

    study: Study
    plan: Plan
    scale: Scale
    images: str
    tables: tuple[FilledTable, ...]
    comparisons: Mapping[str, tuple[Comparison, ...]]
    health: Health
    judgements: tuple[Judgement, ...]
    effects: tuple[Effects, ...]
    plots: tuple[Plot, ...]
    gallery: tuple[Example, ...]
    provenance: str


def find(tracker: Tracker, study: Study, plan: Plan, scale: Scale) -> Findings:
    """Gather what MLflow holds of a plan."""
    runs = tracker.trials()
    verdicts = Verdicts(tracker, runs)
    verdicts.forget_damaged(plan)
    tables = tables_of(study, plan, runs)
    filled = tuple(fill_tables(tables, plan.seeds, runs))
    effects = tuple(grid_effects(study, plan, scale, runs))
    plots = [
        scatter_plot(plan, runs),
        *_plots(tables, filled, scale, tracker, runs, verdicts),
        *map(effects_plot, effects),
    ]
    return Findings(
        study=study,
        plan=plan,
        scale=scale,
        images=images_text((runs[t.digest] for t in plan if t.digest in runs), scale),
        tables=filled,
        comparisons={table.name: verdicts.comparisons(table, plan.seeds) for table in tables},
        health=verdicts.health(plan),
        judgements=tuple(judge_claims(study.claims, tables, plan.seeds, verdicts, runs)),
        effects=effects,
        plots=tuple(plot for plot in plots if plot),
        gallery=tuple(gallery(plan, verdicts, tracker.classes(study.name))),
        provenance=describe_provenance([runs[t.digest] for t in plan if t.digest in runs]),
    )


def _plots(
    tables: Sequence[Table],
    filled: Sequence[FilledTable],
    scale: Scale,
    tracker: Tracker,
    runs: Mapping[str, TrialRun],
    verdicts: Verdicts,
) -> list[Plot | None]:
    """Draw every table's figures, for which there is something to draw."""
    drawn: list[Plot | None] = [shape_bias_plot(tables, runs)]
    for table, values in zip(tables, filled, strict=True):
        asks = {column.evaluator for column in table.shown}
        drawn += [steps_plot(values), radii_plot(values, scale), stages_plot(values, scale)]
        if "tpa" in asks:
            drawn.append(patches_plot(table, verdicts, scale))
        if "corruptions" in asks:
            drawn.append(corruptions_plot(table, verdicts))
        if "size" in table.plots:
            drawn.append(size_plot(table, runs))
        if len(tables) == 1 or _is_about_training(table, runs):
            drawn.append(training_plot(table, tracker, runs))
    return drawn


def _is_about_training(table: Table, runs: Mapping[str, TrialRun]) -> bool:
    """Say whether a table trains adversarially or lost a training."""
    digests = [row.recipe.digest() for row in table.rows]
    fell = any(runs[digest].outcome == "collapsed" for digest in digests if digest in runs)
    return fell or any(row.recipe.adversary for row in table.rows)
