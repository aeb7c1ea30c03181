"""The same scores as a plain form of the protocol, written with scikit-learn, on real images and a random timm ViT."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from crisp.distributed import World
from crisp.evals.segmentation.command_knn import evaluate_knn
from crisp.evals.segmentation.command_linear import evaluate_linear
from crisp.evals.segmentation.config import SegKnnConfig, SegLinearConfig
from crisp.evals.segmentation.folder import FolderLayout
from crisp.models.frozen import BlockTokens, FrozenBackbone, FrozenModel

ALONE = World(rank=0, size=1, local_rank=0, nodes=1, device=torch.device("cpu"))
SIDE_PX, PATCH_PX = 128, 16


class RandomVit(FrozenBackbone):
    """Two blocks of timm's ViT-Ti/16, as it initialises them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.vit = timm.create_model("vit_tiny_patch16_224", img_size=SIDE_PX, depth=2, num_classes=0)
        self.dim, self.depth, self.patch_px, self.native_px = 192, 2, PATCH_PX, SIDE_PX
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, *, last: int = 1) -> list[BlockTokens]:
        tokens = self.vit.forward_features(images)
        return [BlockTokens(cls=tokens[:, 0], patches=tokens[:, 1:])]


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return FrozenModel(backbone=RandomVit(), name="random", source="random:", fingerprint="random", account="")


# --- the plain form ---


@dataclass
class Split:
    features: np.ndarray  # [images, n, D]
    pixels: np.ndarray  # [images, n, p*p]


@torch.no_grad()
def plain_split(backbone: RandomVit, images: Sequence[Path], masks: Sequence[Path]) -> Split:
    features, pixels = [], []
    for image, mask in zip(images, masks, strict=True):
        picture = Image.open(image).convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        values = (np.asarray(picture) / 255 - backbone.mean) / backbone.std
        tokens = backbone.vit.forward_features(torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None])
        features.append(tokens[0, 1:].numpy())
        labels = np.asarray(Image.open(mask).resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST))
        places = [(i, j) for i in range(0, SIDE_PX, PATCH_PX) for j in range(0, SIDE_PX, PATCH_PX)]
        pixels.append([labels[i : i + PATCH_PX, j : j + PATCH_PX].ravel() for i, j in places])
    return Split(np.array(features), np.array(pixels))


def plain_miou(truth: np.ndarray, predicted: np.ndarray, ignored: Sequence[int]) -> float:
    kept = ~np.isin(truth, ignored)
    return 100 * float(jaccard_score(truth[kept], predicted[kept], average="macro"))


def modes(labels: np.ndarray, axis: int) -> np.ndarray:
    return torch.from_numpy(labels).mode(dim=axis).values.numpy()  # the smallest of equals


