"""Student and teacher: backbone, concept aggregator and heads as one module, and the moving average between two.

Axes: B images, V = 2 + L views, K regions per image, n patches of a global view, m masked patches of the batch,
d bottleneck width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crisp.config import ModelConfig, RegionConfig, TrainConfig, ViewsConfig
from crisp.distributed import local_shards
from crisp.errors import CrispError
from crisp.models.concept import ConceptAggregator
from crisp.models.heads import Kind, ProjectionHeads
from crisp.models.stochastic_depth import BlockRows
from crisp.models.vit import Tokens, VisionTransformer, compile_blocks, set_fused_attention

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Projections:
    """What the losses compare: l2-normalised bottlenecks, and the prototypes that turn them into logits."""

    cls: Tensor
    """[2, B, d] of the global views, [L, B, d] of the local ones"""
    patch: Tensor | None
    """[m, d] masked patches alone, in the order of `masked_positions`; None of local views"""
    region: Tensor | None
    """[2, B, K, d]; None of local views, or without the region loss"""
    prototypes: dict[Kind, Tensor]
    """[P, d] per kind that is there"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherProjections(Projections):
    """The teacher's, with what the patch centre needs of all patches, masked or not."""

    patch_sum: Tensor
    """[d] sum of the bottlenecks of all 2·B·n patches"""
    patch_count: int
    """2·B·n"""


def masked_positions(patch_masks: Tensor) -> Tensor:
    """Positions [m] int64 of the masked patches in the flattened masks [2, B, n] bool.

    Their number is data: give it masks on the host, and send the result to a GPU, which would have to be waited for.
    """
    return patch_masks.flatten().nonzero().squeeze(1)


