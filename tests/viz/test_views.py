"""The picture of a sample's views: its lines lie where the content is, and it shows what training would see."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from crisp.config import DataConfig, OptimConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError
from crisp.geometry import crop_affine
from crisp.pipelines.loader import build_train_loader
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.viz.grid import GridLine, clip_segment, grid_lines, grid_nodes, map_line, map_nodes, map_patch
from crisp.viz.region_figure import denormalise
from crisp.viz.views import ViewsPictureConfig, draw_views, main, render_samples, view_title

CELLS, PATCH_PX, STEP_PX = 7, 16, 32
LEVEL = 36  # brightness from one cell to the next
# Geometry alone: every pixel keeps its value.
PLAIN = ViewsConfig(
    local_views=6, jitter_probability=0, grayscale_probability=0, blur_probability=(0, 0, 0),
    solarize_probability=(0, 0, 0), mask_probability=1, seeds_per_image=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose content is the grid: red rises by a level per column of cells, green per row; one wide, one high."""
    folder = tmp_path_factory.mktemp("views")
    for name, cell_w, cell_h in (("wide", 70, 45), ("high", 40, 66)):
        column, row = np.meshgrid(np.arange(CELLS * cell_w) // cell_w, np.arange(CELLS * cell_h) // cell_h)
        pixels = np.stack([column * LEVEL, row * LEVEL, np.zeros_like(row)], axis=-1).astype(np.uint8)
        target = folder / "images" / "class" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), workers=1))
    return folder / "shards"


def config_for(shards: Path, **values: Any) -> ViewsPictureConfig:
    return ViewsPictureConfig(**({"shards": str(shards), "out": Path("views.png"), "views": PLAIN} | values))


def borders(image: NDArray[np.uint8], axis: str) -> dict[float, float]:
    """Where the content's cells meet, in continuous pixels of the view, by that border's place in the reference."""
    levels = image[..., 0].mean(axis=0) if axis == "x" else image[..., 1].mean(axis=1)
    centres = np.arange(len(levels)) + 0.5
    if levels[0] > levels[-1]:
        levels, centres = levels[::-1], centres[::-1]
    found = {}
    for border in range(1, CELLS):
        half = (border - 0.5) * LEVEL
        # Steps beside the view's own border are left out: resizing repeats the last pixel there.
        if levels[2] < half - LEVEL / 3 and half + LEVEL / 3 < levels[-3]:
            after = int(np.argmax(levels > half))
            share = (half - levels[after - 1]) / (levels[after] - levels[after - 1])
            found[float(border * STEP_PX)] = float(centres[after - 1] + share * (centres[after] - centres[after - 1]))
    return found


