import numpy as np
import pytest
import torch

from crisp.benchmarks import warp as benchmark
from crisp.errors import CrispError
from crisp.ops import regions as ops
from crisp.ops import triton_support

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GRIDS = {"reference_grid": 14, "view_grid": 14, "patch_px": 16}


def inputs(images=4, seeds=2):
    config = benchmark.WarpBenchmark(batch=images, seeds=seeds, channels=32)
    made = benchmark.make_inputs(config, CPU, torch.float32)
    return made.tokens, made.seeds, made.view_from_reference


@pytest.mark.parametrize("mode", ["centre", "forward", "coverage"])
def test_the_step_is_discovery_then_warping_with_sizes(mode):
    tokens, seeds, maps = inputs()
    warped = ops.discover_and_warp(tokens, seeds, maps, threshold=0.75, mode=mode, min_coverage=0.3, **GRIDS)
    regions = ops.discover(tokens, seeds, threshold=0.75)
    view_regions, counts = ops.warp(regions, maps, mode=mode, min_coverage=0.3, **GRIDS)
    assert torch.equal(warped.regions, regions)
    assert torch.equal(warped.view_regions, view_regions)
    assert torch.equal(warped.counts, counts)
    assert torch.equal(counts, view_regions.sum(-1, dtype=torch.int32))
    assert counts.dtype == torch.int32
    assert 0 < counts.sum() < view_regions.numel()


def test_the_torch_form_compiles_whole():
    tokens, seeds, maps = inputs()
    compiled = torch.compile(ops.discover_and_warp, backend="aot_eager", fullgraph=True)
    warped = compiled(tokens, seeds, maps, threshold=0.75, **GRIDS)
    plain = ops.discover_and_warp(tokens, seeds, maps, threshold=0.75, **GRIDS)
    for one, other in zip(warped, plain, strict=True):
        assert torch.equal(one, other)


def test_torch_runs_on_the_cpu_and_where_it_is_asked_for():
    assert ops.resolve_implementation(CPU) == "torch"
    assert ops.resolve_implementation(CUDA, "torch") == "torch"


def test_cuda_takes_triton_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(triton_support, "HAS_TRITON", True)
    assert ops.resolve_implementation(CUDA) == "triton"
    assert ops.resolve_implementation(CUDA, "triton") == "triton"
    assert ops.resolve_implementation(CUDA, mode="forward") == "torch"
    assert ops.resolve_implementation(CUDA, mode="coverage") == "torch"
    monkeypatch.setattr(triton_support, "HAS_TRITON", False)
    assert ops.resolve_implementation(CUDA) == "torch"
    with pytest.raises(CrispError, match="Triton is not installed; install it, or leave it out"):
        ops.resolve_implementation(CUDA, "triton")


@pytest.mark.parametrize(
    ("device", "implementation", "mode", "message"),
    [
        (CPU, "triton", "centre", "tensors are on cpu; move them to CUDA, leave it out, or set TRITON_INTERPRET=1"),
        (CUDA, "triton", "forward", "warp mode 'forward' has no kernel; use 'auto' or 'torch'"),
        (CPU, "cuda", "centre", "implementation 'cuda': unknown; use 'auto', 'torch' or 'triton'"),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(monkeypatch, device, implementation, mode, message):
    monkeypatch.setattr(triton_support, "HAS_TRITON", True)
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(CrispError, match=message):
        ops.resolve_implementation(device, implementation, mode=mode)


def test_random_crops_stay_within_the_reference():
    maps = benchmark.random_crops(500, np.random.default_rng(0))
    width, height = 224 / np.abs(maps[:, 0, 0]) / 224, 224 / maps[:, 1, 1] / 224  # shares of the reference's sides
    assert (width * height > 0.245).all()
    assert (width <= 1 + 1e-6).all()
    assert (height <= 1 + 1e-6).all()
    assert 0.4 < (maps[:, 0, 0] < 0).mean() < 0.6


def test_the_benchmark_prints_a_row_for_every_call(capsys):
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--batch", "2", "--channels", "16", "--repeats", "2", "--threads", str(threads)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for dtype in ("float32", "bfloat16"):
        for call in ("floor: norms of the tokens", "discover", "warp, centre", "warp, forward", "warp, coverage"):
            assert f"| cpu | torch | {dtype} | {call} |" in printed
    assert "of the patches that mode centre marks." in printed
    assert torch.cuda.is_available() or "not measured on a GPU" in printed
