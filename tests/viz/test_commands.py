"""The picture commands from end to end on tiny models: what they draw, and wrong input in one line each."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crisp.checkpoint import load_module_state, load_weights
from crisp.cli import main as crisp
from crisp.config import TrainConfig
from crisp.models.published import load_frozen
from crisp.models.student_teacher import build_student_teacher
from crisp.pipelines.loader import build_train_loader
from crisp.runs import read_run_config
from crisp.training.step import find_regions
from crisp.viz import attention, correspondence, pca, regions
from crisp.viz.components import composite, principal_components
from crisp.viz.config import ShapedPictureConfig
from crisp.viz.inputs import Images, prepare
from crisp.viz.regions import RegionsConfig, region_pictures

pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
CPU = torch.device("cpu")


def run(caplog: pytest.LogCaptureFixture, *args: str | Path) -> str:
    """The log of a command that succeeds."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert crisp(["viz", *map(str, args)]) == 0, caplog.text
    return caplog.text


def test_every_command_writes_png_and_pdf(
    weights: dict[str, str], photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = ("--weights", weights["16"], weights["8"], "--images", photo_folder, "--device", "cpu", "--count", "1")
    for command, *options in (
        ("pca", "--size-px", "96", "--one-by-one"),
        ("attention", "--size-px", "96", "--shape", "whole"),
        ("correspondence", "--size-px", "96"),
        ("correspondence", "--size-px", "96", "--between", "views", "--attention-weights", weights["8"]),
        ("regions", "--weights", weights["16"], "--size-px", "96"),
    ):
        for suffix in ("png", "pdf") if command == "pca" else ("png",):
            out = tmp_path / f"{command}.{suffix}"
            out.unlink(missing_ok=True)
            text = run(caplog, command, *both, *options, "--out", out)
            assert str(out) in text
            assert str(photo_folder) in text, "which images are shown"
            if suffix == "pdf":
                assert out.read_bytes()[:5] == b"%PDF-"
            else:
                pixels = np.asarray(Image.open(out).convert("RGB"))
                assert min(pixels.shape[:2]) > 250
                assert pixels.std() > 20


def test_pca_shows_the_components_of_what_each_model_sees(weights: dict[str, str], photo_folder: Path) -> None:
    """Taken from the finished figure; 96 px where the models are made for 64."""
    config = pca.PcaConfig(
        weights=(weights["16"], weights["8"]), images=(str(photo_folder),), out=Path("x.png"), count=2, size_px=96,
        shape="squash", device="cpu", one_by_one=True,
    )  # fmt: skip
    panels = pca.picture(config).axes
    assert len(panels) == 2 * (1 + 2 * 2)
    images = Images([str(photo_folder)])
    shown = [np.asarray(panel.images[0].get_array()) for panel in panels]
    first = [array for array in shown if array.shape == (96, 96, 3)]
    for array, number in zip(first, (0, 3), strict=True):
        np.testing.assert_array_equal(array, prepare(images.decode(number), size_px=96, patch_px=1, shape="squash"))
    for patch, grid in ((16, 6), (8, 12)):
        backbone = load_frozen(weights[str(patch)], device=CPU).backbone
        maps = [array for array in shown if array.shape == (grid, grid, 3)]
        for array, image in zip(maps, first, strict=True):
            pixels = (image / 255 - np.array(backbone.mean)) / np.array(backbone.std)
            tokens = backbone(torch.tensor(pixels).movedim(-1, 0)[None].float())[-1].patches[0]
            expected = composite(principal_components(tokens.numpy(), 6), (grid, grid))
            assert np.abs(array.astype(int) - expected.astype(int)).max() <= 1


def test_attention_shows_mean_and_heads(weights: dict[str, str], photo_folder: Path) -> None:
    config = ShapedPictureConfig(
        weights=(weights["16"],), images=(str(photo_folder),), out=Path("x.png"), count=1, size_px=96, device="cpu"
    )
    figure = attention.picture(config)
    image, mean, heads = (np.asarray(panel.images[0].get_array()) for panel in figure.axes)
    backbone = load_frozen(weights["16"], device=CPU).backbone
    pixels = (image / 255 - np.array(backbone.mean)) / np.array(backbone.std)
    expected = backbone.cls_attention(torch.tensor(pixels).movedim(-1, 0)[None].float())[0].numpy()
    assert mean.shape == (6, 6, 3)
    brightest = np.unravel_index(mean.astype(int).sum(-1).argmax(), (6, 6))
    assert brightest == np.unravel_index(expected.mean(0).argmax(), (6, 6))
    height = heads.shape[0] // 6  # two heads beside each other, enlarged
    second = heads[height // 2 :: height, -6 * height + height // 2 :: height]
    assert np.unravel_index(second.astype(int).sum(-1).argmax(), (6, 6)) == np.unravel_index(
        expected[1].argmax(), (6, 6)
    )


def test_accuracy_between_views_is_printed_and_the_same_again(
    weights: dict[str, str], photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = (
        "correspondence", "--between", "views", "--weights", weights["16"], "--names", "tiny", "--images", photo_folder,
        "--size-px", "96", "--device", "cpu", "--out", tmp_path / "x.png", "--count", "1", "--measured", "4",
    )  # fmt: skip
    lines = [[x for x in run(caplog, *args).splitlines() if "matched right" in x] for _ in range(2)]
    assert lines[0] == lines[1]
    (line,) = lines[0]
    assert "tiny: " in line
    assert "mean of 4 images" in line
    text = run(caplog, *args, "--seed", "1")
    assert line not in text, "other crops"


def test_pairs_are_drawn_from_patch_to_match(weights: dict[str, str], photo_folder: Path) -> None:
    config = correspondence.CorrespondenceConfig(
        weights=(weights["16"],), images=(str(photo_folder),), out=Path("x.png"), sample=(2, 0), size_px=96, top=5,
        device="cpu",
    )  # fmt: skip
    (panel,) = correspondence.picture(config).axes
    assert len(panel.lines) == 5
    backbone = load_frozen(weights["16"], device=CPU).backbone
    images = Images([str(photo_folder)])
    pixels = [prepare(images.decode(n), size_px=96, patch_px=1, shape="squash") for n in (2, 0)]
    inputs = [(p / 255 - np.array(backbone.mean)) / np.array(backbone.std) for p in pixels]
    first, second = (torch.tensor(x).movedim(-1, 0)[None].float() for x in inputs)
    similar = backbone(first)[-1].patches[0] @ backbone(second)[-1].patches[0].T
    top = backbone.cls_attention(first)[0].mean(0).topk(5).indices
    for line, patch in zip(panel.lines, top.tolist(), strict=True):
        match = int(similar[patch].argmax())
        x, y = line.get_xydata().T
        assert (x[0], y[0]) == (patch % 6 * 16 + 8, patch // 6 * 16 + 8)
        assert (x[1] - 96 - round(0.06 * 96), y[1]) == (match % 6 * 16 + 8, match // 6 * 16 + 8)


def test_regions_are_those_of_the_training_step(run_folder: Path) -> None:
    """The same batch, through the run's networks and through the loader of frozen weights."""
    config = read_run_config(run_folder)
    checkpoint = run_folder / "checkpoints" / "step-00000009"
    networks = build_student_teacher(config, CPU).eval()
    load_weights(networks.teacher, load_module_state(checkpoint, "teacher"), source="")
    loader = build_train_loader(config, rank=0, world_size=1, device=CPU)
    batch = next(iter(loader))
    expected = find_regions(networks, batch, config)
    found = region_pictures(
        load_frozen(str(checkpoint), device=CPU), batch, views=config.views, region=config.region, device=CPU
    )
    loader.close()
    np.testing.assert_array_equal(found.region, expected.reference[:, 0].numpy())
    np.testing.assert_array_equal(found.view_regions, expected.masks[:, :, 0].numpy())
    np.testing.assert_array_equal(found.valid, expected.valid[:, 0].numpy())
    assert found.region.sum() > len(found.region)


def test_regions_of_a_run_take_its_choices_and_show_what_it_saw(
    run_folder: Path, weights: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_run_config(run_folder)
    sources = [run_folder / "checkpoints" / f"step-0000000{step}" for step in (6, 9)]
    assert config.data.shards is not None
    args = ("--images", config.data.shards, "--device", "cpu", "--out", tmp_path / "x.png", "--sample", "3", "17")
    text = run(caplog, "regions", "--weights", *sources, *args)
    assert text.count(f"threshold {config.region.threshold:g}, mean of the last 2 blocks") == 2
    text = run(caplog, "regions", "--weights", sources[0], weights["16"], *args, "--threshold", ".5", "--blocks", "1")
    assert text.count("threshold 0.5, mean of the last 1 blocks") == 2
    drawn = RegionsConfig(
        weights=(str(sources[0]), str(sources[1])), images=(config.data.shards,), out=tmp_path / "x.png",
        sample=(3, 17), device="cpu",
    )  # fmt: skip
    panels = regions.picture(drawn).axes
    assert len(panels) == 2 * 2 * 3
    side = config.views.global_px
    assert {panel.get_xlim() + panel.get_ylim() for panel in panels} == {(0, side, side, 0)}, (
        "all of each image is seen"
    )
    batch = _first_epoch(config, (3, 17))
    for sample, number in enumerate((3, 17)):
        reference = next(p for p in panels if len(p.lines) == 1 and _shows(p.images[0], batch[number]))
        assert reference.lines[0].get_color() == "#1646ff", f"the seed of image {sample}"


def _shows(image: object, pixels: np.ndarray) -> bool:
    array = np.asarray(image.get_array())  # type: ignore[attr-defined]
    return array.shape == pixels.shape and bool((array == pixels).all())


def _first_epoch(config: TrainConfig, wanted: tuple[int, ...]) -> dict[int, np.ndarray]:
    """References of samples as the run's loader makes them."""
    from crisp.viz.region_figure import denormalise

    loader = build_train_loader(config, rank=0, world_size=1, device=CPU)
    found = {}
    for _, batch in zip(range(loader.steps_per_epoch), loader, strict=False):
        for b, sample_id in enumerate(batch.sample_id.tolist()):
            if sample_id in wanted:
                found[sample_id] = denormalise(batch.reference[b])
    loader.close()
    return found


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_of_runs(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(caplog, "curves", "--runs", run_folder, "--out", tmp_path / "x.pdf")
    run(caplog, "curves", "--runs", run_folder, run_folder, "--names", "a", "b$_$", "--keys", "loss", "learning_rate",
        "--out", tmp_path / "x.png")  # fmt: skip
    assert np.asarray(Image.open(tmp_path / "x.png")).shape[1] == 2100


# --- wrong input ------------------------------------------------------------------------------------------------------

WRONG = {
    "no such weights": (("pca", "--weights", "nowhere.pth"), "nowhere.pth: no such file"),
    "no such image": (("pca", "--images", "nowhere"), "images=nowhere: no such file or folder"),
    "suffix": (("attention", "--out", "x.gif"), "out=x.gif: pictures are written as .png or .pdf"),
    "size": (("pca", "--size-px", "100"), "size_px=100: no multiple of the 16 px patches of DINO"),
    "too large": (("attention", "--size-px", "1136"), "size_px=1136: must lie between"),
    "names": (("pca", "--names", "a", "b"), "names: 2 for 1 weights"),
    "sample": (("regions", "--sample", "99"), "sample=99: there are 4 images"),
    "odd pairs": (("correspondence", "--sample", "1", "2", "3"), "sample: 3 images are no pairs"),
    "one image": (("correspondence", "--images", "{photos}/chelsea.png"), "images: 1 given, which is no pair"),
    "measured": (("correspondence", "--measured", "9"), "measured=9: between images the right match is unknown"),
    "top": (("correspondence", "--top", "0"), "top=0: must be 1 or more"),
    "seed": (("regions", "--seed", "-1"), "seed=-1: must be 0 or more"),
    "blocks": (("regions", "--blocks", "3"), "blocks=3: DINO ViT-128×2/16 has 2 blocks"),
    "threshold": (("regions", "--threshold", "2"), "threshold=2.0: a cosine lies in [-1, 1]"),
    "grids": (("regions", "--weights", "{16}", "{8}"), "patches of 8 px"),
    "no cls": (("attention", "--weights", "{no cls}"), "has no [CLS] token"),
    "no cls to match": (("correspondence", "--weights", "{no cls}"), "with --attention-weights"),
    "count": (("pca", "--count", "0"), "count=0: must be 1 or more"),
    "too few patches": (("pca", "--size-px", "16"), "components=3: 1 patches"),
    "curves of nothing": (("curves",), "runs and table: give one of the two"),
    "curves of no run": (("curves", "--runs", "{photos}"), "no config.json"),
    "table": (("curves", "--table", "{photos}/chelsea.png"), "not a table of an ablation"),
    "evals": (("curves", "--runs", "x", "--evals", "nowhere"), "evals=nowhere: no such folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(
    name: str, weights: dict[str, str], photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    (command, *options), words = WRONG[name]
    known = {"{photos}": str(photo_folder)} | {f"{{{key}}}": source for key, source in weights.items()}
    given = []
    for option in options:
        for key, value in known.items():
            option = option.replace(key, value)
        given.append(option)
    defaults = {"--out": [str(tmp_path / "x.png")]}
    if command != "curves":
        defaults |= {"--weights": [weights["16"]], "--images": [str(photo_folder)], "--device": ["cpu"]}
        if command == "pca":
            defaults["--size-px"] = ["64"]
    rest = [part for key, values in defaults.items() if key not in given for part in (key, *values)]
    assert crisp(["viz", command, *given, *rest]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert words in lines[0]
    assert not (tmp_path / "x.png").exists()


def test_a_diverged_model_is_said(weights: dict[str, str], photo_folder: Path, tmp_path: Path) -> None:
    path = Path(weights["16"].removeprefix("dino:"))
    state = torch.load(path)
    state["blocks.1.mlp.fc2.bias"] += 3e38
    torch.save(state, tmp_path / "w.pth")
    config = pca.PcaConfig(
        weights=(f"dino:{tmp_path / 'w.pth'}",), images=(str(photo_folder),), out=tmp_path / "x.png", count=1,
        size_px=64, device="cpu",
    )  # fmt: skip
    with pytest.raises(Exception, match="not finite, so it has diverged"):
        pca.picture(replace(config))


def test_an_ablation_is_drawn_as_table_and_curves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"value": b, "scores": {"mIoU": 50 + b}, "paper": {"mIoU": 51 + b}, "default": b == 0.75}
            for b in (0.4, 0.75, 0.9)]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps({"title": "β", "parameter": "β", "rows": rows}))
    run(caplog, "curves", "--table", tmp_path / "t.json", "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
