"""With the region loss off and one shared norm, `train_step` is iBOT's step: every number of it against a plain twin.

The two start from the same weights (a teacher that differs from the student) and get the same views and masks; they
are compared after each of three steps. Without stochastic depth: its draws come from torch's generator, and the two
draw in another order, so that there would be nothing to compare.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crisp.batch import Batch
from crisp.config import LossConfig, ModelConfig, OptimConfig, RegionConfig, Sharing, TrainConfig, ViewsConfig
from crisp.distributed import World
from crisp.schedules import StepSchedule
from crisp.training.state import TrainState, build_state
from crisp.training.step import train_step
from tests import ibot_plain as ibot
from tests.ibot_plain import PlainIbot, StepResult

IMAGES, STEPS = 5, 3
CLIP = 0.2
LEARNING_RATE, WEIGHT_DECAY, MOMENTUM = 5e-4, 0.2, 0.99
TEACHER_TEMPERATURES = (0.04, 0.055, 0.07)
WORLD = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
VIEWS = ViewsConfig(reference_px=64, global_px=64, local_px=48, local_views=2)
MODEL = ModelConfig(
    arch="vit_tiny_patch16_224", embed_dim=36, depth=2, num_heads=3, drop_path=0.0, shared_norm=True,
    head_mlp="shared", head_hidden=40, head_bottleneck=16, prototypes=48,
)  # fmt: skip


def make_state(
    last_layer: Sharing, *, learn_gain: bool, dtype: torch.dtype = torch.float64, **model: Any
) -> TrainState:
    """crisp as iBOT: fp32 is no autocast, so that modules in float64 stay in it. Biases and gains are not 0 and 1."""
    config = TrainConfig(
        precision="fp32",
        views=VIEWS,
        model=replace(MODEL, head_last_layer=last_layer, learn_last_layer_gain=learn_gain, **model),
        region=RegionConfig(enabled=False),
        loss=LossConfig(),
        optim=OptimConfig(clip_norm=CLIP),
    )
    state = build_state(config, WORLD)
    state.networks.to(dtype)
    state.loss.to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in state.networks.named_parameters():  # the teacher's too
            if learn_gain or not name.endswith("weight_g"):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return state


def twin_name(name: str) -> str:
    """A parameter's name in crisp → in iBOT's checkpoints."""
    for crisp, published in (
        ("backbone.mask_token", "backbone.masked_embed"),
        ("backbone.norm_cls.", "backbone.norm."),
        ("backbone.norm_patch.", "backbone.norm."),
        ("heads.mlp.cls.", "head.mlp."),
        ("heads.mlp.patch.", "head.mlp."),
        ("heads.last_layer.cls.", "head.last_layer."),
        ("heads.last_layer.patch.", "head.last_layer2."),
    ):
        if name.startswith(crisp):
            return published + name.removeprefix(crisp)
    return name


def make_twin(state: TrainState, dtype: torch.dtype) -> PlainIbot:
    """iBOT with the same weights, all of which must be there; what crisp names twice must be one and the same."""
    model = state.config.model
    networks = []
    for network in (state.networks.student, state.networks.teacher):
        backbone = ibot.Backbone(
            dim=network.backbone.dim,
            depth=len(network.backbone.blocks),
            heads=network.backbone.num_heads,
            patch_px=VIEWS.patch_px,
            base_grid=VIEWS.global_grid,
        )
        head = ibot.Head(
            dim=network.backbone.dim,
            hidden=model.head_hidden,
            bottleneck=model.head_bottleneck,
            prototypes=model.prototypes,
            separate=model.head_last_layer == "separate",
            learn_gain=model.learn_last_layer_gain,
        )
        twin = ibot.Network(backbone, head).to(dtype)
        weights: dict[str, Tensor] = {}
        for name, value in network.state_dict().items():
            assert torch.equal(weights.setdefault(twin_name(name), value), value), name
        twin.load_state_dict(weights)
        networks.append(twin)
    return PlainIbot(*networks, prototypes=model.prototypes)


def make_batch(seed: int) -> Batch:
    """Random views; the second image has no mask at all, the third only one in its second view, the fourth all."""
    generator = torch.Generator().manual_seed(seed)
    patches = VIEWS.global_grid**2
    masks = torch.rand(2, IMAGES, patches, generator=generator) < 0.4
    masks[:, 1] = False
    masks[0, 2] = False
    masks[0, 3] = True
    return Batch(
        reference=torch.zeros(IMAGES, 3, 64, 64),
        global_views=torch.randn(2, IMAGES, 3, 64, 64, generator=generator),
        local_views=torch.randn(2, IMAGES, 3, 48, 48, generator=generator),
        view_from_reference=torch.zeros(4, IMAGES, 2, 3),
        patch_masks=masks,
        region_seed=torch.zeros(IMAGES, 1, dtype=torch.int64),
        label=torch.full((IMAGES,), -1),
        sample_id=torch.arange(IMAGES),
    )


def twin_step(twin: PlainIbot, batch: Batch, step: int, *, frozen: bool) -> StepResult:
    """The twin's step on the views in its own type."""
    dtype = twin.cls_centre.dtype
    return twin.step(
        batch.global_views.to(dtype),
        batch.local_views.to(dtype),
        batch.patch_masks,
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        teacher_temperature=TEACHER_TEMPERATURES[step],
        clip=CLIP,
        last_layer_frozen=frozen,
    )


