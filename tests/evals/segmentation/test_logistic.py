"""The fit against scikit-learn's on the same data, on ranks against one, and the search under it on known functions."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from torch import Tensor

from crisp.errors import CrispError
from crisp.evals.segmentation import logistic
from crisp.evals.segmentation.lbfgs import minimise
from crisp.evals.segmentation.logistic import C_GRID, HISTORY, LINE_SEARCH, MAX_ITER, TOL, LogisticModel, fit_logistic

KINDS = ("separable", "collinear", "imbalanced", "absent", "binary", "constant")
WORKER = Path(__file__).with_name("logistic_ranks.py")


def made(kind: str) -> tuple[Tensor, Tensor]:
    """600 features of width 12 to 20 and one of four targets."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 4, 600)
    if kind == "imbalanced":
        targets = np.where(draw.random(600) < 0.9, 0, targets)
    centres = draw.normal(size=(4, 12)) * (3 if kind == "separable" else 0.4)
    features = draw.normal(size=(600, 12)) + centres[targets]
    if kind == "collinear":
        features = np.concatenate([features, features[:, :3], features @ draw.normal(size=(12, 5))], axis=1)
    if kind == "constant":
        features[:, 4], features[:, 5] = 0.0, 7.0
    if kind == "absent":
        targets[targets == 2] = 1
    if kind == "binary":
        targets = np.where(targets > 1, 3, 0)
    return torch.from_numpy(features), torch.from_numpy(targets)


