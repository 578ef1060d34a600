"""Whatever is read from a user, a store or a data folder works, or is refused with a message.

pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics
"""

from __future__ import annotations

import io
import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import texture_builder
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save
from texture_builder import vgg19_network

from evaluators import __main__ as evaluators_main
from evaluators.ledger import LEDGER, from_parquet, survival_scores, to_parquet
from evaluators.options import JudgeOptions
from evaluators.shards import ShardStore
from evaluators.textures import LAYOUT, StoredTextures
from grid import run
from grid.axes import AXES
from grid.options import RunOptions
from grid.plan import build_plan
from grid.study import Study, load_study
from tests.paper import BASES, deit, resnet50
from trainables.data.base import Shard
from trainables.data.images import ImageFiles, size_or_problem
from trainables.data.load import stored_images, stored_labels
from trainables.networks import build_classifier
from trainables.recipe import Preprocessing, Recipe
from trainables.scale import DIGITS
from trainables.store.checkpoint import (
    load_newest_checkpoint,
    recipe_of,
    save_checkpoint,
)
from trainables.store.storage import Folder
from trainables.store.tensors import unpickled
from trainables.weights import load_weights

SCALARS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.text(max_size=12),
    st.sampled_from(["relu", "adamw", "none", "randaug+mixup", "timm:resnet18", "timm:", "huge"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3))


def toml_value(value):
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


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


@given(content=st.binary(max_size=300))
@example(b"name = " + b"[" * 100_000)
@example(b"name = " + b"9" * 10_000)
def test_any_bytes_are_a_study_file_or_refused(tmp_path, content):
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="study file"):
        load_study(str(path))


def test_a_study_of_a_billion_trials_is_refused_and_not_enumerated():
    thousand = tuple(number / 1000 for number in range(1, 1001))
    axes = dict.fromkeys(("learning_rate", "weight_decay", "mixup_alpha"), thousand)
    with pytest.raises(ValueError, match="1,000,000,000 combinations with 1 seeds each are more"):
        build_plan(Study(name="x", base=resnet50(), axes=axes), DIGITS)


FIELDS = st.dictionaries(st.sampled_from([*Recipe.model_fields, "colour"]), VALUES, max_size=4)


@given(base=st.sampled_from([resnet50(), deit()]), changes=FIELDS)
def test_a_recipe_is_refused_or_survives_its_own_json(base, changes):
    fields = {name: getattr(base, name) for name in Recipe.model_fields}
    try:
        recipe = Recipe.model_validate(fields | changes)
    except ValidationError:
        return
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again.digest() == recipe.digest()
    assert recipe.describe()


NUMBERS = ["0", "-1", "2", "0.5", "nan", "inf", "1e999", "1e-999999999", "9" * 5000, "1/0"]
PLACES = ["", ".", "/dev/null", "/dev/null/x", "\0", "a" * 300, "s3://", "file:///nowhere", "x://y"]
NAMES = ["digits", "cifar10", "imagenet", "folder", "full", "T5", "T99", "family=resnet", "clean"]
VALUE = st.one_of(st.sampled_from([*NUMBERS, *PLACES, *NAMES, "meta", "cuda:99"]), st.text())
# A command, the words before the drawn ones, and those after: DIR holds weights that are none.
COMMANDS = {
    RunOptions: (run.main, ["--plan"], []),
    JudgeOptions: (evaluators_main.main, ["--model", "resnet18"], ["--weights", "DIR/bad.pth"]),
    texture_builder.BuildOptions: (
        texture_builder.main,
        [],
        ["--weights", "DIR/bad.pth", "--out", "DIR/out"],
    ),
}


@pytest.mark.parametrize("options", COMMANDS)
@given(data=st.data())
def test_any_words_to_a_command_end_in_0_or_in_2_and_a_refusal(options, data, tmp_path, capsys):
    names = [f"--{field.alias}" for field in options.model_fields.values()]
    pair = st.tuples(st.sampled_from(names), VALUE)
    drawn = data.draw(st.lists(st.one_of(pair, VALUE.map(lambda value: (value,))), max_size=4))
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    main, before, after = COMMANDS[options]
    after = [word.replace("DIR", str(tmp_path)) for word in after]
    try:
        code = main([*before, *(word for words in drawn for word in words), *after])
    except SystemExit as refused:
        code = refused.code
    said = capsys.readouterr()
    assert code == 0 or (code == 2 and said.err)
    assert not (tmp_path / "out").exists()


@given(scheme=st.sampled_from(["ftp", "hdfs", "file", "mock", "", "s3"]), rest=st.text(max_size=20))
def test_any_storage_uri_is_a_folder_or_refused(scheme, rest):
    region = "?region=us-east-1" if scheme == "s3" else ""
    try:
        assert Folder(f"{scheme}://{rest}{region}")
    except ValueError as error:
        assert "cannot be used" in str(error)