def crisp_schedule(step: int, *, frozen: bool) -> StepSchedule:
    """A constant learning rate; the teacher's temperature moves."""
    return StepSchedule(
        step=step,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        ema_momentum=MOMENTUM,
        teacher_temperature=TEACHER_TEMPERATURES[step],
        last_layer_frozen=frozen,
    )


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter once, under its name in the twin."""
    return {twin_name(name): parameter.detach().clone() for name, parameter in module.named_parameters()}


def difference(value: Tensor, want: Tensor) -> float:
    """‖value − want‖ / ‖want‖; where nothing is wanted, nothing may be there."""
    distance, length = float((value.double() - want.double()).norm()), float(want.double().norm())
    return distance / length if length > 0 else (0.0 if distance == 0 else float("inf"))


@dataclass
class Differences:
    """The largest relative difference of any tensor, in any step; and whether the comparison was a full one."""

    losses: float = 0.0
    centres: float = 0.0
    gradients: float = 0.0
    student_changes: float = 0.0
    teacher_changes: float = 0.0
    clipped: set[bool] = field(default_factory=set)
    """True: the clipping acted on some tensor; False: it left some as it was"""

    def see(self, what: str, value: Tensor, want: Tensor) -> None:
        """Keep it if it is the largest."""
        setattr(self, what, max(getattr(self, what), difference(value, want)))

    @property
    def largest(self) -> float:
        """Of all."""
        return max(self.losses, self.centres, self.gradients, self.student_changes, self.teacher_changes)


def run_both(state: TrainState, twin: PlainIbot, *, frozen_steps: int) -> Differences:
    """Three steps of both, compared after each; weights by how far they are from where they began."""
    found = Differences()
    pairs = {
        "student_changes": (state.networks.student, twin.student),
        "teacher_changes": (state.networks.teacher, twin.teacher),
    }
    began = {what: snapshot(ours) for what, (ours, _) in pairs.items()}
    for step in range(STEPS):
        batch, frozen = make_batch(seed=step), step < frozen_steps
        metrics = train_step(state, batch, crisp_schedule(step, frozen=frozen))
        want = twin_step(twin, batch, step, frozen=frozen)

        found.see("losses", metrics.terms.cls, want.cls)
        found.see("losses", metrics.terms.patch, want.patch)
        found.see("losses", metrics.terms.total.detach(), want.cls + want.patch)
        found.see("centres", state.loss.centers[0], twin.cls_centre)
        found.see("centres", state.loss.centers[1], twin.patch_centre)

        gradients = {twin_name(name): p.grad for name, p in state.networks.student.named_parameters()}
        assert gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            assert (gradients[name] is None) == (gradient is None), name
            if gradient is not None:
                found.see("gradients", gradients[name], gradient)
        found.clipped |= {factor < 1 for factor in want.clip_factors.values()}

        for what, (ours, theirs) in pairs.items():
            now, then = snapshot(ours), began[what]
            assert now.keys() == dict(theirs.named_parameters()).keys()
            for name, value in theirs.named_parameters():
                found.see(what, now[name] - then[name], value.detach() - then[name])
    return found


@pytest.mark.parametrize("frozen_steps", [0, 2, STEPS])
@pytest.mark.parametrize("learn_gain", [True, False], ids=["learned gain", "fixed gain"])
@pytest.mark.parametrize("last_layer", ["shared", "separate"])
def test_three_steps_equal_ibots(last_layer: Sharing, learn_gain: bool, frozen_steps: int) -> None:
    state = make_state(last_layer, learn_gain=learn_gain)
    twin = make_twin(state, torch.float64)
    before = snapshot(state.networks.student)
    found = run_both(state, twin, frozen_steps=frozen_steps)
    print(found)  # docs/ibot.md has these figures; pytest -s shows them
    assert found.largest < 1e-6, found
    assert found.clipped == {True, False}
    for name, value in snapshot(state.networks.student).items():
        still = ("last_layer" in name and frozen_steps == STEPS) or (name.endswith("weight_g") and not learn_gain)
        assert torch.equal(value, before[name]) == still, name


@pytest.mark.parametrize("last_layer", ["shared", "separate"])
def test_losses_in_float32_equal_ibots(last_layer: Sharing) -> None:
    """Of the first step, against the twin in float32 and in float64."""
    for dtype in (torch.float32, torch.float64):
        state = make_state(last_layer, learn_gain=True, dtype=torch.float32)
        twin = make_twin(state, dtype)
        terms = train_step(state, make_batch(seed=0), crisp_schedule(0, frozen=False)).terms
        want = twin_step(twin, make_batch(seed=0), 0, frozen=False)
        assert terms.cls.dtype == terms.patch.dtype == torch.float32
        found = difference(terms.cls, want.cls), difference(terms.patch, want.patch)
        print(dtype, found)
        assert max(found) < 1e-5


def test_a_batch_without_any_mask_equals_ibots() -> None:
    """The patch loss is 0, and its gradients are zeros, not missing: AdamW must decay the mask token all the same."""
    state = make_state("separate", learn_gain=True)
    twin = make_twin(state, torch.float64)
    batch = make_batch(seed=0)
    batch = replace(batch, patch_masks=torch.zeros_like(batch.patch_masks))
    terms = train_step(state, batch, crisp_schedule(0, frozen=False)).terms
    want = twin_step(twin, batch, 0, frozen=False)
    assert terms.patch == want.patch == 0
    ours = snapshot(state.networks.student)
    for name, value in twin.student.named_parameters():
        gradient = want.gradients[name]
        assert gradient is not None, name
        assert difference(ours[name], value.detach()) < 1e-12, name


def _global_clipping(parameters: dict[str, torch.nn.Parameter], clip: float) -> dict[str, float]:
    torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
    return {}


def _masked_images_alone(
    student: list[Tensor], teacher: list[Tensor], masks: Tensor, centre: Tensor, temperature: float
) -> Tensor:
    each = [(ibot.cross_entropy(teacher[v], student[v], centre, temperature) * masks[v]).sum(-1) for v in range(2)]
    shares = torch.stack(each) / masks.sum(-1).clamp(min=1)
    return shares.sum() / masks.any(-1).sum()


@pytest.mark.parametrize(
    ("fact", "otherwise"),
    [
        ("LAYER_NORM_EPS", 1e-5),
        ("CENTRE_MOMENTUM", 0.9001),
        ("ADAM_EPS", 1e-6),
        ("BETA_2", 0.998),
        ("is_decayed", lambda name, parameter: parameter.ndim > 1 and name != "backbone.masked_embed"),
        ("is_decayed", lambda name, parameter: parameter.ndim > 1 and not name.endswith("weight_g")),
        ("clip_gradients", _global_clipping),
        ("patch_loss", _masked_images_alone),
    ],
)
def test_the_comparison_sees_a_changed_fact(monkeypatch: pytest.MonkeyPatch, fact: str, otherwise: Any) -> None:
    """So that agreement means something: a twin that departs from the recipe in one place is told apart."""
    monkeypatch.setattr(ibot, fact, otherwise)
    state = make_state("shared", learn_gain=True)
    found = run_both(state, make_twin(state, torch.float64), frozen_steps=0)
    assert found.largest > 1e-5, found


def test_the_comparison_sees_the_other_position_embeddings() -> None:
    """By target size: crisp's option, not iBOT's way."""
    state = make_state("shared", learn_gain=True, position_resize="size")
    found = run_both(state, make_twin(state, torch.float64), frozen_steps=0)
    assert found.losses > 1e-5, found
