"""The contract between the data pipeline and the model."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a loader yields and a step consumes. B images, L local views, K seeds, n patches of a global view.

    Images are normalised by ImageNet's mean and standard deviation. Views are view-major, so that
    `global_views.flatten(0, 1)` is free. Affines follow `crisp.geometry`: a [2, 3] matrix takes (x, y, 1) of
    the reference, in continuous pixels, to a view; a flip is part of it.
    """

    reference: Tensor
    """[B, 3, H, W] float16 | bfloat16 | float32"""
    global_views: Tensor
    """[2, B, 3, global_px, global_px], as reference"""
    local_views: Tensor
    """[L, B, 3, local_px, local_px], as reference"""
    view_from_reference: Tensor
    """[2+L, B, 2, 3] float32"""
    patch_masks: Tensor
    """[2, B, n] bool: True where the student sees the mask token. Always on the host (page-locked if the rest is on a
    GPU): how many patches are masked decides shapes, and a GPU that must be asked is a GPU that waits"""
    region_seed: Tensor
    """[B, K] int64: index of a reference patch"""
    label: Tensor
    """[B] int64; −1: unknown"""
    sample_id: Tensor
    """[B] int64: row of the shard index"""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device, the masks where they are."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _FIELDS if name != "patch_masks"
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; what lies there already is not copied."""
        return Batch(**{name: getattr(self, name).pin_memory() for name in _FIELDS})

    def split(self, parts: int) -> list["Batch"]:
        """The same images in that many batches, whose sizes differ by at most one (some may be empty)."""
        shares = {name: getattr(self, name).tensor_split(parts, dim=int(name in _VIEW_MAJOR)) for name in _FIELDS}
        return [Batch(**{name: share[i] for name, share in shares.items()}) for i in range(parts)]

    def __len__(self) -> int:
        return self.sample_id.shape[0]


_FIELDS = [field.name for field in dataclasses.fields(Batch)]
_VIEW_MAJOR = {"global_views", "local_views", "view_from_reference", "patch_masks"}
