"""Every choice of a run, as frozen keyword-only dataclasses (no torch here: the command line must start fast).

Defaults are those of the method for ViT-S/16; `crisp.recipes` has the named runs. A field's docstring is its
text on the command line. `__post_init__` refuses what cannot work; what depends on the data (a batch larger
than the data set) is refused where the data is opened.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from crisp.errors import CrispError

Interpolation = Literal["bicubic", "bilinear"]
WarpMode = Literal["centre", "forward", "coverage"]
Sharing = Literal["shared", "cls_apart", "separate"]
Precision = Literal["bf16", "fp16", "fp32"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise CrispError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliConfig:
    """How the DALI renderer is set up; none of it changes a sample. `crisp bench loader --tune` measures them."""

    workers: int = 1
    """Processes that read ahead of the graph, a step each; 0: the training process reads."""
    hardware_decoder_share: float = 0.75
    """Of the JPEGs, decoded by the GPU's own decoder where it has one (A100, H100); the rest by its cores."""
    preallocate_width_px: int = 0
    """Width of the images for which decoders reserve memory at once; 0: nearly the largest of the data."""
    preallocate_height_px: int = 0
    """Height of them; 0: nearly the largest of the data."""

    def __post_init__(self) -> None:
        _require(self.workers >= 0, f"data.dali.workers={self.workers}: must be 0 or more")
        _require(
            0 <= self.hardware_decoder_share <= 1,
            f"data.dali.hardware_decoder_share={self.hardware_decoder_share}: must be between 0 and 1",
        )
        for name in ("preallocate_width_px", "preallocate_height_px"):
            _require(getattr(self, name) >= 0, f"data.dali.{name}={getattr(self, name)}: must be 0 (automatic) or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where samples come from and who renders them."""

    shards: str | None = None
    """Folder written by `crisp shard`: a path, or a URL (s3, gs, http)."""
    renderer: Literal["auto", "dali", "cpu"] = "auto"
    """Who renders the views: DALI, or the threaded CPU renderer; auto takes DALI where there is a GPU."""
    threads: int = 0
    """Threads of the renderer; 0: the cores of this machine shared by its ranks."""
    read_threads: int = 4
    """Threads that read images ahead of the renderer."""
    prefetch_batches: int = 2
    """Batches rendered ahead of the step."""
    pixels: Literal["float32", "float16"] = "float32"
    """Type of the images; float16 halves memory and transfer."""
    parts: int = 8
    """Canonical parts of the sample order, a constant of a run: node i of N reads parts i, i+N, …"""
    shuffle_window_shards: int = 16
    """Samples are shuffled within windows of this many (shuffled) shards."""
    verify_checksums: bool = True
    """Check each sample's bytes against the index before decoding."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the samples (and more than 16) had to be replaced by a neighbour."""
    sample_timeout_s: float = 60.0
    """A sample that takes longer to read or to decode is replaced."""
    cache: Path | None = None
    """Where shards from a URL are kept, for all ranks of a machine; default crisp in the user's cache folder."""
    cache_gb: float = 100.0
    """Size that this cache may have, in 10⁹ bytes."""
    dali: DaliConfig = field(default_factory=DaliConfig)

    def __post_init__(self) -> None:
        _require(self.threads >= 0, f"data.threads={self.threads}: must be 0 (automatic) or more")
        for name in ("read_threads", "prefetch_batches", "parts", "shuffle_window_shards"):
            _require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}: must be 1 or more")
        for name in ("sample_timeout_s", "cache_gb"):
            _require(getattr(self, name) > 0, f"data.{name}={getattr(self, name)}: must be positive")
        _require(0 <= self.max_bad_share <= 1, f"data.max_bad_share={self.max_bad_share}: must be between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewsConfig:
    """Reference image, augmented views, patch masks and region seeds (METHOD: iBOT's recipe plus a reference)."""

    patch_px: int = 16
    """Side of a patch."""
    reference_px: int = 224
    """Side of the reference: the whole image, each axis resized on its own."""
    global_px: int = 224
    """Side of the two global views."""
    local_px: int = 96
    """Side of the local views."""
    local_views: int = 10
    """Number of local views."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Area of a global crop, as a share of the image."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Area of a local crop, as a share of the image."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a crop, log-uniform."""
    interpolation: Interpolation = "bicubic"
    """Filter of every resize; both are antialiased."""
    flip_probability: float = 0.5
    """Horizontal flip, per view."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: float = 0.8
    """Colour jitter, per view."""
    grayscale_probability: float = 0.2
    """Grayscale, per view."""
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the Gaussian blur, uniform."""
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Blur on global view 1, on global view 2, on local views."""
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Solarise (threshold 128) on global view 1, on global view 2, on local views."""
    mask_shape: Literal["block", "rand"] = "block"
    """Patch masks: iBOT's blocks, or exactly int(ratio·n) random patches."""
    mask_probability: float = 0.5
    """A global view is masked at all."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of patches masked in a masked view, uniform."""
    mask_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Aspect ratio of a mask block, log-uniform."""
    seeds_per_image: int = 1
    """Region seeds per image (K)."""
    seed_policy: Literal["uniform", "visible"] = "uniform"
    """Seeds uniform over the reference, or over the part of it that both global views show."""

    def __post_init__(self) -> None:
        _require(self.patch_px >= 1, f"views.patch_px={self.patch_px}: must be 1 or more")
        for name in ("reference_px", "global_px", "local_px"):
            value = getattr(self, name)
            _require(
                value > 0 and value % self.patch_px == 0,
                f"views.{name}={value}: must be a positive multiple of views.patch_px={self.patch_px}",
            )
        _require(self.local_views >= 0, f"views.local_views={self.local_views}: must be 0 or more")
        _require(self.seeds_per_image >= 1, f"views.seeds_per_image={self.seeds_per_image}: must be 1 or more")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            _require(0 < low <= high <= 1, f"views.{name}=({low}, {high}): needs 0 < low <= high <= 1")
        for name in ("aspect", "mask_aspect", "blur_sigma_px"):
            low, high = getattr(self, name)
            _require(0 < low <= high, f"views.{name}=({low}, {high}): needs 0 < low <= high")
        low, high = self.mask_ratio
        _require(0 <= low <= high <= 1, f"views.mask_ratio=({low}, {high}): needs 0 <= low <= high <= 1")
        for name in ("flip", "jitter", "grayscale", "mask"):
            value = getattr(self, f"{name}_probability")
            _require(0 <= value <= 1, f"views.{name}_probability={value}: must lie in [0, 1]")
        for name in ("blur_probability", "solarize_probability"):
            values = getattr(self, name)
            _require(all(0 <= v <= 1 for v in values), f"views.{name}={values}: must lie in [0, 1]")

    @property
    def views(self) -> int:
        """Number of augmented views V = 2 + local views; the two global ones come first."""
        return 2 + self.local_views

    @property
    def view_px(self) -> tuple[int, ...]:
        """Side of each of the V views."""
        return (self.global_px,) * 2 + (self.local_px,) * self.local_views

    @property
    def reference_grid(self) -> int:
        """Patches along a side of the reference."""
        return self.reference_px // self.patch_px

    @property
    def global_grid(self) -> int:
        """Patches along a side of a global view."""
        return self.global_px // self.patch_px


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Backbone and heads."""

    arch: str = "vit_small_patch16_224"
    """Name of a timm Vision Transformer."""
    embed_dim: int | None = None
    """Width, where it shall differ from the named model's."""
    depth: int | None = None
    """Blocks, where they shall differ from the named model's."""
    num_heads: int | None = None
    """Attention heads, where they shall differ from the named model's."""
    drop_path: float = 0.1
    """Stochastic depth of the last block (linear in depth), student only."""
    recompute: bool = False
    """Activation checkpointing: run blocks again in the backward pass instead of keeping what they computed."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    shared_norm: bool = False
    """One final LayerNorm for CLS and patches, as in iBOT, in place of two."""
    position_resize: Literal["scale", "size"] = "scale"
    """Resize position embeddings by scale factor (grid + .1)/base, as iBOT does, or by target size."""
    head_mlp: Sharing = "cls_apart"
    """Which of CLS, patch and region share the MLP: all, patch and region, or none."""
    head_last_layer: Sharing = "separate"
    """Which of CLS, patch and region share the last layer."""
    head_hidden: int = 2048
    """Width of the MLP."""
    head_bottleneck: int = 256
    """Width of the l2-normalised bottleneck."""
    prototypes: int = 8192
    """Outputs of the last layer."""
    learn_last_layer_gain: bool = True
    """Learn the gain of the weight-normed last layer (ViT-S), or fix it at 1 (ViT-B and ViT-L)."""

    def __post_init__(self) -> None:
        _require(0 <= self.drop_path < 1, f"model.drop_path={self.drop_path}: must lie in [0, 1)")
        for name in ("embed_dim", "depth", "num_heads", "head_hidden", "head_bottleneck", "prototypes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.{name}={value}: must be 1 or more")

    @property
    def arch_args(self) -> dict[str, int]:
        """The sizes that override the named model's, as timm takes them."""
        sizes = {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}
        return {name: size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionConfig:
    """Region discovery, warping and the concept token (paper, sections 3.1 to 3.3)."""

    enabled: bool = True
    """Use the region loss; off is iBOT."""
    threshold: float = 0.75
    """β: cosine similarity to the seed from which a patch belongs to the region."""
    blocks: int = 4
    """M: last teacher blocks averaged for discovery."""
    block_norm: Literal["patch", "raw"] = "patch"
    """Take each of the M blocks through the teacher's patch norm, or as it is."""
    warp_mode: WarpMode = "centre"
    """How a region becomes a mask of view patches."""
    min_coverage: float = 0.5
    """τ of warp mode coverage: share of a view patch that the region must cover."""
    min_patches: int = 4
    """t: patches that both views must show for a region to count."""
    concept_depth: int = 1
    """L: blocks of the concept aggregator; 0 is the mean of the region's patches, without a norm."""
    concept_input: Literal["normed", "raw"] = "normed"
    """The aggregator reads patches after the patch norm, or before."""
    concept_norm: Literal["own", "shared"] = "own"
    """The concept token has its own LayerNorm, or the patch norm's."""

    def __post_init__(self) -> None:
        _require(-1 <= self.threshold <= 1, f"region.threshold={self.threshold}: a cosine lies in [-1, 1]")
        _require(self.blocks >= 1, f"region.blocks={self.blocks}: must be 1 or more")
        _require(0 < self.min_coverage <= 1, f"region.min_coverage={self.min_coverage}: must lie in (0, 1]")
        _require(self.min_patches >= 1, f"region.min_patches={self.min_patches}: must be 1 or more")
        _require(self.concept_depth >= 0, f"region.concept_depth={self.concept_depth}: must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Temperatures, centres and weights of the three losses."""

    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Teacher temperature at the start and after the warm-up (linear, stepped per epoch)."""
    teacher_temperature_warmup_epochs: int = 30
    """Epochs of that warm-up."""
    center_momentum: float = 0.9
    """Momentum of the centres."""
    patch_weight: float = 1.0
    """λ_patch."""
    region_weight: float = 1.0
    """λ_region."""
    fused: bool = False
    """Last layer and cross-entropy by Triton's kernels, which hold no logits (CUDA only; not measured yet)."""

    def __post_init__(self) -> None:
        for value in (self.student_temperature, *self.teacher_temperature):
            _require(value > 0, f"loss temperature {value}: must be positive")
        _require(0 <= self.center_momentum < 1, f"loss.center_momentum={self.center_momentum}: must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW and every schedule. Lengths are in epochs; schedules move per step."""

    epochs: int = 200
    """Length of the run."""
    global_batch: int = 256
    """Images per optimiser step over all ranks, a constant of a run."""
    micro_batch: int = 0
    """Images that a rank takes at once, accumulating gradients; 0: all of its share, on a CPU few (4 of a ViT-S)."""
    base_lr: float = 5e-4
    """Learning rate × global_batch / 256 is the peak."""
    min_lr: float = 1e-6
    """Learning rate at the end."""
    warmup_epochs: float = 10
    """Linear warm-up of the learning rate from 0."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """Weight decay at the start and at the end (cosine); none on biases and 1-D parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momenta."""
    eps: float = 1e-8
    """AdamW's ε."""
    clip_norm: float = 3.0
    """Largest gradient norm of each tensor; 0: no clipping."""
    freeze_last_layer_epochs: int = 1
    """Epochs in which the last layers get no gradient."""
    ema_momentum: tuple[float, float] = (0.996, 1.0)
    """Momentum of the teacher at the start and at the end (cosine)."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, f"optim.epochs={self.epochs}: must be 1 or more")
        _require(self.global_batch >= 1, f"optim.global_batch={self.global_batch}: must be 1 or more")
        _require(self.micro_batch >= 0, f"optim.micro_batch={self.micro_batch}: must be 0 (automatic) or more")
        for name in ("base_lr", "min_lr", "eps", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optim.{name}={value}: must be 0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas={self.betas}: must lie in [0, 1)")
        _require(
            all(0 <= momentum <= 1 for momentum in self.ema_momentum),
            f"optim.ema_momentum={self.ema_momentum}: must lie in [0, 1]",
        )
        _require(
            0 <= self.warmup_epochs <= self.epochs,
            f"optim.warmup_epochs={self.warmup_epochs}: must lie between 0 and optim.epochs={self.epochs}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """Published weights that a run starts from; schedules and centres start anew."""

    weights: str | None = None
    """File of iBOT, DINO, DINOv2 or timm weights (.pth, .safetensors), or timm:NAME; none: random weights."""
    which: Literal["teacher", "student"] = "teacher"
    """Network of a file that holds a whole run; student and teacher both start from it."""
    heads: bool = True
    """Take its projection head too, where it has one."""

    def __post_init__(self) -> None:
        _require(self.weights != "", "init.weights='': empty; give a file or timm:NAME, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig:
    """k-NN classification by the teacher's [CLS] while the run goes on; it changes no weight."""

    every_epochs: int = 0
    """Epochs between two measurements (one is also made at the end); 0: none."""
    train_shards: str | None = None
    """Labelled shards whose images are the neighbours, a path or a URL; default: those of the run."""
    val_shards: str | None = None
    """Labelled shards of the same classes to classify; default: a tenth of the neighbours' shards, held out."""
    k: int = 20
    """Neighbours that vote."""
    max_train: int = 50_000
    """Most neighbours taken, a random subset of their shards that is the same each time."""
    max_val: int = 10_000
    """Most images classified, likewise."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 0, f"knn.every_epochs={self.every_epochs}: must be 0 (off) or more")
        for name in ("k", "max_train", "max_val"):
            _require(getattr(self, name) >= 1, f"knn.{name}={getattr(self, name)}: must be 1 or more")
        _require(self.k <= self.max_train, f"knn.k={self.k}: must not exceed knn.max_train={self.max_train}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturesConfig:
    """Regions and principal components of a few fixed images, drawn by the run of its teacher; it changes no weight."""

    every_epochs: int = 0
    """Epochs between two drawings in RUN/pictures (also at the start and at the end); 0: none."""
    images: int = 8
    """How many images, evenly from the shards' first to their last."""
    shards: str | None = None
    """Shards that they are of, a path or a URL; default: those of the run."""
    pca_px: int = 448
    """Side of the images whose components are drawn; regions have the run's own sizes."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 0, f"pictures.every_epochs={self.every_epochs}: must be 0 (off) or more")
        _require(1 <= self.images <= 64, f"pictures.images={self.images}: must lie between 1 and 64")
        _require(1 <= self.pca_px <= 1120, f"pictures.pca_px={self.pca_px}: must lie between one patch and 1120")


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases beside TensorBoard (the extra 'wandb')."""

    project: str | None = None
    """Project that the run is sent to; none: it is not used."""
    entity: str | None = None
    """User or team; default: that of the login."""
    mode: Literal["online", "offline"] = "online"
    """offline keeps everything in RUN/wandb until 'wandb sync'."""

    def __post_init__(self) -> None:
        _require(self.project != "", "wandb.project='': empty; give a name, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run."""

    recipe: str = "vits16"
    """Name of the recipe that this began as."""
    out: Path | None = None
    """Folder of the run; default runs/RECIPE. (Not --run: torchrun would take that for one of its own options.)"""
    seed: int = 0
    """Seed of the weights, the order and every draw."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes the GPU where there is one."""
    precision: Precision = "bf16"
    """Autocast type."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several ranks: each holds whole networks (ddp), or a shard of student, teacher and moments (fsdp)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints (one is also written at the end)."""
    max_skipped_steps: int = 20
    """Stop after this many steps in a row that were skipped because a gradient was not finite."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this stay for good; 0: none."""
    keep_best: bool = True
    """The checkpoint with the best k-NN accuracy stays, where knn.every_epochs is set."""
    rank_timeout_s: float = 600.0
    """A rank that stands still for so long ends the job, and is named; start-up, the first step, saving and k-NN may
    take six times as long. 0: wait for ever."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: InitConfig = field(default_factory=InitConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        _require(self.max_skipped_steps >= 1, f"max_skipped_steps={self.max_skipped_steps}: must be 1 or more")
        _require(self.log_every >= 1, f"log_every={self.log_every}: must be 1 or more")
        _require(self.checkpoint_every >= 1, f"checkpoint_every={self.checkpoint_every}: must be 1 or more")
        _require(self.keep_checkpoints >= 1, f"keep_checkpoints={self.keep_checkpoints}: must be 1 or more")
        _require(self.keep_every >= 0, f"keep_every={self.keep_every}: must be 0 (none) or more")
        _require(
            self.keep_every % self.checkpoint_every == 0,
            f"keep_every={self.keep_every}: must be a multiple of checkpoint_every={self.checkpoint_every}",
        )
        _require(self.rank_timeout_s >= 0, f"rank_timeout_s={self.rank_timeout_s}: must be 0 (for ever) or more")
        _require(
            self.optim.global_batch % self.data.parts == 0,
            f"optim.global_batch={self.optim.global_batch}: must be a multiple of data.parts={self.data.parts}; "
            f"change one of the two",
        )
        _require(
            not self.pictures.every_epochs or self.pictures.pca_px % self.views.patch_px == 0,
            f"pictures.pca_px={self.pictures.pca_px}: must be a multiple of views.patch_px={self.views.patch_px}",
        )

    @property
    def run_folder(self) -> Path:
        """Where the run is written."""
        return self.out if self.out is not None else Path("runs") / self.recipe


def to_json(config: Any) -> Any:
    """A config (or any field of one) as JSON types; `train_config_from_json` is its inverse."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, tuple):
        return [to_json(value) for value in config]
    return config


def _from_json(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    _require(not unknown, f"{where}: unknown field {unknown}; it was written by another version of crisp")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _from_json(hint, value, f"{where}.{name}")  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        elif hint == Path | None and value is not None:
            value = Path(value)
        arguments[name] = value
    return cls(**arguments)


def train_config_from_json(values: dict[str, Any]) -> TrainConfig:
    """The config that `to_json` wrote.

    Raises:
        CrispError: a field that this version does not know.
    """
    config: TrainConfig = _from_json(TrainConfig, values, "config.json")
    return config
