"""Nothing that is read can run code or leave its folder, and what is secret stays so."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from texture_builder import vgg19_network
from torchvision.datasets import CIFAR10 as TORCHVISION

from evaluators.__main__ import main as judge
from evaluators.shards import ShardStore
from evaluators.textures import LAYOUT, StoredTextures
from grid import options, run
from grid.study import load_study
from tests.driver import ROOT, SECONDS, ended, start, study_of_one, wait_for_checkpoint
from tests.pictures import write_folder
from tests.servers import MlflowServer
from tests.test_cifar import write_archive
from trainables.data.images import ImageFiles
from trainables.data.listing import DataSource
from trainables.data.load import load_data, stored_images, stored_labels
from trainables.networks import build_classifier
from trainables.recipe import Preprocessing
from trainables.scale import CIFAR10
from trainables.store.checkpoint import (
    classifier_of,
    load_newest_checkpoint,
    recipe_of,
    save_weights,
    stored_weights,
)
from trainables.weights import load_weights


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def as_torch(value):
    buffer = io.BytesIO()
    torch.save({"model": value, "history": []}, buffer)
    return buffer.getvalue()


def as_array(value):
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def as_extension(value):
    """A column whose type is a pickle: pyarrow has read such ones (CVE-2023-47248)."""
    kind = {"ARROW:extension:name": "arrow.py_extension_type"}
    kind["ARROW:extension:metadata"] = pickle.dumps(value)
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("image_id", pa.string(), metadata=kind)])
    pq.write_table(pa.table([["a"]], schema=schema), sink)
    return sink.getvalue().to_pybytes()


FORMS = {"pickle": pickle.dumps, "torch": as_torch, "npy": as_array, "parquet": as_extension}
CARELESS = {
    "pickle": pickle.loads,
    "torch": lambda content: torch.load(io.BytesIO(content), weights_only=False),
    "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
}


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "was-run"


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("form", CARELESS)
def test_a_planted_pickle_does_run_where_it_is_read_carelessly(marker, form):
    CARELESS[form](FORMS[form](Planted(marker)))
    assert marker.exists()


SIXTEEN = Preprocessing(size=16)
# By the name of the file, in which HASH is that of its content: how the project reads it.
READERS = {
    "epoch-00001-HASH.pt": lambda path, _: load_newest_checkpoint(path.parent),
    **{
        f"weights{suffix}": lambda path, recipe: load_weights(path, build_classifier(recipe))
        for suffix in (".pth", ".pt", ".safetensors")
    },
    "artifact.safetensors": lambda path, recipe: classifier_of(path, recipe.digest()),
    "header.safetensors": lambda path, _: recipe_of(path.read_bytes(), path),
    "teacher.safetensors": lambda path, recipe: stored_weights(str(path), recipe.digest()),
    "vgg19.pth": lambda path, _: vgg19_network(path),
    LAYOUT.format(label=0, cluster=0): lambda path, _: StoredTextures(root_of(path), (0,), 1)[0],
    "fog.npy": lambda path, _: stored_images(path, 32),
    "cifar10.1_v6_labels.npy": lambda path, _: stored_labels(path, 1, 10),
    "cifar-10-python.tar.gz": lambda path, _: load_data(CIFAR10, DataSource(root=path.parent)),
    "picture.jpg": lambda path, _: ImageFiles(
        path.parent, [path.name], preprocessing=SIXTEEN
    ).original(0),
    "study.toml": lambda path, _: load_study(str(path)),
}


def root_of(path):
    return next(folder for folder in path.parents if folder.name == "root")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READERS)
def test_a_planted_pickle_is_refused_by_its_path(name, form, marker, tmp_path, small):
    content = FORMS[form](Planted(marker))
    path = put(tmp_path / "root" / name.replace("HASH", short_hash(content)), content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        READERS[name](path, small())
    assert not marker.exists()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The folder of a CIFAR-10 archive that is unpacked."""
    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(TORCHVISION, name, getattr(TORCHVISION, name))
    return write_archive(tmp_path / "root", pytest.MonkeyPatch())


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_planted_in_an_unpacked_archive_is_refused(name, cifar, marker):
    put(cifar / name, pickle.dumps(Planted(marker)))
    with pytest.raises(ValueError, match=re.escape(str(cifar))):
        load_data(CIFAR10, DataSource(root=cifar.parent))
    assert not marker.exists()


def shard(root, content):
    path = put(root / f"0-1-{short_hash(content)}.parquet", content)
    return path, lambda: ShardStore(root, 1).missing()


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_pickle_among_files_that_are_made_anew_counts_as_nothing(form, marker, tmp_path):
    content = FORMS[form](Planted(marker))
    path, read = shard(tmp_path / "root", content)
    read()
    assert not marker.exists()
    assert not path.exists() or path.read_bytes() != content


