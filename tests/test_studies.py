"""The follow-up studies that ship as files are their sources': recipes, rates, figures and claims.

SOURCES has by a study's row what its source states, by the file that states it. FIGURES has the
published figures: of READMEs and configurations of the repositories, and of timm's results.
"""

from __future__ import annotations

import re

import pytest

from evaluators import column_named
from grid.plan import build_plan
from grid.run import main
from grid.study import FOLDER, load_study
from tests import driver
from trainables.networks import build_classifier
from trainables.recipe import Adversary, Preprocessing, Recipe
from trainables.scale import IMAGENET
from trainables.train.optim import build_optimizer, learning_rate

STRONG = ("randaug", "mixup", "cutmix")
UNIT_RANGE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

WANG = {  # UCSC-VLAA/RobustCNN
    "TRAIN.md": {
        "optimizer": "adamw",
        "learning_rate": 5e-4 * (8 * 128) / 512,
        "batch_size": 8 * 128,
        "weight_decay": 0.05,
        "scheduler": "cosine",
        "warmup_rate": 1e-6,
        "cooldown_epochs": 0,
        "epochs": 300,
        "augmentations": STRONG,
        "randaug_magnitude": 9,
        "randaug_std": 0.5,
        "repeats": 3,
        "erasing": 0.25,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "label_smoothing": 0.1,
        "drop_path": 0.1,
    },
    "train.py, defaults": {
        "warmup_epochs": 5.0,
        "warmup_prefix": False,
        "floor_rate": 1e-5,
        "clip_grad": None,
        "ema_decay": 0.0,
        "loss": "ce",
        "mix_probability": 1.0,
        "switch_probability": 0.5,
    },
    "timm/data/transforms_factory.py": {"color_jitter": 0.0, "least_crop": None, "flip": True},
    "timm/models/robust_resnet.py": {
        "preprocessing": Preprocessing(crop=0.875, interpolation="bicubic")
    },
}
SINGH = {  # nmndeep/revisiting-at
    "run_train.sh": {
        "learning_rate": 1e-3,
        "warmup_epochs": 20.0,
        "label_smoothing": 0.1,
        "train_sizes": (),
        "batch_size": 8 * 80,  # 80 on each of a number of GPUs that is not stated
    },
    "main.py": {
        "optimizer": "adamw",
        "optimizer_args": {"betas": (0.9, 0.95)},
        "weight_decay": 0.05,
        "scheduler": "cosine",
        "warmup_prefix": True,
        "warmup_rate": 1e-4 * 1e-3,
        "floor_rate": 5e-6,
        "clip_grad": None,
        "drop_path": 0.0,
        "loss": "ce",
        "ema_decay": 0.0,  # kept beside the weights that are judged
    },
    "parserr.py": {
        "augmentations": STRONG,
        "randaug_magnitude": 9,
        "randaug_std": 0.5,
        "erasing": 0.25,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "mix_probability": 1.0,
        "switch_probability": 0.5,
        "flip": True,
        "color_jitter": 0.0,  # 0.4, which timm leaves out beside RandAugment
    },
    "autopgd_train_clean.py": {
        "adversary": Adversary(
            attack="apgd", epsilon=4 / 255, steps=2, step_size=8 / 255, plain_start=1.0
        )
    },
    "AA_eval.py": {
        "activation": "own",
        "preprocessing": Preprocessing(crop=0.875, interpolation="bicubic", **UNIT_RANGE),
    },
}
LIGHT = {  # dedeswim/vits-robustness-torch
    "configs/xcit-adv-training.yaml": {
        "optimizer": "adamw",
        "learning_rate": 5e-4,
        "weight_decay": 0.5,
        "batch_size": 8 * 64,
        "scheduler": "cosine",
        "epochs": 100 + 10,
        "cooldown_epochs": 10,
        "warmup_epochs": 10.0,
        "warmup_rate": 1e-6,
        "floor_rate": 1e-5,
        "augmentations": (),
        "color_jitter": 0.4,
        "erasing": 0.0,
        "flip": True,
        "label_smoothing": 0.1,
        "drop_path": 0.05,
        "clip_grad": None,
        "ema_decay": 0.0,
        "loss": "ce",
    },
    "src/attacks.py": {
        "adversary": Adversary(
            epsilon=4 / 255, steps=1, step_size=1.5 * 4 / 255, epsilon_epochs=10.0
        )
    },
    "timm's default_cfg": {
        "activation": "own",
        "preprocessing": Preprocessing(crop=1.0, interpolation="bicubic", **UNIT_RANGE),
    },
}
CANONICAL = LIGHT | {
    "configs/xcit.yaml": {
        "weight_decay": 0.05,
        "warmup_epochs": 5.0,
        "augmentations": STRONG,
        "randaug_magnitude": 9,
        "randaug_std": 0.5,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "erasing": 0.25,
        "color_jitter": 0.0,  # 0.4, which timm leaves out beside RandAugment
    }
}
GELU_RESNET = LIGHT | {
    "configs/resnet-adv-training.yaml": {
        "optimizer": "sgd",
        "learning_rate": 3.2,
        "weight_decay": 1e-4,
        "scheduler": "step",
        "scheduler_args": {"decay_epochs": 30, "decay_rate": 0.1},
        "warmup_epochs": 5.0,
        "warmup_rate": 3.2,
        "color_jitter": 0.0,
        "drop_path": 0.0,
        "pixel_range": "half",
    },
    "src/models/models.py": {
        "model": "resnet50",
        "activation": "gelu",
        "preprocessing": Preprocessing(crop=0.95, interpolation="bicubic"),
    },
}
PLAIN = {  # google-research/big_vision
    "big_vision/configs/vit_s16_i1k.py": {
        "model": "plain_vit_small",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "batch_size": 1024,
        "clip_grad": 1.0,
        "clip_mode": "norm",
        "scheduler": "cosine",
        "warmup_epochs": round(10_000 * 1024 / 1_281_167),
        "loss": "ce",
        "label_smoothing": 0.0,
        "augmentations": ("randaug", "mixup"),
        "randaug_layers": 2,
        "randaug_magnitude": 10,
        "randaug_std": 0.0,
        "mixup_alpha": 0.2,
        "flip": True,
        "pixel_range": "half",
        "preprocessing": Preprocessing(),  # 256 and 224 px, bilinear, as the data have it
        "seed": 0,
    },
    "big_vision/optax.py": {"weight_decay": 1e-4 / 1e-3},
    "big_vision/utils.py": {
        "warmup_prefix": True,
        "warmup_rate": 0.0,
        "floor_rate": 0.0,
        "mix_probability": 1.0,
    },
    "big_vision/pp/ops_image.py": {"least_crop": 0.05},
    "big_vision/models/vit.py": {"activation": "gelu", "dropout": 0.0, "drop_path": 0.0},
}
STRIKES_BACK = {  # open-mmlab/mmpretrain
    "configs/_base_/schedules/imagenet_bs2048_rsb.py": {
        "optimizer": "lamb",
        "learning_rate": 5e-3,
        "weight_decay": 0.02,
        "batch_size": 2048,
        "scheduler": "cosine",
        "warmup_epochs": 5.0,
        "warmup_prefix": True,
        "warmup_rate": 1e-4 * 5e-3,
        "floor_rate": 1e-6,
    },
    "configs/_base_/datasets/imagenet_bs256_rsb_a12.py": {
        "randaug_layers": 2,
        "randaug_magnitude": 7,
        "randaug_std": 0.5,
        "flip": True,
    },
    "configs/resnet/resnet50_8xb256-rsb-a2-300e_in1k.py": {
        "model": "resnet50",
        "activation": "relu",
        "epochs": 300,
        "drop_path": 0.05,
        "repeats": 3,
        "loss": "bce",
        "label_smoothing": 0.0,
        "augmentations": STRONG,
        "mixup_alpha": 0.1,
        "cutmix_alpha": 1.0,
        "mix_probability": 1.0,
        "switch_probability": 0.5,
    },
    "timm/models/resnet.py": {"preprocessing": Preprocessing(crop=0.95, interpolation="bicubic")},
}
A1 = STRIKES_BACK | {
    "configs/resnet/resnet50_8xb256-rsb-a1-600e_in1k.py": {
        "epochs": 600,
        "weight_decay": 0.01,
        "mixup_alpha": 0.2,
        "label_smoothing": 0.1,
    }
}
A3 = STRIKES_BACK | {
    "configs/resnet/resnet50_8xb256-rsb-a3-100e_in1k.py": {
        "epochs": 100,
        "learning_rate": 8e-3,
        "warmup_rate": 1e-4 * 8e-3,
        "drop_path": 0.0,
        "repeats": 1,
    },
    "configs/_base_/datasets/imagenet_bs256_rsb_a3.py": {"randaug_magnitude": 6},
    "timm/models/resnet.py": {
        "train_sizes": (160,),
        "preprocessing": Preprocessing(crop=0.95, interpolation="bicubic"),
    },
}
CONV = {"model_args": {"stem": "conv"}}


