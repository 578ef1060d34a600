"""The judging loop: several processes judge as one does, and a run that is cut short ends them."""

import os
import time
from dataclasses import replace
from multiprocessing import active_children, get_context

import pytest
import torch

from evaluators import base, evaluator_named, judging
from evaluators.base import judge_images
from evaluators.judging import Cells
from tests.tiny import trained_classifier
from trainables.scale import DIGITS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier():
    return trained_classifier()


@pytest.fixture
def two_cores():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def cells_of(evaluator, data, folder):
    return Cells([evaluator], data, folder, "a model", CPU)


@pytest.mark.usefixtures("two_cores")
def test_processes_judge_every_image_once_as_one_process_does(
    classifier, few_digits, tmp_path, monkeypatch
):
    """60 images on two cores: 30 for each of two forks."""
    pgd = evaluator_named("pgd", replace(DIGITS, attack_subset=60), steps=[5])
    pids = tmp_path / "pids"

    def noted(*arguments, shard, **named):
        with pids.open("a") as file:
            file.write(f"{os.getpid()} {len(shard)} {torch.get_num_threads()}\n")
        return judge_images(*arguments, shard=shard, **named)

    monkeypatch.setattr(base, "judge_images", noted)
    cells = cells_of(pgd, few_digits, tmp_path)
    cells.judge(classifier)
    judged = [line.split() for line in pids.read_text().splitlines()]
    assert [line[1:] for line in judged] == [["30", "1"]] * 2
    assert str(os.getpid()) not in {pid for pid, *_ in judged}
    assert torch.get_num_threads() == 2
    (store,) = cells.stores.values()
    assert store.merged()[0].equals(judge_images(pgd, classifier, few_digits, device=CPU))


@pytest.mark.usefixtures("two_cores")
def test_ctrl_c_ends_the_processes_and_what_they_judged_is_there(
    classifier, few_digits, tmp_path, monkeypatch
):
    pgd = evaluator_named("pgd", replace(DIGITS, attack_subset=60), steps=[5])

    def first_half_alone(*arguments, shard, **named):
        if shard.first:
            time.sleep(600)
        return judge_images(*arguments, shard=shard, **named)

    def interrupted(store, shard, content):
        added(store, shard, content)
        raise KeyboardInterrupt

    added = judging.ShardStore.add
    monkeypatch.setattr(base, "judge_images", first_half_alone)
    monkeypatch.setattr(judging.ShardStore, "add", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cells_of(pgd, few_digits, tmp_path).judge(classifier)
    assert time.monotonic() - began < 300
    assert not active_children()
    (store,) = cells_of(pgd, few_digits, tmp_path).stores.values()
    assert store.judged == 30


def test_a_fork_ends_when_its_parent_is_gone():
    reader, writer = os.pipe()

    def work():
        judging._begin(lambda _: b"")
        time.sleep(60)
        os.write(writer, b"still here")

    parent = os.fork()
    if parent == 0:
        get_context("fork").Process(target=work).start()
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)
    assert os.read(reader, 10) == b""  # the pipe's other end is closed


@pytest.mark.usefixtures("two_cores")
def test_one_process_judges_on_a_gpu_and_one_for_each_thread_on_a_cpu():
    assert judging.processes_for(torch.device("cuda")) == 1
    assert judging.processes_for(CPU) == 2
