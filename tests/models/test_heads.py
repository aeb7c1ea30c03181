import math

import pytest
import torch

from crisp.config import ModelConfig
from crisp.models.heads import LastLayer, ProjectionHeads

DIM, HIDDEN, BOTTLENECK, PROTOTYPES = 32, 48, 16, 64
MLP_SIZE = (DIM + 1) * HIDDEN + (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * BOTTLENECK
LAYER_SIZE = PROTOTYPES * BOTTLENECK + PROTOTYPES
KINDS = ("cls", "patch", "region")


def build(**changes: object) -> ProjectionHeads:
    torch.manual_seed(0)
    sizes = {"head_hidden": HIDDEN, "head_bottleneck": BOTTLENECK, "prototypes": PROTOTYPES}
    return ProjectionHeads(DIM, ModelConfig(**(sizes | changes)), kinds=KINDS)


# Groups of kinds that share, by configuration; all but the default are rows of the paper's table 7.
SHARED, APART, SEPARATE = [{"cls", "patch", "region"}], [{"cls"}, {"patch", "region"}], [{"cls"}, {"patch"}, {"region"}]


@pytest.mark.parametrize(
    ("mlp", "last_layer", "mlp_groups", "layer_groups"),
    [
        ("cls_apart", "separate", APART, SEPARATE),
        ("shared", "shared", SHARED, SHARED),
        ("shared", "separate", SHARED, SEPARATE),
        ("shared", "cls_apart", SHARED, APART),
        ("separate", "separate", SEPARATE, SEPARATE),
        ("cls_apart", "cls_apart", APART, APART),
    ],
)
def test_sharing(mlp: str, last_layer: str, mlp_groups: list[set[str]], layer_groups: list[set[str]]) -> None:
    heads = build(head_mlp=mlp, head_last_layer=last_layer)
    for modules, groups in ((heads.mlp, mlp_groups), (heads.last_layer, layer_groups)):
        for a in KINDS:
            for b in KINDS:
                together = any({a, b} <= group for group in groups)
                assert (modules[a] is modules[b]) == together
    size = sum(p.numel() for p in heads.parameters())
    assert size == len(mlp_groups) * MLP_SIZE + len(layer_groups) * LAYER_SIZE
    prototypes = heads.prototypes()
    assert len({id(p) for p in prototypes.values()}) == len(layer_groups)


def test_without_regions_nothing_is_built_for_them() -> None:
    heads = ProjectionHeads(DIM, ModelConfig(head_mlp="separate"), kinds=("cls", "patch"))
    assert set(heads.mlp) == set(heads.last_layer) == set(heads.prototypes()) == {"cls", "patch"}


def test_bottlenecks_have_length_one() -> None:
    rows = build().bottlenecks("patch", torch.randn(2, 5, DIM))
    assert rows.shape == (2, 5, BOTTLENECK)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 5))


def test_bottlenecks_spelled_out() -> None:
    heads, x = build().double(), torch.randn(5, DIM).double()
    one, two, three = (heads.mlp["region"][i] for i in (0, 2, 4))
    gelu = torch.nn.functional.gelu
    want = gelu(gelu(x @ one.weight.T + one.bias) @ two.weight.T + two.bias) @ three.weight.T + three.bias
    torch.testing.assert_close(heads.bottlenecks("region", x), want / want.norm(dim=-1, keepdim=True))


def test_prototypes_are_weight_norm() -> None:
    layer = LastLayer(BOTTLENECK, PROTOTYPES, learn_gain=True).double()
    layer.weight_g.data = torch.rand(PROTOTYPES, 1).double() + 0.5
    torch.testing.assert_close(layer(), torch._weight_norm(layer.weight_v, layer.weight_g, 0))
    torch.testing.assert_close(layer().norm(dim=1, keepdim=True), layer.weight_g.detach(), check_dtype=False)


@pytest.mark.parametrize("learn", [True, False])
def test_gain(learn: bool) -> None:
    layer = build(learn_last_layer_gain=learn).last_layer["cls"]
    assert layer.weight_g.shape == (PROTOTYPES, 1)
    assert (layer.weight_g == 1).all()
    assert layer.weight_g.requires_grad is learn
    assert layer.weight_v.requires_grad


def test_initialisation() -> None:
    torch.manual_seed(0)
    heads = ProjectionHeads(384, ModelConfig(), kinds=("cls",))
    for layer in (heads.mlp["cls"][i] for i in (0, 2, 4)):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert layer.bias.count_nonzero() == 0
    bound = 1 / math.sqrt(256)  # as PyTorch makes a linear layer
    assert 0.999 * bound < heads.last_layer["cls"].weight_v.abs().max() <= bound


def test_mean_of_logits_is_the_last_layer_of_the_mean_bottleneck() -> None:
    heads = build().double()
    heads.last_layer["patch"].weight_g.data.uniform_(0.5, 2)
    rows = heads.bottlenecks("patch", torch.randn(200, DIM).double())
    prototypes = heads.prototypes()["patch"]
    torch.testing.assert_close(prototypes @ rows.mean(0), (rows @ prototypes.T).mean(0), rtol=0, atol=1e-13)


def test_autocast_still_gives_float32_lengths() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = build().bottlenecks("cls", torch.randn(7, DIM))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(7))
