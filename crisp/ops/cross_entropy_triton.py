"""Last layer, softmax and cross-entropy in one: the sweep of `crisp.ops.cross_entropy` as four Triton kernels.

No logit ever reaches memory: each kernel computes the tiles it needs from the bottlenecks and prototypes, twice and
more rather than store them, since the products are cheap beside the traffic. Nothing is added up in an undefined order:
the same arguments give the same bits. Not measured on a GPU yet.

Axis letters: G groups, S students and T teachers per group, D bottleneck width, P prototypes. A row of students is
s·G + g, one of teachers t·G + g.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_G = 32
"""Groups per tile"""
BLOCK_P = {2: 64, 4: 32}
"""Prototypes per tile by bytes of a number: a tile of 256 channels is 32 KiB, and what a program holds fits an A100's
shared memory"""
STAGES = {2: 3, 4: 2}
"""Loads under way at once, by bytes of a number, for the same reason"""
WARPS = 8
"""Accumulators of 64 × 256 float32 then take 64 registers of a thread"""


@triton.jit
def load_rows(rows: tl.tensor, first: tl.tensor, row: tl.tensor, count: tl.tensor, D: tl.tensor, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `first + row` [R, D] of a matrix, zeros where `row` is not below `count`."""
    channel = tl.arange(0, BLOCK_D)
    start = rows + (first + row).to(tl.int64)[:, None] * D
    return tl.load(start + channel[None, :], mask=(row[:, None] < count) & (channel[None, :] < D), other=0.0)


@triton.jit
def teacher_targets(  # type: ignore[no-untyped-def]
    teacher: tl.tensor,
    teacher_lse: tl.tensor,
    prototypes: tl.tensor,
    center: tl.tensor,
    group: tl.tensor,
    prototype: tl.tensor,
    T: tl.tensor,
    G: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    per_temperature: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_t softmax of teacher t, a tile [groups, prototypes]; 0 beyond G and P. `prototypes` is a loaded tile."""
    total = tl.zeros((group.shape[0], prototype.shape[0]), tl.float32)
    for t in range(T):
        rows = load_rows(teacher, t * G, group, G, D, BLOCK_D)
        logits = tl.dot(rows, prototypes.T, input_precision=PRECISION)
        lse = tl.load(teacher_lse + t * G + group, mask=group < G, other=float("inf"))
        total += tl.exp((logits - center[None, :]) * per_temperature - lse[:, None])
    return tl.where((prototype < P)[None, :], total, 0.0)


@triton.jit
def teacher_lse_kernel(
    teacher: tl.tensor,
    prototypes: tl.tensor,
    center: tl.tensor,
    teacher_lse: tl.tensor,
    rows: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    per_temperature: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Log-sum-exp of the centred, tempered logits of BLOCK_G teacher rows; grid (⌈T·G / BLOCK_G⌉,)."""
    row = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    bottlenecks = load_rows(teacher, 0, row, rows, D, BLOCK_D)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(0, P, BLOCK_P):
        prototype = start + tl.arange(0, BLOCK_P)
        tile = load_rows(prototypes, 0, prototype, P, D, BLOCK_D)
        shift = tl.load(center + prototype, mask=prototype < P, other=0.0)
        logits = (tl.dot(bottlenecks, tile.T, input_precision=PRECISION) - shift[None, :]) * per_temperature
        logits = tl.where((prototype < P)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), axis=1)
        largest = new_largest
    tl.store(teacher_lse + row, largest + tl.log(total), mask=row < rows)


