"""The figures of the paper's Tables 1 to 4, as data to hold our own against.

Transcribed from its text as scanned. There some figures have lost their decimal point ("354" in a column of percentages
with one decimal); it is put back, and such a row says so (`point_restored`). Where a cell is a dash there is no row.
Two things are kept as printed: iBOT's J&F on MOSE (38.0) is not the mean of its J and F (37.85), which are also
CRISP's; and the text names no architecture for Table 4, which stands beside Table 3 and is taken to share its ViT-S/16.

Names of tasks are those of the commands, names of data sets those of result files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class PaperRow:
    """One figure of the paper."""

    table: int
    model: str
    arch: str
    task: str
    dataset: str
    metric: str
    value: float
    """Percent"""
    starred: bool = False
    """Printed with a star: pre-trained on more than ImageNet-1K"""
    point_restored: bool = False
    """The scan lost the decimal point"""

    @property
    def label(self) -> str:
        """The model as printed: with its star."""
        return f"{self.model}*" if self.starred else self.model


class PaperColumn(NamedTuple):
    """A column of a table: which score stands in it."""

    task: str
    dataset: str
    metric: str
    head: str


def _segmentation() -> Iterator[PaperColumn]:
    for dataset, name in (("ade20k", "ADE20K"), ("voc2012", "VOC"), ("cityscapes", "Cityscapes")):
        yield PaperColumn("seg-knn", dataset, "mIoU", f"{name} k-NN")
        yield PaperColumn("seg-linear", dataset, "mIoU", f"{name} linear")


def _video() -> Iterator[PaperColumn]:
    for dataset, name in (("davis2017", "DAVIS"), ("youtube-vos", "YouTube-VOS"), ("mose", "MOSE")):
        for metric in ("J&F", "J", "F"):
            yield PaperColumn("video", dataset, metric, f"{name} {metric}")


COLUMNS: dict[int, tuple[PaperColumn, ...]] = {
    1: tuple(_segmentation()),
    2: tuple(_video()),
    3: (
        PaperColumn("multilabel", "voc2012", "mAP-1shot", "VOC 1 image"),
        PaperColumn("multilabel", "voc2012", "mAP-2shot", "VOC 2 images"),
        PaperColumn("multilabel", "voc2012", "mAP-5shot", "VOC 5 images"),
        PaperColumn("multilabel", "voc2012", "mAP", "VOC"),
        PaperColumn("multilabel", "coco", "mAP", "COCO"),
        PaperColumn("multilabel", "vg", "mAP", "VG"),
    ),
    4: (
        PaperColumn("knn", "imagenet-1pct", "top1", "k-NN 1\u00a0%"),
        PaperColumn("knn", "imagenet-10pct", "top1", "k-NN 10\u00a0%"),
        PaperColumn("knn", "imagenet", "top1", "k-NN 100\u00a0%"),
        PaperColumn("linear", "imagenet", "top1", "linear"),
    ),
}

TITLES = {
    1: "Table 1: semantic segmentation, frozen features, mIoU",
    2: "Table 2: video object segmentation",
    3: "Table 3: multi-label classification, mAP",
    4: "Table 4: classification on ImageNet, top-1",
}

# Architecture, model, and the figures as scanned; - for a dash. Three digits have lost their point.
_SCANNED = {
    1: """
ViT-S SiT 17.6 22.3 37.6 47.1 31.4 35.6
ViT-S DINO 17.5 20.9 37.2 42.3 30.9 354
ViT-S iBOT 22.0 27.0 49.7 58.0 33.5 37.9
ViT-S CrOC 19.6 24.2 49.0 58.5 29.1 34.6
ViT-S CrIBo 24.9 27.4 60.9 66.0 333 379
ViT-S CRISP 28.2 30.5 61.9 67.3 34.3 39.1
ViT-S CAPI* 20.6 25.8 50.5 59.4 31.3 36.5
ViT-B MAE 18.7 25.6 44.2 56.5 32.2 38.1
ViT-B Data2Vec-2.0 18.4 22.2 46.9 48.4 28.3 35.0
ViT-B iBOT 27.0 31.8 56.6 67.1 35.9 39.6
ViT-B CrIBo 26.9 30.0 61.2 68.1 33.7 38.4
ViT-B CRISP 29.7 32.8 65.3 71.5 36.0 41.0
ViT-B CAPI* 28.3 33.6 61.8 70.3 36.9 41.9
ViT-L MAE 21.7 28.0 46.2 55.9 349 39.6
ViT-L Data2Vec-2.0 23.6 27.0 49.8 50.7 33.1 38.6
ViT-L iBOT 27.2 32.6 58.6 67.8 36.7 41.9
ViT-L CAPI 29.2 34.4 60.7 69.7 35.6 41.7
ViT-L CRISP 32.5 35.6 69.1 73.3 36.9 42.2
ViT-L DINOv2* 34.0 39.0 63.0 72.8 42.0 46.8
ViT-L CAPI* 32.1 37.2 63.8 72.7 38.9 44.3
""",
    2: """
ViT-S/16 iBOT 61.8 60.4 63.2 66.8 66.1 674 38.0 34.1 41.6
ViT-S/16 CrOC 60.2 58.8 61.5 64.3 639 64.7 34.6 31.1 38.1
ViT-S/16 CrIBo 61.5 60.0 63.0 66.5 659 672 36.7 33.1 404
ViT-S/16 CRISP 63.8 62.2 654 67.1 664 67.8 37.8 34.1 41.6
ViT-g/14 DINOv2* 63.9 - - 65.6 - - 40.4 - -
ViT-7B/14 Web-DINO 57.2 - - 439 - - 24.9 - -
""",
    3: """
ViT-S/16 iBOT 44.3 58.8 702 939 582 323
ViT-S/16 CrOC 48.7 56.9 67.8 89.4 56.2 28.8
ViT-S/16 CrIBo 48.8 60.4 700 929 599 320
ViT-S/16 CRISP 493 61.0 711 952 63.0 33.0
""",
    4: """
ViT-S/16 iBOT 623 689 751 779
ViT-S/16 CrOC 49.0 58.0 66.5 71.4
ViT-S/16 CrIBo 58.1 644 70.7 74.9
ViT-S/16 CRISP 63.7 694 752 78.0
ViT-S/16 CAPI* - - - 715
""",
}


def _read(table: int) -> Iterator[PaperRow]:
    for line in _SCANNED[table].strip().splitlines():
        arch, model, *figures = line.split()
        for (task, dataset, metric, _), figure in zip(COLUMNS[table], figures, strict=True):
            if figure == "-":
                continue
            yield PaperRow(
                table=table,
                model=model.rstrip("*").replace("-2.0", " 2.0"),
                arch=arch,
                task=task,
                dataset=dataset,
                metric=metric,
                value=float(figure) if "." in figure else int(figure) / 10,
                starred=model.endswith("*"),
                point_restored="." not in figure,
            )


ROWS: tuple[PaperRow, ...] = tuple(row for table in _SCANNED for row in _read(table))


def rows(task: str, dataset: str) -> list[PaperRow]:
    """The paper's figures for an evaluation, in print order; none where it has none."""
    return [row for row in ROWS if (row.task, row.dataset) == (task, dataset)]
