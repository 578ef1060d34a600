"""All that a report tells, gathered from MLflow: values, comparisons, claims, effects, figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grid.plan import Plan
from grid.report.claims import Judgement, judge_claims
from grid.report.effects import Effects, grid_effects
from grid.report.plots import (
    Plot,
    corruptions_plot,
    patches_plot,
    radii_plot,
    scatter_plot,
    shape_bias_plot,
    size_plot,
    stages_plot,
    steps_plot,
    training_plot,
)
from grid.report.tables import FilledTable, fill_tables, tables_of
from grid.report.verdicts import Comparison, Verdicts
from grid.studies import Study
from trainables.scale import Scale
from trainables.tracking import Tracker, TrialRun


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found. `flags`: pairs of a model and a red flag, of `attacked` models looked at."""

    study: Study
    plan: Plan
    scale: Scale
    tables: tuple[FilledTable, ...]
    comparisons: Mapping[str, tuple[Comparison, ...]]
    flags: tuple[tuple[str, str], ...]
    attacked: int
    judgements: tuple[Judgement, ...]
    effects: tuple[Effects, ...]
    plots: tuple[Plot, ...]


def find(tracker: Tracker, study: Study, plan: Plan, scale: Scale) -> Findings:
    """Gather what MLflow holds of a plan."""
    runs = tracker.trials()
    verdicts = Verdicts(tracker, runs)
    tables = tuple(fill_tables(study, plan, runs))
    flags = verdicts.red_flags(trial.digest for trial in plan)
    described = {trial.digest: trial.recipe.describe() for trial in plan}
    return Findings(
        study=study,
        plan=plan,
        scale=scale,
        tables=tables,
        comparisons={
            table.name: verdicts.comparisons(table, plan.seeds) for table in tables_of(study, plan)
        },
        flags=tuple((described[digest], flag) for digest in flags for flag in flags[digest]),
        attacked=len(flags),
        judgements=tuple(judge_claims(plan, verdicts, runs)),
        effects=tuple(grid_effects(plan, list(study.axes or {}), runs)),
        plots=tuple(_plots(tables, plan, scale, tracker, runs, verdicts)),
    )


def _plots(
    tables: tuple[FilledTable, ...],
    plan: Plan,
    scale: Scale,
    tracker: Tracker,
    runs: Mapping[str, TrialRun],
    verdicts: Verdicts,
) -> list[Plot]:
    """Draw every figure for which there is something to draw."""
    filled = {table.name: table for table in tables}
    asked = {table.name: table for table in plan.tables}
    drawn: list[Plot | None] = [scatter_plot(plan, runs)]
    if "T1" in filled:
        drawn += [radii_plot(filled["T1"], scale), steps_plot(filled["T1"])]
    if "T2" in filled:
        drawn += [steps_plot(filled["T2"]), stages_plot(filled["T2"])]
        drawn.append(training_plot(asked["T2"], tracker, runs))
    if "T3" in filled:
        drawn.append(patches_plot(asked["T3"], verdicts))
    if "T5" in filled:
        drawn += [corruptions_plot(asked["T5"], verdicts), shape_bias_plot(asked["T5"], runs)]
    if "T8" in filled:
        drawn.append(size_plot(asked["T8"], runs, scale))
    return [plot for plot in drawn if plot]
