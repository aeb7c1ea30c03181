import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.distributed import World, world_from_environment
from crisp.errors import CrispError
from crisp.evals.results import Result, result_json, result_markdown
from crisp.evals.video import segmenting
from crisp.evals.video.checks import check_data
from crisp.evals.video.command import evaluate_video, list_data, main, share_of_rank
from crisp.evals.video.config import VideoConfig
from crisp.evals.video.masks import read_mask
from crisp.evals.video.protocol import DINO_STD
from crisp.evals.video.scoring import averages, score_sequence
from crisp.evals.video.sequences import VideoSequence
from crisp.models.frozen import FrozenModel
from tests.evals.tiny_backbone import TinyBackbone, tiny_model
from tests.evals.video.official import davis2016, davis2017, five, frame_folder, mose, youtube_vos
from tests.ranks import in_ranks

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))


def coarse() -> FrozenModel:
    """Patches of 32 px: as many as are needed, and quick."""
    return tiny_model(patch_px=32, depth=4)


def configured(tmp_path: Path, data: Path, **options: Any) -> VideoConfig:
    return VideoConfig(
        **{
            "weights": "tiny:",
            "data": data,
            "out": tmp_path / "out",
            "threads": 2,
            "batch": 3,
            "device": "cpu",
            **options,
        }
    )


def evaluated(config: VideoConfig) -> Result:
    return evaluate_video(config, coarse(), ALONE)


def only(folders: Any) -> Path:
    (folder,) = folders
    assert isinstance(folder, Path)
    return folder


def masks_of(config: VideoConfig) -> Path:
    return only(config.out.glob("video-*/masks"))


def test_davis2017_is_scored(tmp_path: Path) -> None:
    config = configured(tmp_path, davis2017(tmp_path / "data"), size="both")
    result = evaluated(config)
    assert (result.task, result.dataset) == ("video", "davis2017")
    by_size = [
        [f"{s.metric} {s.settings['statistic']}" for s in result.scores if s.settings["size"] == size]
        for size in ("480p", "480x480")
    ]
    assert by_size == [["J&F mean", "J mean", "F mean", "J recall", "J decay", "F recall", "F decay"]] * 2
    assert all(s.settings == {"size": "480p", "statistic": "mean"} for s in result.headline().values())
    headline = {name: score.value for name, score in result.headline().items()}
    assert headline["J&F"] == pytest.approx((headline["J"] + headline["F"]) / 2)
    assert 50 < headline["J"] < 100  # patches of 32 px on squares of 135 px: edges are coarse
    assert result.settings["sequences"] == 2
    assert result.settings["objects"] == 4
    assert set(result.settings["sizes"]) == {"480p", "480x480"}
    assert "DINOv2*" in result_markdown(result)  # the paper's rows stand beside
    # the first frame is as it was given; what is scored is what lies there
    folders = sorted(config.out.glob("video-davis2017-val-*"))
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == [
        "video-davis2017-val-480p", "video-davis2017-val-480x480",
    ]  # fmt: skip
    data = list_data(config)
    facts = check_data(data, threads=1)
    again = []
    for sequence in data.sequences:
        masks = folders[0] / "masks" / sequence.name
        np.testing.assert_array_equal(read_mask(masks / "00000.png"), read_mask(sequence.starts[0]))
        with Image.open(masks / "00003.png") as image:
            assert image.mode == "P"
        again += score_sequence(sequence, facts[sequence.name], masks, single_object=False, threads=1)
    assert averages(again)["J&F", "mean"] == headline["J&F"]
    assert len((folders[0] / "objects.csv").read_text().splitlines()) == 5
    assert json.loads((folders[0] / "settings.json").read_text())["protocol"]["queue_frames"] == 7


def test_two_runs_write_the_same(tmp_path: Path) -> None:
    data = davis2017(tmp_path / "data")
    texts = []
    for name in ("a", "b"):
        config = configured(tmp_path, data, out=tmp_path / name)
        texts.append(result_json(evaluated(config)))
    assert texts[0] == texts[1]
    ours, theirs = (sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in ("a", "b"))
    assert [path.relative_to(tmp_path / "a") for path in ours] == [path.relative_to(tmp_path / "b") for path in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))


