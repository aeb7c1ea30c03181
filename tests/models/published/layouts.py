"""Keys and shapes of published files, as the systems' code makes them: name → shape, without values.

Repository and commit stand at each system. Sizes are arguments, so that a test can take the published ones without
memory, or small ones with values.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

Shapes = dict[str, tuple[int, ...]]


def filled(shapes: Mapping[str, Any], *, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Tensors of these shapes: drawn, so that zeros and ones hide no mistake, or without memory (`meta`).

    Matrices keep the size of what goes through them and scales lie around 1, so that tokens and attention vary.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: fill(inner, shape) for inner, shape in value.items()}
        if device == "meta":
            return torch.empty(value, device="meta")
        drawn = torch.randn(value, generator=generator)
        if len(value) == 1:
            return 0.3 * drawn + (not name.endswith("bias"))
        return drawn if name.endswith(("token", "tokens", "pos_embed")) else drawn / math.prod(value[1:]) ** 0.5

    return {name: fill(name, value) for name, value in shapes.items()}


def linear(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def block(name: str, width: int, hidden: int) -> Shapes:
    return (
        norm(f"{name}.norm1", width)
        | linear(f"{name}.attn.qkv", 3 * width, width)
        | linear(f"{name}.attn.proj", width, width)
        | norm(f"{name}.norm2", width)
        | linear(f"{name}.mlp.fc1", hidden, width)
        | linear(f"{name}.mlp.fc2", width, hidden)
    )


def vit(width: int, depth: int, patch: int, image: int, *, cls: bool = True, hidden: int | None = None) -> Shapes:
    """DINO's vision_transformer.py (facebookresearch/dino at 7c446df5b9f45747937fb0d72314eb9f7b66930a); iBOT's
    (bytedance/ibot at da316d82636a7a7356835ef224b13d5f3ace0489), SiT's (Sara-Ahmed/SiT at
    7f22e9cd14968543bbeeee5ce71fdc0a177fb6c4), CrOC's (stegmuel/CrOC at cf7f83ac43adf45fd66bd3c8d1134aba4bf85613) and
    CrIBo's (tileb1/CrIBo at 73cc6cf0628dfb0a271df2060c637d696d251e89) have the same.
    """
    patches = (image // patch) ** 2
    shapes: Shapes = {"cls_token": (1, 1, width)} if cls else {}
    shapes["pos_embed"] = (1, patches + cls, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        shapes |= block(f"blocks.{i}", width, hidden or 4 * width)
    return shapes | norm("norm", width)


def weight_norm(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight_g": (out, 1), f"{name}.weight_v": (out, width)}


def dino_head(width: int, *, last: Mapping[str, int], hidden: int = 2048, bottleneck: int = 256) -> Shapes:
    """DINOHead: three linear layers, and the prototypes under `last`'s names."""
    shapes = linear("mlp.0", hidden, width) | linear("mlp.2", hidden, hidden) | linear("mlp.4", bottleneck, hidden)
    for name, out in last.items():
        shapes |= weight_norm(name, out, bottleneck)
    return shapes


def wrapped(backbone: Shapes, head: Shapes) -> Shapes:
    """MultiCropWrapper, and what was made from it."""
    return prefixed("backbone.", backbone) | prefixed("head.", head)


def dino_run(backbone: Shapes, *, out: int = 65536, **sizes: int) -> dict[str, Shapes]:
    """main_dino.py of facebookresearch/dino at 7c446df5b9f45747937fb0d72314eb9f7b66930a: the student in
    DistributedDataParallel, the teacher not.
    """
    network = wrapped(backbone, dino_head(backbone["norm.bias"][0], last={"last_layer": out}, **sizes))
    return {"student": prefixed("module.", network), "teacher": network, "dino_loss": {"center": (1, out)}}


