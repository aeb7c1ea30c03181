"""`crisp export`: a trained backbone as a folder for another library, whole or absent."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crisp import __version__
from crisp.errors import CrispError
from crisp.export.backbone import write_other_norm
from crisp.export.config import ExportConfig, Norm
from crisp.export.hf_format import write_hf
from crisp.export.onnx_format import check_packages, write_onnx
from crisp.export.preparation import preparation_for
from crisp.export.timm_format import write_timm
from crisp.models.trained import Trained, load_trained

log = logging.getLogger(__name__)

RECORD_FILE = "crisp.json"


def export(config: ExportConfig) -> Path:
    """Write the backbone, what it was made of (crisp.json), and the norm that the format has no place for.

    Returns:
        The folder.

    Raises:
        CrispError: OUT exists or cannot be written, there is no whole checkpoint, a package is missing, or the format
            cannot express the backbone.
    """
    if config.out.exists() or config.out.is_symlink():
        raise CrispError(f"{config.out}: exists already; remove it, or give another folder")
    if config.format == "onnx":
        check_packages()
    trained = load_trained(config.source, which=config.network)
    with _whole_or_absent(config.out) as folder:
        if config.format == "onnx":
            write_onnx(trained, folder)
            norms: dict[str, Any] = {"norm": "both", "inputs": ["images"], "outputs": ["cls", "patches"]}
        else:
            norm: Norm = config.norm or "cls"
            write = write_timm if config.format == "timm" else write_hf
            write(trained, norm, folder)
            norms = {"norm": norm, "other_norm": write_other_norm(trained.network.backbone, norm, folder)}
        record = _record(trained, config.format) | norms
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    log.info(
        "%s: the %s of step %d (%s) for %s, final norm: %s",
        config.out, trained.which, trained.step, trained.config.model.arch, config.format, norms["norm"],
    )  # fmt: skip
    return config.out


def _record(trained: Trained, format_: str) -> dict[str, Any]:
    config, backbone = trained.config, trained.network.backbone
    return {
        "crisp": __version__,
        "format": format_,
        "network": trained.which,
        "step": trained.step,
        "arch": config.model.arch,
        "width": backbone.dim,
        "image_px": config.views.global_px,
        "patch_px": backbone.patch_px,
        "preparation": asdict(preparation_for(config.views.global_px)),
    }


@contextlib.contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that gets its name at the end; what an export that was killed left there goes."""
    partial = out.with_name(f".partial-{out.name}")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except OSError as error:
        raise CrispError(
            f"{out}: cannot be written ({error.strerror or error}); make room, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