def member(name, kind=tarfile.REGTYPE, link=""):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    return found


def test_what_is_written_over_a_link_leaves_its_target_alone(tmp_path, small):
    target = put(tmp_path / "outside" / "file", b"mine")
    link = tmp_path / "trials" / "weights.safetensors"
    link.parent.mkdir()
    link.symlink_to(target)
    save_weights(link, build_classifier(small()), "{}")
    assert target.read_bytes() == b"mine"
    assert not link.is_symlink()


@pytest.mark.parametrize("model", ["CODE/planted.py:net", "planted:net", "torchhub:CODE:net"])
def test_neither_a_weights_file_nor_a_study_may_name_code(
    model, marker, tmp_path, small, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("planted.py", "hubconf.py"):
        (tmp_path / name).write_text(f"import os; os.mkdir({str(marker)!r})")
    named = model.replace("CODE", str(tmp_path))
    header = json.dumps(small().model_dump(mode="json") | {"model": named})
    save_weights(tmp_path / "w.safetensors", build_classifier(small()), header)
    with pytest.raises(SystemExit):
        judge(["--weights", str(tmp_path / "w.safetensors")])
    assert "names no recipe of this project" in capsys.readouterr().err
    study = tmp_path / "study.toml"
    base = f'model = "{named}"\noptimizer = "sgd"\nscheduler = "step"\nepochs = 1'
    study.write_text(f'name = "s"\n[bases.a]\n{base}')
    with pytest.raises(ValueError, match="runs code, and studies and weights files run none"):
        load_study(str(study))
    assert not marker.exists()
    with pytest.raises(SystemExit):  # where the user names it, it is run
        judge(["--model", named])
    assert marker.exists()


@pytest.mark.parametrize("name", ["[", "\x1b[31m"])
def test_a_class_of_any_name_can_be_looked_at(tmp_path, capsys, name):
    root = write_folder(tmp_path / "data", per_class=1, held_out=1)
    put(root / "train" / name / "b].jpg", b"")
    arguments = ["--scale", "folder", "--data", str(root), "--image-size", "32", "--check"]
    with pytest.raises(SystemExit) as stopped:
        run.main([*arguments, "--results", str(tmp_path / "results"), "--tables", "T6"])
    assert stopped.value.code == 2
    assert "unreadable images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hunter2@127.0.0.1:5000",
        "s3://KEY:hunter2@bucket/place",
        "s3://KEY:hun/ter2+x@bucket/place",
        "postgresql://user:hunter2@host/mlflow",
    ],
)
@pytest.mark.parametrize("option", ["--mlflow", "--storage", "environment"])
def test_a_password_in_a_uri_is_refused_and_not_repeated(uri, option, capsys, monkeypatch):
    arguments = [option, uri]
    if option == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        arguments = []
    with pytest.raises(SystemExit, match="2"):
        run.main(["--plan", *arguments])
    said = "".join(capsys.readouterr())
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert "PGPASSWORD (or ~/.pgpass) for postgresql://" in said
    assert "hunter" not in said
    assert "ter2" not in said


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives a file to another user")
def test_a_cluster_that_another_user_notes_in_tmp_is_not_joined(tmp_path, monkeypatch):
    noted = put(tmp_path / "ray_current_cluster", b"")
    monkeypatch.setattr(options, "STARTED_HERE", noted)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        noted.write_text(there)
        assert options.cluster_address(None) == there
        os.chown(noted, 12345, -1)
        assert options.cluster_address(None) is None


# The hashed set that cluster files install.