@pytest.mark.parametrize("sample_id", [0, 1])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_drawn_lines_lie_on_the_content(shards: Path, sample_id: int, epoch: int) -> None:
    """Taken from the finished figure: the lines' data against the pixels of the image in the same axes."""
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    (shown,) = render_samples(config_for(shards, sample=(sample_id,), epoch=epoch))
    figure = draw_views(shown, grid_patches=STEP_PX // PATCH_PX)
    compared = 0
    assert len(figure.axes) == 1 + PLAIN.views
    for panel, image in zip(figure.axes, [shown.reference, *shown.views], strict=True):
        side = image.shape[0]
        assert panel.images[0].get_extent() == [0, side, side, 0], "continuous pixels: [0, side] from edge to edge"
        np.testing.assert_array_equal(panel.images[0].get_array(), image)
        drawn = {line.get_gid(): line for line in panel.lines}
        for axis, along in (("x", "y"), ("y", "x")):
            for at_px, content in borders(image, axis).items():
                line = drawn[f"{axis}={at_px:g}"]
                places, ends = getattr(line, f"get_{axis}data")(), getattr(line, f"get_{along}data")()
                assert places[0] == pytest.approx(places[1])
                assert places[0] == pytest.approx(content, abs=0.15)
                assert sorted(ends) == pytest.approx([0, side]), "clipped to the view, from edge to edge"
                compared += 1
    assert compared >= 2 * (CELLS - 1) + 10


def test_flips_and_both_shapes_were_among_them(shards: Path) -> None:
    flips = [
        shown.plan.flip[0]
        for epoch in range(3)
        for shown in render_samples(config_for(shards, sample=(0, 1), epoch=epoch))
    ]
    assert 0.2 < np.mean(flips) < 0.8


def test_seed_quad_covers_the_seeds_content(shards: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    inside = 0
    for epoch in range(4):
        (shown,) = render_samples(config_for(shards, epoch=epoch))
        for panel, image in zip(draw_views(shown).axes, [shown.reference, *shown.views], strict=True):
            for patch, seed in zip(panel.patches, shown.plan.region_seed[0].tolist(), strict=True):
                row, column = divmod(seed, PLAIN.reference_grid)
                x, y = patch.get_xy()[:4].mean(axis=0)
                if 3 < x < image.shape[1] - 3 and 3 < y < image.shape[0] - 3:  # its centre is on the view
                    red, green, _ = image[int(y), int(x)].tolist()
                    assert (red, green) == pytest.approx((column // 2 * LEVEL, row // 2 * LEVEL), abs=6)
                    inside += 1
    assert inside >= 4 * PLAIN.seeds_per_image + 4, "in views too"


def test_masked_patches_are_veiled(shards: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    (shown,) = render_samples(config_for(shards))
    panels = draw_views(shown).axes
    for view in range(2):
        veil = panels[1 + view].images[1].get_array()[..., 3]
        np.testing.assert_array_equal(veil.ravel() > 0, shown.plan.patch_masks[view, 0])
    assert [len(panel.images) for panel in panels[3:]] == [1] * PLAIN.local_views


def test_shows_what_a_run_shows(shards: Path) -> None:
    """Views, affines, masks and seeds of a training loader's batches, in its first and second epoch."""
    run = TrainConfig(
        seed=5, views=PLAIN, data=DataConfig(shards=str(shards), parts=1, threads=1), optim=OptimConfig(global_batch=2)
    )
    loader = build_train_loader(run, rank=0, world_size=1, device=torch.device("cpu"))
    with contextlib.closing(loader):
        for epoch, batch in zip(range(2), loader, strict=False):
            for b, sample_id in enumerate(batch.sample_id.tolist()):
                (shown,) = render_samples(config_for(shards, sample=(sample_id,), seed=5, epoch=epoch))
                np.testing.assert_array_equal(shown.reference, denormalise(batch.reference[b]))
                expected = [*denormalise(batch.global_views[:, b]), *denormalise(batch.local_views[:, b])]
                for ours, theirs in zip(shown.views, expected, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
                for name in ("view_from_reference", "patch_masks"):
                    np.testing.assert_array_equal(getattr(shown.plan, name)[:, 0], getattr(batch, name)[:, b].numpy())
                np.testing.assert_array_equal(shown.plan.region_seed[0], batch.region_seed[b].numpy())


def test_titles_say_what_was_done(shards: Path) -> None:
    loud = ViewsConfig(
        local_views=0, flip_probability=1, jitter_probability=1, grayscale_probability=1, blur_probability=(1, 0, 0),
        blur_sigma_px=(1.5, 1.5), solarize_probability=(0, 1, 0),
    )  # fmt: skip
    (shown,) = render_samples(config_for(shards, views=loud))
    sizes = [f"{w}×{h}" for w, h in shown.plan.crop_px[0, :, 2:].tolist()]
    assert view_title(shown.plan, 0) == f"global 1: {sizes[0]} px\nflip, jitter, grey, blur σ 1.5"
    assert view_title(shown.plan, 1) == f"global 2: {sizes[1]} px\nflip, jitter, grey, solarise"
    (shown,) = render_samples(config_for(shards, views=replace(PLAIN, flip_probability=0)))
    assert view_title(shown.plan, 2).startswith("local 1: ")
    assert view_title(shown.plan, 2).endswith("px\nas it is")


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_lines_reach_the_border_of_a_reference_that_is_no_multiple() -> None:
    assert [line.at_px for line in grid_lines(112, step_px=48) if line.axis == "x"] == [0, 48, 96, 112]


def test_nodes_are_named_by_column_and_row() -> None:
    nodes = grid_nodes(224, step_px=32)
    assert nodes["b1"] == (32, 32)
    assert nodes["f3"] == (160, 96)
    assert len(nodes) == 9
    assert grid_nodes(32, step_px=32) == {}
    assert "ad29" in grid_nodes(640, step_px=16), "28 columns on, letters go on in twos"


@pytest.mark.parametrize("flip", [False, True])
def test_lines_nodes_and_patches_of_a_crop(flip: bool) -> None:
    """A window from (32, 64) to (96, 112) of a reference of 128 px, shown at 96 px: 1.5 and 2 times as large."""
    affine = crop_affine(np.array([32, 64, 64, 48]), 96, flip)

    def x(value: float) -> float:
        return 96 - value if flip else value

    def mapped(axis: Any, at_px: float) -> Any:
        return map_line(GridLine(axis=axis, at_px=at_px), affine, reference_px=128, view_px=96)

    np.testing.assert_allclose(mapped("x", 64), [[x(48), 0], [x(48), 96]])
    np.testing.assert_allclose(sorted(mapped("y", 80)[:, 0]), [0, 96])
    np.testing.assert_allclose(mapped("y", 80)[:, 1], 32)
    assert mapped("x", 16) is None
    assert mapped("y", 120) is None
    assert map_nodes({"in": (64, 80), "out": (16, 80)}, affine, view_px=96) == {"in": (x(48), 32)}
    quad = map_patch(4 * 8 + 3, affine, grid=8, patch_px=16)  # x from 48 to 64, y from 64 to 80
    np.testing.assert_allclose(quad, [[x(24), 0], [x(48), 0], [x(48), 32], [x(24), 32]])


def test_slanted_segments_are_clipped_too() -> None:
    np.testing.assert_allclose(clip_segment(np.array([[-5.0, 5.0], [15.0, 15.0]]), 10), [[0, 7.5], [5, 10]])
    assert clip_segment(np.array([[-5.0, 5.0], [5.0, 25.0]]), 10) is None
    inside = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(clip_segment(inside, 10), inside)


# --- the command ------------------------------------------------------------------------------------------------------


def test_one_file_per_sample(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    small = ["--views.local-views", "1", "--shards", str(shards)]
    main([*small, "--out", str(tmp_path / "deep" / "a.pdf")])
    assert (tmp_path / "deep" / "a.pdf").read_bytes().startswith(b"%PDF")
    main([*small, "--out", str(tmp_path / "a.png"), "--sample", "0", "1", "--epoch", "2"])
    for sample_id in range(2):
        with Image.open(tmp_path / f"a-{sample_id}.png") as image:
            assert image.format == "PNG"
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": Path("a.jpeg")}, r"out=a\.jpeg: pictures are written as \.png or \.pdf"),
        ({"out": Path("a")}, r"out=a: pictures"),
        ({"sample": ()}, "sample: none given"),
        ({"epoch": -1}, "epoch=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"grid_patches": 0}, "grid_patches=0"),
    ],
)
def test_refuses_what_cannot_be(shards: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(CrispError, match=message):
        config_for(shards, **values)


def test_says_which_samples_there_are(shards: Path) -> None:
    for sample_id in (2, -1):
        with pytest.raises(CrispError, match=rf"sample={sample_id}: .* has 2 samples; name one from 0 to 1"):
            render_samples(config_for(shards, sample=(sample_id,)))


def test_says_that_a_file_cannot_be_written(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'demo'")
    (tmp_path / "file").touch()
    with pytest.raises(CrispError, match=r"file/a\.png: cannot be written .*--out"):
        main(["--shards", str(shards), "--views.local-views", "0", "--out", str(tmp_path / "file" / "a.png")])


def test_says_that_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CrispError, match=r"pip install 'crisp-ssl\[demo\]'"):
        main(["--shards", str(tmp_path / "unread"), "--out", "a.png"])