def of_sklearn(features: Tensor, targets: Tensor, c: float, **options: object) -> tuple[float, LogisticRegression]:
    """The objective at scikit-learn's solution, and the solution."""
    x, y = features.double().numpy(), targets.numpy()
    model = LogisticRegression(C=c, **options).fit(x, y)
    scores = model.decision_function(x)
    if scores.ndim == 1:
        scores = np.stack([0 * scores, scores], axis=1)
    own = scores[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    loss = (np.logaddexp.reduce(scores, axis=1) - own).mean() + (model.coef_**2).sum() / (2 * c * len(y))
    return float(loss), model


def objective(model: LogisticModel, features: Tensor, targets: Tensor, c: float) -> float:
    """Written out, from weight and bias."""
    logits = features.double() @ model.weight.T + model.bias
    return float(
        torch.nn.functional.cross_entropy(logits, targets) + model.weight.square().sum() / (2 * c * len(targets))
    )


def test_the_protocol() -> None:
    assert (MAX_ITER, TOL, HISTORY, LINE_SEARCH) == (1000, 1e-12, 5, 50)
    np.testing.assert_allclose(C_GRID, 10 ** np.linspace(-6, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_predictions_are_those_of_scikit_learn(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the whole grid; in chunks that do not divide the rows."""
    monkeypatch.setattr(logistic, "CHUNK_LOGITS", 4 * 170)
    features, targets = made(kind)
    for c in C_GRID:
        expected, reference = of_sklearn(features, targets, c, max_iter=1000, tol=1e-12, solver="newton-cholesky")
        model = fit_logistic(features.to(dtype), targets, classes=4, c=c)
        assert model.loss == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert model.loss == pytest.approx(expected, abs=2e-5)
        assert objective(model, features, targets, c) == pytest.approx(model.loss, abs=1e-5)
        same = model.predict(features.to(dtype)).numpy() == reference.predict(features.numpy())
        assert same.mean() > 0.998, f"C={c}"


def test_loss_is_that_of_scikit_learns_lbfgs() -> None:
    features, targets = made("collinear")
    for c in C_GRID:
        expected, _ = of_sklearn(features, targets, c, max_iter=1000, tol=1e-12)
        assert fit_logistic(features, targets, classes=4, c=c).loss == pytest.approx(expected, rel=1e-9)


def test_a_class_that_never_occurs_is_never_predicted() -> None:
    features, targets = made("absent")
    model = fit_logistic(features, targets, classes=6, c=1.0)
    assert model.bias.isinf().tolist() == [False, False, True, False, True, True]
    assert not model.weight[[2, 4, 5]].any()
    assert set(model.predict(100 * torch.randn(500, 12, dtype=torch.float64)).tolist()) == {0, 1, 3}


def test_a_single_class_needs_no_fit() -> None:
    model = fit_logistic(torch.randn(5, 3), torch.full((5,), 2), classes=4, c=1.0)
    assert (model.loss, model.iterations) == (0.0, 0)
    assert model.predict(torch.randn(4, 3)).tolist() == [2] * 4


def test_two_fits_are_the_same_bit_for_bit_and_memory_maps_do(tmp_path: Path) -> None:
    features, targets = made("imbalanced")
    np.save(tmp_path / "features.npy", features.float().numpy())
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    first, second = (fit_logistic(given, targets, classes=4, c=1.0) for given in (features.float(), mapped))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert torch.equal(first.predict(features.float()), second.predict(mapped))


@pytest.mark.parametrize("kind", ["absent", "binary"])
def test_a_start_at_the_solution_stays_there(kind: str) -> None:
    features, targets = made(kind)
    cold = fit_logistic(features, targets, classes=4, c=1.0)
    warm = fit_logistic(features, targets, classes=4, c=1.0, start=cold)
    assert warm.iterations < cold.iterations / 2
    assert warm.loss == pytest.approx(cold.loss, rel=1e-12)


def test_the_limit_of_iterations_is_kept() -> None:
    features, targets = made("imbalanced")
    assert fit_logistic(features, targets, classes=4, c=1.0, max_iter=3).iterations == 3


def test_ranks_fit_what_one_process_fits(tmp_path: Path) -> None:
    """60 and 30 rows, 90 and none; and a wrong target on one rank stops both with the same line."""
    spec = importlib.util.spec_from_file_location("logistic_ranks", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    whole = worker.fit(slice(None))
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name in worker.SHARES:
        weight, bias = found[0][name]
        assert torch.equal(weight, found[1][name][0])
        assert torch.equal(bias, found[1][name][1])
        torch.testing.assert_close(weight, whole.weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias, whole.bias, rtol=1e-5, atol=1e-6)
    assert {one["message"] for one in found} == {"1 targets lie outside 0 to 3; drop rows with ignored labels first"}


def camvid(split: str, count: int, folder: Path) -> tuple[Tensor, Tensor]:
    """Patch features [n, D] of a small random ViT and their pixel labels [n, 256] (11: ignored)."""
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=128, embed_dim=48, num_heads=3, depth=2
    ).eval()
    paths = sorted((folder / split).iterdir())
    features, labels = [], []
    for path in paths[:count]:
        image = Image.open(path).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        truth = Image.open(folder / f"{split}annot" / path.name).resize((128, 128), Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            features.append(net.forward_features((pixels - 0.45) / 0.225)[0, 1:])
        patches = torch.from_numpy(np.array(truth)).view(8, 16, 8, 16).permute(0, 2, 1, 3)
        labels.append(patches.reshape(64, 256))
    return torch.cat(features), torch.cat(labels)


@pytest.mark.slow
def test_real_features_get_scikit_learns_miou(test_data: Path) -> None:
    """Road scenes: classes from 1 to 880 patches, features that depend on each other."""
    train, labels = camvid("train", 23, test_data / "camvid")
    val, truth = camvid("val", 9, test_data / "camvid")
    mean, std = train.mean(dim=0), train.std(dim=0)
    targets = labels.long().mode(dim=1).values
    train, val, targets = ((train - mean) / std)[targets != 11], (val - mean) / std, targets[targets != 11]
    train, val = train.double(), val.double()  # what is compared is the search, not rounding
    scored = truth.flatten() != 11

    def miou(predicted: Tensor) -> float:
        pixels = predicted[:, None].expand(-1, 256).flatten()
        return 100 * float(jaccard_score(truth.flatten()[scored], pixels[scored], average="macro"))

    for c in C_GRID:
        expected, reference = of_sklearn(train, targets, c, max_iter=1000, tol=1e-12, solver="newton-cholesky")
        model = fit_logistic(train, targets, classes=12, c=c)
        assert model.loss == pytest.approx(expected, rel=1e-4, abs=1e-4), f"C={c}"
        own = miou(torch.from_numpy(reference.predict(val.double().numpy())))
        assert miou(model.predict(val)) == pytest.approx(own, abs=0.1), f"C={c}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": 0.0}, "c=0.0: the inverse strength"),
        ({"c": float("inf")}, "c=inf"),
        ({"targets": torch.tensor([0, 1])}, "features of shape (3, 2) with 2 targets"),
        ({"targets": torch.tensor([0, -1, 5])}, "2 targets lie outside 0 to 3"),
        ({"features": torch.tensor([[0.0, 1], [torch.nan, 0], [1, 1]])}, "1 features are not finite"),
        ({"features": torch.ones(0, 2), "targets": torch.ones(0).long()}, "no rows"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    given = {"features": torch.eye(3)[:, :2], "targets": torch.tensor([0, 1, 2]), "classes": 4, "c": 1.0}
    with pytest.raises(CrispError) as raised:
        fit_logistic(**{**given, **change})  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_a_start_of_other_classes_is_refused() -> None:
    features, targets = made("absent")
    start = fit_logistic(features, targets, classes=4, c=1.0, max_iter=1)
    with pytest.raises(CrispError, match="start: a model of other classes"):
        fit_logistic(*made("binary"), classes=4, c=1.0, start=start)


def rosenbrock(point: Tensor) -> tuple[float, Tensor]:
    point = point.clone().requires_grad_()
    value = (100 * (point[1:] - point[:-1] ** 2) ** 2 + (1 - point[:-1]) ** 2).sum()
    (gradient,) = torch.autograd.grad(value, point)
    return float(value.detach()), gradient


def test_the_search_finds_a_bent_valley() -> None:
    found = minimise(rosenbrock, torch.zeros(6).double(), max_iter=500, tol=1e-5, history=5, line_search=50)
    assert found.reason == "gradient"
    torch.testing.assert_close(found.point, torch.ones(6).double(), rtol=0, atol=1e-5)


def test_the_search_says_why_it_ended() -> None:
    start = torch.zeros(6).double()
    assert minimise(rosenbrock, start, max_iter=4, tol=0, history=5, line_search=50).reason == "iterations"
    assert minimise(rosenbrock, start, max_iter=5000, tol=0, history=5, line_search=50).reason == "flat"


def test_the_search_keeps_to_its_evaluations() -> None:
    """A line on which the value never falls enough: after so many tries, along two directions, it gives up."""
    calls = 0

    def cliff(point: Tensor) -> tuple[float, Tensor]:
        nonlocal calls
        calls += 1
        return (0.0 if calls == 1 else float("inf")), torch.ones(2).double()

    found = minimise(cliff, torch.zeros(2).double(), max_iter=9, tol=0, history=5, line_search=7)
    assert (found.reason, found.iterations, calls) == ("flat", 0, 1 + 7)
    assert not found.point.any()
