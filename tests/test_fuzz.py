"""Whatever is read from a user, a store or a data folder works, or is refused with a message."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from evaluators.shards import ShardStore, to_parquet
from evaluators.textures import read_published
from evaluators.weights import load_any_weights
from grid.plan import build_plan
from grid.run import main
from grid.studies import AXES, BASES, load_study
from trainables.checkpoint import load_newest_checkpoint, save_checkpoint
from trainables.data import Shard
from trainables.models import build_classifier
from trainables.scale import DIGITS

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SCALARS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.text(max_size=12),
    st.sampled_from(["relu", "adamw", "none", "randaug+mixup", "timm:resnet18", "timm:", "huge"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))


def toml_value(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        escaped = "".join(
            c if c.isalnum() or c in "+:_-" else f"\\u{ord(c) % 0xD7FF:04x}" for c in value
        )
        return f'"{escaped}"'
    return repr(value)


@FEW
@given(
    base=st.sampled_from([*BASES, "resnet5"]),
    fixed=st.dictionaries(st.sampled_from([*AXES, "colour"]), VALUES, max_size=3),
    axes=st.dictionaries(st.sampled_from(AXES), st.lists(SCALARS, max_size=2), max_size=2),
)
def test_a_study_file_is_planned_or_refused(tmp_path, base, fixed, axes):
    lines = ['name = "fuzz"', f'base = "{base}"', "[set]"]
    lines += [f"{key} = {toml_value(value)}" for key, value in fixed.items()]
    lines += ["[axes]", *[f"{key} = {toml_value(value)}" for key, value in axes.items()]]
    path = tmp_path / "study.toml"
    path.write_text("\n".join(lines))
    try:
        plan = build_plan(load_study(str(path)), DIGITS)
    except ValueError as error:
        assert str(error)
    else:
        assert all(trial.digest == trial.recipe.digest() for trial in plan)


@FEW
@given(content=st.binary(max_size=300))
def test_any_bytes_are_a_study_file_or_refused(tmp_path, content):
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="study file"):
        load_study(str(path))


WORDS = st.one_of(
    st.sampled_from(
        ["--plan", "--study", "full", "--tables", "T5", "T99", "--only", "family=resnet", "--seeds",
         "0", "2", "--scale", "digits", "--evaluators", "clean", "--cpus-per-trial", "x"]
    ),
    st.text(min_size=1, max_size=8),
)  # fmt: skip


@FEW
@given(words=st.lists(WORDS, max_size=5))
def test_any_words_after_plan_end_in_0_or_2(words, capsys):
    try:
        code = main(["--plan", *words])
    except SystemExit as refused:
        code = refused.code
    said = capsys.readouterr()
    assert code in (0, 2)
    assert said.err or code == 0


def mutated(content, seed):
    """Flip, cut out or insert bytes."""
    draw = random.Random(seed)
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(len(found), 1))
        kind = draw.choice(("flip", "cut", "insert", "end"))
        if kind == "flip" and found:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del found[place : place + draw.randint(1, 200)]
        elif kind == "insert":
            found[place:place] = draw.randbytes(draw.randint(1, 20))
        else:
            del found[place:]
    return bytes(found)


@pytest.mark.parametrize("seed", range(25))
def test_a_mutated_weights_file_loads_or_is_refused(small, tmp_path, seed):
    classifier = build_classifier(small())
    tensors = {k: v.contiguous() for k, v in classifier.state_dict().items()}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(mutated(save(tensors), seed))
    try:
        load_any_weights(path, classifier)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("seed", range(25))
def test_a_mutated_pickle_of_weights_is_refused(small, tmp_path, seed):
    classifier = build_classifier(small())
    path = tmp_path / "weights.pth"
    torch.save(classifier.state_dict(), path)
    path.write_bytes(mutated(path.read_bytes(), seed))
    try:
        load_any_weights(path, classifier)
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("seed", range(10))
def test_a_mutated_checkpoint_gives_way_to_the_one_before(tmp_path, seed):
    save_checkpoint(tmp_path, 1, {"epoch": torch.tensor(1)})
    newest = tmp_path / save_checkpoint(tmp_path, 2, {"epoch": torch.tensor(2)})
    content = newest.read_bytes()
    changed = mutated(content, seed)
    newest.write_bytes(changed)
    found = load_newest_checkpoint(tmp_path)
    assert int(found["epoch"]) == (2 if changed == content else 1)


@pytest.mark.parametrize("seed", range(20))
def test_a_mutated_shard_is_read_as_it_was_or_judged_again(tmp_path, seed):
    import pyarrow as pa

    table = pa.table({"image_id": [str(i) for i in range(500)]})
    store = ShardStore(tmp_path, 1)
    store.add(Shard(), to_parquet(table, seconds=1.5))
    (path,) = tmp_path.iterdir()
    path.write_bytes(mutated(path.read_bytes(), seed))
    if not store.missing():
        assert store.merged()[0].equals(table)


@FEW
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_texture_are_refused(tmp_path, content):
    path = tmp_path / (
        "attention-style_t-label_0/conv_5_cam-thred_0.8_n-clusters_30/cls-w_0_scale_1"
        "/cluster_0/iter_9999.pt"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"iter_9999\.pt"):
        read_published(tmp_path, classes=(0,), clusters=1).of_class(0)
