"""The search for settings on made-up measurements; and once with real ones, whatever they are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from crisp.benchmarks import loader_tune
from crisp.benchmarks.loader import main
from crisp.benchmarks.loader_config import LoaderBenchConfig
from crisp.benchmarks.loader_tune import (
    Setting,
    Trial,
    Tuned,
    Values,
    choose,
    flags,
    print_tuned,
    search,
    settings_for,
    with_values,
)
from crisp.config import TrainConfig
from crisp.shard_imagenet.config import ShardConfig
from crisp.shard_imagenet.shard import shard_imagenet


def trial(*rounds: float) -> Trial:
    return Trial(values={}, rounds=rounds)


def test_the_best_is_taken_and_ties_go_to_the_smaller() -> None:
    assert choose([trial(100), trial(200), trial(150)]) == 1
    assert choose([trial(95, 97, 99), trial(96, 100, 104)]) == 0, "97 is not below 96: within the spread"
    assert choose([trial(246, 250, 253), trial(224, 330, 436)]) == 1, "a disturbed turn makes no tie"
    assert choose([trial(95, 95, 99), trial(96, 100, 104)]) == 1
    assert choose([trial(100), trial(100)]) == 0


def setting(name: str, *values: Any) -> Setting:
    return Setting(name=name, values=tuple({name: value} for value in values))


def test_settings_are_searched_one_at_a_time_until_nothing_changes() -> None:
    asked: list[Values] = []

    def measure(wanted: list[Values]) -> list[tuple[float, ...]]:
        asked.extend(wanted)
        # b = 3 pays only with a = 2: a first pass from a = 1, b = 1 finds a = 2, then b = 3.
        return [(100.0 * values["a"] + (10 * values["b"] if values["a"] == 2 else 0),) for values in wanted]

    settings = [setting("a", 1, 2), setting("b", 1, 3)]
    values, steps = search({"a": 1, "b": 1}, settings, measure)
    assert values == {"a": 2, "b": 3}
    assert [step.setting for step in steps] == ["a", "b", "a"], "what was compared before is not again"
    assert len(asked) == len({json.dumps(each, sort_keys=True) for each in asked}), "nothing is measured twice"
    assert asked[0] == {"a": 1, "b": 1}
    assert search({"a": 2, "b": 3}, settings, measure)[1][2:] == [], "a pass without a change is the last"


def test_the_search_ends_after_two_passes() -> None:
    """Measurements that contradict each other must not keep it going."""
    flip = iter(range(1000))
    values, steps = search(
        {"a": 1, "b": 1},
        [setting("a", 1, 2), setting("b", 1, 2)],
        lambda wanted: [(float(next(flip)),) for _ in wanted],
    )
    assert len(steps) <= 4
    assert set(values) == {"a", "b"}


def test_every_setting_is_a_field(shards: Path) -> None:
    for device in ("cpu", "gpu"):
        settings = settings_for(LoaderBenchConfig(shards=shards, device=device))  # type: ignore[arg-type]
        names = {name for each in settings for values in each.values for name in values}
        assert {"data.threads", "data.prefetch_batches"} <= names
        assert ("data.read_threads" in names) == (device == "cpu")
        assert ("data.dali.hardware_decoder_share" in names) == (device == "gpu")
        assert ("data.dali.preallocate_width_px" in names) == (device == "gpu")
        for each in settings:
            for values in each.values:
                changed = with_values(TrainConfig(), values)
                assert all(eval(f"changed.{name}", {"changed": changed}) == value for name, value in values.items())


def test_flags_are_those_of_crisp_train() -> None:
    import tyro

    values = {
        "data.threads": 3,
        "data.dali.hardware_decoder_share": 0.65,
        "data.dali.preallocate_width_px": 0,
        "data.dali.preallocate_height_px": 0,
    }
    text = flags(values, "dali")
    assert text == "--data.renderer dali --data.threads 3 --data.dali.hardware-decoder-share 0.65"
    parsed = tyro.cli(TrainConfig, args=text.split())
    assert (parsed.data.renderer, parsed.data.threads) == ("dali", 3)
    assert parsed.data.dali.hardware_decoder_share == 0.65
    assert "--data.dali.preallocate-width-px 500" in flags({**values, "data.dali.preallocate_width_px": 500}, "dali")


def test_the_table_shows_what_was_tried() -> None:
    def measure(wanted: list[Values]) -> list[tuple[float, ...]]:
        return [(float(values["data.threads"]),) for values in wanted]

    values, steps = search({"data.threads": 1}, [setting("data.threads", 1, 2)], measure)
    console = Console(width=100)
    with console.capture() as capture:
        print_tuned(
            Tuned(steps=steps, values=values, samples_per_s=2, cores_of_others=1, flags="--data.threads 2"), console
        )
    assert capture.get().strip().splitlines()[-1] == "--data.threads 2"
    assert "data.threads" in capture.get()
    assert "quiet machine" in capture.get()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.jpg")
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), workers=1))
    return folder / "shards"


@pytest.mark.slow
def test_tuning_ends_with_flags(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_tune, "settings_for", lambda _: [setting("data.threads", 1, 2)])
    file = tmp_path / "tuned.json"
    options = "--tune --batch 2 --rounds 1 --seconds 0.05 --views.local-views 1"
    main(["--shards", str(shards), "--json", str(file), *options.split()])
    written = json.loads(file.read_text())
    assert written["flags"].startswith("--data.renderer cpu --data.threads")
    assert written["flags"] in capsys.readouterr().out
