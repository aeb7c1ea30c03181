"""What a region is worth, held against true segments. Pure functions.

A segment is all pixels of one label; a patch's label is that of most of its pixels (ties: the smallest label). Pixels
of ignored labels, and patches whose label is ignored, are left out on both sides. The seed's segment is that of its
patch's label L. For a region R of whole patches:

- purity: share of R's patches whose label is L.
- purity-px: share of R's pixels whose label is L.
- overlap: the largest |R ∩ S| / |R ∪ S| over all segments S, counted in patches (S: the patches of that label).
- overlap-px: the same, counted in pixels. A region that is exactly the patches of a label has overlap 1 and less than
  that in pixels, where the segment's edge cuts patches.
- boundary-recall: share of the boundary of the seed's segment that has the region's boundary within a tolerance.
- boundary-precision: share of the region's boundary that has the segment's boundary within the tolerance. Recall alone
  favours regions in tatters.
- size: share of the image's patches that R holds.

A boundary is the pixels whose right or lower neighbour is on the other side; the image's border is none, and neither is
a pair with an ignored pixel. Within t pixels means |Δx| ≤ t and |Δy| ≤ t, the square neighbourhood that superpixels are
judged with (Stutz, Hermans and Leibe, "Superpixels: an evaluation of the state of the art", 2018).

Axes: B images, K regions, N patches row by row, H = W pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MEASURES = ("purity", "purity-px", "overlap", "overlap-px", "boundary-recall", "boundary-precision", "size")
UNDEFINED = -1.0
"""In place of a measure that does not exist: the seed's label is ignored, or there is no boundary to recall"""
NO_LABEL = -1
LABELS = 256


class Segments(NamedTuple):
    """The truth of B images."""

    labels: Tensor
    """[B, N] int64 of patches; −1: ignored"""
    pixel_counts: Tensor
    """[B, N, 256] float32: pixels of each label in each patch, none of ignored ones"""
    pixels: Tensor
    """[B, H, W] uint8 labels"""
    counted: Tensor
    """[B, H, W] bool: not ignored"""


@dataclass(frozen=True, slots=True)
class SeedSegments:
    """The segments of K seeds per image, and their boundaries: the same for all regions around these seeds."""

    labels: Tensor
    """[B, K] int64; −1: ignored"""
    boundary: Tensor
    """[B, K, H, W] bool"""
    near_boundary: Tensor
    """[B, K, H, W] bool: within the tolerance of it"""


def segments_of(patch_pixels: Tensor, modes: Tensor, *, ignored: tuple[int, ...]) -> Segments:
    """Labels as `crisp.evals.segmentation.truth` holds them → what measures need.

    Args:
        patch_pixels: [B, N, p·p] uint8, pixel labels of each patch, N a square.
        modes: [B, N] uint8, the most frequent label of each patch.
        ignored: labels that count nowhere.
    """
    B, N, area = patch_pixels.shape
    grid, side = round(N**0.5), round(area**0.5)
    is_ignored = torch.zeros(LABELS, dtype=torch.bool, device=patch_pixels.device)
    is_ignored[list(ignored)] = True
    labels = modes.long()
    counts = torch.zeros(B, N, LABELS, device=patch_pixels.device)
    counts.scatter_add_(2, patch_pixels.long(), torch.ones((), device=patch_pixels.device).expand(B, N, area))
    counts[..., is_ignored] = 0
    pixels = patch_pixels.view(B, grid, grid, side, side).transpose(2, 3).reshape(B, grid * side, grid * side)
    return Segments(labels.masked_fill(is_ignored[labels], NO_LABEL), counts, pixels, ~is_ignored[pixels.long()])


def seed_segments(segments: Segments, seeds: Tensor, *, tolerance_px: int) -> SeedSegments:
    """What regions around `seeds` [B, K] int64 (patches) are held against."""
    labels = segments.labels.gather(1, seeds)
    inside = segments.pixels[:, None].long() == labels[..., None, None]
    edge = boundary(inside, segments.counted[:, None])
    return SeedSegments(labels, edge, within(edge, tolerance_px))


@torch.no_grad()
def measure(regions: Tensor, truth: SeedSegments, segments: Segments, *, patch_px: int, tolerance_px: int) -> Tensor:
    """Every measure of each region.

    Args:
        regions: [B, K, N] bool, around the seeds of `truth`.
        truth: of the seeds.
        segments: of the images.
        patch_px: side of a patch.
        tolerance_px: of boundaries.

    Returns:
        [B, K, 7] float32 in the order of `MEASURES`, each in [0, 1], or `UNDEFINED`.
    """
    patch_counts = F.one_hot(segments.labels + 1, LABELS + 1)[..., 1:].float()  # [B, N, 256], none of ignored ones
    own = truth.labels.clamp_min(0)[..., None]
    found = []
    for counts in (patch_counts, segments.pixel_counts):
        held = regions.float() @ counts  # [B, K, 256]; whole numbers, exact in float32
        size = held.sum(-1)
        union = size[..., None] + counts.sum(1)[:, None] - held
        share = held / union.clamp_min(1)
        found.append((held.gather(2, own)[..., 0] / size.clamp_min(1), share.amax(-1)))
    (purity, overlap), (purity_px, overlap_px) = found

    side = segments.pixels.shape[-1] // patch_px
    pixels = regions.unflatten(2, (side, side)).repeat_interleave(patch_px, 2).repeat_interleave(patch_px, 3)
    edge = boundary(pixels, segments.counted[:, None])
    recall = _share(truth.boundary, within(edge, tolerance_px))
    precision = _share(edge, truth.near_boundary)

    measures = torch.stack([purity, purity_px, overlap, overlap_px, recall, precision], dim=-1)
    measures = measures.masked_fill((truth.labels == NO_LABEL)[..., None], UNDEFINED)
    return torch.cat([measures, regions.float().mean(-1, keepdim=True)], dim=-1)


def _share(boundaries: Tensor, near: Tensor) -> Tensor:
    """Share of boundary pixels [..., H, W] that are near; `UNDEFINED` where there are none."""
    total = boundaries.sum((-2, -1))
    share = (boundaries & near).sum((-2, -1)) / total.clamp_min(1)
    return share.masked_fill(total == 0, UNDEFINED)


def boundary(inside: Tensor, counted: Tensor) -> Tensor:
    """Pixels whose right or lower neighbour is on the other side, both counted.

    Args:
        inside: [B, K, H, W] bool.
        counted: [B, 1, H, W] bool.

    Returns:
        [B, K, H, W] bool.
    """
    edge = torch.zeros_like(inside)
    edge[..., :, :-1] = (inside[..., :, 1:] != inside[..., :, :-1]) & counted[..., :, 1:] & counted[..., :, :-1]
    edge[..., :-1, :] |= (inside[..., 1:, :] != inside[..., :-1, :]) & counted[..., 1:, :] & counted[..., :-1, :]
    return edge


def within(pixels: Tensor, tolerance_px: int) -> Tensor:
    """Pixels [B, K, H, W] bool that have one of `pixels` within a square of ± `tolerance_px`."""
    if tolerance_px == 0:
        return pixels
    width, t = 2 * tolerance_px + 1, tolerance_px
    rows = F.max_pool2d(pixels.float(), (1, width), stride=1, padding=(0, t))
    return F.max_pool2d(rows, (width, 1), stride=1, padding=(t, 0)) > 0