HASHED = (ROOT / "requirements-cluster.txt").read_text()
PINS = dict(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", HASHED, re.MULTILINE))


def test_every_requirement_of_the_hashed_set_has_hashes_and_no_host():
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", HASHED, flags=re.MULTILINE).strip())
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+( ; [^\\]+)? \\\n    --hash=sha256:[0-9a-f]{64}", entry)
    assert "://" not in HASHED


def test_the_hashed_set_has_what_the_project_asks_for_at_the_tested_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    own = project["project"]["dependencies"]
    extra = project["project"]["optional-dependencies"]["cluster"]
    for entry in map(Requirement, [*own, *extra, *project["build-system"]["requires"]]):
        assert entry.name in PINS
        assert entry.specifier.contains(PINS[entry.name])
    tested = re.findall(
        r"^([a-z0-9-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert {name: PINS[name] for name, _ in tested} == dict(tested)
    assert {Requirement(entry).name for entry in own} <= set(dict(tested))


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-local.yaml"])
def test_a_cluster_installs_nothing_whose_hash_is_not_known(name):
    setup = " ".join(yaml.safe_load((ROOT / name).read_text())["setup_commands"])
    assert "--require-hashes -r requirements-cluster.txt" in setup
    installs = re.findall(r"pip install .*?(?=&&|\) |$)", setup)
    assert installs
    for install in installs:
        assert "--require-hashes" in install or "--no-deps --no-build-isolation" in install


# The real command, with secrets around it and pickles in its way.

SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": "secret-of-mlflow",
    "AWS_ACCESS_KEY_ID": "AKIASECRETOFAWS",
    "AWS_SECRET_ACCESS_KEY": "secret/of+aws",
    "RAY_AUTH_TOKEN": "5ec2e7" * 8,
}
ASK_GCS = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20))
"""


def listeners(process):
    """Return the address and port of every socket that a process and those below it listen on."""
    found = {}
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            name = " ".join(one.cmdline()[:1])
            for connection in one.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[name, connection.laddr.port] = connection.laddr.ip
    return found


def asked_gcs(port, environment, token):
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or ""}
    return subprocess.run(
        [sys.executable, "-c", ASK_GCS, f"127.0.0.1:{port}"],
        env=environment | (own if token else {"RAY_AUTH_MODE": "disabled"}),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def folder():
    # A short path: Ray's sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="g") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def server(folder):
    server = MlflowServer(folder / "server")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def environment(folder):
    (folder / "home").mkdir()
    (folder / "ray").mkdir()
    own = {"HOME": str(folder / "home"), "RAY_TMPDIR": str(folder / "ray")}
    # A busy machine starts Ray's processes late.
    own["RAY_worker_register_timeout_seconds"] = str(SECONDS)
    kept = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    return kept | own | SECRETS


def started(folder, server, environment, *arguments):
    study = put(folder / "study.toml", study_of_one("pgd", epochs=20).encode())
    options = ("--mlflow", server.uri, "--address", "local", *arguments)
    return start(study, folder / "results", *options, env=environment)


def looked_into(driver, folder, environment):
    """Return where a run listens, and what Ray answers to whom; it is held still meanwhile."""
    wait_for_checkpoint(folder / "results", driver)
    process = psutil.Process(driver.pid)
    process.suspend()
    found = listeners(process)
    (port,) = [port for (name, port) in found if name.endswith("gcs_server")]
    tokens = {"none": None, "another": "0" * 64, "its own": SECRETS["RAY_AUTH_TOKEN"]}
    asked = {name: asked_gcs(port, environment, token) for name, token in tokens.items()}
    process.resume()
    return found, asked


@pytest.fixture(scope="module")
def ran(folder, server, environment):
    """A run of the command: where it listened, who got an answer, and what it said."""
    marker = folder / "was-run"
    for name in ("tuner.pkl", "trainable.pkl", "error.pkl", "x/error.pkl", "x/.tune_metadata"):
        put(folder / "results" / "tune" / name, pickle.dumps(Planted(marker)))
    driver = started(folder, server, environment)
    try:
        found, asked = looked_into(driver, folder, environment)
        return found, asked, ended(driver)
    finally:
        driver.kill()


@pytest.mark.slow
def test_a_run_listens_on_its_loopback_alone_and_ray_answers_nobody_without_its_token(ran):
    found, asked, _ = ran
    assert len(found) > 5
    assert set(found.values()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert asked.pop("its own").returncode == 0
    for answer in asked.values():
        assert answer.returncode != 0
        assert "uthenticat" in answer.stderr


@pytest.mark.slow
def test_secrets_are_neither_printed_nor_written(ran, folder):
    _, _, said = ran
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"mlflow.db", "index.html", "raylet.out"} <= {path.name for path in files}
    written = {str(path): path.read_bytes() for path in files} | {"printed": said.encode()}
    for name in set(SECRETS) - {"MLFLOW_TRACKING_USERNAME"}:
        assert [w for w, content in written.items() if SECRETS[name].encode() in content] == []


@pytest.mark.slow
def test_pickles_in_the_results_and_the_artifacts_are_not_opened(ran, folder, server, environment):
    marker = folder / "was-run"
    (ledger,) = (folder / "server" / "artifacts").rglob("artifacts/ledgers/pgd.*.parquet")
    put(ledger, pickle.dumps(Planted(marker)))
    ended(started(folder, server, environment, "--report"))
    assert "damaged ledger" in (folder / "results" / "report" / "tables.md").read_text()
    assert not marker.exists()
