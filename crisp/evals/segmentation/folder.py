"""Any folder of images and index masks."""

from dataclasses import dataclass
from pathlib import Path

from crisp.errors import CrispError
from crisp.evals.segmentation.data import Labels, Pair, SegmentationData, Split, checked, list_files

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
SPLIT = "{split}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderLayout:
    """Where the images and masks of a folder lie; a mask has its image's name and the ending .png."""

    images: str = "images/{split}"
    """Folder of a split's images, below --data."""
    masks: str = "annotations/{split}"
    """Folder of a split's masks, below --data: one byte per pixel, palette or gray."""
    train: str = "train"
    """What {split} stands for to fit on."""
    val: str = "val"
    """What {split} stands for to score on."""
    ignored: tuple[int, ...] = (255,)
    """Ids that are not scored."""
    classes: int | None = None
    """Ids must lie below this number or be ignored, and train must hold each; default: any, as the masks hold them."""

    def __post_init__(self) -> None:
        for name, text in (("images", self.images), ("masks", self.masks)):
            if SPLIT not in text:
                raise CrispError(f"folder.{name}={text}: {SPLIT} must stand in it, once for train and once for val")
        if self.train == self.val:
            raise CrispError(f"folder.train={self.train}: is folder.val, too; score on images that were not fitted on")
        if wrong := [label for label in self.ignored if not 0 <= label <= 255]:
            raise CrispError(f"folder.ignored={wrong[0]}: ids lie in 0 to 255")
        if self.classes is not None and not 2 <= self.classes <= 256:
            raise CrispError(f"folder.classes={self.classes}: must lie in 2 to 256")


def open_folder(root: Path, layout: FolderLayout) -> SegmentationData:
    """The two splits that a layout names.

    Raises:
        CrispError: a folder or a file that is missing.
    """
    classes = None
    known = tuple(range(256))
    if layout.classes is not None:
        classes = tuple(label for label in range(layout.classes) if label not in layout.ignored)
        known = (*classes, *layout.ignored)
    return checked(
        SegmentationData(
            name=root.resolve().name,
            slug=root.resolve().name.lower(),
            root=root,
            train=_split(root, layout, layout.train),
            val=_split(root, layout, layout.val),
            labels=Labels(known=known, ignored=layout.ignored, classes=classes),
        )
    )


def _split(root: Path, layout: FolderLayout, name: str) -> Split:
    images = list_files(root / layout.images.replace(SPLIT, name), IMAGE_ENDINGS)
    masks = root / layout.masks.replace(SPLIT, name)
    pairs = tuple(Pair(name=path.stem, image=path, mask=masks / f"{path.stem}.png") for path in images)
    twice = {pair.name for pair in pairs}
    if len(twice) < len(pairs):
        raise CrispError(f"{images[0].parent}: two images differ in their ending alone, and would share one mask")
    return Split(name=name, pairs=pairs)
