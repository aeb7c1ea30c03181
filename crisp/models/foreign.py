"""Weights of other systems under this project's names: which layout a file has, and what each of its keys is.

One short function per system tells what a key of its backbone is called here; `SYSTEMS` lists them. Every key of a
file ends as a weight, or as ignored with the reason; one that nobody knows is an error. A part that would change the
features and that our backbone does not have (registers, gated MLPs, …) is refused.

Layouts: a whole run holds `student` (`module.backbone.*`, `module.head.*`) and `teacher` (`backbone.*`, `head.*`); a
backbone comes bare or in one key `state_dict` (iBOT's files) or `model` (DeiT's).
Axes: D width, n patches, h hidden width of the head, d bottleneck width, P prototypes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from crisp.errors import CrispError

# What a plain ViT has, under timm's names, which are ours. `norm` is the final norm; a LayerScale may be folded.
_PLAIN_VIT = re.compile(
    r"cls_token|pos_embed|mask_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|blocks\.\d+\.ls[12]\.gamma"
)
_HEAD = re.compile(r"mlp\.(0|2|4)\.(weight|bias)|last_layer2?\.weight_(g|v)")

# What changes the features and has no place in our backbone.
_UNLIKE_OURS = {
    r"register_tokens|reg_token": "register tokens",
    r"dist_token": "a distillation token",
    r"norm_pre\..*": "a norm before its blocks",
    r"patch_embed\.norm\..*": "a norm of its patch embedding",
    r"patch_embed\.(?!proj\.|norm\.).*": "a patch embedding that is more than one convolution",
    r"blocks\.\d+\.mlp\.(w1|w2|w3|w12|fc1_g|fc1_x|norm)\..*": "a gated (SwiGLU) or normed MLP",
    r"blocks\.\d+\.attn\.[qk]_norm\..*": "norms of queries and keys",
    r"rope.*|.*relative_position_.*": "relative or rotary positions",
}
_RUN_STATE = {
    "optimizer": "state of its optimiser",
    "epoch": "where its run stood",
    "args": "its command line",
    "fp16_scaler": "state of its loss scaler",
    "dino_loss": "its loss's centre: centres start anew",
    "ibot_loss": "its loss's centres: centres start anew",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignWeights:
    """A file's weights, each with the key that it has in the file."""

    layout: str
    """The layout that was recognised, for the log"""
    backbone: Mapping[str, tuple[str, Tensor]]
    """Our name (`norm.*` for the one final norm) → key in the file, tensor"""
    head: Mapping[str, tuple[str, Tensor]]
    """iBOT's name (`mlp.0.weight` [h, D], `last_layer.weight_v` [P, d], `last_layer2.weight_v`, …) → key, tensor"""
    ignored: Mapping[str, str]
    """Key in the file → why"""


def ibot_name(key: str) -> str:
    """IBOT (Zhou et al., 2021): timm's names, and `masked_embed` [1, D] for the mask token."""
    return "mask_token" if key == "masked_embed" else key


def dino_name(key: str) -> str:
    """DINO (Caron et al., 2021): timm's names; it has no mask token."""
    return key


def dinov2_name(key: str) -> str:
    """DINOv2 (Oquab et al., 2023): blocks may come in chunks, `blocks.CHUNK.BLOCK.*` with BLOCK counted from the first.

    LayerScale gammas keep their names.
    """
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)


def timm_name(key: str) -> str:
    """timm (Wightman): our names already."""
    return key


SYSTEMS: dict[str, Callable[[str], str]] = {
    "iBOT": ibot_name,
    "DINOv2": dinov2_name,
    "timm": timm_name,
    "DINO": dino_name,
}


def read_layout(
    content: Mapping[str, Any], *, source: str, which: Literal["teacher", "student"] = "teacher"
) -> ForeignWeights:
    """A file's weights under our names.

    Args:
        content: what `crisp.models.weights_file.read_weights` returned.
        source: the file, for messages.
        which: network of a whole run; a bare backbone has no such choice.

    Raises:
        CrispError: no ViT is in it, it has a part that our backbone lacks, or a key is unknown.
    """
    ignored: dict[str, str] = {}
    wrapping, network = _unwrap(content, ignored, source=source, which=which)
    backbone_keys, head_keys = _split(network)
    if "patch_embed.proj.weight" not in backbone_keys:
        raise CrispError(
            f"{source}: no patch_embed.proj.weight among its {len(network)} keys ({_few(network)}), so no layout that "
            f"is known; give weights of iBOT, DINO, DINOv2 or a timm ViT"
        )
    system = _recognise(backbone_keys, head_keys)
    rename = SYSTEMS[system]
    backbone: dict[str, tuple[str, Tensor]] = {}
    unknown: list[str] = []
    for key, (file_key, value) in backbone_keys.items():
        name = rename(key)
        if re.fullmatch(r"(head|fc_norm|head_dist)\..*", key):
            ignored[file_key] = "its classifier"
        elif _PLAIN_VIT.fullmatch(name) and isinstance(value, Tensor):
            backbone[name] = (file_key, value)
        else:
            _refuse_unlike(name, file_key, source)
            unknown.append(file_key)
    head: dict[str, tuple[str, Tensor]] = {}
    for key, (file_key, value) in head_keys.items():
        # what torch.nn.utils.parametrizations calls gain and direction
        name = key.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        if _HEAD.fullmatch(name) and isinstance(value, Tensor):
            head[name] = (file_key, value)
        else:
            unknown.append(file_key)
    if unknown:
        raise CrispError(
            f"{source}: read as {system}, {len(unknown)} keys have no known meaning ({_few(unknown)}); remove "
            f"them from the file if they do not matter"
        )
    return ForeignWeights(layout=f"{system}, {wrapping}", backbone=backbone, head=head, ignored=ignored)


