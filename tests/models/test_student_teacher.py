import dataclasses
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crisp.config import LossConfig, TrainConfig
from crisp.errors import CrispError
from crisp.losses import CrispLoss, LossTerms, TeacherStatistics, Temperatures
from crisp.models.student_teacher import StudentTeacher, build_student_teacher, masked_positions

BATCH, LOCALS, K, PATCHES, DIM = 3, 3, 2, 16, 32
Inputs = dict[str, Tensor]


def make_inputs(*, masks: bool = True, valid: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    view_regions = torch.rand(2, BATCH, K, PATCHES, generator=generator) < 0.5
    view_regions[:, 1, 0] = False  # a region that neither view shows
    return {
        "global_views": torch.randn(2, BATCH, 3, 64, 64, generator=generator),
        "local_views": torch.randn(LOCALS, BATCH, 3, 32, 32, generator=generator),
        "patch_masks": (torch.rand(2, BATCH, PATCHES, generator=generator) < 0.4) & masks,
        "view_regions": view_regions & valid,
    }


def make_pair(configs: Any, *, region: dict[str, Any] | None = None, **model: Any) -> StudentTeacher:
    torch.manual_seed(0)
    pair = StudentTeacher(configs.model(**model), configs.region(**(region or {})), configs.views)
    with torch.no_grad():  # part them, so that nothing agrees by chance
        for parameter in pair.teacher.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return pair


def run_losses(pair: StudentTeacher, inputs: Inputs, **weights: float) -> LossTerms:
    """All that a step computes before its backward pass, on one process."""
    enabled = pair.student.region_config.enabled
    masked = masked_positions(inputs["patch_masks"])
    view_regions = inputs["view_regions"] if enabled else None
    valid = inputs["view_regions"].sum(-1).amin(0) >= 4 if enabled else None
    loss = CrispLoss(LossConfig(**weights), views=2 + len(inputs["local_views"]), prototypes=64, region=enabled)
    teacher = pair.teacher.teach(inputs["global_views"], masked=masked, view_regions=view_regions)
    statistics = TeacherStatistics.of_step([TeacherStatistics.of(teacher, valid)])
    at = Temperatures(0.1, 0.04)
    of_global = loss.of_global_views(
        pair.student(
            inputs["global_views"], patch_masks=inputs["patch_masks"], masked=masked, view_regions=view_regions
        ),
        teacher,
        patch_masks=inputs["patch_masks"],
        masked=masked,
        valid=valid,
        statistics=statistics,
        temperatures=at,
    )
    if not len(inputs["local_views"]):
        return of_global
    local = pair.student(inputs["local_views"])
    return of_global + loss.of_local_views(local, teacher, statistics=statistics, temperatures=at)


def of_globals(inputs: Inputs) -> Inputs:
    """What `Network.forward` takes of the global views."""
    named = {name: value for name, value in inputs.items() if name != "local_views"}
    return {"views": named.pop("global_views"), **named, "masked": masked_positions(inputs["patch_masks"])}


def reached(module: nn.Module) -> bool:
    """Whether the loss moves any of its parameters; each must have a finite gradient all the same."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    gradients = [p.grad for p in trainable]
    assert gradients
    assert all(g is not None and g.isfinite().all() for g in gradients)
    return any(bool(g.count_nonzero()) for g in gradients if g is not None)


def test_shapes(configs: Any) -> None:
    pair, inputs = make_pair(configs), make_inputs()
    masked = masked_positions(inputs["patch_masks"])
    teacher = pair.teacher.teach(inputs["global_views"], masked=masked, view_regions=inputs["view_regions"])
    student, local = pair.student(**of_globals(inputs)), pair.student(inputs["local_views"])
    m = int(inputs["patch_masks"].sum())
    assert student.cls.shape == (2, BATCH, 16)
    assert local.cls.shape == (LOCALS, BATCH, 16)
    assert local.patch is local.region is None
    assert list(local.prototypes) == ["cls"]
    assert teacher.cls.shape == (2, BATCH, 16)
    assert student.patch.shape == teacher.patch.shape == (m, 16)
    assert student.region is not None
    assert teacher.region is not None
    assert student.region.shape == teacher.region.shape == (2, BATCH, K, 16)
    assert teacher.patch_count == 2 * BATCH * PATCHES
    assert not any(t.requires_grad for t in (teacher.cls, teacher.patch, teacher.region, *teacher.prototypes.values()))
    assert pair.teacher.discovery_tokens(torch.zeros(BATCH, 3, 64, 64)).shape == (BATCH, PATCHES, DIM)


def test_masked_positions_name_view_image_patch() -> None:
    masks = make_inputs()["patch_masks"]
    patches = torch.arange(masks.numel()).view_as(masks)
    assert torch.equal(patches.flatten()[masked_positions(masks)], patches[masks])


def test_projections_are_those_of_the_parts(configs: Any) -> None:
    """One call equals backbone, aggregator and heads called one by one, view by view."""
    pair, inputs = make_pair(configs), make_inputs()
    masked = masked_positions(inputs["patch_masks"])
    student, local, network = pair.student(**of_globals(inputs)), pair.student(inputs["local_views"]), pair.student
    row = 0
    for view in range(2):
        masks = inputs["patch_masks"][view]
        tokens = network.backbone(inputs["global_views"][view], masks)
        patches = network.heads.bottlenecks("patch", tokens.patches)[masks]
        torch.testing.assert_close(student.patch[row : row + len(patches)], patches)
        row += len(patches)
        torch.testing.assert_close(student.cls[view], network.heads.bottlenecks("cls", tokens.cls))
        regions = network.concept(tokens.patches, inputs["view_regions"][view])
        torch.testing.assert_close(student.region[view], network.heads.bottlenecks("region", regions))
    for view in range(LOCALS):
        cls = network.backbone(inputs["local_views"][view]).cls
        torch.testing.assert_close(local.cls[view], network.heads.bottlenecks("cls", cls))
    teacher = pair.teacher.teach(inputs["global_views"], masked=masked, view_regions=inputs["view_regions"])
    unmasked = pair.teacher.backbone(inputs["global_views"].flatten(0, 1))
    everything = pair.teacher.heads.bottlenecks("patch", unmasked.patches)
    torch.testing.assert_close(teacher.patch_sum, everything.sum((0, 1)))
    torch.testing.assert_close(teacher.patch, everything.flatten(0, 1)[masked])


def test_gradients_reach_what_they_should(configs: Any) -> None:
    pair = make_pair(configs)
    run_losses(pair, make_inputs()).total.backward()
    assert all(p.grad is None for p in pair.teacher.parameters())
    student = pair.student
    assert student.backbone.mask_token.grad.count_nonzero()
    parts = (student.backbone, student.concept, *student.heads.mlp.values(), *student.heads.last_layer.values())
    for part in parts:
        assert reached(part)
    for name, parameter in student.named_parameters():
        assert parameter.grad.count_nonzero(), name


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_gradients_without_masks_or_regions(configs: Any, masks: bool, regions: bool) -> None:
    """Zero where there is nothing to learn from, but never missing: ranks may differ in what they have."""
    pair = make_pair(configs, head_mlp="separate")
    terms = run_losses(pair, make_inputs(masks=masks, valid=regions))
    terms.total.backward()
    student = pair.student
    assert bool(terms.patch > 0) is masks
    assert bool(terms.region > 0) is regions
    assert reached(student.heads.mlp["patch"]) is masks
    assert reached(student.heads.last_layer["patch"]) is masks
    assert bool(student.backbone.mask_token.grad.count_nonzero()) is masks
    assert reached(student.heads.mlp["region"]) is regions
    assert reached(student.heads.last_layer["region"]) is regions
    assert reached(student.concept) is regions
    assert reached(student.backbone.norm_patch) is (masks or regions)
    assert reached(student.backbone.norm_cls)
    assert reached(student)


@pytest.mark.parametrize(
    ("region", "model"),
    [
        ({"enabled": False}, {}),
        ({"concept_depth": 0}, {}),
        ({"concept_depth": 2, "concept_norm": "shared"}, {}),
        ({"concept_input": "raw"}, {"shared_norm": True}),
        ({}, {"head_mlp": "shared", "head_last_layer": "shared", "learn_last_layer_gain": False}),
    ],
)
def test_every_configuration_trains_every_parameter(
    configs: Any, region: dict[str, Any], model: dict[str, Any]
) -> None:
    pair = make_pair(configs, region=region, **model)
    run_losses(pair, make_inputs()).total.backward()
    assert reached(pair.student)


def test_what_the_concept_reads_and_ends_in(configs: Any) -> None:
    inputs = make_inputs()
    for choice, norm in (("normed", "own"), ("raw", "own"), ("normed", "shared")):
        network = make_pair(configs, region={"concept_input": choice, "concept_norm": norm}).student
        with torch.no_grad():
            network.backbone.norm_patch.bias += 0.3
            tokens = network.backbone(inputs["global_views"][0], inputs["patch_masks"][0])
            patches = {"normed": tokens.patches, "raw": tokens.raw_patches}[choice]
            concepts = network.concept(patches, inputs["view_regions"][0])
            ended = network.backbone.norm_patch(concepts) if norm == "shared" else concepts
            want = network.heads.bottlenecks("region", ended)
            torch.testing.assert_close(network(**of_globals(inputs)).region[0], want)


def test_no_local_views(configs: Any) -> None:
    pair, inputs = make_pair(configs), make_inputs()
    terms = run_losses(pair, inputs | {"local_views": inputs["local_views"][:0]})
    terms.total.backward()
    assert reached(pair.student)


def test_half_precision_is_finite(configs: Any) -> None:
    pair = make_pair(configs)
    with torch.autocast("cpu", torch.bfloat16):
        terms = run_losses(pair, make_inputs())
    terms.total.backward()
    full = run_losses(pair, make_inputs())
    for field in dataclasses.fields(LossTerms):
        torch.testing.assert_close(getattr(terms, field.name), getattr(full, field.name), rtol=0.05, atol=0)
    assert reached(pair.student)


def test_the_teacher_starts_as_the_student_without_stochastic_depth(configs: Any) -> None:
    torch.manual_seed(0)
    pair = StudentTeacher(configs.model(drop_path=0.5), configs.region(), configs.views).train()
    assert all(map(torch.equal, pair.student.state_dict().values(), pair.teacher.state_dict().values()))
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert pair.student.backbone.drop_rates == [0, 0.5]
    assert pair.teacher.backbone.drop_rates == [0, 0]


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.996, 1.0])
def test_moving_average(configs: Any, momentum: float) -> None:
    pair = make_pair(configs).double()
    teacher = dict(pair.teacher.named_parameters())
    want = {name: momentum * teacher[name] + (1 - momentum) * p for name, p in pair.student.named_parameters()}
    before = {name: p.clone() for name, p in teacher.items()}
    pair.update_teacher(momentum)
    assert set(want) == set(teacher)
    for name, value in want.items():
        torch.testing.assert_close(teacher[name], value, check_dtype=False, rtol=1e-14, atol=1e-15)
        if momentum == 1:
            assert torch.equal(teacher[name], before[name])
    assert not list(pair.buffers())


def test_the_moving_average_reaches_gain_and_direction_apart(configs: Any) -> None:
    pair = make_pair(configs)
    student, teacher = (n.heads.last_layer["cls"] for n in (pair.student, pair.teacher))
    with torch.no_grad():
        student.weight_g.fill_(3.0)
        teacher.weight_g.fill_(1.0)
    pair.update_teacher(0.5)
    torch.testing.assert_close(teacher.weight_g, torch.full_like(teacher.weight_g, 2.0))


def test_more_blocks_than_the_model_has(configs: Any) -> None:
    with pytest.raises(CrispError, match=r"region\.blocks=4: the model has 2 blocks; take at most that many"):
        make_pair(configs, region={"blocks": 4})
    make_pair(configs, region={"blocks": 4, "enabled": False})


def test_build_is_reproducible_and_says_what_it_chose(configs: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = TrainConfig(model=configs.model(), region=configs.region(), views=configs.views)
    states = []
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            torch.manual_seed(7)
            pair = build_student_teacher(config, torch.device("cpu"))
            states.append(pair.state_dict())
    assert "cpu, plain attention" in caplog.text
    assert not any(b.attn.fused_attn for n in (pair.student, pair.teacher) for b in n.backbone.blocks)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