class Counted:
    """Notes which sequences are segmented, and can be interrupted at one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.stop_at: str | None = None
        original = segmenting.segment

        def segment(sequence: VideoSequence, *args: Any, **options: Any) -> Any:
            self.names.append(sequence.name)
            for frame, mask in original(sequence, *args, **options):
                if sequence.name == self.stop_at and frame == 2:
                    raise KeyboardInterrupt
                yield frame, mask

        monkeypatch.setattr(segmenting, "segment", segment)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def test_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path, davis2017(tmp_path / "data"))
    counted = Counted(monkeypatch)
    counted.stop_at = "camel"
    with pytest.raises(KeyboardInterrupt):
        evaluated(config)
    assert counted.take() == ["bear", "camel"]
    assert [path.name for path in masks_of(config).iterdir()] == ["bear"]  # whole or absent
    counted.stop_at = None
    resumed = evaluated(config)
    assert counted.take() == ["camel"]
    assert result_json(evaluated(config)) == result_json(resumed)
    assert counted.take() == []
    uninterrupted = evaluated(replace(config, out=tmp_path / "other"))
    assert result_json(uninterrupted) == result_json(resumed)
    counted.take()
    # a mask that is gone, and a start that is another
    (masks_of(config) / "bear/00003.png").unlink()
    evaluated(config)
    assert counted.take() == ["bear"]
    shutil.copy(config.data / "Annotations/480p/camel/00001.png", config.data / "Annotations/480p/camel/00000.png")
    evaluated(config)
    assert counted.take() == ["camel"]
    # other weights or settings have other masks
    evaluated(replace(config, layers=1))
    assert counted.take() == ["bear", "camel"]
    evaluate_video(config, tiny_model(patch_px=32, depth=4, seed=1), ALONE)
    assert counted.take() == ["bear", "camel"]


def archived(config: VideoConfig) -> zipfile.ZipFile:
    return zipfile.ZipFile(only(config.out.glob("*.zip")))


def test_archive_of_youtube_vos(tmp_path: Path) -> None:
    config = configured(tmp_path, youtube_vos(tmp_path / "data"), dataset="youtube-vos")
    result = evaluated(config)
    assert result.scores == []
    assert result.dataset == "youtube-vos-valid"
    archive = archived(config)
    assert result.settings["archives"] == {"480p": Path(str(archive.filename)).name}
    asked = {"a": five(0, 5), "b": five(0, 5)[:4]}
    assert archive.namelist() == [f"Annotations/{video}/{name}.png" for video, names in asked.items() for name in names]
    assert sorted(path.stem for path in (masks_of(config) / "b").iterdir()) == asked["b"]
    masks = {name: Image.open(archive.open(f"Annotations/b/{name}.png")) for name in five(0, 5)[:4]}
    assert {mask.mode for mask in masks.values()} == {"P"}
    assert {mask.size for mask in masks.values()} == {(64, 48)}
    assert masks["00000"].getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # type: ignore[index]
    ids = {name: set(np.unique(np.asarray(mask)).tolist()) for name, mask in masks.items()}
    assert ids == {"00000": {0, 1}, "00005": {0, 1}, "00010": {0, 1, 2}, "00015": {0, 1, 2}}
    given = read_mask(config.data / "valid/Annotations/b/00010.png") == 2
    np.testing.assert_array_equal(np.asarray(masks["00010"]) == 2, given)


@pytest.mark.parametrize(
    ("make", "dataset", "split", "videos"),
    [(mose, "mose", "valid", ["0a0b", "1c1d"]), (davis2017, "davis2017", "test-dev", ["hidden"])],
)
def test_archives_with_the_videos_at_their_root(
    tmp_path: Path, make: Any, dataset: Any, split: str, videos: list[str]
) -> None:
    config = configured(tmp_path, make(tmp_path / "data"), dataset=dataset, split=split)
    assert evaluated(config).dataset == f"{dataset}-{split}"
    archive = archived(config)
    assert archive.namelist() == [f"{video}/{name}.png" for video in videos for name in five()]
    assert {Image.open(archive.open(name)).mode for name in archive.namelist()} == {"P"}


def test_archive_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path, mose(tmp_path / "data"), dataset="mose")
    written = []

    def full(self: zipfile.ZipFile, *args: Any) -> None:
        written.append(args)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(CrispError, match="zip: cannot be written"):
            evaluated(config)
    assert [path.name for path in config.out.iterdir() if path.is_file()] == []
    evaluated(config)
    assert archived(config).testzip() is None


def test_hold_outs_are_scored_under_the_name_that_the_paper_has(tmp_path: Path) -> None:
    for make, dataset in ((youtube_vos, "youtube-vos"), (mose, "mose")):
        config = configured(tmp_path, make(tmp_path / dataset), dataset=dataset, split="holdout")
        result = evaluated(config)
        assert result.dataset == dataset
        assert result.settings["sequences"] == 1
        assert result.headline()["J"].value > 50
    assert not list((tmp_path / "out").glob("*.zip"))


def test_davis2016_and_folders(tmp_path: Path) -> None:
    config = configured(tmp_path, davis2016(tmp_path / "data"), dataset="davis2016")
    assert evaluated(config).headline()["J"].value > 50
    assert set(np.unique(read_mask(masks_of(config) / "bear/00004.png")).tolist()) == {0, 1}
    config = configured(
        tmp_path, frame_folder(tmp_path / "clip", masks_of=[1]), dataset="folder", out=tmp_path / "clips"
    )
    assert evaluated(config).scores == []
    assert not read_mask(masks_of(config) / "clip/00000.png").any()  # before its first mask
    assert set(np.unique(read_mask(masks_of(config) / "clip/00004.png")).tolist()) == {0, 1, 2}


class Noted(TinyBackbone):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__(patch_px=32, depth=5)
        self.mean, self.std = (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)
        self.seen: list[tuple[torch.Tensor, int]] = []

    def forward(self, images: torch.Tensor, *, last: int = 1) -> Any:
        self.seen.append((images, last))
        return super().forward(images, last=last)


def test_what_the_backbone_sees(tmp_path: Path) -> None:
    """Batches of frames at the size of the protocol, the model's own normalisation or DINO's; features of 4 blocks."""
    backbone = Noted()
    model = FrozenModel(backbone=backbone, name="noted", source="", fingerprint="noted", account="")
    config = configured(tmp_path, davis2017(tmp_path / "data"), split="train")
    evaluate_video(config, model, ALONE)
    assert [(tuple(images.shape), last) for images, last in backbone.seen] == [
        ((3, 3, 480, 640), 4), ((2, 3, 480, 640), 4),
    ]  # fmt: skip
    own = backbone.seen[0][0]
    backbone.seen.clear()
    evaluate_video(replace(config, normalisation="dino", size="480x480", layers=1), model, ALONE)
    assert [(tuple(images.shape), last) for images, last in backbone.seen] == [
        ((3, 3, 480, 480), 1), ((2, 3, 480, 480), 1),
    ]  # fmt: skip
    dinos = backbone.seen[0][0]
    assert float(own[:, 0].mean() * 0.5 + 0.1) == pytest.approx(
        float(dinos[:, 0].mean() * DINO_STD[0] + 0.485), abs=2e-3
    )


def test_features_are_the_mean_of_the_normed_blocks(tmp_path: Path) -> None:
    frames = sorted((davis2017(tmp_path / "data") / "JPEGImages/480p/bear").iterdir())
    backbone = TinyBackbone(patch_px=32, depth=5)
    extractor = segmenting.Extractor(
        backbone=backbone, device=torch.device("cpu"), size="480p", layers=4, mean=backbone.mean, std=backbone.std,
        batch=2, threads=1, autocast=lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    features = list(extractor.features(frames, 48, 64))
    assert [tuple(f.shape) for f in features] == [(15, 20, 8)] * 5
    image = segmenting.read_frame(frames[3], 480, 640, mean=backbone.mean, std=backbone.std)
    blocks = backbone(image[None], last=4)
    expected = sum(block.patches[0] for block in blocks) / 4
    torch.testing.assert_close(features[3].flatten(0, 1), expected)


def test_shares_of_ranks_are_a_partition_and_even(tmp_path: Path) -> None:
    counts = [7, 30, 3, 3, 12, 9, 20, 1]
    videos = [
        VideoSequence(
            name=str(n), frames=tuple(Path(f"{i}.jpg") for i in range(count)), starts={}, truths={}, written=()
        )
        for n, count in enumerate(counts)
    ]
    for ranks in (1, 2, 3, 9):
        shares = [share_of_rank(videos, rank, ranks) for rank in range(ranks)]
        assert sorted(v.name for share in shares for v in share) == sorted(v.name for v in videos)
    loads = [sum(len(v.frames) for v in share_of_rank(videos, rank, 2)) for rank in range(2)]
    assert max(loads) - min(loads) <= 3


def _evaluate_in_rank(config: VideoConfig) -> Any:
    with world_from_environment("cpu") as world:
        return result_json(evaluate_video(config, coarse(), world))


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    config = configured(tmp_path, davis2017(tmp_path / "data", names=("a", "b", "c")))
    alone = result_json(evaluated(replace(config, out=tmp_path / "alone")))
    assert in_ranks(_evaluate_in_rank, 2, tmp_path / "ranks", config) == [alone, alone]


def _fail_in_last_rank(config: VideoConfig) -> Any:
    """The last rank's frames cannot be decoded."""
    with world_from_environment("cpu") as world:
        if world.rank == world.size - 1:
            segmenting.read_frame = _undecodable
        try:
            evaluate_video(config, coarse(), world)
        except CrispError as error:
            return str(error)
        return None


