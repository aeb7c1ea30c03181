"""Whether training steps are what they should be on this machine: twice the same, on the GPU as on the CPU, finite."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from crisp.checkpoint import list_checkpoints, load_module_state
from crisp.config import Precision, TrainConfig
from crisp.doctor.check import Finding, Wrong
from crisp.doctor.config import Context
from crisp.doctor.data_checks import SHARDS
from crisp.doctor.process import work_folder
from crisp.doctor.tiny import TinyRun, run_config, tiny_config
from crisp.pipelines.loader import build_train_loader
from crisp.runs import CHECKPOINTS
from crisp.trainer import train
from crisp.training.saving import restore, save
from crisp.training.step import train_step

STEPS = 3
LOSS_TOLERANCE = 1e-4
"""Relative, of float32 steps on GPU and CPU, which add in other orders"""
WEIGHT_TOLERANCE = 0.02
"""Of the weights after these steps: norm of the difference to that of how far the steps moved them"""
MAX_SKIPPED: dict[Precision, int] = {"bf16": 0, "fp16": 19}
"""Loss scaling begins too high, and skips a step each time that it halves"""
HALF_TOLERANCE = 0.05
"""Relative, of the first loss in half precision to that in float32"""


def steps_repeat(context: Context) -> Finding:
    """Steps on the CPU, twice from the same seed, bit for bit."""
    runs = [TinyRun(tiny_config(), torch.device("cpu")) for _ in range(2)]
    losses = [run.take(STEPS) for run in runs]
    first, second = (run.weights() for run in runs)
    if losses[0] != losses[1] or not torch.equal(first, second):
        raise Wrong(
            f"two runs from one seed differ: losses {losses[0]} and {losses[1]}, weights by "
            f"{float((first - second).abs().max()):.1e}"
        )
    return Finding(figure=f"{STEPS} steps, {first.numel():,} weights bit for bit", values={"loss": losses[0][-1]})


def gpu_steps(context: Context) -> Finding:
    """Steps in float32 on the GPU against the same on the CPU."""
    return _against_cpu(context, tiny_config())


def compiled_steps(context: Context) -> Finding:
    """The same through torch.compile (--model.compile)."""
    config = tiny_config()
    return _against_cpu(context, replace(config, model=replace(config.model, compile=True)))


def fused_steps(context: Context) -> Finding:
    """The same with the fused last layer and loss (--loss.fused)."""
    config = tiny_config()
    return _against_cpu(context, replace(config, loss=replace(config.loss, fused=True)))


def _against_cpu(context: Context, config: TrainConfig) -> Finding:
    """Steps of `config` on the device against `tiny_config`'s on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    cpu, gpu = TinyRun(tiny_config(), torch.device("cpu")), TinyRun(config, torch.device(context.device))
    start = cpu.weights()
    expected, found = cpu.take(STEPS), gpu.take(STEPS)
    loss_apart = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    theirs, ours = cpu.weights(), gpu.weights()
    weights_apart = float((ours - theirs).norm() / (theirs - start).norm())
    if not (loss_apart <= LOSS_TOLERANCE and weights_apart <= WEIGHT_TOLERANCE):
        raise Wrong(
            f"after {STEPS} float32 steps losses are {loss_apart:.1e} off the CPU's (at most {LOSS_TOLERANCE:g}), "
            f"weights {weights_apart:.1e} of how far they moved (at most {WEIGHT_TOLERANCE:g})"
        )
    return Finding(
        figure=f"{STEPS} steps: losses {loss_apart:.0e} off, weights {weights_apart:.0e} of how far they moved",
        values={"loss_relative": loss_apart, "weights_of_movement": weights_apart},
    )


def bf16_steps(context: Context) -> Finding:
    """Steps in bfloat16 stay finite and near float32's."""
    return _half(context, "bf16")


def fp16_steps(context: Context) -> Finding:
    """Steps in float16, with its loss scaling, stay finite and near float32's."""
    return _half(context, "fp16")