@triton.jit
def loss_kernel(
    student: tl.tensor,
    student_prototypes: tl.tensor,
    teacher: tl.tensor,
    teacher_prototypes: tl.tensor,
    teacher_lse: tl.tensor,
    center: tl.tensor,
    student_lse: tl.tensor,
    cross_entropy: tl.tensor,
    T: tl.tensor,
    G: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    per_student_temperature: tl.tensor,
    per_teacher_temperature: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Σ_t H(teacher t, student s) of BLOCK_G groups, and the student's log-sum-exp; grid (S, ⌈G / BLOCK_G⌉)."""
    first = tl.program_id(0) * G
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    bottlenecks = load_rows(student, first, group, G, D, BLOCK_D)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    expected = tl.zeros((BLOCK_G,), tl.float32)  # Σ_p target · logit
    for start in range(0, P, BLOCK_P):
        prototype = start + tl.arange(0, BLOCK_P)
        shift = tl.load(center + prototype, mask=prototype < P, other=0.0)
        tile = load_rows(teacher_prototypes, 0, prototype, P, D, BLOCK_D)
        targets = teacher_targets(
            teacher, teacher_lse, tile, shift, group, prototype, T, G, P, D, per_teacher_temperature, PRECISION, BLOCK_D
        )
        tile = load_rows(student_prototypes, 0, prototype, P, D, BLOCK_D)
        logits = tl.dot(bottlenecks, tile.T, input_precision=PRECISION) * per_student_temperature
        expected += tl.sum(targets * logits, axis=1)
        logits = tl.where((prototype < P)[None, :], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest[:, None]), axis=1)
        largest = new_largest
    lse = largest + tl.log(total)
    tl.store(student_lse + first + group, lse, mask=group < G)
    tl.store(cross_entropy + first + group, T * lse - expected, mask=group < G)


