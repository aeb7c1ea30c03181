"""The baseline is iBOT: its losses and weights are those of the plain twin that crisp itself is held against."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from crisp.benchmarks.ibot_published import PublishedIbot
from crisp.config import OptimConfig, TrainConfig
from tests import ibot_plain
from tests.ibot_plain import PlainIbot
from tests.test_ibot_parity import CLIP, MODEL, VIEWS, crisp_schedule, make_batch, twin_step


def twin_name(name: str) -> str:
    """A parameter of the baseline → of the twin."""
    for ours, published in (
        ("mask_token", "backbone.masked_embed"),
        ("vit.", "backbone."),
        ("head.last_layer.parametrizations.weight.original0", "head.last_layer.weight_g"),
        ("head.last_layer.parametrizations.weight.original1", "head.last_layer.weight_v"),
    ):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def test_it_takes_the_twins_step() -> None:
    # Local views as large as the base grid: timm resizes position embeddings in its own way.
    views = replace(VIEWS, local_px=64)
    config = TrainConfig(views=views, model=MODEL, optim=OptimConfig(clip_norm=CLIP))
    ours = PublishedIbot(config, torch.device("cpu"))
    for part in (ours.student, ours.teacher):
        part.double()
    ours.cls_center, ours.patch_center = ours.cls_center.double(), ours.patch_center.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*ours.student.parameters(), *ours.teacher.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    networks = []
    for network in (ours.student, ours.teacher):
        backbone = ibot_plain.Backbone(dim=36, depth=2, heads=3, patch_px=16, base_grid=4)
        head = ibot_plain.Head(dim=36, hidden=40, bottleneck=16, prototypes=48, separate=False, learn_gain=True)
        twin = ibot_plain.Network(backbone, head).double()
        weights = {twin_name(name): value for name, value in network.state_dict().items()}
        weights |= {
            name.replace("last_layer", "last_layer2"): weights[name] for name in weights if "last_layer" in name
        }
        twin.load_state_dict(weights)
        networks.append(twin)
    plain = PlainIbot(*networks, prototypes=48)

    for step in range(2):
        batch = make_batch(step)
        batch = replace(batch, local_views=torch.randn(2, 5, 3, 64, 64, generator=generator))
        doubled = replace(batch, global_views=batch.global_views.double(), local_views=batch.local_views.double())
        got = ours.step(doubled, crisp_schedule(step, frozen=False), torch.autocast("cpu", enabled=False))
        want = twin_step(plain, batch, step, frozen=False)
        assert got["cls"] == pytest.approx(float(want.cls), rel=1e-7)
        assert got["patch"] == pytest.approx(float(want.patch), rel=1e-7)
    assert_same_weights(ours.student, networks[0])
    assert_same_weights(ours.teacher, networks[1])


def assert_same_weights(ours: nn.Module, twin: nn.Module) -> None:
    named: dict[str, Tensor] = dict(twin.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, named[twin_name(name)], rtol=1e-6, atol=1e-9, msg=name)