def but(source, **row):
    """Return a source with what the README states of one row, or the models' file."""
    return source | {"README.md": row}


def xcit(**row):
    """Return the light recipe of an XCiT of 12 layers, of timm's of 24."""
    return but(LIGHT, model_args={"depth": 12, "eta": 1.0}, **row)


SOURCES = {
    "wang2023-robust-cnn": {
        "W1/DeiT-S": but(WANG, model="deit_small", activation="gelu"),
        "W1/Robust-ResNet-DW-S": but(WANG, model="robust_resnet_dw", activation="relu"),
        **{
            f"W1/Robust-ResNet-{name}-DW-S": but(WANG, model=model, activation="relu")
            for name, model in (
                ("Inverted", "robust_resnet_inverted_dw"),
                ("Up-Inverted", "robust_resnet_up_inverted_dw"),
                ("Down-Inverted", "robust_resnet_down_inverted_dw"),
            )
        },
    },
    "singh2023-revisiting-at": {
        "S1/ViT-S": but(SINGH, model="vit_small", epochs=300),
        "S1/ViT-S-CvSt": but(SINGH, model="vit_small", epochs=300, **CONV),
        "S1/ConvNeXt-T": but(SINGH, model="convnext_tiny", epochs=300),
        "S1/ConvNeXt-T-CvSt": but(SINGH, model="convnext_tiny", epochs=300, **CONV),
        "S1/ConvNeXt-iso-CvSt": but(SINGH, model="convnext_iso", epochs=300, **CONV),
        "S2/ViT-M-CvSt, 50 epochs": but(SINGH, model="vit_medium", epochs=50, **CONV),
        "S2/ConvNeXt-S-CvSt, 50 epochs": but(SINGH, model="convnext_small", epochs=50, **CONV),
        "S2/ViT-B, 50 epochs": but(SINGH, model="vit_base", epochs=50),
        "S2/ConvNeXt-B, 50 epochs": but(SINGH, model="convnext_base", epochs=50),
        "S2/ViT-B-CvSt, 250 epochs": but(SINGH, model="vit_base", epochs=250, **CONV),
        "S2/ConvNeXt-B-CvSt, 250 epochs": but(SINGH, model="convnext_base", epochs=250, **CONV),
        "S2/ConvNeXt-L-CvSt, 100 epochs": but(SINGH, model="convnext_large", epochs=100, **CONV),
    },
    "debenedetti2023-light-recipe": {
        "D1/XCiT-S12": but(LIGHT, model="timm:xcit_small_12_p16_224"),
        "D1/XCiT-M12": xcit(model="timm:xcit_medium_24_p16_224"),
        "D1/XCiT-L12": xcit(
            model="timm:xcit_large_24_p16_224",
            adversary=Adversary(
                epsilon=4 / 255, steps=2, step_size=1.5 * 4 / 255 / 2, epsilon_epochs=10.0
            ),
        ),
        "D1/ConvNeXt-T": but(
            LIGHT,
            model="convnext_tiny",
            preprocessing=Preprocessing(crop=0.875, interpolation="bicubic", **UNIT_RANGE),
        ),
        "D1/GELU ResNet-50": GELU_RESNET,
        "D2/XCiT-S12, light": but(LIGHT, model="timm:xcit_small_12_p16_224"),
        "D2/XCiT-S12, canonical": but(CANONICAL, model="timm:xcit_small_12_p16_224"),
    },
    "plain-vit": {
        "P1/ViT-S/16, 90 epochs": but(PLAIN, epochs=90),
        "P1/ViT-S/16, 300 epochs": but(PLAIN, epochs=300),
    },
    "resnet-strikes-back": {
        "R1/A1, 600 epochs": A1,
        "R1/A2, 300 epochs": STRIKES_BACK,
        "R1/A3, 100 epochs at 160 px": A3,
    },
}
# Rows that are the paper's own, with what they change of a base of bai2021.
LEFT_OUTS = {"erasing": 0.25, "drop_path": 0.1, "repeats": 3}  # TRAIN.md of UCSC-VLAA/RobustCNN
OF_THE_PAPER = {
    "bai2021-leftouts": {
        f"L1/{label} {words}": (base, changes)
        for label, base in (("DeiT-S,", "deit_small"), ("ResNet-50*,", "resnet50_aligned"))
        for words, changes in (("as in the paper", {}),)
    }
    | {
        f"L1/{label} with {words}": (base, {name: LEFT_OUTS[name] for name in names})
        for label, base in (("DeiT-S", "deit_small"), ("ResNet-50*", "resnet50_aligned"))
        for words, names in (
            ("random erasing", ["erasing"]),
            ("drop path", ["drop_path"]),
            ("repeated augmentation", ["repeats"]),
            ("all three", LEFT_OUTS),
        )
    },
    "plain-vit": {
        "P1/DeiT-S, 100 epochs": ("deit_small", {}),
        "P1/ResNet-50, 100 epochs": ("resnet50", {}),
    },
    "resnet-strikes-back": {
        "R1/ResNet-50, the study's own recipe": ("resnet50", {}),
        "R1/DeiT-S, 300 epochs": ("deit_small", {"epochs": 300}),
    },
}
STUDIES = (*SOURCES, "bai2021-leftouts", "pretrained-contest")


