"""Named runs: a recipe is a function that returns a `TrainConfig`, and the command line can override every field."""

from collections.abc import Callable
from dataclasses import replace

from crisp.config import LossConfig, ModelConfig, OptimConfig, RegionConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError


def vits16() -> TrainConfig:
    """ViT-S/16 as in the paper, but from random weights: 200 epochs at batch 256 (4 GPUs × 64).

    The paper reports 49 minutes per ImageNet epoch and 18.5 GB per GPU on four RTX 3090, about 163 hours in all.
    """
    return TrainConfig(recipe="vits16")


def vitb16() -> TrainConfig:
    """ViT-B/16 as in the paper, but from random weights: 200 epochs at batch 160 (4 GPUs × 40)."""
    return TrainConfig(
        recipe="vitb16",
        model=ModelConfig(arch="vit_base_patch16_224", learn_last_layer_gain=False),
        views=ViewsConfig(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32)),
        loss=LossConfig(teacher_temperature_warmup_epochs=50),
        optim=OptimConfig(global_batch=160, base_lr=7.5e-4, min_lr=2e-6, clip_norm=0.3, freeze_last_layer_epochs=3),
    )


def vitl16() -> TrainConfig:
    """ViT-L/16: 200 epochs at batch 128 (4 GPUs × 32). iBOT's settings for this size are unverified."""
    base = vitb16()
    return replace(
        base,
        recipe="vitl16",
        model=replace(base.model, arch="vit_large_patch16_224"),
        optim=replace(base.optim, global_batch=128),
    )


def ibot_vits16() -> TrainConfig:
    """iBOT's own ViT-S/16, for comparison: no region loss, one final norm, one shared head, 800 epochs at batch 1024.

    By arithmetic a step costs 7 % less than CRISP's; the paper measured 42 against 49 minutes per epoch.
    """
    return TrainConfig(
        recipe="ibot_vits16",
        model=ModelConfig(shared_norm=True, head_mlp="shared", head_last_layer="shared"),
        region=RegionConfig(enabled=False),
        optim=OptimConfig(epochs=800, global_batch=1024),
    )


def demo() -> TrainConfig:
    """A tiny ViT that learns on a few hundred crops in minutes on two cores; it shows that everything works.

    On `crisp demo`'s crops k-NN accuracy rises from about .3 to above .4 in 1200 steps (3.5 minutes on two EPYC cores).
    Width and depth are small so that it sees 38,000 images in that time: a deeper one learned nothing by then.
    The teacher's temperature stays at its low start, and the teacher follows fast, for a run this short.
    """
    return TrainConfig(
        recipe="demo",
        precision="fp32",
        log_every=10,
        checkpoint_every=200,
        views=ViewsConfig(reference_px=112, global_px=112, local_px=48, local_views=4),
        model=ModelConfig(
            arch="vit_tiny_patch16_224",
            embed_dim=96,
            depth=2,
            num_heads=3,
            drop_path=0.0,
            head_hidden=128,
            head_bottleneck=64,
            prototypes=256,
        ),
        region=RegionConfig(blocks=2),
        loss=LossConfig(teacher_temperature=(0.04, 0.04)),
        optim=OptimConfig(
            epochs=100,
            global_batch=32,
            base_lr=8e-3,
            warmup_epochs=5,
            weight_decay=(0.04, 0.04),
            ema_momentum=(0.98, 1.0),
        ),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (vits16, vitb16, vitl16, ibot_vits16, demo)
}


def recipe_named(name: str) -> TrainConfig:
    """The config of a recipe.

    Raises:
        CrispError: no recipe has that name.
    """
    if name not in RECIPES:
        raise CrispError(f"recipe {name!r}: there is no such recipe; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
