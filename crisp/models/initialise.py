"""Starting a run from published weights: every tensor of the file goes somewhere, and the report says where.

Backbone to backbone; the one final norm to both norms; the head's MLP to every kind's MLP; iBOT's `last_layer` to the
CLS kind and `last_layer2` (where it is apart) to patch and region. The concept block has no counterpart and stays
random. Student and teacher start as the same network.
Axes: D width, n patches, d bottleneck width, P prototypes.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from crisp.config import InitConfig
from crisp.errors import CrispError
from crisp.models.foreign import ForeignWeights, fold_layer_scales, read_layout
from crisp.models.heads import Kind
from crisp.models.student_teacher import Network, StudentTeacher
from crisp.models.vit import VisionTransformer
from crisp.models.weights_file import read_weights

log = logging.getLogger(__name__)

INIT_FILE = "init.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class InitReport:
    """What became of each key of the file, and what of each parameter of ours."""

    source: str
    layout: str
    """The layout that was recognised"""
    loaded: dict[str, list[str]]
    """Key in the file → the parameters that start from it"""
    resized: dict[str, str]
    """Key in the file (also in `loaded`) → from which grid to which"""
    folded: list[str]
    """Keys of LayerScale gammas, multiplied into the layers before them"""
    ignored: dict[str, str]
    """Key in the file → why it is not used"""
    fresh: list[str]
    """Our parameters that the file has nothing for"""

    def log(self) -> None:
        """The counts as a line of the log and a table on stderr; the keys themselves at level debug."""
        counts = ", ".join(f"{count} {group}" for group, count, _ in self._groups())
        log.info("initial weights from %s, read as %s: %s", self.source, self.layout, counts)
        Console(stderr=True).print(self.table())
        for group in ("loaded", "resized", "folded", "ignored", "fresh"):
            log.debug("%s: %s", group, getattr(self, group))

    def table(self) -> Table:
        """A row per group: how many tensors, and what became of them."""
        table = Table("", "tensors", "", title=escape(f"{self.source} ({self.layout})"))
        for group, count, what in self._groups():
            table.add_row(group, str(count), escape(what))
        return table

    def write(self, run: Path) -> None:
        """RUN/init.json, with every key."""
        (run / INIT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def _groups(self) -> list[tuple[str, int, str]]:
        fresh = sorted({name.split(".")[0] if "mask_token" not in name else "mask token" for name in self.fresh})
        rows = [
            ("loaded", len(self.loaded), f"into {sum(map(len, self.loaded.values()))} tensors of ours"),
            ("resized", len(self.resized), "; ".join(sorted(set(self.resized.values())))),
            ("folded", len(self.folded), "LayerScale, into the layers before it"),
            ("ignored", len(self.ignored), "; ".join(sorted(set(self.ignored.values())))),
            ("fresh", len(self.fresh), f"ours, not in the file: {', '.join(fresh)}"),
        ]
        return [row for row in rows if row[1]]


def initialise(networks: StudentTeacher, config: InitConfig) -> InitReport:
    """Start both networks from `config.weights`, in place; every rank reads the file by itself.

    A file does not tell its number of attention heads: `model.num_heads` must be the one that it was trained with.

    Raises:
        CrispError: the file cannot be read or used, or its sizes are not the model's.
    """
    assert config.weights is not None
    source = config.weights
    foreign = read_layout(read_weights(source), source=source, which=config.which)
    report = load_foreign(networks.student, foreign, source=source, heads=config.heads)
    networks.teacher.load_state_dict(networks.student.state_dict())
    return report


@torch.no_grad()
def load_foreign(network: Network, foreign: ForeignWeights, *, source: str, heads: bool) -> InitReport:
    """Copy a file's weights into a network. Nothing is changed when it fails.

    Args:
        network: the one to change.
        foreign: the file's weights under our names.
        source: the file, for messages.
        heads: take its head too, if it has one.

    Raises:
        CrispError: a size differs, or the file lacks what our backbone needs.
    """
    for file_key, tensor in (*foreign.backbone.values(), *foreign.head.values()):
        if not tensor.isfinite().all():
            raise CrispError(f"{source}: {file_key} holds NaN or infinity; take another checkpoint of that run")
    own = network.state_dict()
    key_of = {name: key for name, (key, _) in foreign.backbone.items()}
    tensors = {name: tensor for name, (_, tensor) in foreign.backbone.items()}
    _check_backbone(network.backbone, tensors, source)

    folded: list[str] = []
    if not any(name.endswith(".gamma") for name in own):
        folded = [key_of[name] for name in tensors if name.endswith(".gamma")]
        tensors = fold_layer_scales(tensors)
    resized: dict[str, str] = {}
    before, grid = _grid_of(tensors["pos_embed"], source), network.backbone.base_grid
    if before != grid:
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], grid)
        resized[key_of["pos_embed"]] = f"position embedding, {before[0]}×{before[1]} → {grid[0]}×{grid[1]} patches"

    chosen: dict[str, tuple[str, Tensor]] = {}  # our key → key in the file, tensor
    for name, tensor in tensors.items():
        kind, _, leaf = name.partition(".")
        ours = (f"norm_cls.{leaf}", f"norm_patch.{leaf}") if kind == "norm" else (name,)
        chosen |= {f"backbone.{our}": (key_of[name], tensor) for our in ours}
    ignored = dict(foreign.ignored)
    if heads:
        chosen |= _choose_heads(network, foreign.head, source)
        used = {key for key, _ in chosen.values()}
        ignored |= {key: "a layer for a kind that is not used" for key, _ in foreign.head.values() if key not in used}
    else:
        ignored |= {key: "its head: --init.no-heads" for key, _ in foreign.head.values()}

    for our, (file_key, tensor) in chosen.items():
        if own[our].shape != tensor.shape:
            raise CrispError(
                f"{source}: {file_key} is {tuple(tensor.shape)} there and {our} is {tuple(own[our].shape)} here; "
                f"give the model fields that it was trained with"
            )
        own[our].copy_(tensor)  # a state_dict shares its memory with the parameters
    loaded: dict[str, list[str]] = {}
    for our, (file_key, _) in chosen.items():
        loaded.setdefault(file_key, []).append(our)
    fresh = [our for our in own if our not in chosen]
    return InitReport(
        source=source,
        layout=foreign.layout,
        loaded=loaded,
        resized=resized,
        folded=folded,
        ignored=ignored,
        fresh=fresh,
    )


def resize_positions(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings [1, 1+n, D] of a square grid for another grid, once, before training.

    Bicubic without antialiasing, by target size: the .1 that iBOT and DINO add to the grid at each forward pass would
    move every sampling position, and here nothing has to be rounded.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    base = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    resized = F.interpolate(base, size=grid, mode="bicubic", antialias=False)
    return torch.cat([pos_embed[:, :1].float(), resized.flatten(2).transpose(1, 2)], dim=1)


def _grid_of(pos_embed: Tensor, source: str) -> tuple[int, int]:
    side = math.isqrt(max(pos_embed.shape[1] - 1, 0))
    if side == 0 or side * side != pos_embed.shape[1] - 1:
        raise CrispError(
            f"{source}: {pos_embed.shape[1]} position embeddings are not one of the CLS token and a square grid; "
            f"give weights of a plain ViT"
        )
    return side, side


def _check_backbone(backbone: VisionTransformer, tensors: Mapping[str, Tensor], source: str) -> None:
    """What a user can have chosen wrongly, each with the field to change."""
    patch_px = tensors["patch_embed.proj.weight"].shape[-1]
    if patch_px != backbone.patch_px:
        raise CrispError(
            f"{source}: patches of {patch_px} px there and views.patch_px={backbone.patch_px} here; take a model.arch "
            f"with patches of {patch_px}, or other weights"
        )
    dim = tensors["patch_embed.proj.weight"].shape[0]
    if dim != backbone.dim:
        raise CrispError(
            f"{source}: width {dim} there and {backbone.dim} here; choose the model.arch (or model.embed_dim) that it "
            f"was trained with"
        )
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    if depth != len(backbone.blocks):
        raise CrispError(
            f"{source}: {depth} blocks there and {len(backbone.blocks)} here; set --model.depth {depth}, or choose "
            f"another model.arch"
        )
    wanted = {name.replace("norm_cls.", "norm.") for name in backbone.state_dict() if "norm_patch" not in name}
    missing = sorted(wanted - tensors.keys() - {"mask_token"})
    if missing:
        raise CrispError(
            f"{source}: lacks {len(missing)} tensors of the backbone ({missing[0]}); give whole weights of a plain "
            f"ViT, or a model.arch without that part"
        )


def _choose_heads(
    network: Network, head: Mapping[str, tuple[str, Tensor]], source: str
) -> dict[str, tuple[str, Tensor]]:
    """Which of the file's head tensors each kind starts from: our key → key in the file, tensor."""
    if not head:
        return {}
    _check_head_sizes(network, head, source)
    chosen: dict[str, tuple[str, Tensor]] = {}
    source_of_layer: dict[int, tuple[Kind, str]] = {}
    for kind in network.heads.kinds:
        apart = kind != "cls" and "last_layer2.weight_v" in head
        layer = "last_layer2" if apart else "last_layer"
        # kinds that share one layer here must not have two in the file
        other_kind, other = source_of_layer.setdefault(id(network.heads.last_layer[kind]), (kind, layer))
        if other != layer and any(
            not torch.equal(head[f"{other}.{part}"][1], head[f"{layer}.{part}"][1]) for part in ("weight_v", "weight_g")
        ):
            raise CrispError(
                f"{source}: its last layers of {other_kind} and {kind} differ, and model.head_last_layer=shared makes "
                f"them one; set --model.head-last-layer cls_apart, or leave its head out with --init.no-heads"
            )
        for name, found in head.items():
            part, _, leaf = name.partition(".")
            if part == "mlp":
                chosen[f"heads.mlp.{kind}.{leaf}"] = found
            elif part == layer:
                chosen[f"heads.last_layer.{kind}.{leaf}"] = found
    return chosen


def _check_head_sizes(network: Network, head: Mapping[str, tuple[str, Tensor]], source: str) -> None:
    wanted = [f"mlp.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")]
    layers = ["last_layer"] + ["last_layer2"] * any(name.startswith("last_layer2") for name in head)
    wanted += [f"{layer}.{leaf}" for layer in layers for leaf in ("weight_v", "weight_g")]
    missing = [name for name in wanted if name not in head]
    if missing:
        raise CrispError(
            f"{source}: its head lacks {', '.join(missing)}, so it is none of three layers and weight-normed "
            f"prototypes; leave it out with --init.no-heads"
        )
    own = network.heads.state_dict()
    sizes = {
        "head_hidden": (head["mlp.0.weight"][1].shape[0], own["mlp.cls.0.weight"].shape[0]),
        "head_bottleneck": (head["mlp.4.weight"][1].shape[0], own["mlp.cls.4.weight"].shape[0]),
        "prototypes": (head["last_layer.weight_v"][1].shape[0], own["last_layer.cls.weight_v"].shape[0]),
    }
    for field, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise CrispError(
                f"{source}: model.{field}={ours}, and its head has {theirs}; set --model.{field.replace('_', '-')} "
                f"{theirs}, or leave its head out with --init.no-heads"
            )
