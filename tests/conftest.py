"""Shared settings and fixtures: one thread, no calls home, small trainings."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_AUTH_MODE": "disabled",
    "GIT_PYTHON_REFRESH": "quiet",
}

import torch
from hypothesis import HealthCheck, settings

from tests.paper import deit, resnet50
from trainables.data.base import Data, Split
from trainables.data.load import load_data
from trainables.recipe import Recipe
from trainables.scale import DIGITS

# pytest --hypothesis-profile=long tests/test_fuzz.py
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile(
    "few", max_examples=30, deadline=None, derandomize=True, suppress_health_check=CHECKS
)
settings.register_profile(
    "long", max_examples=1000, deadline=None, database=None, suppress_health_check=CHECKS
)
settings.load_profile("few")


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start: a suite in a shell's background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def migrated_once() -> Iterator[None]:
    """Spare the tests MLflow's migrations, in a session that has to do with MLflow at all."""
    with pytest.MonkeyPatch.context() as patch:
        if "mlflow" in sys.modules:
            from tests.servers import migrate_once

            migrate_once(patch)
        yield


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data(DIGITS)


@pytest.fixture(scope="session")
def few_digits(digits: Data) -> Data:
    """192 training and 60 held-out images: seconds instead of minutes."""

    def head(split: Split, count: int) -> Split:
        return Split(
            images=split.images[:count], labels=split.labels[:count], ids=split.ids[:count]
        )

    return Data(
        data_set=digits.data_set,
        train=head(digits.train, 192),
        held_out=head(digits.held_out, 60),
        class_names=digits.class_names,
    )


@pytest.fixture
def small() -> Callable[..., Recipe]:
    """A digits recipe of two epochs; keyword arguments change its fields."""

    def build(base: str = "resnet", **changes: object) -> Recipe:
        recipe = DIGITS.shrink(resnet50() if base == "resnet" else deit("small"))
        model = {"model": "resnet18"} if base == "resnet" else {}
        return recipe.replace(**({"epochs": 2, "warmup_epochs": 0.0} | model | changes))

    return build


@pytest.fixture
def generator() -> Iterator[torch.Generator]:
    yield torch.Generator().manual_seed(0)
