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
    """[2, B, n] bool: True where the student sees the mask token"""
    region_seed: Tensor
    """[B, K] int64: index of a reference patch"""
    label: Tensor
    """[B] int64; −1: unknown"""
    sample_id: Tensor
    """[B] int64: row of the shard index"""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return Batch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in dataclasses.fields(self)}
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; what lies there already is not copied."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in dataclasses.fields(self)})

    def __len__(self) -> int:
        return self.sample_id.shape[0]
