import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""That one program may have"""


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    kernels = {name.rsplit("-sm_", 1)[0] for name in compiled}
    assert {
        f"discover-{dtype}-{layout}" for dtype in ("bf16", "fp16", "fp32") for layout in ("rows", "strided")
    } < kernels
    assert {"warp-14to14", "warp-14to6", "warp-32to14"} < kernels
    assert {
        f"{kernel}-{dtype}"
        for dtype in ("bf16", "fp16", "fp32")
        for kernel in ("teacher_lse", "loss", "student_gradient", "prototype_gradient")
    } < kernels
    for name, result in compiled.items():
        arch = name.rsplit("-", 1)[1]
        assert result["target"] in (arch, f"{arch}a"), name
        assert result["cubin_starts_with"] == "7f454c46", name  # an ELF file
        assert result["shared_bytes"] <= SHARED_BYTES[arch], name
    assert len(compiled) == 3 * len(kernels)