@pytest.fixture(scope="module")
def rows():
    """The recipes of every study's rows at ImageNet's scale, by study and then TABLE/label."""
    return {
        name: {
            f"{table.name}/{row.label}": row.recipe
            for table in build_plan(load_study(name), IMAGENET).tables
            for row in table.rows
        }
        for name in STUDIES
    }


def test_every_row_that_is_trained_has_a_source(rows):
    for name in STUDIES:
        known = {**SOURCES.get(name, {}), **OF_THE_PAPER.get(name, {})}
        assert {place for place, recipe in rows[name].items() if recipe.epochs} == known.keys()


@pytest.mark.parametrize(
    ("study", "place"), [(study, place) for study, places in SOURCES.items() for place in places]
)
def test_a_rows_recipe_is_its_sources_field_by_field(rows, study, place):
    recipe = rows[study][place]
    stated = {}
    for path, fields in SOURCES[study][place].items():
        stated |= dict.fromkeys(fields, path)
    expected = {}
    for fields in SOURCES[study][place].values():
        expected |= fields
    for name in Recipe.model_fields:
        if name in ("scale", "seed", "warm_start"):
            continue
        value, where = getattr(recipe, name), stated.get(name, "what no source states")
        default = Recipe.model_fields[name].get_default()
        wanted = expected.get(name, default)
        if isinstance(wanted, float):
            wanted = pytest.approx(wanted, rel=1e-12)
        if isinstance(wanted, Adversary):
            assert value.model_dump() == pytest.approx(wanted.model_dump()), (name, where)
        else:
            assert value == wanted, (name, where)


