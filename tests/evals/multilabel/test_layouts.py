"""Each official layout, read and refused; and COCO's made from real photographs and boxes."""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crisp.errors import CrispError
from crisp.evals.multilabel.coco import find_coco2014, find_coco2017, open_coco
from crisp.evals.multilabel.command import open_data_set
from crisp.evals.multilabel.data import IGNORED, MultiLabelImages, check_positives
from crisp.evals.multilabel.protocol import VOC_CLASSES
from crisp.evals.multilabel.visual_genome import find_visual_genome, open_visual_genome
from crisp.evals.multilabel.voc import find_voc2012_multilabel, open_voc2012
from tests.evals.multilabel import layouts


def named(images: MultiLabelImages, number: int, value: int = 1) -> set[str]:
    return {images.classes[column] for column in np.flatnonzero(images.targets[number] == value)}


# -------------------------------------------------------------------------------------------------------------- VOC


def test_voc_takes_the_lists_and_the_xml(tmp_path: Path) -> None:
    place = layouts.voc(tmp_path)
    data = open_voc2012(place)
    for split, images in (("train", data.train), ("val", data.val)):
        names = (place / f"ImageSets/Main/{split}.txt").read_text().split()
        assert len(images) == len(names) == 40
        for number, name in enumerate(names):
            assert Path(images.source.where(number)).stem == name
            tree = ET.parse(place / f"Annotations/{name}.xml")
            easy = {o.findtext("name") for o in tree.findall("object") if o.findtext("difficult") == "0"}
            assert named(images, number) == easy
            assert not named(images, number, IGNORED)


def test_a_class_with_difficult_objects_alone_is_ignored(tmp_path: Path) -> None:
    place = layouts.voc(tmp_path)
    name = (place / "ImageSets/Main/train.txt").read_text().split()[0]
    layouts.write_annotation(place, name, [("dog", 1), ("cat", 0), ("cat", 1), ("person", 1), ("bird", 1), ("bird", 0)])
    images = open_voc2012(place).train
    assert named(images, 0) == {"cat", "bird"}
    assert named(images, 0, IGNORED) == {"dog", "person"}
    assert len(named(images, 0, 0)) == 16


def test_what_is_wrong_with_voc_is_told_at_once(tmp_path: Path) -> None:
    place = layouts.voc(tmp_path)
    name = (place / "ImageSets/Main/val.txt").read_text().split()[3]

    def refused() -> str:
        with pytest.raises(CrispError) as raised:
            open_voc2012(place)
        return str(raised.value)

    layouts.write_annotation(place, name, [("unicorn", 0)])
    assert f"{name}.xml: object 'unicorn' is none of VOC's 20 classes" in refused()
    (place / f"Annotations/{name}.xml").write_text("<annotation>")
    assert f"{name}.xml: not XML" in refused()
    (place / f"Annotations/{name}.xml").unlink()
    assert f"{name}.xml: No such file" in refused()
    layouts.write_annotation(place, name, [("cat", 0)])
    (place / f"JPEGImages/{name}.jpg").unlink()
    assert f"{name}.jpg: no such file, and so 1 of 40 images" in refused()
    for i in range(40):
        layouts.write_annotation(place, f"2007_{i:06d}", [(other, 0) for other in VOC_CLASSES if other != "sofa"])
    layouts.write_annotation(place, "2007_000000", [("sofa", 1)])
    assert "train: no image shows class 'sofa', and so for 1 of 20 classes" in refused()


# -------------------------------------------------------------------------------------------------------------- COCO


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_takes_the_official_files(tmp_path: Path, year: int) -> None:
    data = open_coco(layouts.coco(tmp_path, year), year)
    assert data.name == f"coco{year}"
    assert data.train.classes == ("thing 1", "thing 3", "thing 13", "thing 90")  # by id
    for split, images in (("train", data.train), ("val", data.val)):
        content = json.loads((tmp_path / f"annotations/instances_{split}{year}.json").read_text())
        assert len(images) == len(content["images"]) == 12
        names = {image["id"]: image["file_name"] for image in content["images"]}
        kinds = {category["id"]: category["name"] for category in content["categories"]}
        expected: dict[str, set[str]] = {name: set() for name in names.values()}
        for found in content["annotations"]:
            expected[names[found["image_id"]]].add(kinds[found["category_id"]])
        assert {Path(images.source.where(i)).name: named(images, i) for i in range(12)} == expected
        assert set() in expected.values()