def _undecodable(path: Path, *args: Any, **options: Any) -> Any:
    raise CrispError(f"{path.name}: this frame cannot be decoded")


@pytest.mark.slow
def test_a_fault_of_one_rank_ends_all(tmp_path: Path) -> None:
    config = configured(tmp_path, davis2017(tmp_path / "data"))
    said = in_ranks(_fail_in_last_rank, 2, tmp_path / "ranks", config)
    assert said == ["00000.jpg: this frame cannot be decoded"] * 2


def test_wrong_choices_are_named(tmp_path: Path) -> None:
    with pytest.raises(CrispError, match="split=valid: davis2017 has no such split"):
        configured(tmp_path, tmp_path, split="valid")
    with pytest.raises(CrispError, match="layers=0: must be at least 1"):
        configured(tmp_path, tmp_path, layers=0)
    with pytest.raises(CrispError, match="batch=0: must be at least 1"):
        configured(tmp_path, tmp_path, batch=0)
    with pytest.raises(CrispError, match="nowhere: no such folder"):
        list_data(configured(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(CrispError, match="layers=5: tiny ViT has 4 blocks"):
        evaluated(configured(tmp_path, davis2017(tmp_path / "data"), layers=5))


def test_patches_of_14_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configured(tmp_path, frame_folder(tmp_path / "clip"), dataset="folder")
    evaluate_video(config, tiny_model(patch_px=14), ALONE)
    assert "patches of 14 px do not divide 480 px: sides are floored to whole patches" in caplog.text


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line, with a model of the tests."""
    published = pytest.importorskip("crisp.models.published", reason="loaders of published models are not there yet")
    monkeypatch.setattr(published, "load_frozen", lambda source, *, device: coarse())
    root = davis2017(tmp_path / "data")
    main(
        ["--weights", "tiny:", "--data", str(root), "--out", str(tmp_path / "out"), "--device", "cpu", "--split", "val"]
    )
    written = json.loads((tmp_path / "out/video-davis2017.json").read_text())
    assert [score["metric"] for score in written["scores"]][:2] == ["J&F", "J"]
    assert "J&F" in capsys.readouterr().out
    assert os.path.exists(tmp_path / "out/video-davis2017.md")
