"""The paper's study, its bases and their usual variants, for tests of what they are used in."""

from __future__ import annotations

from grid.axes import with_axes as _with_axes
from grid.axes import with_settings as _with_settings
from grid.study import load_study

STUDY = load_study("bai2021")
LIBRARY = STUDY.library
BASES, CURRICULA = LIBRARY.bases, LIBRARY.curricula
STRONG = "randaug+mixup+cutmix"


def with_axes(recipe, values):
    return _with_axes(recipe, values, LIBRARY)


def with_axis(recipe, axis, value):
    return with_axes(recipe, {axis: value})


def with_settings(recipe, settings, axes=None):
    return _with_settings(recipe, settings, axes, LIBRARY)


def resnet50():
    return BASES["resnet50"]


def deit(size="base", *, epochs=100):
    return with_axes(BASES["deit_small"], {"size": size, "epochs": epochs})


def resnet_aligned():
    return BASES["resnet50_aligned"]


def adversarial_deit():
    return BASES["adversarial_deit_small"]


def adversarial_resnet50():
    return BASES["adversarial_resnet50"]