def test_a_robust_model_of_singh_starts_from_its_own_clean_training(rows):
    for place, recipe in rows["singh2023-revisiting-at"].items():
        clean = recipe.replace(adversary=None, warm_start=None, epochs=100)
        assert recipe.warm_start == clean, place


@pytest.mark.parametrize(
    ("study", "place"), [(study, row) for study, places in OF_THE_PAPER.items() for row in places]
)
def test_a_row_of_the_paper_is_the_papers_but_for_what_it_changes(rows, study, place):
    base, changes = OF_THE_PAPER[study][place]
    assert rows[study][place] == load_study("bai2021").bases[base].replace(**changes)


SETS = ("imagenet-v2", "imagenet-r", "imagenet-sketch")
OWN = ("clean", "natural", "corruptions", "stylized-cropped")
DEIT, RESNET = (76.8, 12.2, 48.0, 13.0), (76.9, 3.2, 57.9, 8.3)
# By row the crop, and timm's accuracy on ImageNet, -A, -V2, -R and -Sketch: results/results-
# imagenet.csv, -imagenet-a.csv, -imagenetv2-matched-frequency.csv, -imagenet-r.csv and -sketch.csv
# of huggingface/pytorch-image-models @aa4b585 at 224 px.
CONTEST = {
    "resnet50.tv_in1k": (0.875, 76.156, None, 63.19, 36.157, 24.064),
    "resnet50.tv2_in1k": (0.965, 80.846, 14.387, 69.51, 42.84, 29.869),
    "resnet50.a1_in1k": (0.95, 80.382, 9.973, 68.47, 40.417, 29.641),
    "resnet50.a2_in1k": (0.95, 79.828, 7.507, 67.81, 38.603, 27.393),
    "resnet50.a3_in1k": (0.95, 78.052, 6.333, 65.67, 36.05, 25.068),
    "resnet50.c1_in1k": (0.95, 79.766, 9.64, 68.64, 41.553, 30.832),
    "convnext_tiny.fb_in1k": (0.875, 82.066, 24.107, 70.93, 47.133, 33.825),
    "convnext_small.fb_in1k": (0.875, 83.144, 31.373, 72.3, 49.54, 37.063),
    "convnext_base.fb_in1k": (0.875, 83.838, 36.693, 73.78, 51.25, 38.236),
    "convnext_base.fb_in22k_ft_in1k": (0.875, 85.814, 54.773, 76.16, 61.783, 48.804),
    "deit_small.fb_in1k": (0.9, 79.856, 18.72, 68.53, 42.27, 29.435),
    "deit_base.fb_in1k": (0.9, 81.98, 27.173, 70.97, 44.913, 32.39),
    "deit3_small.fb_in1k": (0.9, 81.382, 26.013, 70.77, 45.96, 34.685),
    "deit3_base.fb_in1k": (0.9, 83.8, 38.92, 73.42, 53.433, 40.378),
    "deit3_base.fb_in22k_ft_in1k": (1.0, 85.728, 57.147, 76.53, 61.917, 47.37),
    "vit_small.augreg_in1k": (0.9, 78.842, 13.08, 66.59, 37.123, 25.953),
    "vit_base.augreg_in1k": (0.9, 79.154, 14.907, 66.34, 38.14, 27.973),
    "vit_base.augreg_in21k_ft_in1k": (0.9, 84.534, 43.133, 74.1, 56.86, 43.261),
    "swin_tiny.ms_in1k": (0.9, 81.388, 21.12, 69.45, 41.397, 29.35),
    "swin_base.ms_in1k": (0.9, 83.604, 35.773, 72.4, 46.503, 32.644),
}
FIGURES = {
    "bai2021-leftouts": {  # README of ytongbai/ViTs-vs-CNNs
        "L1": (
            OWN,
            {
                "DeiT-S, as in the paper": DEIT,
                "ResNet-50*, as in the paper": (76.3, 4.5, 55.6, 8.2),
            },
        )
    },
    "wang2023-robust-cnn": {  # README of UCSC-VLAA/RobustCNN
        "W1": (
            ("clean", "stylized", "corruptions", "imagenet-r", "imagenet-sketch"),
            {
                "DeiT-S": (79.8, 16.2, 42.8, 41.9, 29.1),
                "Robust-ResNet-DW-S": (79.4, 18.6, 42.3, 45.9, 33.0),
                "Robust-ResNet-Inverted-DW-S": (79.0, 19.5, 42.1, 45.9, 32.8),
                "Robust-ResNet-Up-Inverted-DW-S": (79.2, 20.2, 40.9, 48.7, 35.2),
                "Robust-ResNet-Down-Inverted-DW-S": (79.9, 19.3, 41.6, 46.0, 32.8),
            },
        )
    },
    "singh2023-revisiting-at": {  # README of nmndeep/revisiting-at
        "S1": (
            ("clean", "autoattack"),
            {
                "ViT-S": (69.2, 44.0),
                "ViT-S-CvSt": (72.5, 48.1),
                "ConvNeXt-T": (72.4, 48.6),
                "ConvNeXt-T-CvSt": (72.7, 49.5),
                "ConvNeXt-iso-CvSt": (70.2, 45.9),
            },
        ),
        "S2": (
            ("clean", "autoattack"),
            {
                "ViT-M-CvSt, 50 epochs": (72.4, 48.8),
                "ConvNeXt-S-CvSt, 50 epochs": (74.1, 52.4),
                "ViT-B, 50 epochs": (73.3, 50.0),
                "ConvNeXt-B, 50 epochs": (75.6, 54.3),
                "ViT-B-CvSt, 250 epochs": (76.3, 54.7),
                "ConvNeXt-B-CvSt, 250 epochs": (75.9, 56.1),
                "ConvNeXt-L-CvSt, 100 epochs": (77.0, 57.7),
            },
        ),
    },
    "debenedetti2023-light-recipe": {  # README and notebooks/data of vits-robustness-torch
        "D1": (
            ("clean", "autoattack"),
            {
                "XCiT-S12": (72.34, 41.78),
                "XCiT-M12": (74.04, 45.24),
                "XCiT-L12": (73.76, 47.60),
                "ConvNeXt-T": (71.64, 44.44),
                "GELU ResNet-50": (66.54, 35.12),
            },
        ),
        "D2": (
            ("clean", "pgd-5", "pgd-10"),
            {
                "XCiT-S12, light": (72.28, 49.80, 49.52),
                "XCiT-S12, canonical": (71.46, 40.95, 29.57),
            },
        ),
    },
    "plain-vit": {  # big_vision/configs/vit_s16_i1k.py; the abstract; the paper of bai2021
        "P1": (
            OWN,
            {
                "ViT-S/16, 90 epochs": (76.5, None, None, None),
                "ViT-S/16, 300 epochs": (80.0, None, None, None),
                "DeiT-S, 100 epochs": DEIT,
                "ResNet-50, 100 epochs": RESNET,
            },
        )
    },
    "resnet-strikes-back": {  # timm's results; the paper of bai2021
        "R1": (
            OWN,
            {
                "ResNet-50, the study's own recipe": RESNET,
                **{
                    row: (*CONTEST[f"resnet50.{tag}_in1k"][1:3], None, None)
                    for row, tag in (
                        ("A1, 600 epochs", "a1"),
                        ("A2, 300 epochs", "a2"),
                        ("A3, 100 epochs at 160 px", "a3"),
                    )
                },
            },
        )
    },
    "pretrained-contest": {
        "C1": (("clean", "natural", *SETS), {row: known[1:] for row, known in CONTEST.items()})
    },
}


