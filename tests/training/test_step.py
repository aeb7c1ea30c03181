"""A step as a whole: accumulated gradients are those of one batch, and a step that is not finite changes nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.benchmarks.step_contenders import synthetic_batch
from crisp.config import ModelConfig, RegionConfig, TrainConfig
from crisp.distributed import World
from crisp.models.vit import VisionTransformer
from crisp.recipes import demo, recipe_named
from crisp.schedules import schedule_at
from crisp.training.state import TrainState, build_state
from crisp.training.step import StepMetrics, default_micro_batch, micro_batches, train_step

WORLD = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
IMAGES = 7
STEP = 12
"""After the warm-up's first step, where the learning rate is 0, and with free last layers"""


def config_of(**optim: int) -> TrainConfig:
    base = demo()
    return replace(
        base,
        precision="fp32",
        data=replace(base.data, parts=1),
        views=replace(base.views, reference_px=64, global_px=64, local_px=32, local_views=2),
        model=ModelConfig(
            arch="vit_tiny_patch16_224", embed_dim=48, depth=2, drop_path=0.4,
            head_hidden=32, head_bottleneck=16, prototypes=64,
        ),
        region=RegionConfig(blocks=2, threshold=0.0, min_patches=1),
        optim=replace(base.optim, epochs=3, global_batch=IMAGES, warmup_epochs=1, **optim),
    )  # fmt: skip


def double_state(config: TrainConfig) -> TrainState:
    state = build_state(config, WORLD)
    state.networks.double()
    state.loss.double()
    return state


def batch_of(config: TrainConfig) -> Batch:
    return synthetic_batch(config, WORLD.device)


def step_of(state: TrainState, batch: Batch, *, step: int = STEP) -> StepMetrics:
    return train_step(state, batch, schedule_at(state.config, step=step, steps_per_epoch=10))


def everything(state: TrainState) -> dict[str, Tensor]:
    values = {f"loss.{name}": value.clone() for name, value in state.loss.state_dict().items()}
    for name, parameter in state.networks.student.named_parameters():
        values[name] = parameter.detach().clone()
        for moment, value in state.optimizer.state[parameter].items():
            values[f"{name} {moment}"] = value.clone()
    return values


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch: int) -> None:
    """And one step of the optimiser, the centres and the teacher's average, whatever the number of micro-batches."""
    whole, parts = (double_state(config_of(micro_batch=images)) for images in (IMAGES, micro_batch))
    assert len(micro_batches(parts, batch_of(parts.config), STEP)) == -(-IMAGES // micro_batch)
    for step in (STEP, STEP + 1):
        one, other = (step_of(state, batch_of(state.config), step=step) for state in (whole, parts))
        torch.testing.assert_close(one.regions, other.regions)
        assert one.regions[1] > 0
        torch.testing.assert_close(one.gradient_norms, other.gradient_norms, rtol=1e-9, atol=0)
        for term in ("cls", "patch", "region", "total"):
            torch.testing.assert_close(getattr(one.terms, term), getattr(other.terms, term), rtol=1e-10, atol=0)
    want, got = everything(whole), everything(parts)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-9, msg=name)
    for one, other in zip(whole.networks.teacher.parameters(), parts.networks.teacher.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_micro_batches_hold_every_image_once() -> None:
    state = build_state(config_of(micro_batch=2), WORLD)
    batch = batch_of(state.config)
    parts = micro_batches(state, batch, 0)
    assert torch.cat([part.sample_id for part, _ in parts]).tolist() == batch.sample_id.tolist()
    assert torch.equal(torch.cat([part.local_views for part, _ in parts], dim=1), batch.local_views)
    assert torch.equal(torch.cat([part.patch_masks for part, _ in parts], dim=1), batch.patch_masks)


def test_a_cpu_takes_as_many_images_as_its_memory_should_hold() -> None:
    def at_once(recipe: str, device: str) -> int:
        config = recipe_named(recipe)
        views = config.views
        with torch.device("meta"):
            backbone = VisionTransformer(config.model, image_px=views.global_px, patch_px=views.patch_px, drop_path=0.0)
        return default_micro_batch(config, backbone, torch.device(device), config.optim.global_batch)

    assert at_once("vits16", "cpu") == 8
    assert at_once("vitb16", "cpu") == 4
    assert at_once("vitl16", "cpu") == 2
    assert at_once("demo", "cpu") == recipe_named("demo").optim.global_batch
    assert at_once("vitb16", "cuda") == recipe_named("vitb16").optim.global_batch


@pytest.mark.parametrize("where", ["reference", "global_views", "local_views"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    state = build_state(config_of(), WORLD)
    batch = batch_of(state.config)
    assert not step_of(state, batch).skipped
    before = everything(state)
    images = getattr(batch, where).clone()
    images.flatten()[5] = torch.inf
    metrics = step_of(state, replace(batch, **{where: images}), step=STEP + 1)
    if where == "reference":
        # A reference decides regions alone: similarities that are not numbers make none, and the step is a good one.
        assert not metrics.skipped
        return
    assert metrics.skipped
    after = everything(state)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not step_of(state, batch, step=STEP + 2).skipped
    assert all(value.isfinite().all() for value in everything(state).values())


@pytest.mark.slow
def test_compiled_blocks_make_the_same_step() -> None:
    plain = config_of()
    compiled = replace(plain, model=replace(plain.model, compile=True))
    one, other = (step_of(build_state(config, WORLD), batch_of(config)) for config in (plain, compiled))
    torch.testing.assert_close(one.terms.total, other.terms.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.gradient_norms, other.gradient_norms, rtol=1e-3, atol=1e-6)
