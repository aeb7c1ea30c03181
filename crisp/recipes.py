"""Named runs: a recipe is a function that returns a `TrainConfig`, and the command line can override every field."""

from collections.abc import Callable
from dataclasses import replace

from crisp import ablations
from crisp.config import LossConfig, ModelConfig, OptimConfig, RegionConfig, TrainConfig, ViewsConfig
from crisp.errors import CrispError


def vits16() -> TrainConfig:
    """ViT-S/16 as in the paper, with --init.weights from iBOT's: 200 epochs at batch 256 (4 GPUs × 64).

    The paper reports 49 minutes per ImageNet epoch and 18.5 GB per GPU on four RTX 3090, about 163 hours in all.
    """
    return TrainConfig(recipe="vits16")


def vitb16() -> TrainConfig:
    """ViT-B/16 as in the paper, with --init.weights from iBOT's: 200 epochs at batch 160 (4 GPUs × 40).

    Four times the arithmetic of ViT-S/16, so by the paper's 49 minutes about 3.3 hours per epoch on four RTX 3090.
    iBOT's settings for this size are second-hand.
    """
    return TrainConfig(
        recipe="vitb16",
        model=ModelConfig(arch="vit_base_patch16_224", learn_last_layer_gain=False),
        views=ViewsConfig(global_scale=(0.32, 1.0), local_scale=(0.05, 0.32)),
        loss=LossConfig(teacher_temperature_warmup_epochs=50),
        optim=OptimConfig(global_batch=160, base_lr=7.5e-4, min_lr=2e-6, clip_norm=0.3, freeze_last_layer_epochs=3),
    )


def vitl16() -> TrainConfig:
    """ViT-L/16 as in the paper, with --init.weights from iBOT's: 200 epochs at batch 128 (4 GPUs × 32).

    Fourteen times the arithmetic of ViT-S/16: about 11 hours per epoch on four RTX 3090. iBOT's settings for this
    size are unverified.
    """
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


def ibot_vitb16() -> TrainConfig:
    """iBOT's own ViT-B/16, for comparison: 400 epochs at batch 1024; second-hand settings.

    By arithmetic a step costs 7 % less than `vitb16`'s at the same batch.
    """
    base, ibot = vitb16(), ibot_vits16()
    return replace(
        base,
        recipe="ibot_vitb16",
        model=replace(base.model, shared_norm=True, head_mlp="shared", head_last_layer="shared"),
        region=ibot.region,
        optim=replace(base.optim, epochs=400, global_batch=1024),
    )


def ibot_vitl16() -> TrainConfig:
    """iBOT's own ViT-L/16, for comparison: 250 epochs at batch 1024; unverified settings.

    By arithmetic a step costs 7 % less than `vitl16`'s at the same batch.
    """
    base = ibot_vitb16()
    return replace(
        base,
        recipe="ibot_vitl16",
        model=replace(base.model, arch="vit_large_patch16_224"),
        optim=replace(base.optim, epochs=250),
    )


def vits16_low_lr() -> TrainConfig:
    """`vits16` for a start from iBOT's weights that does not blow up: a tenth of the rate, a slower teacher.

    Continuing from iBOT's weights at its peak rate (5e-4) and batch 256 is known to send the loss to 12, then to NaN.
    iBOT's own help suggests a teacher's momentum of .9995 at batch 256. Cost as `vits16`.
    """
    base = vits16()
    return replace(base, recipe="vits16_low_lr", optim=replace(base.optim, base_lr=5e-5, ema_momentum=(0.9995, 1.0)))


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


MAIN: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (vits16, vits16_low_lr, vitb16, vitl16, ibot_vits16, ibot_vitb16, ibot_vitl16, demo)
}
"""Without the rows of ablations"""

RECIPES = MAIN | ablations.RECIPES


def recipe_named(name: str) -> TrainConfig:
    """The config of a recipe.

    Raises:
        CrispError: no recipe has that name.
    """
    if name not in RECIPES:
        raise CrispError(
            f"recipe {name!r}: there is no such recipe; choose one of {', '.join(MAIN)}, or an ablation's row "
            f"('crisp recipes' lists them)"
        )
    return RECIPES[name]()