@pytest.mark.parametrize("study", STUDIES)
def test_every_published_figure_is_its_sources_and_no_other_is_there(study):
    expected = {
        (name, row, column): figure
        for name, (columns, figures) in FIGURES[study].items()
        for row, numbers in figures.items()
        for column, figure in zip(columns, numbers, strict=True)
        if figure is not None
    }
    published = {
        (table.name, row, column): figure
        for table in load_study(study).tables
        for (row, column), (figure, _) in table.published.items()
    }
    assert published == expected


@pytest.mark.parametrize("study", STUDIES)
def test_a_claims_published_difference_is_that_of_its_rows_figures(study):
    tables = {table.name: table.published for table in load_study(study).tables}
    for claim in load_study(study).claims:
        figures = [
            tables[table].get((row, claim.column), (None,))[0]
            for table, row in filter(any, (claim.row, claim.of))
        ]
        if claim.published is None or None in figures:
            assert claim.published is None, claim.says
            continue
        assert claim.published == pytest.approx(figures[0] - figures[1], abs=0.05), claim.says
        side = {"ahead": claim.published > 0, "behind": claim.published < 0}
        assert side.get(claim.test, abs(claim.published) < 5), claim.says


def test_a_pretrained_row_is_timms_weights_cut_as_timm_judges_them(rows):
    for label, (crop, *_) in CONTEST.items():
        recipe = rows["pretrained-contest"][f"C1/{label}"]
        stem, _, tag = label.partition(".")
        assert re.fullmatch(rf"timm:{stem}(_patch16_224|_patch4_window7_224)?\.{tag}", recipe.init)
        assert (recipe.model, recipe.epochs) == (recipe.init, 0)
        assert (recipe.preprocessing.size, recipe.preprocessing.crop) == (224, crop)


