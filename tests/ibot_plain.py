"""iBOT's published training step, written as plainly as it can be: the twin that `test_ibot_parity` holds crisp to.

Nothing of crisp is imported, and nothing is made cheap: every patch of every view goes through the whole head, all
logits are held at once, and the optimiser is written out. Each function says which fact of the recipe it follows;
docs/ibot.md lists them. Parameters have the names of iBOT's checkpoints.
Axes: B images, V = 2 + L views (global ones first), n patches, D width, d bottleneck width, P prototypes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6
CENTRE_MOMENTUM = 0.9
STUDENT_TEMPERATURE = 0.1
BETA_1, BETA_2, ADAM_EPS = 0.9, 0.999, 1e-8


# The networks


class Attention(nn.Module):
    """Plain multi-head self-attention with biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1+n, D] → [B, 1+n, D]"""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two layers with a GELU between them, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D]"""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; LayerNorm eps 1e-6."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1+n, D] → [B, 1+n, D]"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Backbone(nn.Module):
    """ViT with a mask token and one final norm for CLS and patches."""

    def __init__(self, *, dim: int, depth: int, heads: int, patch_px: int, base_grid: int) -> None:
        super().__init__()
        self.base_grid = base_grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_px, stride=patch_px)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + base_grid**2, dim))
        self.masked_embed = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] → [B, 1+n, D]; a masked patch ([B, n] bool) is replaced before its position is added."""
        embedded = self.patch_embed["proj"](images)  # [B, D, rows, columns]
        grid = embedded.shape[-1]
        patches = embedded.flatten(2).transpose(1, 2)
        if masks is not None:
            share = masks[..., None].to(patches.dtype)
            patches = (1 - share) * patches + share * self.masked_embed
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def positions(self, grid: int) -> Tensor:
        """[1, 1+grid², D]: other grids bicubic with scale factor (grid + .1)/base grid, not by target size."""
        if grid == self.base_grid:
            return self.pos_embed
        base = self.pos_embed[:, 1:].reshape(1, self.base_grid, self.base_grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(base, scale_factor=(grid + 0.1) / self.base_grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.permute(0, 2, 3, 1).reshape(1, grid**2, -1)], dim=1)


class LastLayer(nn.Module):
    """Weight-normed linear layer without bias; its gain is learned, or fixed at 1."""

    def __init__(self, bottleneck: int, prototypes: int, *, learn_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=learn_gain)
        self.weight_v = nn.Parameter(torch.zeros(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        """[…, d] → […, P]"""
        lengths = (self.weight_v**2).sum(dim=1, keepdim=True).sqrt()
        return x @ (self.weight_g * self.weight_v / lengths).T


class Head(nn.Module):
    """One MLP for CLS and patches always; "separate" gives the patches a last layer of their own, and nothing else."""

    def __init__(
        self, *, dim: int, hidden: int, bottleneck: int, prototypes: int, separate: bool, learn_gain: bool
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = LastLayer(bottleneck, prototypes, learn_gain=learn_gain)
        self.last_layer2 = self.last_layer
        if separate:
            self.last_layer2 = LastLayer(bottleneck, prototypes, learn_gain=learn_gain)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1+n, D] → logits [B, P] of the CLS token and [B, n, P] of all patches, masked or not."""
        x = self.mlp(tokens)
        x = x / (x**2).sum(-1, keepdim=True).sqrt()
        return self.last_layer(x[:, 0]), self.last_layer2(x[:, 1:])


class Network(nn.Module):
    """Backbone and head of the student or of the teacher."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of one view, [B, P] and [B, n, P]."""
        return self.head(self.backbone(images, masks))


# The loss


