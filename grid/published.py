"""The paper's figures with their source; a figure that is not verified is not here.

Percent. Sources: the README and logs of the original code (GitHub ytongbai/ViTs-vs-CNNs) and
written notes of others on the paper, as recorded in STUDY section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

README = "original code's README"
LOG = "original code's logs"
NOTES = "written notes on the paper"


@dataclass(frozen=True)
class Published:
    """One figure of the paper, in percent, by table, row label and column label."""

    table: str
    row: str
    column: str
    value: float
    source: str = README


def _ood(table: str, row: str, clean: float, *others: float) -> list[Published]:
    columns = ("Clean", "ImageNet-A", "ImageNet-C error", "Stylized")
    pairs = zip(columns, (clean, *others), strict=False)
    return [Published(table, row, column, value) for column, value in pairs]


def _attacked(row: str, *values: float) -> list[Published]:
    columns = ("Clean", "PGD-100", "AutoAttack 4/255")
    pairs = zip(columns, values, strict=True)
    return [Published("T2", row, column, value) for column, value in pairs]


def _stages(row: str, *values: float) -> list[Published]:
    columns = ("Clean, same images", "after APGD-CE", "after APGD-T", "after FAB-T")
    pairs = zip(columns, values, strict=True)
    return [Published("T2", row, column, value, LOG) for column, value in pairs]


FIGURES: tuple[Published, ...] = (
    Published("T1", "ResNet-50", "Clean", 76.9),
    Published("T1", "DeiT-S", "Clean", 76.8),
    Published("T1", "ResNet-50", "AutoAttack 4/255", 0.0, NOTES),
    Published("T1", "DeiT-S", "AutoAttack 4/255", 0.0, NOTES),
    Published("T1", "DeiT-S", "AutoAttack 0.001", 22.1, NOTES),
    *_attacked("ResNet-50 ReLU", 66.77, 32.26, 26.41),
    *_attacked("ResNet-50 GELU", 67.38, 40.27, 35.51),
    *_attacked("DeiT-S", 66.50, 40.32, 35.50),
    *_stages("ResNet-50 GELU", 67.61, 39.45, 35.51, 35.51),
    *_stages("DeiT-S", 66.51, 39.53, 35.52, 35.51),
    Published("T3", "ResNet-50", "Clean", 76.9),
    Published("T3", "DeiT-S", "Clean", 76.8),
    Published("T4", "none", "Clean", 76.9),
    *_ood("T5", "ResNet-50", 76.9, 3.2, 57.9, 8.3),
    *_ood("T5", "ResNet-50*", 76.3, 4.5, 55.6, 8.2),
    *_ood("T5", "DeiT-S", 76.8, 12.2, 48.0, 13.0),
    *_ood("T6", "step, SGD", 76.9, 3.2, 57.9, 8.3),
    *_ood("T7", "randaug+cutmix", 75.7, 6.3, 52.3, 10.8),
    *_ood("T8", "ResNet-18*", 67.83, 1.92, 64.14, 7.92),
    *_ood("T8", "ResNet-50*", 76.28, 4.53, 55.62, 8.17),
    *_ood("T8", "ResNet-101*", 77.97, 8.84, 49.19, 11.60),
    *_ood("T8", "ResNet-18-Best", 66.81, 2.03, 62.65, 9.45),
    *_ood("T8", "ResNet-50-Best", 75.74, 6.32, 52.25, 10.77),
    *_ood("T8", "ResNet-101-Best", 77.83, 11.49, 47.35, 13.28),
    *_ood("T8", "DeiT-Mini", 72.89, 8.19, 54.68, 9.88),
    *_ood("T8", "DeiT-S", 76.82, 12.21, 47.99, 12.98),
    *_ood("T9", "DeiT-S, the teacher", 76.8, 12.2, 48.0, 13.0),
    *_ood("T9", "ResNet-50*, teacher DeiT-S", 76.7, 5.2, 54.2, 9.8),
    *_ood("T9", "ResNet-50*, the teacher", 76.3, 4.5, 55.6, 8.2),
    *_ood("T9", "DeiT-S, teacher ResNet-50*", 76.2, 10.9, 49.3, 11.9),
    *_ood("T10", "ResNet-50", 76.9, 3.2, 57.9, 8.3),
    *_ood("T10", "DeiT-S", 76.8, 12.2, 48.0, 13.0),
)


def published(table: str, row: str, column: str) -> Published | None:
    """Return the paper's figure for a cell of a table, or None where none is verified."""
    key = (table, row, column)
    return next((f for f in FIGURES if (f.table, f.row, f.column) == key), None)
