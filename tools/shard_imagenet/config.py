"""The choices of `crisp shard`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from crisp.errors import CrispError

MAX_PIXELS = 178_956_970
"""Twice Pillow's `Image.MAX_IMAGE_PIXELS`: beyond it, renderers could not decode what is not a plain JPEG"""

Layout = Literal["auto", "folders", "imagenet-tars", "kaggle", "webdataset", "parquet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Write images as WebDataset shards with an index. Started again after any stop, it goes on where it was."""

    source: Positional[Annotated[str, arg(metavar="SOURCE")]]
    """Path or URL: class folders, a flat folder, ImageNet's tars or the folder that holds them, Kaggle's layout,
    WebDataset shards, Parquet files. Folders train and val in it become OUT/train and OUT/val."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """Folder for the shards, path or URL; it must be empty, not exist yet, or hold what an earlier run began."""

    layout: Layout = "auto"
    """What SOURCE is; auto looks, and says what it found."""
    split: Literal["auto", "train", "val"] = "auto"
    """auto: all splits there are; else only this one, straight in OUT."""
    labels: str | None = None
    """Labels that the source does not hold: a CSV of file,label for a flat folder; for ImageNet's val tar the devkit
    (its tar.gz), or a text file with one WordNet id per image."""
    classes: str | None = None
    """Text file with one class id per line, for a source that lacks some of them; default: those found. They are
    sorted, unless the source's labels are numbers: then the first line names label 0."""
    follow_links: bool = False
    """Take links that lead out of the source, too."""

    shard_bytes: int = 256 * 1024 * 1024
    """A shard is closed before it grows beyond this (a single larger image gets its own). Planned from the files'
    sizes before anything is decoded; re-encoded, from the ratio that a few hundred of them have."""
    shard_samples: int | None = None
    """Files per shard, in place of shard_bytes."""
    shuffle: Literal["auto", "yes", "no"] = "auto"
    """Mix the files before they are cut into shards; auto: if the source is in order of class."""
    seed: int = 0
    """Of the shuffle."""
    short_side: int | None = None
    """Re-encode images whose shorter side is longer than this, as JPEG with this short side; default: bytes
    untouched."""
    quality: int = 90
    """JPEG quality of what is re-encoded."""
    orient: bool = False
    """Turn images upright as their EXIF orientation says, and re-encode those; default: pixels as stored."""
    max_pixels: int = 64_000_000
    """Images with more pixels are rejected."""
    strict: bool = False
    """Stop at the first file that cannot be taken, in place of listing it in rejected.jsonl."""
    dry_run: bool = False
    """Print the plan with its sizes and write nothing."""

    workers: int = 0
    """Processes (with ray: tasks at a time); 0: the cores there are. The output is the same for any number."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: tasks on the Ray cluster of ray_address."""
    ray_address: str = "auto"
    """Of the Ray cluster; auto: the one that this machine belongs to."""
    partition: str = "0/1"
    """i/n: make only every n-th shard from the i-th on (i from 0), for job arrays. The last one to finish merges."""

    def __post_init__(self) -> None:
        for name in ("shard_bytes", "max_pixels", "shard_samples", "short_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CrispError(f"{name}={value}: must be 1 or more")
        if self.max_pixels > MAX_PIXELS:
            raise CrispError(
                f"max_pixels={self.max_pixels}: must be {MAX_PIXELS} or less, Pillow decodes no larger image"
            )
        if self.workers < 0:
            raise CrispError(f"workers={self.workers}: must be 0 (automatic) or more")
        if self.seed < 0:
            raise CrispError(f"seed={self.seed}: must be 0 or more")
        if not 1 <= self.quality <= 100:
            raise CrispError(f"quality={self.quality}: must be from 1 to 100")
        self.part  # noqa: B018  (its error is the check)

    @property
    def part(self) -> tuple[int, int]:
        """`partition` as (i, n)."""
        number, slash, count = self.partition.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise CrispError(f"partition={self.partition!r}: must be i/n with i from 0 to n-1, such as 0/8")
        return int(number), int(count)
