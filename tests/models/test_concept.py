import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from crisp.models.concept import ConceptAggregator

B, K, N, D, HEADS = 3, 2, 9, 32, 4


def build(depth: int, *, own_norm: bool = True) -> ConceptAggregator:
    torch.manual_seed(depth)
    aggregator = ConceptAggregator(D, HEADS, depth=depth, own_norm=own_norm).double()
    for parameter in aggregator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return aggregator


def some_regions() -> Tensor:
    regions = torch.rand(B, K, N, generator=torch.Generator().manual_seed(5)) < 0.4
    regions[..., 3] = True
    return regions


def plain_concept(aggregator: ConceptAggregator, patches: Tensor, region: Tensor) -> Tensor:
    """Eq. 3–5 as they read, for one image and one region: patches [n, D], region [n] bool → [D]."""
    n = len(patches)
    x = torch.cat([aggregator.concept_token[0], patches])  # Eq. 3: [1+n, D]
    mask = torch.full((1 + n, 1 + n), -torch.inf, dtype=x.dtype)  # Eq. 4
    mask[0, 1:][region] = 0.0
    for block in aggregator.blocks:
        y = block.norm1(x)
        q, (k, v) = block.q(y), block.kv(y).chunk(2, dim=-1)
        attended = []
        for h in range(HEADS):
            part = slice(h * D // HEADS, (h + 1) * D // HEADS)
            scores = q[:, part] @ k[:, part].T / (D // HEADS) ** 0.5 + mask  # Eq. 5
            attended.append(scores[0].softmax(-1) @ v[:, part])  # the other rows attend to nothing
        concept = x[0] + block.proj(torch.cat(attended))
        concept = concept + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(concept))))
        x = torch.cat([concept[None], patches])
    return aggregator.norm(x[0])


@pytest.mark.parametrize("own_norm", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_equals_full_masked_attention(depth: int, own_norm: bool) -> None:
    aggregator, patches, regions = build(depth, own_norm=own_norm), torch.randn(B, N, D).double(), some_regions()
    tokens = aggregator(patches, regions)
    assert tokens.shape == (B, K, D)
    for b in range(B):
        for k in range(K):
            torch.testing.assert_close(tokens[b, k], plain_concept(aggregator, patches[b], regions[b, k]))


def test_depth_zero_is_the_mean() -> None:
    aggregator, patches, regions = build(0), torch.randn(B, N, D).double(), some_regions()
    tokens = aggregator(patches, regions)
    for b in range(B):
        for k in range(K):
            torch.testing.assert_close(tokens[b, k], patches[b][regions[b, k]].mean(0))
    assert not list(aggregator.parameters())


@pytest.mark.parametrize("depth", [0, 2])
def test_patches_outside_the_region_do_not_matter(depth: int) -> None:
    aggregator, regions = build(depth), some_regions()
    patches = torch.randn(B, N, D).double().requires_grad_()
    aggregator(patches, regions)[:, 0].sum().backward()
    assert patches.grad is not None
    reached = patches.grad.abs().sum(-1) > 0
    assert torch.equal(reached, regions[:, 0])


@pytest.mark.parametrize("depth", [0, 1])
def test_an_empty_region_is_finite_and_leaves_the_others(depth: int) -> None:
    aggregator, regions = build(depth), some_regions()
    patches = torch.randn(B, N, D).double().requires_grad_()
    whole = aggregator(patches, regions)
    regions[1, 0] = False
    tokens = aggregator(patches, regions)
    assert tokens.isfinite().all()
    others = torch.ones(B, K, dtype=torch.bool)
    others[1, 0] = False
    torch.testing.assert_close(tokens[others], whole[others])
    torch.where(others[..., None], tokens, 0).pow(2).sum().backward()
    assert patches.grad is not None
    for gradient in (patches.grad, *(p.grad for p in aggregator.parameters())):
        assert gradient.isfinite().all()


def test_initialisation_and_decay() -> None:
    torch.manual_seed(0)
    aggregator = ConceptAggregator(384, 6, depth=1, own_norm=True)
    assert aggregator.concept_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert aggregator.concept_token.ndim > 1  # decayed, as the CLS token is
    block = aggregator.blocks[0]
    for layer in (block.q, block.kv, block.proj, block.mlp.fc1, block.mlp.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert layer.bias.count_nonzero() == 0
    for norm in (block.norm1, block.norm2, aggregator.norm):
        assert norm.eps == 1e-6


@pytest.mark.parametrize("depth", [0, 1])
def test_autocast_is_finite(depth: int) -> None:
    regions = some_regions()
    regions[0] = False
    with torch.autocast("cpu", torch.bfloat16):
        assert build(depth).float()(torch.randn(B, N, D), regions).isfinite().all()