class Plain:
    """Split, standardisation, choice, final fit, as PROTOCOL says them; `fit_predict` is the classifier."""

    def __init__(self, train: Split, val: Split, ignored: Sequence[int]) -> None:
        self.ignored = ignored
        order = np.random.default_rng(0).permutation(len(train.features))
        held = order[: len(order) // 10]
        fit = np.setdiff1d(order, held)
        scaler = StandardScaler().fit(train.features[fit].reshape(-1, 192).astype(np.float64))

        def flat(split: Split, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            features = scaler.transform(split.features[images].reshape(-1, 192).astype(np.float64))
            return features, split.pixels[images].reshape(-1, PATCH_PX**2)

        self.fit, self.held = flat(train, fit), flat(train, held) if len(held) else None
        self.train, self.val = flat(train, np.arange(len(order))), flat(val, np.arange(len(val.features)))

    def labelled(self, split: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        kept = ~np.isin(modes(split[1], axis=1), self.ignored)
        return split[0][kept], split[1][kept]

    def search(self, choices: Sequence[Any]) -> tuple[dict[Any, float], Any, float]:
        """Scores on the held-out images, the choice, and its score on val."""
        scores = dict(self.scores(choices, self.fit, self.held))
        best = max(choices, key=scores.__getitem__)
        return scores, best, dict(self.scores([best], self.train, self.val))[best]

    def scores(self, choices: Sequence[Any], fit: Any, test: Any) -> Iterator[tuple[Any, float]]:
        bank = self.labelled(fit)
        for choice in choices:
            predict = self.knn if isinstance(choice, tuple) else self.linear
            yield choice, plain_miou(test[1], predict(choice, bank, test[0]), self.ignored)

    @staticmethod
    def knn(choice: tuple[int, str], bank: Any, queries: np.ndarray) -> np.ndarray:
        k, distance = choice
        ours, keys = torch.from_numpy(queries), torch.from_numpy(bank[0])  # float64
        if distance == "cosine":
            distances = 1 - normalize(ours) @ normalize(keys).T
        else:
            distances = torch.cdist(ours, keys)
        neighbours = distances.topk(k, largest=False).indices.numpy()
        return modes(bank[1][neighbours], axis=1)

    @staticmethod
    def linear(c: float, bank: Any, queries: np.ndarray) -> np.ndarray:
        model = LogisticRegression(C=c, tol=1e-5, max_iter=1000)
        with threadpool_limits(1):
            predicted = model.fit(bank[0], modes(bank[1], axis=1)).predict(queries)
        return np.broadcast_to(predicted[:, None], (len(queries), PATCH_PX**2))


# --- data ---


@dataclass
class Data:
    options: dict[str, Any]
    plain: Plain


@pytest.fixture(scope="module")
def camvid(test_data: Path, model: FrozenModel) -> Data:
    root = test_data / "camvid"
    splits = [
        plain_split(model.backbone, sorted((root / s).iterdir()), sorted((root / f"{s}annot").iterdir()))  # type: ignore[arg-type]
        for s in ("train", "val")
    ]
    layout = FolderLayout(images="{split}", masks="{split}annot", ignored=(11,), classes=12)
    return Data({"data": root, "dataset": "folder", "folder": layout}, Plain(*splits, ignored=(11,)))


@pytest.fixture(scope="module")
def coco128(test_data: Path, model: FrozenModel) -> Data:
    root = test_data / "coco128"
    splits = [
        plain_split(model.backbone, sorted((root / "images" / s).iterdir()), sorted((root / "semantic" / s).iterdir()))  # type: ignore[arg-type]
        for s in ("train2017", "val2017")
    ]
    layout = FolderLayout(masks="semantic/{split}", train="train2017", val="val2017", ignored=(0,))
    options = {"data": root, "dataset": "folder", "folder": layout, "allow_empty_classes": True}
    return Data(options, Plain(*splits, ignored=(0,)))


@pytest.fixture(scope="module")
def ade20k(test_data: Path, model: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The three images in the official layout, one of them to score on."""
    source, root = test_data / "ade20k-sample", tmp_path_factory.mktemp("ade")
    images, masks = (sorted((source / kind).iterdir()) for kind in ("images", "annotations"))
    splits = []
    for split, which in (("training", slice(0, 2)), ("validation", slice(2, 3))):
        for kind, paths in (("images", images[which]), ("annotations", masks[which])):
            (root / kind / split).mkdir(parents=True)
            for path in paths:
                (root / kind / split / path.name).symlink_to(path)
        splits.append(plain_split(model.backbone, images[which], masks[which]))  # type: ignore[arg-type]
    options = {"data": root, "dataset": "ade20k", "allow_empty_classes": True}
    return Data(options, Plain(*splits, ignored=(0, 255)))


# --- the comparison ---


def knn(data: Data, model: FrozenModel, cache: Path, **options: Any) -> Any:
    config = SegKnnConfig(weights="random:", cache=cache, image_px=SIDE_PX, dtype="fp32", **data.options, **options)
    return evaluate_knn(config, model, ALONE)


@pytest.mark.parametrize("name", ["camvid", "coco128"])
def test_knn_equals_the_plain_form(
    name: str, model: FrozenModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data: Data = request.getfixturevalue(name)
    result = knn(data, model, tmp_path)
    choices = [(k, distance) for k in (1, 3, 10, 30) for distance in ("cosine", "l2")]
    held_out, best, score = data.plain.search(choices)
    assert result.chosen == dict(zip(("k", "distance"), best, strict=True))
    # 0.01: features of one image at a time differ in their last bits, which turns a near tie now and then
    assert result.scores[0].value == pytest.approx(score, abs=0.01)
    ours = {(s.settings["k"], s.settings["distance"]): s.value for s in result.scores[1:]}
    assert ours == pytest.approx(held_out, abs=0.01)


def test_linear_equals_scikit_learn(camvid: Data, model: FrozenModel, tmp_path: Path) -> None:
    cs = (1e-4, 1e-2)
    config = SegLinearConfig(weights="random:", cache=tmp_path, image_px=SIDE_PX, cs=cs, **camvid.options)
    result = evaluate_linear(config, model, ALONE)
    held_out, best, score = camvid.plain.search(cs)
    assert result.chosen == {"C": best}
    assert result.scores[0].value == pytest.approx(score, abs=0.1)
    assert {s.settings["C"]: s.value for s in result.scores[1:]} == pytest.approx(held_out, abs=0.1)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_ade20k_images_in_the_official_layout(distance: str, ade20k: Data, model: FrozenModel, tmp_path: Path) -> None:
    result = knn(ade20k, model, tmp_path, ks=(3,), distances=(distance,))
    ((_, expected),) = ade20k.plain.scores([(3, distance)], ade20k.plain.train, ade20k.plain.val)
    assert result.scores[0].value == pytest.approx(expected, abs=0.01)
    assert result.settings["ignored"] == [0, 255]