class Network(nn.Module):
    """Backbone, concept aggregator and heads of one of the two.

    `forward` is the student's pass of one crop group, global or local views. Every trainable parameter takes part in
    that of the global views: with no masked patch, or no visible region, its gradient is zero, not missing.

    Args:
        model, region, views: the run's.
        drop_path: stochastic depth; 0 for the teacher.

    Raises:
        CrispError: as VisionTransformer, and if discovery wants more blocks than the model has.
    """

    def __init__(self, model: ModelConfig, region: RegionConfig, views: ViewsConfig, *, drop_path: float) -> None:
        super().__init__()
        self.region_config = region
        kinds: Sequence[Kind] = ("cls", "patch", "region") if region.enabled else ("cls", "patch")
        self.backbone = VisionTransformer(model, image_px=views.global_px, patch_px=views.patch_px, drop_path=drop_path)
        dim, depth = self.backbone.dim, len(self.backbone.blocks)
        if region.enabled and region.blocks > depth:
            raise CrispError(f"region.blocks={region.blocks}: the model has {depth} blocks; take at most that many")
        self.heads = ProjectionHeads(dim, model, kinds=kinds)
        if region.enabled:
            own_norm = region.concept_norm == "own"
            self.concept = ConceptAggregator(
                dim, self.backbone.num_heads, depth=region.concept_depth, own_norm=own_norm
            )

    def forward(
        self,
        views: Tensor,
        *,
        patch_masks: Tensor | None = None,
        masked: Tensor | None = None,
        view_regions: Tensor | None = None,
        rows: Sequence[BlockRows | None] | None = None,
    ) -> Projections:
        """The student's pass of one crop group: global views with masks, or local views without.

        Args:
            views: [2, B, 3, H, W] global, or [L, B, 3, h, w] local ones.
            patch_masks: [2, B, n] bool
            masked: [m] `masked_positions(patch_masks)`
            view_regions: [2, B, K, n] bool; None without the region loss.
            rows: images of the flattened views that pass through each block's branches; None: all.
        """
        images = views.flatten(0, 1)
        if patch_masks is None or masked is None:
            cls = self.backbone.forward_cls(images, rows).unflatten(0, views.shape[:2])
            return Projections(
                cls=self.heads.bottlenecks("cls", cls),
                patch=None,
                region=None,
                prototypes=self.heads.prototypes(["cls"]),
            )
        tokens = self.backbone(images, patch_masks.flatten(0, 1), rows)
        # FSDP hooks what leaves here: nothing may be a view of another tensor.
        return Projections(
            cls=self.heads.bottlenecks("cls", tokens.cls.unflatten(0, views.shape[:2])),
            patch=self.heads.bottlenecks("patch", tokens.patches.flatten(0, 1).index_select(0, masked)),
            region=self._project_regions(tokens, view_regions),
            prototypes=self.heads.prototypes(),
        )

    @torch.no_grad()
    def teach(
        self,
        global_views: Tensor,
        *,
        masked: Tensor,
        view_regions: Tensor | None,
        prototypes: dict[Kind, Tensor] | None = None,
    ) -> TeacherProjections:
        """The teacher's pass: unmasked global views only.

        Args:
            global_views, masked, view_regions: as `forward`'s.
            prototypes: this network's, if they are known; computed otherwise.
        """
        tokens = self.backbone(global_views.flatten(0, 1))
        patch = self.heads.bottlenecks("patch", tokens.patches.flatten(0, 1))  # [2·B·n, d]
        return TeacherProjections(
            cls=self.heads.bottlenecks("cls", tokens.cls).unflatten(0, global_views.shape[:2]),
            patch=patch.index_select(0, masked),
            region=self._project_regions(tokens, view_regions),
            prototypes=prototypes or self.heads.prototypes(),
            patch_sum=patch.sum(0),
            patch_count=len(patch),
        )

    @torch.no_grad()
    def discovery_tokens(self, reference: Tensor) -> Tensor:
        """Patch tokens [B, N, D] of the reference [B, 3, H, W] for `crisp.regions.discover_regions`; no head runs."""
        config = self.region_config
        blocks = min(config.blocks, len(self.backbone.blocks))  # without the region loss it may ask for more
        return self.backbone.forward_last_blocks(reference, blocks=blocks, norm=config.block_norm)

    @torch.no_grad()
    def patch_tokens(self, images: Tensor) -> Tensor:
        """Patch tokens [B, n, D] of the last block through the patch norm, for pictures of them; no head runs."""
        return self.backbone(images).patches

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """CLS tokens [B, D] of images [B, 3, H, W], for the online k-NN; no head runs."""
        return self.backbone.forward_cls(images)

    def _project_regions(self, tokens: Tokens, view_regions: Tensor | None) -> Tensor | None:
        if view_regions is None:
            return None
        config = self.region_config
        patches = tokens.patches if config.concept_input == "normed" else tokens.raw_patches
        concepts = self.concept(patches, view_regions.flatten(0, 1))  # [2·B, K, D]
        if config.concept_norm == "shared" and config.concept_depth > 0:
            concepts = self.backbone.norm_patch(concepts)
        # Given its axes before the head: FSDP warns of a pass that returns a view.
        return self.heads.bottlenecks("region", concepts.unflatten(0, view_regions.shape[:2]))


class StudentTeacher(nn.Module):
    """The student, and a teacher that starts as its copy and follows as its exponential moving average.

    The teacher has no stochastic depth and no gradients. Wrap `student` alone in DistributedDataParallel.
    """

    def __init__(self, model: ModelConfig, region: RegionConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.student = Network(model, region, views, drop_path=model.drop_path)
        self.teacher = Network(model, region, views, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student, for every parameter; once per optimiser step.

        There are no buffers to follow: the constructor would have to copy them here if there were. Where the two are
        sharded, they are so alike, and each rank updates its shards without a message.
        """
        teacher, student = local_shards(self.teacher.parameters()), local_shards(self.student.parameters())
        torch._foreach_lerp_(teacher, student, 1.0 - momentum)


def build_student_teacher(config: TrainConfig, device: torch.device) -> StudentTeacher:
    """The pair of a run on its device, with the attention that is fastest there, compiled if the run says so.

    Weights are drawn on the CPU from torch's global generator, so that a seed means the same on every device.
    """
    pair = StudentTeacher(config.model, config.region, config.views)
    fused = device.type == "cuda"
    set_fused_attention(pair, fused)
    if config.model.compile:
        compile_blocks(pair)
    trainable = sum(p.numel() for p in pair.student.parameters() if p.requires_grad)
    logger.info(
        "%s: %.1f M trainable parameters on %s, %s attention",
        config.model.arch, trainable / 1e6, device, "torch's fused" if fused else "plain",
    )  # fmt: skip
    return pair.to(device)
