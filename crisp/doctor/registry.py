"""All checks, in the order in which they run. A new one is a function in one of the modules and an entry here."""

from crisp.doctor.check import Check

_MACHINE = "crisp.doctor.machine_checks"
_TWINS = "crisp.doctor.twins"
_DATA = "crisp.doctor.data_checks"
_TRAINING = "crisp.doctor.training_checks"
_RANKS = "crisp.doctor.rank_checks"
_SPEED = "crisp.doctor.speed_checks"

_REPORT_IT = "this should never be: attach the report to a bug"

MACHINE = (
    Check(
        name="packages",
        group="machine",
        proves="every package that CRISP needs is there, new enough, and can be imported",
        remedy="pip install --upgrade crisp-ssl, in the environment that runs this command",
        run=f"{_MACHINE}:packages",
        quick=True,
    ),
    Check(
        name="compiled code",
        group="machine",
        proves="Numba compiles here, and what it compiles draws NumPy's random numbers",
        remedy="unset NUMBA_DISABLE_JIT; set NUMBA_CACHE_DIR to a folder that can be written; pip install -U numba",
        run=f"{_MACHINE}:compiled_code",
        quick=True,
    ),
    Check(
        name="cores",
        group="machine",
        proves="the cores that threads are made for may all be used",
        remedy="give the container as many cores as it sees (docker --cpuset-cpus, not --cpus), or set --data.threads "
        "and OMP_NUM_THREADS to what it may use",
        run=f"{_MACHINE}:cores",
        quick=True,
    ),
    Check(
        name="memory",
        group="machine",
        proves="there is memory for networks, batches and libraries",
        remedy="end what takes it, or give the container more",
        run=f"{_MACHINE}:memory",
        quick=True,
    ),
    Check(
        name="shared memory",
        group="machine",
        proves="DALI's readers and NCCL's ranks have room in /dev/shm",
        remedy="start the container with --ipc=host or --shm-size=8g; without, use --data.dali.workers 0",
        run=f"{_MACHINE}:shared_memory",
        quick=True,
    ),
    Check(
        name="disk",
        group="machine",
        proves="what is written here is on the disk, and checkpoints have room",
        remedy="make room, or go to another disk (runs: --out; scratch files: TMPDIR)",
        run=f"{_MACHINE}:disk",
        quick=True,
    ),
    Check(
        name="open files",
        group="machine",
        proves="as many files may be open as shards, processes and GPUs need",
        remedy="ulimit -n 4096 before the command, or LimitNOFILE of its service",
        run=f"{_MACHINE}:open_files",
        quick=True,
    ),
    Check(
        name="GPU",
        group="machine",
        proves="torch sees every GPU that the driver has, and each multiplies right",
        remedy="install the torch that fits the driver (pytorch.org/get-started), check nvidia-smi and "
        "CUDA_VISIBLE_DEVICES; start a container with --gpus all",
        run=f"{_MACHINE}:gpu",
        quick=True,
    ),
)

TWINS = (
    Check(
        name="region kernels",
        group="twins",
        proves="the Triton kernels find and warp the regions that the torch form does",
        remedy=f"{_REPORT_IT}; until then --region.warp-mode forward warps by torch, and without Triton all of it is "
        "torch",
        run=f"{_TWINS}:region_kernels",
        gpus=1,
        quick=True,
    ),
    Check(
        name="warp",
        group="twins",
        proves="regions land in the views where float64 geometry puts them",
        remedy=_REPORT_IT,
        run=f"{_TWINS}:warp",
        quick=True,
    ),
    Check(
        name="cross-entropy",
        group="twins",
        proves="the chunked loss over prototypes and its gradients are those of the plain form",
        remedy=_REPORT_IT,
        run=f"{_TWINS}:cross_entropy",
        quick=True,
    ),
    Check(
        name="fused loss",
        group="twins",
        proves="the Triton kernels of last layer and loss have the plain form's loss and gradients",
        remedy="leave --loss.fused off; attach the report to a bug",
        run=f"{_TWINS}:fused_cross_entropy",
        gpus=1,
        quick=True,
    ),
    # A kernel has its entry here (gpus=1) and its function in twins.py, beside the plain form that it is held against.
)
"""Each kernel against its plain form"""

DATA = (
    Check(
        name="shards",
        group="data",
        proves="JPEGs become shards, and every byte of them is verified",
        remedy="see the line 'disk'; if that one passes, attach the report to a bug",
        run=f"{_DATA}:shards",
        quick=True,
    ),
    Check(
        name="CPU renderer",
        group="data",
        proves="the compiled renderer shows what the plain one shows",
        remedy=f"delete __pycache__/*.nb? of crisp/pipelines; if it fails again, {_REPORT_IT}",
        run=f"{_DATA}:cpu_renderer",
        quick=True,
    ),
    Check(
        name="loader",
        group="data",
        proves="a loader that starts at a step gives that step's batch, bit for bit",
        remedy=_REPORT_IT,
        run=f"{_DATA}:loader_resumes",
        needs=("shards",),
        quick=True,
    ),
    Check(
        name="loader to GPU",
        group="data",
        proves="batches of the CPU renderer arrive whole on a GPU that is busy",
        remedy=_REPORT_IT,
        run=f"{_DATA}:loader_to_gpu",
        needs=("shards",),
        gpus=1,
        quick=True,
    ),
    Check(
        name="DALI",
        group="data",
        proves="DALI (on the GPU where there is one) shows what the CPU renderer shows",
        remedy="pip install 'crisp-ssl[cuda13]' (cuda12 for drivers before 580); --data.renderer cpu does without",
        run=f"{_DATA}:dali_renderer",
        needs=("shards",),
    ),
)

