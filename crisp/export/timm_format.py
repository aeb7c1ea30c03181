"""A folder for timm: `timm.create_model("local-dir:OUT", pretrained=True)`."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from crisp.errors import CrispError
from crisp.export.backbone import WEIGHTS_FILE, plain_weights, save_tensors
from crisp.export.config import Norm
from crisp.export.preparation import CROP_SHARE, preparation_for
from crisp.models.trained import Trained
from crisp.models.vit import LAYER_NORM_EPS


def write_timm(trained: Trained, norm: Norm, folder: Path) -> None:
    """Write config.json and model.safetensors.

    `model(images)` is the CLS token with the CLS norm, and the mean of the patch tokens with the patch norm: each norm
    with the tokens that it had in training.

    Args:
        trained: what to export.
        norm: the final norm of timm's model.
        folder: an empty one.

    Raises:
        CrispError: timm's model of this name ends in a norm of another kind.
    """
    model, image_px = trained.config.model, trained.config.views.global_px
    arch = model.arch.partition(".")[0]  # behind the point is a tag of timm's own weights
    args: dict[str, Any] = {
        "img_size": image_px,
        **model.arch_args,
        "global_pool": "token" if norm == "cls" else "avg",
        # timm puts the norm behind the pooling for some names, and leaves it out for others
        "final_norm": True,
        "fc_norm": False,
    }
    vit = timm.create_model(arch, pretrained=False, num_classes=0, **args)
    if not isinstance(vit.norm, nn.LayerNorm) or vit.norm.eps != LAYER_NORM_EPS:
        raise CrispError(
            f"model.arch={model.arch}: timm's model ends in {vit.norm}, ours in a LayerNorm of eps {LAYER_NORM_EPS}; "
            f"export it with --format onnx"
        )
    weights = plain_weights(trained.network.backbone, norm)
    vit.load_state_dict(weights)  # strict: exactly the names and shapes that timm will look for
    save_tensors(weights, folder / WEIGHTS_FILE)
    prepared = preparation_for(image_px)
    config = {
        "architecture": arch,
        "num_classes": 0,
        "num_features": trained.network.backbone.dim,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, image_px, image_px],
            "fixed_input_size": True,
            "interpolation": prepared.interpolation,
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": prepared.mean,
            "std": prepared.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
