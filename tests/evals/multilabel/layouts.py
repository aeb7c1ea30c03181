"""Tiny data sets in the official layouts. An image is as many stripes as it has labels, each of its class's colour."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crisp.evals.multilabel.protocol import VOC_CLASSES


def picture(path: Path, labels: Sequence[int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    stripes = [np.random.default_rng(1000 + label).integers(0, 256, 3) for label in labels] or [np.full(3, 128)]
    pixels = np.concatenate([np.tile(colour, (30, 12, 1)) for colour in stripes], axis=1)
    noisy = np.clip(pixels + rng.integers(-15, 16, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=95)


def random_labels(count: int, classes: int, seed: int) -> list[list[int]]:
    """Each class on several images: image i shows class i mod C, and another one now and then."""
    rng = np.random.default_rng(seed)
    return [sorted({i % classes, int(rng.integers(classes))}) for i in range(count)]


def voc(root: Path, *, per_split: int = 40) -> Path:
    """VOCdevkit/VOC2012; each image's first object appears twice, once difficult."""
    place = root / "VOCdevkit/VOC2012"
    (place / "ImageSets/Main").mkdir(parents=True)
    (place / "Annotations").mkdir()
    for number, split in enumerate(("train", "val")):
        names = []
        for i, labels in enumerate(random_labels(per_split, len(VOC_CLASSES), number)):
            name = f"200{7 + number}_{i:06d}"
            names.append(name)
            picture(place / f"JPEGImages/{name}.jpg", labels, i)
            objects = [(VOC_CLASSES[label], 0) for label in labels] + [(VOC_CLASSES[labels[0]], 1)]
            write_annotation(place, name, objects)
        (place / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return place


def write_annotation(place: Path, name: str, objects: Sequence[tuple[str, int]]) -> None:
    """An XML as VOC's; a person carries parts, whose names are no classes."""
    described = "".join(
        f"<object><name>{kind}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        + ("<part><name>head</name></part>" if kind == "person" else "")
        + "</object>"
        for kind, difficult in objects
    )
    (place / f"Annotations/{name}.xml").write_text(
        f"<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename>{described}</annotation>"
    )


def coco(place: Path, year: int, *, per_split: int = 12, category_ids: Sequence[int] = (1, 3, 90, 13)) -> Path:
    """{train,val}YEAR and annotations/, with ids as COCO's have gaps; the last image of a split shows nothing."""
    for number, split in enumerate(("train", "val")):
        images, annotations = [], []
        for i, labels in enumerate([*random_labels(per_split - 1, len(category_ids), number), []]):
            image_id = 9 + 16 * (per_split - i)  # falling: the order in the file is not that of the ids
            prefix = f"COCO_{split}2014_" if year == 2014 else ""
            name = f"{prefix}{image_id:012d}.jpg"
            images.append({"id": image_id, "file_name": name, "height": 30, "width": 12})
            picture(place / f"{split}{year}" / name, labels, i)
            annotations += [
                annotation(len(annotations) + k, image_id, category_ids[label]) for k, label in enumerate(labels)
            ]
        categories = [{"id": number, "name": f"thing {number}", "supercategory": "thing"} for number in category_ids]
        write_instances(place, split, year, images, annotations, categories)
    return place


def annotation(number: int, image_id: int, category_id: int) -> dict[str, Any]:
    return {
        "id": number, "image_id": image_id, "category_id": category_id,
        "bbox": [0.0, 0.0, 5.0, 5.0], "area": 25.0, "iscrowd": 0, "segmentation": [],
    }  # fmt: skip


def write_instances(
    place: Path,
    split: str,
    year: int,
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
) -> None:
    (place / "annotations").mkdir(parents=True, exist_ok=True)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    (place / f"annotations/instances_{split}{year}.json").write_text(json.dumps(content))


def visual_genome(place: Path, *, images: int = 60, names: Sequence[str] = ("man", "tree", "sky")) -> Path:
    """objects.json, VG_100K and VG_100K_2; names in mixed case, a rare one on each tenth image."""
    content = []
    for i, labels in enumerate(random_labels(images, len(names), 0)):
        image_id = 1 + 7 * (images - i)
        folder = "VG_100K" if i % 2 else "VG_100K_2"
        picture(place / folder / f"{image_id}.jpg", labels, i)
        objects = [{"object_id": 10 * i + k, "names": [_dressed(names[label], k)]} for k, label in enumerate(labels)]
        if i % 10 == 0:
            objects.append({"object_id": 10 * i + 9, "names": ["rare"]})
        content.append({"image_id": image_id, "objects": objects, "image_url": f"https://x/{folder}/{image_id}.jpg"})
    (place / "objects.json").write_text(json.dumps(content))
    return place


def _dressed(name: str, k: int) -> str:
    return f" {name.title()}" if k else name
