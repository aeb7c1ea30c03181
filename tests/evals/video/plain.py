"""The protocol as it is told, one patch, one pixel at a time: the twin of what is fast."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mask = NDArray[np.bool_]


def plain_labels(target: Tensor, context: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Labels [C, h, w] of a frame's features [h, w, D] from (features [h, w, D], labels [C, h, w]) of others."""
    height, width, _ = target.shape
    labels = torch.zeros_like(context[0][1])
    for i in range(height):
        for j in range(width):
            rows = range(max(0, i - 12), min(height, i + 12 + 1))
            columns = range(max(0, j - 12), min(width, j + 12 + 1))
            candidates = []  # (weight, where its labels are) of whatever lies in the neighbourhood
            for features, soft in context:
                cosines = torch.cosine_similarity(features, target[i, j].expand_as(features), dim=-1).tolist()
                candidates += [(math.exp(cosines[k][n] / 0.1), (soft, k, n)) for k in rows for n in columns]
            ordered = sorted((weight for weight, _ in candidates), reverse=True)
            fifth = ordered[min(5, len(ordered)) - 1]
            kept = [(weight, source) for weight, source in candidates if weight >= fifth]
            total = sum(weight for weight, _ in kept)
            for weight, (soft, k, n) in kept:
                labels[:, i, j] += weight / total * soft[:, k, n]
    return labels


def plain_propagate(features: Sequence[Tensor], first: NDArray[np.uint8], objects: int) -> list[Tensor]:
    """Labels [1 + objects, h, w] of each frame; `first` [h, w] holds the ids of the first frame's patches."""
    grid = torch.from_numpy(first.astype(np.int64))
    start = torch.stack([grid == index for index in range(objects + 1)]).to(features[0])
    queue: list[tuple[Tensor, Tensor]] = []
    result = [start]
    for frame in features[1:]:
        labels = plain_labels(frame, [(features[0], start), *queue])
        queue = [*queue, (frame, labels)][-7:]
        result.append(labels)
    return result


def plain_read_out(labels: Tensor, *, patch_px: int, height_px: int, width_px: int) -> NDArray[np.uint8]:
    """Channel [height_px, width_px] that wins in labels [C, h, w]."""
    channels = [_stretch(_bilinear(channel.double().numpy(), patch_px)) for channel in labels]
    large_h, large_w = channels[0].shape
    out = np.zeros((height_px, width_px), dtype=np.uint8)
    for y in range(height_px):
        for x in range(width_px):
            # nearest: the source pixel under the centre of the wanted one
            row, column = int((y + 0.5) * large_h / height_px), int((x + 0.5) * large_w / width_px)
            out[y, x] = int(np.argmax([channel[row, column] for channel in channels]))
    return out


def _bilinear(channel: NDArray[np.float64], factor: int) -> NDArray[np.float64]:
    def weights(count: int) -> NDArray[np.float64]:
        matrix = np.zeros((count * factor, count))
        for to in range(count * factor):
            at = min(max((to + 0.5) / factor - 0.5, 0), count - 1)
            low = min(int(at), count - 1)
            matrix[to, low] += 1 - (at - low)
            matrix[to, min(low + 1, count - 1)] += at - low
        return matrix

    return weights(channel.shape[0]) @ channel @ weights(channel.shape[1]).T


def _stretch(channel: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = channel.min(), channel.max()
    return (channel - low) / (high - low) if high > low else np.zeros_like(channel)


def plain_j(truth: Mask, predicted: Mask) -> float:
    both = sum(1 for t, p in zip(truth.flat, predicted.flat, strict=True) if t and p)
    either = sum(1 for t, p in zip(truth.flat, predicted.flat, strict=True) if t or p)
    return both / either if either else 1.0


def plain_contour(mask: Mask) -> list[tuple[int, int]]:
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            inside = [mask[b, a] for b, a in others if b < height and a < width]
            if any(value != mask[y, x] for value in inside):
                found.append((y, x))
    return found


def plain_f(truth: Mask, predicted: Mask) -> float:
    theirs, ours = plain_contour(truth), plain_contour(predicted)
    if not theirs and not ours:
        return 1.0
    if not theirs or not ours:
        return 0.0
    reach = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))

    def share(of: list[tuple[int, int]], near: list[tuple[int, int]]) -> float:
        disk = [(b, a) for b in range(-reach, reach + 1) for a in range(-reach, reach + 1) if b * b + a * a <= reach**2]
        reached = {(y + b, x + a) for y, x in near for b, a in disk}
        return sum(pixel in reached for pixel in of) / len(of)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def plain_statistics(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, recall, decay."""
    count = len(values)
    edges = [round(1 + i * (count - 1) / 4 + 1e-10) - 1 for i in range(5)]
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    mean = sum(values) / count
    recall = sum(value > 0.5 for value in values) / count
    return mean, recall, sum(first) / len(first) - sum(last) / len(last)


def plain_scores(truths: Mapping[int, NDArray[np.uint8]], predicted: Mapping[int, NDArray[np.uint8]]) -> list[float]:
    """J mean, recall, decay and F mean, recall, decay of a DAVIS sequence, averaged over its objects."""
    last = len(truths) - 1
    start = np.where(truths[0] == 255, 0, truths[0])
    rows = []
    for index in range(1, int(start.max()) + 1):
        pairs = [(truths[frame] == index, predicted[frame] == index) for frame in range(1, last)]
        rows.append([*plain_statistics([plain_j(*p) for p in pairs]), *plain_statistics([plain_f(*p) for p in pairs])])
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
