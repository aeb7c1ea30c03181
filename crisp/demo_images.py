"""Images for `crisp demo`: crops of a few photographs, with the photograph as the class.

Training crops come from the left half of a photograph, test crops from the right half: no pixel is in both, and
a class is told by what the two halves share: material, texture, structure. To keep colour and brightness from deciding
it alone, every crop of either half is taken as if under another light (exposure, contrast, white balance).
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crisp.errors import CrispError

RGB = NDArray[np.uint8]
"""[H, W, 3]"""

# Photographs that lie inside the wheels of scikit-image and scikit-learn (nothing is downloaded), by their folder.
# Half of them are gray or nearly so, and several are textures: without those, a colour histogram would tell them apart.
WHEEL_PHOTOGRAPHS = {
    ("skimage", "data"): (
        "astronaut.png",
        "brick.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
    ),
    ("sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST_PX = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """How photographs are cut."""

    train: int = 32
    """Crops per class from the left half."""
    test: int = 32
    """Crops per class from the right half."""
    window: tuple[float, float] = (0.5, 1.0)
    """Side of a crop's window, as a share of the half's shorter side; uniform."""
    aspect: tuple[float, float] = (4 / 5, 5 / 4)
    """Width over height of a window; log-uniform."""
    long_side_px: tuple[int, int] = (288, 448)
    """Longer side of the written image, whatever the window's size; uniform."""
    contrast: float = 1.5
    """Contrast of a crop is multiplied by up to this or its inverse, about mid-gray; log-uniform, 1: unchanged."""
    exposure: float = 1.6
    """So is its brightness."""
    white_balance: float = 1.25
    """So is the brightness of each channel."""
    quality: int = 90
    """JPEG quality."""


def write_demo_images(folder: Path, *, seed: int, crops: CropConfig | None = None) -> list[str]:
    """Cuts the photographs of the wheels into `folder/{train,test}/CLASS/NNN.jpg`. Deterministic for a seed.

    Returns:
        The class names, sorted.

    Raises:
        CrispError: scikit-image or scikit-learn is missing.
    """
    return write_crops({path.stem: load_rgb(path) for path in wheel_photographs()}, folder, seed=seed, crops=crops)


def write_own_images(
    source: Path, folder: Path, *, seed: int, limit: int = 20, crops: CropConfig | None = None
) -> tuple[list[str], dict[str, str]]:
    """The same from the first `limit` readable photographs of a folder of one's own (not of its subfolders), by name.

    Returns:
        The class names, sorted, and for each file that was passed over the reason.

    Raises:
        CrispError: no such folder, or fewer than two photographs in it can be used.
    """
    photographs, passed_over = own_photographs(source, limit=limit)
    return write_crops(photographs, folder, seed=seed, crops=crops), passed_over


def wheel_photographs() -> list[Path]:
    """Paths of the photographs inside the installed wheels; neither package is imported.

    Raises:
        CrispError: a package or one of its photographs is missing.
    """
    paths = []
    for (package, subfolder), names in WHEEL_PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise CrispError(f"{package}: not installed, its photographs are the demo's; pip install 'crisp-ssl[demo]'")
        paths += [Path(spec.submodule_search_locations[0]) / subfolder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise CrispError(f"{path}: missing from the installed wheel; pip install --force-reinstall its package")
    return paths


def own_photographs(source: Path, *, limit: int) -> tuple[dict[str, RGB], dict[str, str]]:
    """Photographs by class name, and for each file passed over the reason; `write_own_images` says the rest."""
    if not source.is_dir():
        raise CrispError(f"{source}: no such folder; --images wants a folder of photographs ({', '.join(SUFFIXES)})")
    photographs: dict[str, RGB] = {}
    passed_over: dict[str, str] = {}
    for path in sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES):
        if len(photographs) == limit:
            passed_over[path.name] = f"after the first {limit} photographs"
            continue
        try:
            image = load_rgb(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL's readers raise
            passed_over[path.name] = f"cannot be decoded ({error})"
            continue
        if min(image.shape[0], image.shape[1] // 2) < SMALLEST_PX:
            passed_over[path.name] = f"{image.shape[1]}x{image.shape[0]}: its halves are under {SMALLEST_PX} px"
            continue
        photographs[path.name if path.stem in photographs else path.stem] = image
    if len(photographs) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(passed_over.items())[:3])
        raise CrispError(
            f"{source}: {len(photographs)} usable photographs, the demo needs at least 2 ({', '.join(SUFFIXES)}, "
            f"{2 * SMALLEST_PX}x{SMALLEST_PX} px or more){f'; passed over: {why}' if why else ''}"
        )
    return photographs, passed_over


def load_rgb(path: Path) -> RGB:
    """An image file as RGB uint8 [H, W, 3], upright as its EXIF says; gray ones get three equal channels."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def write_crops(photographs: dict[str, RGB], folder: Path, *, seed: int, crops: CropConfig | None = None) -> list[str]:
    """Cuts photographs by class name into `folder/{train,test}/CLASS/NNN.jpg`; returns the sorted class names.

    A crop depends on the seed, its class, its split and its number alone.
    """
    crops = crops or CropConfig()
    names = sorted(photographs)
    for label, name in enumerate(names):
        image = photographs[name]
        half = image.shape[1] // 2  # the middle column of an odd width is in neither half
        halves = (("train", image[:, :half], crops.train), ("test", image[:, -half:], crops.test))
        for split, (split_name, pixels, count) in enumerate(halves):
            target = folder / split_name / name
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([seed, label, split, number])
                crop = _change_light(_cut(pixels, rng, crops), rng, crops)
                Image.fromarray(crop).save(target / f"{number:03d}.jpg", quality=crops.quality)
    return names


def _cut(pixels: RGB, rng: np.random.Generator, crops: CropConfig) -> RGB:
    """A random window of `pixels`, resized to a random size."""
    height, width = pixels.shape[:2]
    side_px = rng.uniform(*crops.window) * min(height, width)
    aspect = math.exp(rng.uniform(*np.log(crops.aspect)))
    window_width = min(width, round(side_px * math.sqrt(aspect)))
    window_height = min(height, round(side_px / math.sqrt(aspect)))
    x = int(rng.integers(width - window_width + 1))
    y = int(rng.integers(height - window_height + 1))
    scale = rng.integers(*crops.long_side_px, endpoint=True) / max(window_width, window_height)
    size = (round(window_width * scale), round(window_height * scale))
    window = Image.fromarray(pixels[y : y + window_height, x : x + window_width])
    return np.asarray(window.resize(size, Image.Resampling.LANCZOS))


def _change_light(pixels: RGB, rng: np.random.Generator, crops: CropConfig) -> RGB:
    """The same scene under another light."""
    gain = crops.exposure ** rng.uniform(-1, 1) * crops.white_balance ** rng.uniform(-1, 1, size=3)
    contrast = crops.contrast ** rng.uniform(-1, 1)
    return np.clip((pixels * gain - 128) * contrast + 128, 0, 255).round().astype(np.uint8)