def ibot_run(backbone: Shapes, *, out: int = 8192, **sizes: int) -> dict[str, Shapes]:
    """main_ibot.py and models/head.py of bytedance/ibot at da316d82636a7a7356835ef224b13d5f3ace0489: the student alone
    has a mask token; with a shared head, `last_layer2` is `last_layer` under a second name.
    """
    width = backbone["norm.bias"][0]
    network = wrapped(backbone, dino_head(width, last={"last_layer": out, "last_layer2": out}, **sizes))
    student = prefixed("module.", network) | {"module.backbone.masked_embed": (1, width)}
    return {"student": student, "teacher": network, "ibot_loss": {"center": (1, out), "center2": (1, 1, out)}}


def sit_run(backbone: Shapes, *, patch: int = 16, hidden: int = 4096, out: int = 256) -> dict[str, Shapes]:
    """main.py and vision_transformer.py of Sara-Ahmed/SiT at 7f22e9cd14968543bbeeee5ce71fdc0a177fb6c4: both networks in
    DistributedDataParallel, for the batch norms in their heads.
    """
    width = backbone["norm.bias"][0]

    def batch_norm(name: str, channels: int, *, affine: bool = True) -> Shapes:
        running: Shapes = {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
        return running | {f"{name}.num_batches_tracked": ()} | (norm(name, channels) if affine else {})

    head = linear("mlp.0", hidden, width) | batch_norm("mlp.1", hidden)
    head |= linear("mlp.3", hidden, hidden) | batch_norm("mlp.4", hidden)
    head |= linear("mlp.6", out, hidden) | batch_norm("mlp.7", out, affine=False)
    recons = linear("mlp.0", width, width) | linear("mlp.2", width, width) | linear("mlp.4", width, width)
    recons |= {"convTrans.weight": (width, 3, patch, patch), "convTrans.bias": (3,)}
    network = prefixed("module.", wrapped(backbone, head) | prefixed("head_recons.", recons))
    return {"student": network, "teacher": network}


def croc_run(backbone: Shapes, *, out: int = 65536, out_c: int = 65536, **sizes: int) -> dict[str, Shapes]:
    """main_croc.py and models/vision_transformer.py of stegmuel/CrOC at cf7f83ac43adf45fd66bd3c8d1134aba4bf85613."""
    last = {"last_layer": out, "last_layer_c": out_c}
    network = wrapped(backbone, dino_head(backbone["norm.bias"][0], last=last, **sizes))
    loss: Shapes = {"center": (1, out), "center_c": (1, out_c)}
    return {"student": prefixed("module.", network), "teacher": network, "croc_loss": loss}


def cribo_run(backbone: Shapes, *, queue: int = 25000, tokens: int = 32, **sizes: int) -> dict[str, Any]:
    """main_cribo.py of tileb1/CrIBo at 73cc6cf0628dfb0a271df2060c637d696d251e89: CrOC's networks, its loss as
    `dino_loss`, and queues.
    """
    width = backbone["norm.bias"][0]
    run = croc_run(backbone, **sizes)
    queues = {"centroids_queue_cpu": (2, tokens * queue, width), "cls_queue_cpu": (2, queue, width)}
    networks = {"student": run["student"], "teacher": run["teacher"]}
    return networks | {"dino_loss": run["croc_loss"], "cpv_queue_cpu": (queue,)} | queues


def mae(width: int, depth: int, patch: int, image: int, *, decoder_width: int = 512, decoder_depth: int = 8) -> Shapes:
    """models_mae.py of facebookresearch/mae at efb2a8062c206524e35e47d04501ed4f544c0ae8, decoder and all."""
    patches = (image // patch) ** 2
    shapes = vit(width, depth, patch, image) | linear("decoder_embed", decoder_width, width)
    shapes |= {"mask_token": (1, 1, decoder_width), "decoder_pos_embed": (1, 1 + patches, decoder_width)}
    for i in range(decoder_depth):
        shapes |= block(f"decoder_blocks.{i}", decoder_width, 4 * decoder_width)
    return shapes | norm("decoder_norm", decoder_width) | linear("decoder_pred", 3 * patch**2, decoder_width)


def dinov2(
    width: int, depth: int, patch: int, image: int, *, registers: int = 0, gated: bool = False, chunks: int = 0
) -> Shapes:
    """dinov2/models/vision_transformer.py of facebookresearch/dinov2 at b8931f7bf91576930313be2c6d6af376033b35f0;
    facebookresearch/webssl at c85b60bbe8b8436f30316c7e28db1777475db3d9 has the same, gated and in four chunks.
    """
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + (image // patch) ** 2, width)}
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    shapes["mask_token"] = (1, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
    for i in range(depth):
        # chunks of depth // chunks blocks each, so that there can be one more: 26 blocks in 4 chunks make 5
        name = f"blocks.{i // (depth // chunks)}.{i}" if chunks else f"blocks.{i}"
        part = block(name, width, 4 * width) | {f"{name}.ls1.gamma": (width,), f"{name}.ls2.gamma": (width,)}
        if gated:
            part = {key: shape for key, shape in part.items() if ".mlp." not in key}
            part |= linear(f"{name}.mlp.w12", 2 * hidden, width) | linear(f"{name}.mlp.w3", width, hidden)
        shapes |= part
    return shapes | norm("norm", width)


def dinov2_teacher(backbone: Shapes, *, out: int = 65536, **sizes: int) -> dict[str, Shapes]:
    """What dinov2/train/train.py of facebookresearch/dinov2 at b8931f7bf91576930313be2c6d6af376033b35f0 saves as
    teacher_checkpoint.pth, with separate heads.
    """
    head = dino_head(backbone["norm.bias"][0], last={"last_layer": out}, **sizes)
    heads = prefixed("dino_head.", head) | prefixed("ibot_head.", head)
    return {"teacher": prefixed("backbone.", backbone) | heads}


def hf_dinov2(own: Shapes) -> Shapes:
    """Hugging Face's names of an unchunked DINOv2, after convert_dinov2_to_hf.py of huggingface/transformers at
    0e5b57e7673f58a8689d9f5f1e96c7007fdb5b13.
    """
    direct = {
        "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings", "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    }  # fmt: skip
    parts = {
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "attn.proj": "attention.output.dense", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out",
    }  # fmt: skip
    shapes: Shapes = {}
    for key, shape in own.items():
        leaf = key.rpartition(".")[2]
        stem = key.removesuffix(f".{leaf}") if leaf in ("weight", "bias") else key
        end = f".{leaf}" if leaf in ("weight", "bias") else ""
        if not stem.startswith("blocks."):
            shapes[direct[stem] + end] = shape
            continue
        _, i, part = stem.split(".", 2)
        if part == "attn.qkv":
            for name in ("query", "key", "value"):
                shapes[f"encoder.layer.{i}.attention.attention.{name}{end}"] = (shape[0] // 3, *shape[1:])
        else:
            shapes[f"encoder.layer.{i}.{parts.get(part, part)}{end}"] = shape
    return shapes


def ijepa_run(encoder: Shapes, *, width: int = 384, depth: int = 12) -> dict[str, Shapes]:
    """src/models/vision_transformer.py and src/train.py of facebookresearch/ijepa at
    52c1ae95d05f743e000e8f10a1f3a79b10cff048: all three networks in DistributedDataParallel.

    Args:
        encoder: `vit(..., cls=False)`.
        width, depth: of the predictor.
    """
    dim, patches = encoder["norm.bias"][0], encoder["pos_embed"][1]
    predictor: Shapes = {"mask_token": (1, 1, width), "predictor_pos_embed": (1, patches, width)}
    predictor |= linear("predictor_embed", width, dim)
    for i in range(depth):
        predictor |= block(f"predictor_blocks.{i}", width, 4 * width)
    predictor |= norm("predictor_norm", width) | linear("predictor_proj", dim, width)
    networks = {"encoder": encoder, "predictor": predictor, "target_encoder": encoder}
    return {name: prefixed("module.", shapes) for name, shapes in networks.items()}
