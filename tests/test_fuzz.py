"""Whatever is read from a user, a store or a data folder works, or is refused with a message.

    pytest tests/test_fuzz.py --hypothesis-profile=long

The last line counts the inputs that were tried.
"""

from __future__ import annotations

import functools
import io
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import texture_builder
import torch
from hypothesis import given
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
from evaluators.weights import load_any_weights
from grid import run
from grid.axes import AXES
from grid.options import RunOptions
from grid.plan import build_plan
from grid.study import load_study
from tests.paper import BASES, deit, resnet50
from tests.pictures import write_folder
from trainables.data.base import Shard
from trainables.data.images import ImageFiles, size_or_problem
from trainables.data.load import stored_images, stored_labels
from trainables.networks import build_classifier
from trainables.recipe import Recipe
from trainables.scale import DIGITS
from trainables.store.checkpoint import (
    load_newest_checkpoint,
    recipe_of,
    save_checkpoint,
    save_weights,
    unpickled,
)
from trainables.store.storage import Folder

tried = 0


@pytest.fixture(scope="module", autouse=True)
def count(request):
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nbad inputs tried: {tried:,}")


def counted(test):
    """Count how often a test's body runs."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        global tried  # noqa: PLW0603 - pytest makes no object that outlives a test's runs
        tried += 1
        return test(*args, **kwargs)

    return wrapped


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


@given(
    base=st.sampled_from([*BASES, "resnet5"]),
    fixed=st.dictionaries(st.sampled_from([*AXES, "colour"]), VALUES, max_size=3),
    axes=st.dictionaries(st.sampled_from(AXES), st.lists(SCALARS, max_size=2), max_size=2),
)
@counted
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
@counted
def test_any_bytes_are_a_study_file_or_refused(tmp_path, content):
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="study file"):
        load_study(str(path))


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 10_000], ids=["deep", "long"])
@counted
def test_a_study_file_that_no_parser_takes_is_refused(tmp_path, value):
    path = tmp_path / "study.toml"
    path.write_text(f"name = {value}")
    with pytest.raises(ValueError, match=r"study file .* is not TOML"):
        load_study(str(path))


@counted
def test_a_study_of_a_billion_trials_is_refused_and_not_enumerated(tmp_path):
    rates = ", ".join(f"{rate / 1000}" for rate in range(1, 1001))
    axes = [f"{axis} = [{rates}]" for axis in ("learning_rate", "weight_decay", "mixup_alpha")]
    path = tmp_path / "study.toml"
    path.write_text('name = "x"\nbase = "resnet50"\n[axes]\n' + "\n".join(axes))
    with pytest.raises(ValueError, match="1,000,000,000 combinations with 1 seeds each are more"):
        build_plan(load_study(str(path)), DIGITS)


FIELDS = st.dictionaries(st.sampled_from([*Recipe.model_fields, "colour"]), VALUES, max_size=4)


@given(base=st.sampled_from([resnet50(), deit()]), changes=FIELDS)
@counted
def test_a_recipe_is_refused_or_survives_its_own_json(base, changes):
    fields = {name: getattr(base, name) for name in Recipe.model_fields}
    try:
        recipe = Recipe.model_validate(fields | changes)
    except ValidationError:
        return
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again.digest() == recipe.digest()
    assert recipe.describe()


def options_of(parser):
    return [name for action in parser._actions for name in action.option_strings]


NUMBERS = [
    "0",
    "-1",
    "2",
    "0.5",
    "nan",
    "inf",
    "1e999",
    "1e-999999999",
    "9" * 30,
    "9" * 5000,
    "1/0",
]
PLACES = ["", ".", "/dev/null", "/dev/null/x", "\0", "a" * 300, "s3://", "file:///nowhere", "x://y"]
NAMES = ["digits", "cifar10", "imagenet", "folder", "full", "T5", "T99", "family=resnet", "clean"]
VALUE = st.one_of(st.sampled_from([*NUMBERS, *PLACES, *NAMES, "meta", "cuda:99"]), st.text())


def parser_of(options):
    return options.parser()


def words(parser):
    pair = st.tuples(st.sampled_from(options_of(parser)), VALUE)
    return st.lists(st.one_of(pair, VALUE.map(lambda value: (value,))), max_size=4).map(
        lambda pairs: [word for pair in pairs for word in pair]
    )


def ends_well(main, arguments, capsys):
    """Return whether a command works or refuses what it was given with a word."""
    try:
        code = main(arguments)
    except SystemExit as refused:
        code = refused.code
    said = capsys.readouterr()
    return code == 0 or (code == 2 and bool(said.err))


@given(arguments=words(parser_of(RunOptions)))
@counted
def test_any_words_after_plan_end_in_0_or_2(arguments, capsys):
    assert ends_well(run.main, ["--plan", *arguments], capsys)


@pytest.fixture(scope="module")
def no_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "damaged.pth"
    path.write_bytes(b"nothing")
    return str(path)


@given(arguments=words(parser_of(JudgeOptions)))
@counted
def test_any_words_to_the_evaluators_end_in_0_or_2(arguments, no_weights, capsys):
    assert ends_well(
        evaluators_main.main, ["--model", "resnet18", *arguments, "--weights", no_weights], capsys
    )


@given(arguments=words(parser_of(texture_builder.BuildOptions)))
@counted
def test_any_words_to_the_texture_builder_end_in_0_or_2(arguments, no_weights, tmp_path, capsys):
    fixed = ["--weights", no_weights, "--out", str(tmp_path / "out")]
    assert ends_well(texture_builder.main, [*arguments, *fixed], capsys)
    assert not (tmp_path / "out").exists()


@given(scheme=st.sampled_from(["ftp", "hdfs", "file", "mock", "", "s3"]), rest=st.text(max_size=20))
@counted
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
@counted
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
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(len(found), 1))
        kind = draw.choice(("flip", "flip", "cut", "insert", "end"))
        if kind == "flip" and found:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del found[place : place + draw.randint(1, 200)]
        elif kind == "insert":
            found[place:place] = draw.randbytes(draw.randint(1, 20))
        else:
            del found[place:]
    return bytes(found)


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def works_or_names(path, read):
    """Read a file, and return whether that works or is a ValueError that names it."""
    try:
        read()
    except ValueError as error:
        return str(path) in str(error)
    return True


@pytest.fixture(scope="module")
def classifier():
    return build_classifier(DIGITS.shrink(resnet50()).replace(model="resnet18"))


@pytest.fixture(scope="module")
def tensors(classifier):
    return {name: value.contiguous() for name, value in classifier.state_dict().items()}


@given(seed=SEEDS)
@counted
def test_a_mutated_weights_file_loads_or_is_refused(classifier, tensors, tmp_path, seed):
    path = tmp_path / "weights.safetensors"
    save_weights(path, classifier, "{}")
    for content in (path.read_bytes(), save(tensors, metadata={"format": "pt"})):
        path.write_bytes(mutated(content, seed))
        assert works_or_names(path, lambda: load_any_weights(path, classifier))
        assert works_or_names(path, lambda: recipe_of(path.read_bytes(), path))


@given(seed=SEEDS)
@counted
def test_a_mutated_pickle_of_weights_loads_or_is_refused(classifier, tensors, tmp_path, seed):
    path = tmp_path / "weights.pth"
    path.write_bytes(mutated(pickled(tensors), seed))
    assert works_or_names(path, lambda: load_any_weights(path, classifier))


ODD = {
    "sparse": torch.eye(3).to_sparse(),
    "complex": torch.ones(3, dtype=torch.complex64),
    "meta": torch.empty(3, device="meta"),
    "no tensor": 3,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@counted
def test_tensors_of_a_strange_kind_are_refused(classifier, tensors, tmp_path, name):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickled(tensors | {"backbone.fc.bias": ODD[name]}))
    for read in (lambda: load_any_weights(path, classifier), lambda: vgg19_network(path)):
        with pytest.raises(ValueError, match="no dictionary of dense tensors of real numbers"):
            read()


@given(seed=SEEDS)
@counted
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


@given(seed=SEEDS)
@counted
def test_a_mutated_checkpoint_of_the_right_hash_is_read_or_refused(seed):
    state = {"epoch": torch.arange(9), "history": [{"epoch": 1.0}], "generator": (1, "a", None)}
    assert works_or_names(
        "some/place", lambda: unpickled(mutated(pickled(state), seed), "some/place")
    )


TABLE = pa.table(
    [[str(i) for i in range(90)], ["clean"] * 90, [1] * 90, [2] * 90, [False] * 90, [None] * 90,
     [3] * 90, [None] * 90],
    schema=LEDGER,
)  # fmt: skip


@given(seed=SEEDS)
@counted
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
@counted
def test_a_mutated_ledger_is_a_ledger_or_refused(seed):
    try:
        ledger, _ = from_parquet(mutated(to_parquet(TABLE, seconds=1.5), seed))
    except ValueError as error:
        assert "it is no" in str(error)
    else:
        assert all(score.n for score in survival_scores(ledger))


@given(seed=SEEDS)
@counted
def test_a_mutated_texture_is_read_or_refused(tmp_path, seed):
    path = tmp_path / LAYOUT.format(label=0, cluster=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated(pickled(torch.zeros(3, 8, 8)), seed))
    dictionary = StoredTextures(tmp_path, (0,), 1)
    assert works_or_names(path, lambda: dictionary[0])


@given(seed=SEEDS)
@counted
def test_a_mutated_array_is_read_or_refused(tmp_path, seed):
    path = tmp_path / "fog.npy"
    draw = random.Random(seed)
    array = draw.choice(
        [np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64), np.zeros(4, complex), "npz"]
    )
    if isinstance(array, str):
        np.savez(path.with_suffix(".npz"), a=np.zeros(3))
        path.with_suffix(".npz").replace(path)
    else:
        np.save(path, array)
    path.write_bytes(mutated(path.read_bytes(), seed))
    assert works_or_names(path, lambda: stored_images(path, 32))
    assert works_or_names(path, lambda: stored_labels(path, 4, 10))


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
@counted
def test_the_check_and_the_loader_agree_on_which_image_is_damaged(tmp_path, content, seed):
    path = tmp_path / "train" / "class" / "picture.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutated(content, seed))
    size = size_or_problem(path)
    files = ImageFiles(tmp_path, ["train/class/picture.jpg"], size=16)
    if isinstance(size, str):
        with pytest.raises(ValueError, match=r"picture\.jpg \(class class\) cannot be read: "):
            files.original(0)
    else:
        assert set(files.original(0).size) == set(size)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("pictures"), per_class=2, held_out=0)


@given(seed=SEEDS)
@counted
def test_mutated_originals_are_decoded_again(pictures, tmp_path, seed):
    paths = [f"train/class-00/picture {number}.JPEG" for number in (0, 1)]
    files = ImageFiles(pictures, paths, size=16)
    files.decoded_once(tmp_path, 2**30)
    (cached,) = tmp_path.glob("originals-*")
    cached.write_bytes(mutated(cached.read_bytes(), seed))
    again, _ = files.decoded_once(tmp_path, 2**30)
    assert again.original(1).tobytes() == files.original(1).tobytes()
