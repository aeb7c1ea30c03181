"""Any Vision Transformer of timm, with its pretrained weights (`timm:NAME`) or a file's (`timm:NAME@FILE`).

Its position embeddings are resized by timm (bicubic, antialiased). A file must have the keys of timm's own model;
weights in another system's layout are read as that system's.
"""

import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from crisp.errors import CrispError
from crisp.models.frozen import BlockTokens, FrozenBackbone
from crisp.models.published.attention import caught_attention
from crisp.models.published.keys import KeyRules, few, sort_keys
from crisp.models.published.positions import all_finite, check_last, grid_side, patch_grid
from crisp.models.published.system import Built

_KINDS = (vision_transformer.VisionTransformer, eva.Eva)
_RULES = KeyRules(
    weights=((r"(?:(?:state_dict|model)\.)?(?:module\.)?(.+)", r"\1"),),
    ignored=((r"(?:(?:state_dict|model)\.)?(?:module\.)?(head|head_dist)\..*", "its classifier"),),
)


class TimmBackbone(FrozenBackbone):
    """A Vision Transformer as timm runs it.

    Args:
        vit: timm's, made for any image size (`dynamic_img_size`).
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit
        self.dim, self.depth = vit.embed_dim, len(vit.blocks)
        self.patch_px: int = vit.patch_embed.patch_size[0]
        self.native_px: int = vit.patch_embed.img_size[0]
        self.mean, self.std = tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
        self.facts = {"timm": vit.pretrained_cfg["architecture"]}
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        """See FrozenBackbone."""
        check_last(last, self.depth)
        patch_grid(images, self.patch_px)
        taken = self.vit.forward_intermediates(
            images, indices=last, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        if not self.vit.num_prefix_tokens:
            return [BlockTokens(cls=None, patches=patches) for patches in taken]
        has_cls = self.vit.cls_token is not None
        return [BlockTokens(cls=prefix[:, 0] if has_cls else None, patches=patches) for patches, prefix in taken]

    def cls_attention(self, images: Tensor) -> Tensor:
        """See FrozenBackbone."""
        if self.vit.cls_token is None:
            return super().cls_attention(images)
        attention = caught_attention(self.vit.blocks[-1].attn, lambda: self(images))
        return attention[:, :, 0, self.vit.num_prefix_tokens :]


def build_timm(name: str, state: Mapping[str, Any], *, source: str) -> Built:
    """timm's model of that name with the weights of a file.

    Args:
        name: timm's.
        state: the file's content; position embeddings may be those of another image size than the named model's.
        source: for messages.

    Raises:
        CrispError: timm has no such Vision Transformer, or the file's keys are not those of its model.
    """
    if not timm.is_model(name):
        raise CrispError(f"{source}: timm has no model {name}; see timm.list_models('vit_*')")
    keys = sort_keys(state, _RULES, source=source, system="timm")
    weights = keys.tensors
    vit = _create(name, weights, source)
    expected = {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()}
    missing, unknown = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or unknown:
        wrong = [f"lacks {few(missing)}"] * bool(missing) + [f"has {few(unknown)}, which it lacks"] * bool(unknown)
        raise CrispError(
            f"{source}: not the keys of timm's {name}: the file {' and '.join(wrong)}; name the model that it was made "
            f"from, or its system (SYSTEM:FILE)"
        )
    for key, shape in expected.items():
        if tuple(weights[key].shape) != shape:
            got, want = ("×".join(map(str, s)) for s in (weights[key].shape, shape))
            raise CrispError(f"{source}: {key} is {got} there and {want} in timm's {name}; name another model")
        if not all_finite(weights[key]):
            raise CrispError(f"{source}: {key} holds NaN or infinity; take another checkpoint")
    vit.load_state_dict(weights)
    notes = ["positions interpolated by timm for other grids (bicubic, antialias)"]
    if isinstance(vit.norm, nn.Identity):
        notes.append("no final norm before its pooling: tokens as the blocks give them")
    return Built(backbone=TimmBackbone(vit), arch_name=name, account=keys.account(*notes))


def _create(name: str, weights: Mapping[str, Tensor], source: str) -> Any:
    sizes = {}
    plain = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True) if _is_vit(name) else None
    if not isinstance(plain, _KINDS):
        raise CrispError(f"{source}: {name} is no plain Vision Transformer; name one such as vit_small_patch16_224")
    table, given = getattr(plain, "pos_embed", None), weights.get("pos_embed")
    if isinstance(table, nn.Parameter) and given is not None and given.shape != table.shape:
        prefix = table.shape[1] - plain.patch_embed.num_patches
        side = grid_side(given.shape[1] - prefix, source=source)
        sizes["img_size"] = side * plain.patch_embed.patch_size[0]
    if not sizes:
        return plain
    return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **sizes)


def _is_vit(name: str) -> bool:
    modules = {vision_transformer.__name__, eva.__name__, "timm.models.deit"}
    return timm.models.model_entrypoint(name).__module__ in modules


def arch_of(source: str) -> tuple[str, str | None]:
    """Name and file of `NAME` or `NAME@FILE`."""
    match = re.fullmatch(r"([^@]+)(?:@(.+))?", source)
    if match is None:
        raise CrispError(f"timm:{source}: no name of a model; give timm:NAME or timm:NAME@FILE")
    return match[1], match[2]
