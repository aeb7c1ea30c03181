"""The choices of `crisp ablate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from crisp.ablations import TABLES
from crisp.errors import CrispError

Table = Literal["layers", "threshold", "blocks", "heads", "norm", "warp", "seeds"]
Scale = Literal["demo", "paper"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionData:
    """Images with masks for region quality, as `crisp eval region-quality` takes them."""

    data: Path | None = None
    """Folder of the data set; none: region quality is left out."""
    images: str | None = None
    """Its --images."""
    masks: str | None = None
    """Its --masks."""
    ignored: tuple[int, ...] | None = None
    """Its --ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblateConfig:
    """Train the rows of an ablation, evaluate each, and put them into the paper's table.

    Every row is an ordinary run in OUT/TABLE/ROW. Started again after any stop, finished rows stay as they are and
    others go on. Several GPUs train several rows at once.
    """

    table: Positional[Annotated[Table, arg(metavar="TABLE")]]
    """layers: M, Table 5; threshold: β, Figure 6; blocks: L, Table 6; heads: Table 7; norm; warp and seeds are ours."""
    scale: Scale = "demo"
    """demo: a tiny model on the demo's photographs, in minutes; paper: ViT-S/16, 50 epochs of ImageNet a row."""
    rows: tuple[str, ...] = ()
    """Some rows of the table only, by name."""
    out: Path | None = None
    """Folder of all tables of a scale; default runs/ablate-SCALE."""
    shards: str | None = None
    """Training shards; scale demo makes its own."""
    init_weights: str | None = None
    """What each row starts from, at scale paper iBOT's ViT-S/16; none: random weights."""
    epochs: int | None = None
    """Of each row; default: 50 at scale paper, 25 at scale demo."""
    seed: int = 0
    """Of each run."""
    train: tuple[str, ...] = ()
    """Further options of `crisp train` for every row, each as FIELD=VALUE: --train optim.micro-batch=32."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPUs where there are some; on the CPU rows run one after the other."""
    gpus_per_row: int = 1
    """GPUs that train a row together."""
    voc: Path | None = None
    """PASCAL VOC 2012, for k-NN and linear segmentation."""
    voc_train: Literal["train", "trainaug", "capi"] = "trainaug"
    """The list of VOC that is learnt from; trainaug and capi need SBD."""
    imagenet: Path | None = None
    """ImageNet with train and val, for k-NN with 10 % of the labels."""
    list_10pct: Path | None = None
    """SimCLR's 10percent.txt."""
    regions: RegionData = field(default_factory=RegionData)
    dry_run: bool = False
    """Print the plan and every command, and run nothing."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if row not in TABLES[self.table]:
                raise CrispError(f"rows={row}: {self.table} has the rows {', '.join(TABLES[self.table])}")
        if len(set(self.rows)) < len(self.rows):
            raise CrispError(f"rows={self.rows}: a row stands there twice")
        for option in self.train:
            if "=" not in option or option.startswith("-"):
                raise CrispError(f"train={option}: write FIELD=VALUE, as in --train optim.micro-batch=32")
        for name, least in (("epochs", 1), ("seed", 0), ("gpus_per_row", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise CrispError(f"{name}={value}: must be {least} or more")
        if (self.imagenet is None) != (self.list_10pct is None):
            raise CrispError("imagenet and list_10pct: give both, or neither")
        if self.scale == "paper":
            if self.shards is None:
                raise CrispError("shards: not given; name ImageNet's training shards, or take --scale demo")
            if self.init_weights is None:
                raise CrispError(
                    "init_weights: not given; the paper's rows start from iBOT's ViT-S/16: name its file, or 'none'"
                )

    @property
    def root(self) -> Path:
        """`out`, or its default."""
        return self.out if self.out is not None else Path(f"runs/ablate-{self.scale}")

    @property
    def folder(self) -> Path:
        """Of this table."""
        return self.root / self.table