def test_coco_images_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    place = layouts.coco(tmp_path, 2017)
    before = open_coco(place, 2017)
    (place / "images").mkdir()
    for split in ("train2017", "val2017"):
        (place / split).rename(place / "images" / split)
    after = open_coco(place, 2017)
    assert after.train.source.fingerprint == before.train.source.fingerprint


def test_what_is_wrong_with_coco_is_told_at_once(tmp_path: Path) -> None:
    place = layouts.coco(tmp_path, 2017)
    path = place / "annotations/instances_val2017.json"
    whole = json.loads(path.read_text())

    def refused(**changes: Any) -> str:
        path.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(CrispError) as raised:
            open_coco(place, 2017)
        return str(raised.value)

    odd = layouts.annotation(77, whole["images"][0]["id"], 4)
    assert "annotation 77 has unknown category 4" in refused(annotations=[*whole["annotations"], odd])
    odd = layouts.annotation(78, 5, 1)
    assert "annotation 78 has unknown image 5" in refused(annotations=[*whole["annotations"], odd])
    kept = [found for found in whole["annotations"] if found["category_id"] != 90]
    assert "no image shows class 'thing 90', and so for 1 of 4 classes" in refused(annotations=kept)
    extra = {"id": 2**20, "file_name": "absent.jpg"}
    assert "absent.jpg: no such file, and so 1 of 13 images" in refused(images=[*whole["images"], extra])
    renamed = [{**kind, "name": f"other {kind['id']}"} for kind in whole["categories"]]
    assert "the categories of train and val differ" in refused(categories=renamed)
    assert "not COCO's instances" in refused(images=[{"id": 3}], annotations=[])
    path.write_text("{")
    with pytest.raises(CrispError, match="not JSON"):
        open_coco(place, 2017)