TRAINING = (
    Check(
        name="steps repeat",
        group="training",
        proves="training steps on the CPU, taken twice, are the same bit for bit",
        remedy=f"unset variables that make libraries choose (MKL_*, ONEDNN_*); if that is not it, {_REPORT_IT}",
        run=f"{_TRAINING}:steps_repeat",
        quick=True,
    ),
    Check(
        name="GPU steps",
        group="training",
        proves="float32 steps on the GPU have the losses and weights of the CPU's",
        remedy=f"unset NVIDIA_TF32_OVERRIDE; if that is not it, {_REPORT_IT}",
        run=f"{_TRAINING}:gpu_steps",
        gpus=1,
        quick=True,
    ),
    Check(
        name="compiled steps",
        group="training",
        proves="so have steps through torch.compile",
        remedy="leave --model.compile off; attach the report to a bug",
        run=f"{_TRAINING}:compiled_steps",
        gpus=1,
        timeout_s=300,
    ),
    Check(
        name="fused steps",
        group="training",
        proves="so have steps with the fused last layer and loss",
        remedy="leave --loss.fused off; attach the report to a bug",
        run=f"{_TRAINING}:fused_steps",
        gpus=1,
    ),
    Check(
        name="bf16",
        group="training",
        proves="steps in bfloat16 are finite and near float32's",
        remedy="train with --precision fp32; attach the report to a bug",
        run=f"{_TRAINING}:bf16_steps",
        quick=True,
    ),
    Check(
        name="fp16",
        group="training",
        proves="steps in float16 with loss scaling are finite and near float32's",
        remedy="train with --precision bf16 or fp32; attach the report to a bug",
        run=f"{_TRAINING}:fp16_steps",
    ),
    Check(
        name="no waits",
        group="training",
        proves="the host never waits for the GPU in a step",
        remedy="it costs speed alone, results are right; attach the report to a bug",
        run=f"{_TRAINING}:no_waits",
        gpus=1,
        quick=True,
    ),
    Check(
        name="checkpoint",
        group="training",
        proves="what a run saves is loaded bit for bit: networks, centres, moments",
        remedy="see the line 'disk'; if that one passes, attach the report to a bug",
        run=f"{_TRAINING}:checkpoint",
        needs=("shards",),
        quick=True,
    ),
    Check(
        name="resume",
        group="training",
        proves="a run cut in its middle and resumed ends as one left alone, bit for bit (CPU)",
        remedy="if 'steps repeat' fails too, see there; else attach the report to a bug",
        run=f"{_TRAINING}:resume",
        needs=("shards",),
    ),
)

RANKS = (
    Check(
        name="two ranks, gloo",
        group="ranks",
        proves="two processes of torchrun on the CPU train the run that one trains",
        remedy="see what the ranks said in the report; for addresses that are not found set GLOO_SOCKET_IFNAME=lo",
        run=f"{_RANKS}:gloo",
        needs=("shards",),
        timeout_s=300,
    ),
    Check(
        name="two ranks, NCCL",
        group="ranks",
        proves="two processes of torchrun on two GPUs train the run that one trains",
        remedy="see what the ranks said in the report; try NCCL_DEBUG=INFO, then NCCL_P2P_DISABLE=1 and "
        "NCCL_SHM_DISABLE=1 to find the link that fails; see the line 'shared memory'",
        run=f"{_RANKS}:nccl",
        needs=("shards",),
        gpus=2,
        timeout_s=300,
    ),
)

SPEED = (
    Check(
        name="step speed",
        group="speed",
        proves="steps run at full size (ViT-S/16 on a GPU, the demo's on a CPU)",
        remedy="out of memory: take a smaller --optim.micro-batch or --model.recompute; else attach the report",
        run=f"{_SPEED}:step",
        timeout_s=300,
    ),
    Check(
        name="loader speed",
        group="speed",
        proves="the loader runs at full size",
        remedy="see the lines of 'data'",
        run=f"{_SPEED}:loader",
        needs=("shards",),
    ),
    Check(
        name="headroom",
        group="speed",
        proves="the loader is faster than the step that it feeds",
        remedy="crisp bench loader --tune finds better settings; shards made with --short-side 256 load faster; "
        "install DALI; give the job more cores",
        run=f"{_SPEED}:headroom",
        needs=("step speed", "loader speed"),
    ),
)

CHECKS = MACHINE + TWINS + DATA + TRAINING + RANKS + SPEED