@pytest.mark.parametrize(
    ("study", "place", "rates"),
    [
        # Linear from 1e-6 in 5 epochs; 1e-5 + 9.9e-4 (1 + cos(pi e / 300)) / 2, not shifted.
        (
            "wang2023-robust-cnn",
            "W1/Robust-ResNet-Up-Inverted-DW-S",
            {0: 1e-6, 2.5: 5.005e-4, 100: 7.525e-4, 150: 5.05e-4, 200: 2.575e-4},
        ),
        # get_cosine_lr: linear from 1e-7 to epoch 20, cosine to 5e-6 over what is left.
        (
            "singh2023-revisiting-at",
            "S1/ViT-S",
            {0: 1e-7, 10: 5.0005e-4, 20: 1e-3, 160: 5.025e-4, 299.99999: 5e-6},
        ),
        ("singh2023-revisiting-at", "S2/ViT-B, 50 epochs", {10: 5.0005e-4, 20: 1e-3, 35: 5.025e-4}),
        # timm's cosine of 100 epochs, its warm-up on the way, then 10 epochs at the floor.
        (
            "debenedetti2023-light-recipe",
            "D1/XCiT-S12",
            {0: 1e-6, 5: 2.505e-4, 50: 2.55e-4, 100: 1e-5, 109: 1e-5},
        ),
        (
            "debenedetti2023-light-recipe",
            "D1/GELU ResNet-50",
            {0: 3.2, 4: 3.2, 29: 3.2, 30: 0.32, 60: 0.032, 90: 0.0032, 109: 0.0032},
        ),
        # 1e-3 min(1, e / 8) (1 + cos(pi (e - 8) / (total - 8))) / 2.
        ("plain-vit", "P1/ViT-S/16, 90 epochs", {0: 0, 4: 5e-4, 8: 1e-3, 49: 5e-4}),
        ("plain-vit", "P1/ViT-S/16, 300 epochs", {8: 1e-3, 154: 5e-4, 299.99999: 0}),
        # LinearLR from 1e-4 of the rate in 5 epochs, then a cosine to 1e-6.
        (
            "resnet-strikes-back",
            "R1/A1, 600 epochs",
            {0: 5e-7, 2.5: 2.50025e-3, 5: 5e-3, 302.5: 2.5005e-3, 599.99999: 1e-6},
        ),
        ("resnet-strikes-back", "R1/A2, 300 epochs", {5: 5e-3, 152.5: 2.5005e-3}),
        ("resnet-strikes-back", "R1/A3, 100 epochs at 160 px", {0: 8e-7, 5: 8e-3, 52.5: 4.0005e-3}),
        ("bai2021-leftouts", "L1/DeiT-S with all three", {0: 1e-6, 50: 1.005e-3}),
        ("plain-vit", "P1/ResNet-50, 100 epochs", {29: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001}),
    ],
)
def test_the_rate_is_what_the_sources_formula_gives_by_hand(rows, study, place, rates):
    recipe = rows[study][place]
    found = {epoch: learning_rate(recipe, epoch) for epoch in rates}
    assert found == pytest.approx(rates, rel=1e-6, abs=1e-12)