def test_coco_made_from_real_photographs_and_boxes(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "coco128"
    boxes = {
        split: {path.stem: _classes(path) for path in sorted((source / f"boxes/{split}2017").glob("*.txt"))}
        for split in ("train", "val")
    }
    # Categories that have a box in each split, under the ids c + 1.
    counts = [Counter(kind for kinds in boxes[split].values() for kind in kinds) for split in ("train", "val")]
    common = sorted(counts[0].keys() & counts[1].keys())
    assert len(common) > 10
    for split in ("train", "val"):
        images, annotations = [], []
        (tmp_path / f"{split}2017").symlink_to(source / f"images/{split}2017")
        for stem, kinds in boxes[split].items():
            with Image.open(source / f"images/{split}2017/{stem}.jpg") as file:
                width, height = file.size
            images.append({"id": int(stem), "file_name": f"{stem}.jpg", "width": width, "height": height})
            for kind in kinds:
                if kind in common:
                    annotations.append(layouts.annotation(len(annotations), int(stem), kind + 1))
        categories = [{"id": kind + 1, "name": f"class {kind}"} for kind in common]
        layouts.write_instances(tmp_path, split, 2017, images, annotations, categories)
    data = open_coco(tmp_path, 2017)
    for split, read in (("train", data.train), ("val", data.val)):
        assert len(read) == len(boxes[split])
        for number in range(len(read)):
            kinds = boxes[split][Path(read.source.where(number)).stem]
            assert named(read, number) == {f"class {kind}" for kind in kinds if kind in common}


def _classes(path: Path) -> list[int]:
    return [int(line.split()[0]) for line in path.read_text().splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------------------ Visual Genome


def test_visual_genome_takes_the_most_frequent_names(tmp_path: Path) -> None:
    place = layouts.visual_genome(tmp_path)
    data = open_visual_genome(place, classes=3)
    counts = Counter(
        name.strip().lower()
        for image in json.loads((place / "objects.json").read_text())
        for found in image["objects"]
        for name in found["names"]
    )
    assert list(data.train.classes) == sorted(counts, key=lambda name: (-counts[name], name))[:3]
    assert "rare" not in data.train.classes
    with pytest.raises(CrispError, match="val: no image shows class 'rare', and so for 1 of 4 classes"):
        open_visual_genome(place, classes=4)
    assert (len(data.train), len(data.val)) == (54, 6)
    objects = {image["image_id"]: image["objects"] for image in json.loads((place / "objects.json").read_text())}
    seen = set()
    for images in (data.train, data.val):
        for number in range(len(images)):
            image_id = int(Path(images.source.where(number)).stem)
            names = {name.strip().lower() for found in objects[image_id] for name in found["names"]}
            assert named(images, number) == names - {"rare"}
            seen.add(image_id)
    assert seen == set(objects)


def test_visual_genomes_split_is_a_function_of_the_ids(tmp_path: Path) -> None:
    place = layouts.visual_genome(tmp_path)
    first = open_visual_genome(place, classes=3)
    content = json.loads((place / "objects.json").read_text())
    (place / "objects.json").write_text(json.dumps(content[::-1]))
    second = open_visual_genome(place, classes=3)
    assert first.val.source.names == second.val.source.names
    order = np.random.default_rng(0).permutation(60)
    ids = sorted(image["image_id"] for image in content)
    assert sorted(ids[row] for row in order[:6]) == [int(Path(name).stem) for name in first.val.source.names]


def test_what_is_wrong_with_visual_genome_is_told_at_once(tmp_path: Path) -> None:
    place = layouts.visual_genome(tmp_path)
    with pytest.raises(CrispError, match="4 object names, 500 are wanted"):
        open_visual_genome(place)
    image = next((place / "VG_100K").glob("*.jpg"))
    image.unlink()
    with pytest.raises(CrispError, match=rf"no image {image.name} in VG_100K or VG_100K_2, and so 1 of 60 images"):
        open_visual_genome(place, classes=3)
    content = json.loads((place / "objects.json").read_text())
    (place / "objects.json").write_text(json.dumps([*content, content[0]]))
    with pytest.raises(CrispError, match="1 image ids stand there more than once"):
        open_visual_genome(place, classes=3)
    (place / "objects.json").write_text(json.dumps([{"image_id": 3}]))
    with pytest.raises(CrispError, match="not Visual Genome's objects"):
        open_visual_genome(place, classes=3)


# ------------------------------------------------------------------------------------------------------------ finding


def test_each_finder_finds_its_own_layout_alone(tmp_path: Path) -> None:
    finders = {
        "voc": find_voc2012_multilabel, "coco2014": find_coco2014, "coco2017": find_coco2017, "vg": find_visual_genome
    }  # fmt: skip
    places = {
        "voc": layouts.voc(tmp_path / "voc"),
        "coco2014": layouts.coco(tmp_path / "a/coco", 2014),
        "coco2017": layouts.coco(tmp_path / "b/coco", 2017),
        "vg": layouts.visual_genome(tmp_path / "c/visual_genome"),
    }
    for of, place in places.items():
        for name, find in finders.items():
            assert find(place) == (place if name == of else None)
            assert find(place.parent) == (place if name == of else None)
    with pytest.raises(CrispError, match="no multi-label data set here"):
        open_data_set(tmp_path / "nowhere", None)
    with pytest.raises(CrispError, match="no coco2014 here"):
        open_data_set(places["voc"], "coco2014")
    assert open_data_set(places["coco2017"], None).name == "coco2017"


def test_a_class_without_a_positive_image_is_named(tmp_path: Path) -> None:
    data = open_coco(layouts.coco(tmp_path, 2017), 2017).train
    targets = data.targets.copy()
    targets[:, [1, 3]] = IGNORED
    with pytest.raises(CrispError, match="here: no image shows class 'thing 3', and so for 2 of 4 classes"):
        check_positives(MultiLabelImages(source=data.source, targets=targets, classes=data.classes), "here")