def cross_entropy(teacher: Tensor, student: Tensor, centre: Tensor, teacher_temperature: float) -> Tensor:
    """[…, P] × […, P] → […]: targets are softmax((logits − centre)/temperature), and carry no gradient."""
    target = ((teacher.detach() - centre) / teacher_temperature).softmax(-1)
    return -(target * (student / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)


def cls_loss(student: list[Tensor], teacher: list[Tensor], centre: Tensor, teacher_temperature: float) -> Tensor:
    """Teacher global q against student view v for every v ≠ q, averaged over those pairs (22 of 12 views)."""
    pairs = [
        cross_entropy(teacher[q], student[v], centre, teacher_temperature).mean()
        for q in range(len(teacher))
        for v in range(len(student))
        if v != q
    ]
    return torch.stack(pairs).mean()


def patch_loss(
    student: list[Tensor], teacher: list[Tensor], masks: Tensor, centre: Tensor, teacher_temperature: float
) -> Tensor:
    """Same view only: masked sum / max(#masked, 1), mean over *all* images, then over the two views."""
    views = []
    for v in range(2):
        each = cross_entropy(teacher[v], student[v], centre, teacher_temperature)  # [B, n]
        of_images = (each * masks[v]).sum(-1) / masks[v].sum(-1).clamp(min=1)  # 0 for an image without a mask
        views.append(of_images.mean())
    return torch.stack(views).mean()


def next_centre(centre: Tensor, teacher: list[Tensor]) -> Tensor:
    """EMA, momentum .9, of the batch mean of the logits: for the patch centre of *all* patches, masked or not."""
    return CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * torch.cat(teacher).flatten(0, -2).mean(0)


# The step


def clip_gradients(parameters: dict[str, nn.Parameter], clip: float) -> dict[str, float]:
    """Per tensor, not by the global norm: × clip/(norm + 1e-6) where that is below 1. Returns the factors."""
    factors = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            factor = clip / ((parameter.grad**2).sum().sqrt() + 1e-6)
            if factor < 1:
                parameter.grad *= factor
            factors[name] = float(factor)
    return factors


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Not biases and 1-D parameters; but cls token, position embedding, mask token and a learned `weight_g` are."""
    return not (name.endswith(".bias") or parameter.ndim == 1)


class AdamW:
    """Decoupled weight decay, then Adam with bias correction; a parameter without a gradient is skipped altogether."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, parameters: dict[str, nn.Parameter], *, lr: float, weight_decay: float) -> None:
        """One update of every parameter that has a gradient."""
        for name, weight in parameters.items():
            gradient = weight.grad
            if gradient is None:
                continue
            t = self.steps[name] = self.steps.get(name, 0) + 1
            first = BETA_1 * self.first.get(name, torch.zeros_like(weight)) + (1 - BETA_1) * gradient
            second = BETA_2 * self.second.get(name, torch.zeros_like(weight)) + (1 - BETA_2) * gradient**2
            self.first[name], self.second[name] = first, second
            if is_decayed(name, weight):
                weight -= lr * weight_decay * weight
            weight -= lr * (first / (1 - BETA_1**t)) / ((second / (1 - BETA_2**t)).sqrt() + ADAM_EPS)


@torch.no_grad()
def update_teacher(teacher: Network, student: Network, momentum: float) -> None:
    """EMA of every parameter on its own, so of `weight_g` and of `weight_v` apart."""
    for kept, new in zip(teacher.parameters(), student.parameters(), strict=True):
        kept.copy_(momentum * kept + (1 - momentum) * new)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step gave, before anything of the next."""

    cls: Tensor
    patch: Tensor
    gradients: dict[str, Tensor | None]
    """clipped; None where there was none, or it was taken away"""
    clip_factors: dict[str, float]
    """clip/(norm + 1e-6); it acted where this is below 1"""


class PlainIbot:
    """Student, teacher, centres (from 0) and optimiser."""

    def __init__(self, student: Network, teacher: Network, *, prototypes: int) -> None:
        self.student, self.teacher, self.adam = student, teacher, AdamW()
        dtype = next(student.parameters()).dtype
        self.cls_centre = torch.zeros(prototypes, dtype=dtype)
        self.patch_centre = torch.zeros(prototypes, dtype=dtype)

    def step(
        self,
        global_views: Tensor,
        local_views: Tensor,
        masks: Tensor,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        teacher_temperature: float,
        clip: float,
        last_layer_frozen: bool,
    ) -> StepResult:
        """One step on views [2, B, 3, H, W] and [L, B, 3, h, w] with masks [2, B, n] bool."""
        # The teacher sees the global views whole; the student sees them masked, and the local ones whole.
        with torch.no_grad():
            teacher_cls, teacher_patches = zip(*[self.teacher(view) for view in global_views], strict=True)
        of_globals = [self.student(view, masks[v]) for v, view in enumerate(global_views)]
        of_locals = [self.student(view) for view in local_views]  # all their patches too, which are thrown away
        student_cls = [cls for cls, _ in of_globals + of_locals]
        student_patches = [patches for _, patches in of_globals]

        # Both losses with the old centres, and only then the new ones.
        cls = cls_loss(student_cls, list(teacher_cls), self.cls_centre, teacher_temperature)
        patch = patch_loss(student_patches, list(teacher_patches), masks, self.patch_centre, teacher_temperature)
        self.cls_centre = next_centre(self.cls_centre, list(teacher_cls))
        self.patch_centre = next_centre(self.patch_centre, list(teacher_patches))

        self.student.zero_grad(set_to_none=True)
        (cls + patch).backward()
        parameters = dict(self.student.named_parameters())
        factors = clip_gradients(parameters, clip)
        if last_layer_frozen:  # after the clipping
            for name, parameter in parameters.items():
                if "last_layer" in name:
                    parameter.grad = None
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        self.adam.step(parameters, lr=lr, weight_decay=weight_decay)
        update_teacher(self.teacher, self.student, momentum)
        return StepResult(cls=cls.detach(), patch=patch.detach(), gradients=gradients, clip_factors=factors)