BLOCK = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
DECAYED = {  # at scale digits: 3 blocks; ResNet-50 has 1, 1, 2 and 1
    "vit_small": {
        *("patch_embed.proj.weight", "head.weight"),
        *(f"blocks.{block}.{layer}.weight" for block in range(3) for layer in BLOCK),
    },
    "resnet50": {
        *("conv1.weight", "fc.weight"),
        *(f"layer{stage}.0.downsample.0.weight" for stage in range(1, 5)),
        *(
            f"layer{stage}.{block}.conv{number}.weight"
            for stage, block in ((1, 0), (2, 0), (3, 0), (3, 1), (4, 0))
            for number in (1, 2, 3)
        ),
    },
}


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
@pytest.mark.parametrize("model", DECAYED)
def test_matrices_and_kernels_are_decayed_and_nothing_else_is(small, model, optimizer):
    recipe = small(model=model, optimizer=optimizer, weight_decay=0.02)
    classifier = build_classifier(recipe)
    names = {id(weight): name for name, weight in classifier.backbone.named_parameters()}
    groups = build_optimizer(recipe, classifier).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    decay = {
        names[id(weight)]: group["weight_decay"] for group in groups for weight in group["params"]
    }
    assert {name for name, value in decay.items() if value == 0.02} == DECAYED[model]
    assert set(decay.values()) == {0.0, 0.02}