@pytest.mark.parametrize(
    "uri", ["foo://x", "mssql+odbc://host/mlflow", "sqlite:////dev/null", "uc:x", "http://[", "\0"]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_address_that_mlflow_cannot_use_is_refused(uri, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--status", "--mlflow", uri])
    assert (
        f"{uri} cannot be used" in (said := capsys.readouterr().err) or "no MLflow server" in said
    )


SEEDS = st.integers(0, 10**9)


def mutated(content, seed):
    """Flip, cut out or insert bytes, or put random bytes in their place."""
    draw = random.Random(seed)
    if seed % 10 == 0:
        return draw.randbytes(draw.randint(0, 300))
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(len(changed), 1))
        kind = draw.choice(("flip", "flip", "cut", "insert", "end"))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del changed[place : place + draw.randint(1, 200)]
        elif kind == "insert":
            changed[place:place] = draw.randbytes(draw.randint(1, 20))
        else:
            del changed[place:]
    return bytes(changed)


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def classifier():
    return build_classifier(DIGITS.shrink(resnet50()).replace(model="resnet18"))


@pytest.fixture(scope="module")
def tensors(classifier):
    return {name: value.contiguous() for name, value in classifier.state_dict().items()}


def saved(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


STATE = {"epoch": torch.arange(9), "history": [{"epoch": 1.0}], "generator": (1, "a", None)}
TEXTURE = LAYOUT.format(label=0, cluster=0)
# By a file's name: its content, of a model's tensors, and how it is read.
FORMS = {
    "w.safetensors": (lambda tensors: save(tensors, metadata={"recipe": "{}"}), load_weights),
    "recipe.safetensors": (
        lambda tensors: save(tensors, metadata={"recipe": "{}"}),
        lambda path, _: recipe_of(path.read_bytes(), path),
    ),
    "w.pth": (pickled, load_weights),
    "c.pt": (lambda _: pickled(STATE), lambda path, _: unpickled(path.read_bytes(), str(path))),
    TEXTURE: (
        lambda _: pickled(torch.zeros(3, 8, 8)),
        lambda path, _: StoredTextures(path.parents[TEXTURE.count("/")], (0,), 1)[0],
    ),
    "fog.npy": (
        lambda _: saved(np.zeros((4, 32, 32, 3), np.uint8)),
        lambda path, _: stored_images(path, 32),
    ),
    "labels.npy": (
        lambda _: saved(np.zeros(4, np.int64)),
        lambda path, _: stored_labels(path, 4, 10),
    ),
}


@pytest.mark.parametrize("name", FORMS)
@given(seed=SEEDS)
def test_a_mutated_file_is_read_or_named_in_a_refusal(name, classifier, tensors, tmp_path, seed):
    content, read = FORMS[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated(content(tensors), seed))
    try:
        read(path, classifier)
    except ValueError as error:
        assert str(path) in str(error)


ODD = {
    "sparse": torch.eye(3).to_sparse(),
    "complex": torch.ones(3, dtype=torch.complex64),
    "meta": torch.empty(3, device="meta"),
    "no tensor": 3,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_of_a_strange_kind_are_refused(classifier, tensors, tmp_path, name):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickled(tensors | {"backbone.fc.bias": ODD[name]}))
    for read in (lambda: load_weights(path, classifier), lambda: vgg19_network(path)):
        with pytest.raises(ValueError, match="no dictionary of dense tensors of real numbers"):
            read()


@given(seed=SEEDS)
def test_a_mutated_checkpoint_gives_way_to_the_one_before(tmp_path, seed):
    folder = tmp_path / str(seed)
    save_checkpoint(folder, 1, {"epoch": torch.tensor(1)})
    newest = folder / save_checkpoint(folder, 2, {"epoch": torch.tensor(2)})
    content = newest.read_bytes()
    changed = mutated(content, seed)
    newest.write_bytes(changed)
    found = load_newest_checkpoint(folder)
    assert int(found["epoch"]) == (2 if changed == content else 1)
    shutil.rmtree(folder)


TABLE = pa.table(
    [[str(i) for i in range(90)], ["clean"] * 90, [1] * 90, [2] * 90, [False] * 90, [None] * 90,
     [3] * 90, *[[None] * 90] * 5],
    schema=LEDGER,
)  # fmt: skip


@given(seed=SEEDS)
def test_a_mutated_shard_is_read_as_it_was_or_judged_again(tmp_path, seed):
    folder = tmp_path / str(seed)
    ShardStore(folder, 1).add(Shard(0, 1), to_parquet(TABLE, seconds=1.5))
    (path,) = folder.iterdir()
    path.write_bytes(mutated(path.read_bytes(), seed))
    store = ShardStore(folder, 1)
    if not store.missing():
        assert store.merged()[0].equals(TABLE)
    assert len(list(folder.iterdir())) == 1 - len(store.missing())
    store.clear()


@given(seed=SEEDS)
def test_a_mutated_ledger_is_a_ledger_or_refused(seed):
    try:
        ledger, _ = from_parquet(mutated(to_parquet(TABLE, seconds=1.5), seed))
    except ValueError as error:
        assert "it is no" in str(error)
    else:
        assert all(score.n for score in survival_scores(ledger))


def encoded(form, **options):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 23, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(buffer, form, **options)
    return buffer.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6
IMAGES = [
    encoded("JPEG", exif=TURNED),
    encoded("JPEG", progressive=True),
    encoded("JPEG", mode="CMYK"),
    encoded("PNG", mode="P"),
    encoded("PNG", mode="RGBA", exif=TURNED),
    encoded("PNG").replace(b"\0\0\0\x17\0\0\0\x14", b"\x7f\xff\xff\xff\0\0\0\x14"),  # its width
    encoded("WEBP"),
    encoded("BMP"),
    encoded("PPM"),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("GIF"),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
]


@given(content=st.sampled_from(IMAGES), seed=SEEDS)
def test_the_check_and_the_loader_agree_on_which_image_is_damaged(tmp_path, content, seed):
    path = tmp_path / "train" / "class" / "picture.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated(content, seed))
    files = ImageFiles(tmp_path, ["train/class/picture.jpg"], preprocessing=Preprocessing(size=16))
    size = size_or_problem(path)
    if isinstance(size, str):
        with pytest.raises(ValueError, match=r"picture\.jpg \(class class\) cannot be read: "):
            files.original(0)
    else:
        assert set(files.original(0).size) == set(size)