@triton.jit
def student_gradient_kernel(
    student: tl.tensor,
    student_prototypes: tl.tensor,
    teacher: tl.tensor,
    teacher_prototypes: tl.tensor,
    teacher_lse: tl.tensor,
    center: tl.tensor,
    student_lse: tl.tensor,
    weights: tl.tensor,
    gradient: tl.tensor,
    T: tl.tensor,
    G: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    per_student_temperature: tl.tensor,
    per_teacher_temperature: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradient of BLOCK_G of a student's bottlenecks; grid (S, ⌈G / BLOCK_G⌉)."""
    first = tl.program_id(0) * G
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    channel = tl.arange(0, BLOCK_D)
    bottlenecks = load_rows(student, first, group, G, D, BLOCK_D)
    lse = tl.load(student_lse + first + group, mask=group < G, other=0.0)
    total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        prototype = start + tl.arange(0, BLOCK_P)
        shift = tl.load(center + prototype, mask=prototype < P, other=0.0)
        tile = load_rows(teacher_prototypes, 0, prototype, P, D, BLOCK_D)
        targets = teacher_targets(
            teacher, teacher_lse, tile, shift, group, prototype, T, G, P, D, per_teacher_temperature, PRECISION, BLOCK_D
        )
        tile = load_rows(student_prototypes, 0, prototype, P, D, BLOCK_D)
        logits = tl.dot(bottlenecks, tile.T, input_precision=PRECISION) * per_student_temperature
        slope = T * tl.exp(logits - lse[:, None]) - targets
        # beyond P a row of the tile is zero
        total += tl.dot(slope.to(tile.dtype), tile, input_precision=PRECISION)
    weight = tl.load(weights + group, mask=group < G, other=0.0) * per_student_temperature
    start = gradient + (first + group).to(tl.int64)[:, None] * D
    tl.store(start + channel[None, :], total * weight[:, None], mask=(group < G)[:, None] & (channel < D)[None, :])


@triton.jit
def prototype_gradient_kernel(
    student: tl.tensor,
    student_prototypes: tl.tensor,
    teacher: tl.tensor,
    teacher_prototypes: tl.tensor,
    teacher_lse: tl.tensor,
    center: tl.tensor,
    student_lse: tl.tensor,
    weights: tl.tensor,
    gradient: tl.tensor,
    S: tl.tensor,
    T: tl.tensor,
    G: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    per_student_temperature: tl.tensor,
    per_teacher_temperature: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Gradient of BLOCK_P of the student's prototypes, over all rows; grid (⌈P / BLOCK_P⌉,)."""
    prototype = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_D)
    shift = tl.load(center + prototype, mask=prototype < P, other=0.0)
    teacher_tile = load_rows(teacher_prototypes, 0, prototype, P, D, BLOCK_D)
    student_tile = load_rows(student_prototypes, 0, prototype, P, D, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, G, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        weight = tl.load(weights + group, mask=group < G, other=0.0)
        targets = teacher_targets(
            teacher,
            teacher_lse,
            teacher_tile,
            shift,
            group,
            prototype,
            T,
            G,
            P,
            D,
            per_teacher_temperature,
            PRECISION,
            BLOCK_D,
        )
        for s in range(S):
            rows = load_rows(student, s * G, group, G, D, BLOCK_D)
            lse = tl.load(student_lse + s * G + group, mask=group < G, other=0.0)
            logits = tl.dot(rows, student_tile.T, input_precision=PRECISION) * per_student_temperature
            slope = (T * tl.exp(logits - lse[:, None]) - targets).to(rows.dtype)
            weighted = (rows * weight[:, None]).to(rows.dtype)  # zero beyond G
            total += tl.dot(slope.T, weighted, input_precision=PRECISION)
    start = gradient + prototype.to(tl.int64)[:, None] * D
    tl.store(
        start + channel[None, :],
        total * per_student_temperature,
        mask=(prototype < P)[:, None] & (channel < D)[None, :],
    )


def sweep(
    student: Tensor,
    student_prototypes: Tensor,
    teacher: Tensor,
    teacher_prototypes: Tensor,
    *,
    center: Tensor,
    weights: Tensor,
    largest_weight: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    product_dtype: torch.dtype,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`crisp.ops.cross_entropy.sweep_chunks`, fused; products in float16, bfloat16 or float32, sums in float32."""
    S, G, D = student.shape
    T, P = len(teacher), len(student_prototypes)
    rows = [t.to(product_dtype).contiguous() for t in (student, student_prototypes, teacher, teacher_prototypes)]
    weights, center = weights.float().contiguous(), center.float().contiguous()
    tiles = {
        "PRECISION": "ieee" if product_dtype == torch.float32 else "tf32",  # the latter says nothing about halves
        "BLOCK_G": BLOCK_G,
        "BLOCK_P": BLOCK_P[product_dtype.itemsize],
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "num_warps": WARPS,
        "num_stages": STAGES[product_dtype.itemsize],
    }
    per_student, per_teacher = 1 / student_temperature, 1 / teacher_temperature
    teacher_lse, student_lse, cross_entropy = (student.new_empty(n, G, dtype=torch.float32) for n in (T, S, S))
    by_group = (S, triton.cdiv(G, BLOCK_G))
    with torch.cuda.device_of(student):  # Triton launches on the current device, whatever its arguments live on
        teacher_lse_kernel[(triton.cdiv(T * G, BLOCK_G),)](
            rows[2], rows[3], center, teacher_lse, T * G, P, D, per_teacher, **tiles
        )
        loss_kernel[by_group](
            *rows, teacher_lse, center, student_lse, cross_entropy, T, G, P, D, per_student, per_teacher, **tiles
        )
        loss = (cross_entropy.sum(0) * weights).sum()
        if not gradients:
            return loss, None, None
        student_gradient = torch.empty_like(student, dtype=torch.float32)
        student_gradient_kernel[by_group](
            *rows, teacher_lse, center, student_lse, weights, student_gradient,
            T, G, P, D, per_student, per_teacher, **tiles,
        )  # fmt: skip
        prototype_gradient = torch.empty_like(student_prototypes, dtype=torch.float32)
        prototype_gradient_kernel[(triton.cdiv(P, tiles["BLOCK_P"]),)](
            *rows, teacher_lse, center, student_lse, weights / largest_weight, prototype_gradient,
            S, T, G, P, D, per_student, per_teacher, **tiles,
        )  # fmt: skip
    return loss, student_gradient, prototype_gradient * largest_weight