@pytest.mark.parametrize("study", ["bai2021", *STUDIES])
def test_a_files_comment_states_the_whole_cost(study):
    text = (FOLDER / f"{study}.toml").read_text()
    ((trainings, epochs),) = re.findall(r"# Whole cost.*: (\d+) trainings, ([\d,]+) epochs", text)
    trained = [trial for trial in build_plan(load_study(study), IMAGENET) if trial.recipe.epochs]
    assert int(trainings) == len(trained)
    assert float(epochs.replace(",", "")) == pytest.approx(sum(t.cost for t in trained), abs=1)


@pytest.mark.parametrize("study", STUDIES)
def test_every_column_is_one_that_an_evaluator_has(study):
    for table in load_study(study).tables:
        for name in table.columns:
            assert column_named(name).name == name


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_plans_at_digits_without_a_refusal_and_names_what_it_cuts_down(
    study, capsys, tmp_path
):
    command = ["--plan", "--all", "--study", study, "--results", str(tmp_path)]
    assert main([*command, "--scale", "digits"]) == 0
    printed = capsys.readouterr().out
    assert " 0 combinations refused" in printed
    assert "models as they are" not in printed
    for model, relative in load_study(study).relatives.items():
        assert model == relative.model or f"{relative.model} for {model}" in printed


def test_a_study_plans_at_imagenet_with_its_own_rate_batch_and_schedule(capsys, tmp_path):
    study = "resnet-strikes-back"
    assert (
        main(["--plan", "--study", study, "--scale", "imagenet", "--results", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    assert "lamb cosine" in printed
    assert "rate 0.005, decay 0.01, batch 2048, warm-up 5" in printed


SHORT = {  # a tenth of these epochs at digits; where rows differ in their epochs alone, fewer rows
    "bai2021-leftouts": ("--set", "epochs=10"),
    "wang2023-robust-cnn": ("--set", "epochs=10"),
    "singh2023-revisiting-at": ("--tables", "S1", "--set", "epochs=10"),
    "debenedetti2023-light-recipe": ("--tables", "D1", "--set", "epochs=20"),
    "plain-vit": ("--only", "epochs=9,10"),
    "resnet-strikes-back": ("--set", "epochs=10"),
    "pretrained-contest": (
        "--only",
        "model=resnet50",
        "--only",
        "loss=bce,ce",
        "--only",
        "epochs=4,6",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_runs_at_digits_to_its_report(study, tmp_path):
    command = driver.start(
        *(study, tmp_path, "--scale", "digits", "--address", "local"),
        *("--evaluators", "clean", "--seeds", "1", *SHORT[study]),
    )
    assert re.search(r"Trained \d+ and judged \d+ cells", driver.ended(command))
    page = (tmp_path / "report" / "index.html").read_text()
    runs = driver.trials(tmp_path).values()
    assert {run.outcome for run in runs} == {"finished"}
    for run in runs:
        if run.studies[study] != "warm":  # a warm start is in no table
            assert f"{100 * run.metrics['clean']:.1f}" in page