def _half(context: Context, precision: Precision) -> Finding:
    device = torch.device(context.device)
    plain, half = (TinyRun(tiny_config(precision=each), device) for each in ("fp32", precision))
    expected = plain.take(1)[0]
    losses: list[float] = []
    taken = skipped = 0
    while taken < STEPS and skipped <= MAX_SKIPPED[precision]:
        metrics = half.step()
        losses.append(float(metrics.terms.total))
        taken, skipped = (taken, skipped + 1) if metrics.skipped else (taken + 1, skipped)
    if not torch.tensor(losses).isfinite().all() or not half.weights().isfinite().all():
        raise Wrong(f"losses {losses} or the weights are not finite")
    if taken < STEPS:
        raise Wrong(f"{skipped} of {len(losses)} steps had gradients that are not finite")
    apart = abs(losses[0] - expected) / abs(expected)
    if not apart <= HALF_TOLERANCE:
        raise Wrong(f"the first loss is {apart:.1%} off float32's, more than {HALF_TOLERANCE:.0%}")
    found = f"finite, first loss {apart:.1%} off float32's"
    if skipped:
        found += f"; its scale was found after {skipped} skipped steps"
    return Finding(figure=found, values={"relative": apart, "skipped": skipped})


def no_waits(context: Context) -> Finding:
    """A step that never waits for the GPU: the host runs ahead of it."""
    run = TinyRun(tiny_config(precision="bf16"), torch.device(context.device))
    run.take(2)  # compiles kernels, which may wait
    batch, schedule = run.next_batch()
    batch = replace(batch, patch_masks=batch.patch_masks.pin_memory())  # as the loader's are
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(run.state, batch, schedule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Finding(figure="no wait in a step")


def checkpoint(context: Context) -> Finding:
    """What a run saves is what another loads: networks, centres and the optimiser's moments, bit for bit."""
    device = torch.device(context.device)
    out = work_folder(context.folder, "checkpoint")
    config = run_config(context.folder / SHARDS, out, device=context.device)
    saved, loaded = TinyRun(config, device), TinyRun(replace(config, seed=1), device)
    saved.take(STEPS)
    loader = build_train_loader(config, rank=0, world_size=1, device=torch.device("cpu"))
    with contextlib.closing(loader):
        save(saved.state, loader, out, STEPS, last=True, doomed=lambda steps: [])
        step = restore(loaded.state, loader, out)
    if step != STEPS:
        raise Wrong(f"saved after step {STEPS}, loaded as of step {step}")
    ours, theirs = loaded.tensors(), saved.tensors()
    if ours.keys() != theirs.keys():
        raise Wrong(f"{len(theirs)} tensors were saved, {len(ours)} are there after loading")
    for name, tensor in theirs.items():
        if not torch.equal(ours[name], tensor):
            raise Wrong(f"{name} is not loaded as it was saved")
    return Finding(figure=f"{len(theirs)} tensors bit for bit", values={"tensors": len(theirs)})


def resume(context: Context) -> Finding:
    """A run that goes on from its middle ends with the weights of one that was left alone, on the CPU, bit for bit."""
    folder = work_folder(context.folder, "resume")
    whole = train(run_config(context.folder / SHARDS, folder / "whole"))
    checkpoints = list_checkpoints(whole / CHECKPOINTS)
    cut = Path(shutil.copytree(whole, folder / "cut"))
    for checkpoint in list_checkpoints(cut / CHECKPOINTS)[1:]:
        shutil.rmtree(checkpoint)
    train(run_config(context.folder / SHARDS, cut), resume=True)
    first, last = (int(path.name.split("-")[1]) for path in (checkpoints[0], checkpoints[-1]))
    assert first < last, "nothing was left to do"
    compared = _require_same_checkpoint(list_checkpoints(cut / CHECKPOINTS)[-1], checkpoints[-1])
    return Finding(figure=f"from step {first} to {last}, {compared} tensors bit for bit")


def _require_same_checkpoint(one: Path, other: Path) -> int:
    """Bit for bit; returns how many tensors were compared."""
    compared = 0
    for part in ("student", "teacher", "loss", "optimizer"):
        ours, theirs = load_module_state(one, part), load_module_state(other, part)
        if ours.keys() != theirs.keys():
            raise Wrong(f"{part}: other tensors after the resume ({len(ours)} and {len(theirs)})")
        for name, tensor in ours.items():
            if not torch.equal(tensor, theirs[name]):
                apart = float((tensor.double() - theirs[name].double()).abs().max())
                raise Wrong(f"{part}: {name} differs by {apart:.1e} after the resume")
        compared += len(ours)
    return compared
