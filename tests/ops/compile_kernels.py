"""Compiles the kernels for GPUs that need not be there; run as a program by test_triton_compile.py.

A process of its own, since Triton decides once, when a kernel is defined, whether it is compiled or interpreted.
Prints one JSON object: {"<kernel>-<variant>-sm_<arch>": {"target": the PTX's, "cubin_starts_with": four bytes,
"shared_bytes": per program}}.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crisp.ops import cross_entropy_triton, regions_torch, regions_triton

ARCHITECTURES = (80, 90, 100)
GRIDS = {"14to14": (14, 14), "14to6": (14, 6), "32to14": (32, 14)}

DISCOVER_TYPES = {
    "seeds": "*i64",
    "regions": "*i1",
    "threshold": "fp32",
    **dict.fromkeys(("K", "N", "D", "stride_b", "stride_n", "stride_d"), "i32"),
}
DISCOVER_CONSTANTS = {
    "MIN_NORM": regions_torch.MIN_NORM,
    "BLOCK_N": regions_triton.DISCOVER_BLOCK_N,
    "BLOCK_D": regions_triton.DISCOVER_BLOCK_D,
}
ALIGNED = ("tokens", "seeds", "regions", "D", "stride_b", "stride_n")
WARP_TYPES = {
    "regions": "*i1",
    "view_from_reference": "*fp32",
    "view_regions": "*i1",
    "counts": "*i32",
    **dict.fromkeys(("B", "K", "patch_px"), "i32"),
}


CROSS_ENTROPY_TYPES = {
    "teacher_lse": "*fp32",
    "center": "*fp32",
    "student_lse": "*fp32",
    "cross_entropy": "*fp32",
    "weights": "*fp32",
    "gradient": "*fp32",
    "per_temperature": "fp32",
    "per_student_temperature": "fp32",
    "per_teacher_temperature": "fp32",
    **dict.fromkeys(("S", "T", "G", "P", "D", "rows"), "i32"),
}
CROSS_ENTROPY_KERNELS = ("teacher_lse", "loss", "student_gradient", "prototype_gradient")
BOTTLENECK = 256
"""The recipes' bottleneck width"""


def source(kernel, types: dict[str, str], constants: dict[str, float], aligned: tuple[str, ...] = ()) -> ASTSource:
    """A kernel with the types and constants that a launch would give it; `aligned` are multiples of 16."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def sources() -> dict[str, ASTSource]:
    """Every token type, with tokens that lie row by row as a ViT gives them and with any strides; every grid."""
    discover, result = regions_triton.discover_kernel, {}
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"tokens": f"*{dtype}", **DISCOVER_TYPES}
        rows = {**DISCOVER_CONSTANTS, "stride_d": 1, "K": 1}  # a launch makes constants of arguments that are 1
        result[f"discover-{dtype}-rows"] = source(discover, types, rows, ALIGNED)
        result[f"discover-{dtype}-strided"] = source(discover, types, DISCOVER_CONSTANTS)
    for name, (reference_grid, view_grid) in GRIDS.items():
        block = triton.next_power_of_2(view_grid**2)
        grids = {"REFERENCE_GRID": reference_grid, "VIEW_GRID": view_grid, "BLOCK": block}
        result[f"warp-{name}"] = source(regions_triton.warp_centre_kernel, WARP_TYPES, grids)
    return result


def cross_entropy_sources() -> dict[str, ASTSource]:
    """Each of the four kernels for each type of products."""
    result = {}
    for dtype in ("bf16", "fp16", "fp32"):
        tensors = ("student", "student_prototypes", "teacher", "teacher_prototypes", "prototypes")
        types = {**dict.fromkeys(tensors, f"*{dtype}"), **CROSS_ENTROPY_TYPES}
        constants = {
            "PRECISION": "ieee" if dtype == "fp32" else "tf32",
            "BLOCK_G": cross_entropy_triton.BLOCK_G,
            "BLOCK_P": cross_entropy_triton.BLOCK_P[4 if dtype == "fp32" else 2],
            "BLOCK_D": BOTTLENECK,
        }
        for name in CROSS_ENTROPY_KERNELS:
            kernel = getattr(cross_entropy_triton, f"{name}_kernel")
            aligned = tuple(a for a in kernel.arg_names if types.get(a, "").startswith("*") or a in ("P", "D"))
            result[f"{name}-{dtype}"] = source(kernel, types, constants, aligned)
    return result


def launch_options(name: str) -> dict[str, int]:
    """What a launch gives the compiler beside types and constants."""
    if name not in cross_entropy_sources():
        return {}
    number_bytes = 4 if name.endswith("fp32") else 2
    return {"num_warps": cross_entropy_triton.WARPS, "num_stages": cross_entropy_triton.STAGES[number_bytes]}


def main() -> None:
    compiled = {}
    for name, kernel_source in (sources() | cross_entropy_sources()).items():
        for arch in ARCHITECTURES:
            kernel = triton.compile(kernel_source, target=GPUTarget("cuda", arch, 32), options=launch_options(name))
            binary = kernel.asm
            target = re.search(r"^\.target (\w+)", binary["ptx"], re.MULTILINE)
            assert target is not None
            compiled[f"{name}-sm_{arch}"] = {
                "target": target[1],
                "cubin_starts_with": binary["cubin"][:4].hex(),
                "shared_bytes": kernel.metadata.shared,
            }
    print(json.dumps(compiled))


if __name__ == "__main__":
    main()