def _unwrap(
    content: Mapping[str, Any], ignored: dict[str, str], *, source: str, which: str
) -> tuple[str, dict[str, tuple[str, Any]]]:
    """The wrapping in words, and the chosen network's values by their keys without it, each with its whole key."""
    networks = [name for name in ("student", "teacher") if isinstance(content.get(name), Mapping)]
    wrappers = [name for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)]
    if not networks and not wrappers:
        return "bare", {key.removeprefix("module."): (key, value) for key, value in content.items()}
    chosen = which if networks else wrappers[0]
    if networks and which not in networks:
        raise CrispError(f"{source}: it holds no {which}; take the {networks[0]} with --init.which {networks[0]}")
    network = {key.removeprefix("module."): (f"{chosen}.{key}", value) for key, value in content[chosen].items()}
    for name, value in content.items():
        if name in networks and name != chosen:
            for key in value:
                ignored[f"{name}.{key}"] = f"the {name}: the {chosen} is taken"
                # iBOT's teacher sees no masks and has no mask token, so its student's is the one there is
                bare = key.removeprefix("module.")
                if bare == "backbone.masked_embed" and bare not in network:
                    network[bare] = (f"{name}.{key}", value[key])
                    del ignored[f"{name}.{key}"]
        elif name != chosen:
            if networks and name not in _RUN_STATE:
                raise CrispError(f"{source}: {name} has no known meaning beside {networks[0]}; remove it from the file")
            ignored[name] = _RUN_STATE.get(name, f"beside {chosen}")
    return f"{chosen} of a whole run" if networks else f"backbone in {chosen}", network


def _split(network: dict[str, tuple[str, Any]]) -> tuple[dict[str, tuple[str, Any]], dict[str, tuple[str, Any]]]:
    """Backbone and projection head: a network that keeps them apart has `backbone.` before the one's keys."""
    if not any(key.startswith("backbone.") for key in network):
        return network, {}  # a bare ViT's `head.*` is a classifier
    backbone = {key.removeprefix("backbone."): value for key, value in network.items() if not key.startswith("head.")}
    head = {key.removeprefix("head."): value for key, value in network.items() if key.startswith("head.")}
    return backbone, head


def _recognise(backbone: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    """The system, by what only it has. A bare ViT of iBOT and one of DINO are the same, and read the same."""
    if "masked_embed" in backbone or any(key.startswith("last_layer2.") for key in head):
        return "iBOT"
    if "mask_token" in backbone or "register_tokens" in backbone or any(".ls1." in key for key in backbone):
        return "DINOv2"
    if any(key.startswith(("head.", "fc_norm.", "norm_pre.", "reg_token")) for key in backbone):
        return "timm"
    return "DINO"


def _refuse_unlike(name: str, file_key: str, source: str) -> None:
    for pattern, what in _UNLIKE_OURS.items():
        if re.fullmatch(pattern, name):
            raise CrispError(
                f"{source}: it has {what} ({file_key}), which our backbone lacks, so its features could not be kept; "
                f"give weights of a plain ViT"
            )


def _few(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def fold_layer_scales(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same ViT without LayerScale: γ · (W x + b) = (γ W) x + γ b, so the features stay as they are.

    The parametrisation does not: what the gammas would have learned, W and b now do.

    Args:
        backbone: our name → tensor, with `blocks.i.ls1.gamma` and `ls2.gamma` [D].
    """
    folded = {name: tensor for name, tensor in backbone.items() if not name.endswith(".gamma")}
    for name, gamma in backbone.items():
        for scale, layer in ((".ls1.gamma", ".attn.proj"), (".ls2.gamma", ".mlp.fc2")):
            if name.endswith(scale):
                target = name.removesuffix(scale) + layer
                # in float32 at least: the product of two halves has no place in a half
                wide = torch.promote_types(gamma.dtype, torch.float32)
                folded[f"{target}.weight"] = backbone[f"{target}.weight"].to(wide) * gamma.to(wide)[:, None]
                folded[f"{target}.bias"] = backbone[f"{target}.bias"].to(wide) * gamma.to(wide)
    return folded
