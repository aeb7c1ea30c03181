"""Whether the machine has what training needs: packages, memory, room, limits, a GPU that works."""

import importlib
import importlib.metadata
import os
import resource
import shutil
from pathlib import Path

from crisp.doctor.check import Finding, NotHere, Wrong
from crisp.doctor.config import Context
from crisp.doctor.facts import DISTRIBUTION, gpu_driver
from crisp.doctor.limits import cpu_limit, memory_bytes, usable_cores
from crisp.doctor.process import work_folder

LEAST_MEMORY_GB = 4.0
LEAST_SHARED_GB = 0.25
"""DALI's processes pass encoded images in it, and NCCL's ranks what they exchange"""
LEAST_DISK_GB = 3.0
"""Three checkpoints of ViT-S/16, of which two stay"""
LEAST_OPEN_FILES = 1024
"""256 shards stay open, and DALI, NCCL and threads have theirs"""
GPU_TOLERANCE = 1e-5
"""Float32 product of 512 × 512 matrices against float64: norm of the difference to norm"""

_MODULES = {"pillow": "PIL"}
_WRITTEN_BYTES = 16 * 1024 * 1024


def packages(context: Context) -> Finding:
    """Every package that CRISP cannot do without is there, new enough, and can be imported."""
    from packaging.requirements import Requirement

    wrong, found = [], 0
    for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        try:
            importlib.import_module(_MODULES.get(requirement.name, requirement.name))
        except Exception as error:  # noqa: BLE001  (broken libraries raise whatever they like)
            wrong.append(f"{requirement.name} {version} cannot be imported ({error})")
    if wrong:
        raise Wrong("; ".join(wrong))
    return Finding(figure=f"{found} packages", values={"packages": found})


def compiled_code(context: Context) -> Finding:
    """Numba compiles here, keeps what it compiled, and gives NumPy's random numbers."""
    import numpy as np

    from crisp.jit import compiled
    from crisp.philox import Stream, uniforms

    ours = uniforms(Stream.MASK, seed=7, epoch=3, sample=np.arange(50), lane=np.int64(2), blocks=2)  # [50, 8]
    for sample in range(50):
        philox = np.random.Philox(
            key=np.array([7, 3], np.uint64), counter=np.array([0, 2, sample, Stream.MASK], np.uint64)
        )
        if not np.array_equal(ours[sample], np.random.Generator(philox).random(8)):
            raise Wrong(f"the compiled random numbers of sample {sample} are not those of numpy.random.Philox")
    if not hasattr(compiled(_addition), "stats"):
        raise Wrong("Numba does not compile: NUMBA_DISABLE_JIT is set")
    return Finding(figure="compiled draws are NumPy's, bit for bit")


def _addition(a: int, b: int) -> int:
    return a + b


def cores(context: Context) -> Finding:
    """The cores that threads are made for are there to be used."""
    usable, limit = usable_cores(), cpu_limit()
    if limit is not None and limit < 0.75 * usable:
        raise Wrong(
            f"{usable} cores are visible, but the container may use {limit:g}: threads made for all of them would "
            f"wait for each other"
        )
    return Finding(figure=f"{usable} cores", values={"cores": usable})


def memory(context: Context) -> Finding:
    """Memory for the networks, the batches and the libraries."""
    free_gb = memory_bytes().available / 1e9
    if free_gb < LEAST_MEMORY_GB:
        raise Wrong(f"{free_gb:.1f} GB are free, at least {LEAST_MEMORY_GB:g} are needed")
    return Finding(figure=f"{free_gb:.1f} GB free", values={"free_gb": free_gb})


def shared_memory(context: Context) -> Finding:
    """Room in /dev/shm, which the readers of DALI and the ranks of NCCL share."""
    free_gb = shutil.disk_usage("/dev/shm").free / 1e9
    if free_gb < LEAST_SHARED_GB:
        raise Wrong(f"/dev/shm has {free_gb:.2f} GB free, at least {LEAST_SHARED_GB:g} are needed")
    return Finding(figure=f"{free_gb:.1f} GB free", values={"free_gb": free_gb})


def disk(context: Context) -> Finding:
    """What is written here is on the disk, and there is room for checkpoints."""
    for folder in (context.report_folder, context.folder):
        _write_and_read(folder)
    free_gb = shutil.disk_usage(context.report_folder).free / 1e9
    if free_gb < LEAST_DISK_GB:
        raise Wrong(f"{free_gb:.1f} GB are free here, at least {LEAST_DISK_GB:g} are needed for checkpoints")
    return Finding(figure=f"{free_gb:.0f} GB free here", values={"free_gb": free_gb})


def _write_and_read(folder: Path) -> None:
    fresh = work_folder(folder, ".crisp-doctor")
    try:
        written = os.urandom(_WRITTEN_BYTES)
        with (fresh / "file").open("wb") as stream:
            stream.write(written)
            stream.flush()
            os.fsync(stream.fileno())
        if (fresh / "file").read_bytes() != written:
            raise Wrong("a file that was written and flushed reads back otherwise")
    finally:
        shutil.rmtree(fresh)


def open_files(context: Context) -> Finding:
    """As many files may be open as the loader keeps open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        raise Wrong(f"at most {soft} files may be open, at least {LEAST_OPEN_FILES} are needed")
    return Finding(figure=f"{soft} files", values={"files": soft})


def gpu(context: Context) -> Finding:
    """torch sees every GPU that the driver has, and multiplies on each as the processor does."""
    import torch

    driver = gpu_driver()
    if context.asked_device == "cpu":
        raise NotHere("left out by --device cpu")
    if not torch.cuda.is_available():
        if not driver and context.asked_device == "auto":
            raise NotHere("no CUDA device")
        raise Wrong(f"torch sees no GPU: {_why_no_cuda()}; the driver has: {driver or 'none'}")
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 512, generator=generator, dtype=torch.float64)
    expected, names, worst = a @ b, [], 0.0
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        product = (a.to(device, torch.float32) @ b.to(device, torch.float32)).double().cpu()
        apart = float((product - expected).norm() / expected.norm())
        if not apart <= GPU_TOLERANCE:
            raise Wrong(f"GPU {number}: a float32 product is {apart:.1e} off, more than {GPU_TOLERANCE:g}")
        worst = max(worst, apart)
        about = torch.cuda.get_device_properties(number)
        names.append(f"{about.name} (capability {about.major}.{about.minor})")
    figure = f"{len(names)} × {names[0]}" if len(set(names)) == 1 else ", ".join(names)
    return Finding(figure=f"{figure}; product {worst:.0e} off", values={"gpus": len(names), "relative": worst})


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or ["unknown"])[0]
    return "CUDA_VISIBLE_DEVICES hides it" if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else "unknown"
