"""Write the reference pages of the documentation from the registries: docs/reference/*.md."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluators import ALONE, EVALUATORS, PLUG_INS, class_named, evaluator_named
from evaluators.options import JudgeOptions
from grid.axes import AXES
from grid.command import COMMANDS
from grid.estimate import WITHSTANDING
from grid.options import RunOptions, UiOptions
from grid.study import STUDIES, Study, load_study
from trainables.data.registry import STORED_SETS
from trainables.recipe import Adversary, CurriculumRow, Distillation, Frozen, Preprocessing, Recipe
from trainables.scale import scale_named

CLEAN, ADVERSARIAL = WITHSTANDING[False], WITHSTANDING[True]


def write(folder: Path) -> None:
    """Write the pages; one that is as it was keeps its time, so that it is not built again."""
    pages = {
        "commands": commands_page(),
        "recipe": recipe_page(),
        "evaluators": evaluators_page(),
        "studies": studies_page(),
    }
    folder.mkdir(exist_ok=True)
    for name, lines in pages.items():
        path, content = folder / f"{name}.md", "\n".join(lines)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)


def commands_page() -> Iterator[str]:
    """Yield every command with every option, as its --help-all prints them."""
    os.environ["COLUMNS"] = "96"
    yield "# Commands\n\n`robustness-grid COMMAND [options]`\n"
    yield from (f"- `{name}`: {text}" for name, text in COMMANDS.items())
    parsers = {"evaluate": JudgeOptions, "run": RunOptions, "ui": UiOptions}
    for name, options in parsers.items():
        others = [n for n in COMMANDS if n not in parsers] if name == "run" else []
        more = f"\n`{'`, `'.join(others)}` take the same options." if others else ""
        help_text = options.parser(f"robustness-grid {name}").format_help()
        yield f"\n## {name}\n{more}\n\n```text\n{help_text}```"


def recipe_page() -> Iterator[str]:
    """Yield every field of a recipe and of its parts."""
    yield "# Recipe\n"
    for model in (Recipe, Adversary, Distillation, CurriculumRow, Preprocessing):
        yield f"## {model.__name__}\n\n{_paragraphs(model)}\n"
        yield "| Field | Values | Default |\n| --- | --- | --- |"
        yield from _fields(model)
        yield ""
    yield "## Axes\n\nA study varies any field above, or one of these, which bring others along:\n"
    yield ", ".join(f"`{name}`" for name in AXES if name not in Recipe.model_fields) + "."


def _fields(model: type[Frozen]) -> Iterator[str]:
    schema = model.model_json_schema()
    properties = schema.get("properties") or schema["$defs"][model.__name__]["properties"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default()!r}`"
        if isinstance(field.default, Frozen):
            default = ""
        yield f"| `{name}` | {_values(properties[name])} | {default} |"


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema or "allOf" in schema:
        reference = schema.get("$ref") or schema["allOf"][0]["$ref"]
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if schema.get("type") == "array":
        return f"list of {_values(schema.get('items', {}))}"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    stated = [f"{sign} {schema[key]:,.15g}" for key, sign in limits.items() if key in schema]
    kind = str(schema.get("type", "any"))
    kind = {"null": "none", "object": "table"}.get(kind, kind)
    return ", ".join([kind, *stated])


def evaluators_page() -> Iterator[str]:
    """Yield every evaluator with what it asks, what it costs and the columns that it fills."""
    yield (
        "# Evaluators\n\nImages and passes are those of scale `imagenet` with 50,000 held-out "
        "images. Passes are forward passes; one with a gradient counts as two. Where there are two "
        f"figures, the first is for a cleanly trained model ({CLEAN:.0%} of the images withstand "
        f"every attack), the second for an adversarially trained one ({ADVERSARIAL:.0%}). A plan "
        "assumes the same.\n"
    )
    scale, held_out = scale_named("imagenet"), 50_000
    for name in (n for n in EVALUATORS if n not in PLUG_INS):
        evaluator = evaluator_named(name, scale)
        images = evaluator.asked_about(held_out)
        costs = [evaluator.cost(held_out, withstanding=w) / images for w in (CLEAN, ADVERSARIAL)]
        cost = " or ".join(dict.fromkeys(f"{passes:,.0f}" for passes in costs))
        asked = STORED_SETS[name].title if name in ALONE else _paragraphs(class_named(name))
        yield f"## {name}\n\n{asked}\n"
        yield f"Images: {images:,}. Passes for each: {cost}."
        if columns := [f"`{column.name}` ({column.label})" for column in evaluator.columns]:
            yield f"Columns: {', '.join(columns)}."
        yield ""


def studies_page() -> Iterator[str]:
    """Yield every study that is shipped: its tables, grid and claims."""
    yield "# Studies\n\n`robustness-grid run --study NAME` runs one.\n"
    for name in STUDIES:
        study = load_study(name)
        yield f"## {name}\n\n**{study.title}**" + (f" ({study.source})" if study.source else "")
        if study.base:
            yield f"\nBases {', '.join(study.base)}; {study.size:,} combinations ({study.mode}):\n"
            yield from (f"- `{axis}`: {', '.join(v)}" for axis, v in study.axes.items())
        yield from _tables(study)
        if study.claims:
            yield "\nClaims:\n"
            yield from (f"- {claim.says}" for claim in study.claims)
        yield ""


def _tables(study: Study) -> Iterator[str]:
    if study.tables:
        yield "\n| Table | Question | Rows | Columns |\n| --- | --- | --- | --- |"
    for table in study.tables:
        rows = "; ".join(row.label for row in table.rows)
        yield f"| {table.name} | {table.question} | {rows} | {', '.join(table.columns)} |"


def _paragraphs(thing: type) -> str:
    return inspect.getdoc(thing) or ""
