"""`load_frozen`: whatever names trained weights, as a frozen backbone."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crisp.errors import CrispError
from crisp.models.frozen import FrozenModel
from crisp.models.published.fingerprint import fingerprint
from crisp.models.published.hf_folder import is_hf_folder, read_hf_folder
from crisp.models.published.keys import few
from crisp.models.published.ours import is_run, load_ours
from crisp.models.published.registry import SYSTEMS
from crisp.models.published.system import Built
from crisp.models.published.timm_vit import arch_of, build_timm
from crisp.models.weights_file import TIMM_PREFIX, read_weights

log = logging.getLogger(__name__)


def load_frozen(source: str, *, device: torch.device) -> FrozenModel:
    """A trained Vision Transformer in evaluation mode, float32, without gradients; what was found is logged.

    Args:
        source: a run's folder or RUN/checkpoints/step-N; `timm:NAME`; `timm:NAME@FILE`; `SYSTEM:FILE` with a system of
            `SYSTEMS`; or FILE, whose keys tell the system where they can. FILE may be a folder of Hugging Face's.
        device: where it shall be.

    Raises:
        CrispError: there is no such file, run or system; the file's system cannot be told; a key is unknown or missing.
    """
    built, name = _load(source)
    backbone = built.backbone
    backbone.eval().requires_grad_(False)
    digest = fingerprint(backbone)
    log.info(
        "%s: %s, width %d, %d blocks, patches of %d px, made for %d px: %s",
        source, name, backbone.dim, backbone.depth, backbone.patch_px, backbone.native_px, built.account,
    )  # fmt: skip
    return FrozenModel(
        backbone=backbone.to(device), name=name, source=source, fingerprint=digest, account=built.account
    )


def _load(source: str) -> tuple[Built, str]:
    """The backbone, and its name for tables."""
    if source.startswith(TIMM_PREFIX):
        name, file = arch_of(source.removeprefix(TIMM_PREFIX))
        state = _read(file) if file else read_weights(source)
        return build_timm(name, state, source=source), f"timm {name}"
    if is_run(Path(source)):
        return load_ours(Path(source))
    system_name, colon, file = source.partition(":")
    if colon and system_name in SYSTEMS:
        system = SYSTEMS[system_name]
        built = system.build(_read(file), source)
        return built, f"{system.title} {built.arch_name}"
    if colon and system_name.isalnum() and not file.startswith("//") and not Path(source).exists():
        raise CrispError(f"{source}: no system {system_name}; there are timm and {', '.join(sorted(SYSTEMS))}")
    state = _read(source)
    system = SYSTEMS[_recognise(state, source)]
    log.info("%s: its keys are those of %s; name the system (SYSTEM:FILE) if it is another's", source, system.title)
    built = system.build(state, source)
    return built, f"{system.title} {built.arch_name}"


def _read(file: str) -> dict[str, Any]:
    path = Path(file)
    if path.is_dir():
        if not is_hf_folder(path):
            raise CrispError(f"{file}: a folder, neither a run of 'crisp train' nor one with model.safetensors")
        return read_hf_folder(path)
    return read_weights(file)


def _recognise(state: Mapping[str, Any], source: str) -> str:
    for name, system in SYSTEMS.items():
        if system.recognise(state):
            return name
    raise CrispError(
        f"{source}: its keys ({few(state)}) are no system's that is known; name it: SYSTEM:FILE with one of "
        f"{', '.join(sorted(SYSTEMS))}, or timm:NAME@FILE"
    )
