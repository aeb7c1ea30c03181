"""A step as iBOT's published code takes it, costs included: what `crisp bench step` measures CRISP against.

Written from the recipe, in our own words, with the published code's choices wherever they cost something: one shared
head, which every token of every view goes through; logits of all patches, student's and teacher's, held at once;
attention as a matrix that is held; stochastic depth that computes what it drops; both crop groups alive until one
backward pass; each gradient's norm fetched to the host; a moving average in a Python loop; a wait for the device after
each step. `results/step.md` has its time and memory beside those of the published code itself.
Axes: B images, V views, n patches, D width, P prototypes.
"""

import math
from typing import Any

import timm
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from crisp.batch import Batch
from crisp.config import TrainConfig
from crisp.schedules import StepSchedule


class Head(nn.Module):
    """Three-layer MLP, l2-normalised bottleneck, weight-normed last layer: one of each for CLS and patches."""

    def __init__(self, dim: int, config: TrainConfig) -> None:
        super().__init__()
        hidden, bottleneck = config.model.head_hidden, config.model.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = parametrizations.weight_norm(nn.Linear(bottleneck, config.model.prototypes, bias=False))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1+n, D] → logits [B, P] and [B, n, P]."""
        bottlenecks = F.normalize(self.mlp(tokens), dim=-1)
        return self.last_layer(bottlenecks[:, 0]), self.last_layer(bottlenecks[:, 1:])


class Attention(nn.Module):
    """Self-attention with timm's weights; it is the matrix of scores that is scaled, not the queries."""

    def __init__(self, of: timm.layers.Attention) -> None:
        super().__init__()
        self.heads, self.scale, self.qkv, self.proj = of.num_heads, of.scale, of.qkv, of.proj

    def forward(self, x: Tensor, **_: Any) -> Any:
        """[B, 1+n, D] → [B, 1+n, D]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, 1+n, D/h] each
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Network(nn.Module):
    """Backbone and head of the student or the teacher."""

    def __init__(self, config: TrainConfig, *, drop_path: float) -> None:
        super().__init__()
        self.vit = timm.create_model(
            config.model.arch,
            num_classes=0,
            img_size=config.views.global_px,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
            **config.model.arch_args,
        )
        for block in self.vit.blocks:
            block.attn = Attention(block.attn)
        self.mask_token = nn.Parameter(torch.zeros(1, self.vit.embed_dim))
        self.head = Head(self.vit.embed_dim, config)

    def forward(self, views: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of views [V, B, 3, H, W] with masks [V, B, n] bool, as `Head`."""
        x = self.vit.patch_embed(views.flatten(0, 1))  # [V·B, rows, columns, D]
        if masks is not None:
            x = torch.where(masks.reshape(*x.shape[:3], 1), self.mask_token, x)
        return self.head(self.vit.norm(self.vit.blocks(self.vit._pos_embed(x))))


class PublishedIbot:
    """Student, teacher, losses and optimiser; `step` takes one step.

    Args:
        config: sizes, temperatures, momenta and clipping of the run; what concerns regions is not looked at.
        device: of the networks.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.student = Network(config, drop_path=config.model.drop_path).to(device)
        self.teacher = Network(config, drop_path=0.0).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.cls_center = torch.zeros(config.model.prototypes, device=device)
        self.patch_center = torch.zeros(config.model.prototypes, device=device)
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)

    def step(self, batch: Batch, schedule: StepSchedule, autocast: Any) -> dict[str, float]:
        """One step.

        Args:
            batch: of which the reference is not looked at.
            schedule: of this step.
            autocast: a context for the forward passes.

        Returns:
            The losses, on the host.
        """
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = schedule.learning_rate
            if number == 0:
                group["weight_decay"] = schedule.weight_decay
        masks = batch.patch_masks.to(self.device)
        with autocast:
            with torch.no_grad():
                teacher_cls, teacher_patch = self.teacher(batch.global_views)
            student_cls, student_patch = self.student(batch.global_views, masks)
            local_cls, _ = self.student(batch.local_views)
            cls, patch = self._losses(
                torch.cat([student_cls, local_cls]), student_patch, teacher_cls, teacher_patch, masks, schedule
            )
        loss = cls + self.config.loss.patch_weight * patch
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                coefficient = self.config.optim.clip_norm / (parameter.grad.norm(2).item() + 1e-6)
                if coefficient < 1:
                    parameter.grad.mul_(coefficient)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(schedule.ema_momentum).add_((1 - schedule.ema_momentum) * new.detach())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"loss": loss.item(), "cls": cls.item(), "patch": patch.item()}

    def _losses(
        self,
        student_cls: Tensor,
        student_patch: Tensor,
        teacher_cls: Tensor,
        teacher_patch: Tensor,
        masks: Tensor,
        schedule: StepSchedule,
    ) -> tuple[Tensor, Tensor]:
        """CLS and patch loss of all views' logits, view by view; then the centres move."""
        temperature, sharpened = self.config.loss.student_temperature, schedule.teacher_temperature
        views = self.config.views.views
        cls_views = (student_cls / temperature).chunk(views)
        patch_views = (student_patch / temperature).chunk(2)
        cls_targets = ((teacher_cls - self.cls_center) / sharpened).softmax(-1).chunk(2)
        patch_targets = ((teacher_patch - self.patch_center) / sharpened).softmax(-1).chunk(2)
        cls, patch, pairs = student_cls.new_zeros(()), student_cls.new_zeros(()), 0
        for q in range(2):
            for v in range(views):
                if v == q:
                    of_patches = -(patch_targets[q] * F.log_softmax(patch_views[v], dim=-1)).sum(-1)  # [B, n]
                    share = masks[v].float()
                    patch = patch + ((of_patches * share).sum(-1) / share.sum(-1).clamp(min=1)).mean() / 2
                else:
                    cls = cls - (cls_targets[q] * F.log_softmax(cls_views[v], dim=-1)).sum(-1).mean()
                    pairs += 1
        with torch.no_grad():
            momentum = self.config.loss.center_momentum
            self.cls_center.mul_(momentum).add_((1 - momentum) * teacher_cls.float().mean(0))
            self.patch_center.mul_(momentum).add_((1 - momentum) * teacher_patch.float().mean((0, 1)))
        return cls / pairs, patch
