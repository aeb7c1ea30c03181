"""The page in headless Chromium: no error, everything visible, keys, pointer, narrow and wide, light and dark."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crisp.recipes import recipe_named
from crisp.report.command import main as report
from crisp.report.config import ReportConfig
from crisp.shard_imagenet import ShardConfig, shard_imagenet
from crisp.trainer import train
from tests.report.folders import bare_run, full_run
from tests.report.test_page import SECTIONS

pytestmark = pytest.mark.slow

WebDriver = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    """Debian's Chromium and its driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver: 'apt-get install chromium chromium-driver' brings them")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # Tests may run as root in a container, where Chromium's own sandbox does not start and /dev/shm is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps as training leaves it, with online k-NN and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for i in range(24):
        target = folder / "images" / f"class {i % 2} <&>" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(target)
    shard_imagenet(ShardConfig(source=str(folder / "images"), out=str(folder / "shards"), workers=1))
    base = recipe_named("demo")
    config = replace(
        base,
        out=folder / "run",
        log_every=1,
        data=replace(base.data, shards=str(folder / "shards"), threads=1, renderer="cpu"),
        views=replace(base.views, reference_px=64, global_px=64, local_px=32, local_views=2),
        optim=replace(base.optim, epochs=2, global_batch=8, warmup_epochs=1),
        knn=replace(base.knn, every_epochs=1, k=3),
        pictures=replace(base.pictures, every_epochs=1, images=2, pca_px=64),
    )
    return train(config)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> dict[str, Path]:
    """Of a full run, of a bare one, of two side by side, and of one that was trained."""
    folder = tmp_path_factory.mktemp("runs")
    full, bare = full_run(folder / "<b>full"), bare_run(folder / "bare")
    other = full_run(folder / "other", threshold=0.5, steps=150)
    return {
        name: report(ReportConfig(runs=runs, out=folder / f"{name}.html"))
        for name, runs in {
            "full": (full,),
            "bare": (bare,),
            "both": (full, other),
            "trained": (trained,),
        }.items()
    }


def open_page(browser: WebDriver, page: Path, *, width_px: int = 1400, scheme: str = "light") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    metrics = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def press(browser: WebDriver, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def key(name: str) -> str:
    from selenium.webdriver.common.keys import Keys

    return str(getattr(Keys, name))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width_px", [400, 1400])
@pytest.mark.parametrize("name", ["full", "bare", "both", "trained"])
def test_every_section_shows_without_an_error(
    name: str, width_px: int, scheme: str, browser: WebDriver, pages: dict[str, Path]
) -> None:
    open_page(browser, pages[name], width_px=width_px, scheme=scheme)
    assert browser.get_log("browser") == []
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('section')].map(s => {const b = s.getBoundingClientRect();"
        "return [s.id, b.width, b.height, s.querySelector('.blocks').innerText.trim().length]})"
    )
    assert [size[0] for size in sizes] == list(SECTIONS)
    assert all(width > 300 and height > 60 and text > 10 for _, width, height, text in sizes), sizes
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('figure.chart')].map(f => f.querySelectorAll('path.line').length)"
    )
    assert all(drawn)
    assert bool(drawn) == (name != "bare")
    assert browser.execute_script(
        "return [...document.images].every(i => i.closest('[hidden]') || (i.complete && i.naturalWidth > 0))"
    )


def test_a_trained_run_fills_its_charts(browser: WebDriver, pages: dict[str, Path]) -> None:
    open_page(browser, pages["trained"])
    titles = browser.execute_script(
        "return [...document.querySelectorAll('figure.chart > figcaption')].map(title => title.textContent)"
    )
    assert len(titles) == 18, titles
    text = browser.execute_script("return document.querySelector('main').innerText")
    for told in ("6 of 6", "complete", "never stopped", "1 on 1 node", "data.shards"):
        assert told in text
    assert "not logged" not in text
    steps = "return [...document.querySelectorAll('.strip figure')].map(figure => Number(figure.dataset.step))"
    assert browser.execute_script(steps) == [0, 3, 6] * 2


def test_dark_is_dark(browser: WebDriver, pages: dict[str, Path]) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        open_page(browser, pages["full"], scheme=scheme)
        colours = browser.execute_script(
            "return ['body', 'figure.chart', '.note'].flatMap(query => {"
            "const style = getComputedStyle(document.querySelector(query));"
            "return [style.backgroundColor, style.color]})"
        )
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    light, dark = brightness["light"], brightness["dark"]
    assert light[0] > light[1]
    assert light[2] > light[1]
    assert dark[0] < dark[1]
    assert dark[2] < dark[1]
    assert light[5] < light[0]
    assert dark[5] > dark[0]


def test_the_slider_moves_with_the_arrow_keys(browser: WebDriver, pages: dict[str, Path]) -> None:
    open_page(browser, pages["full"])
    shown = (
        "const all = [...document.querySelectorAll('.strip figure')];"
        "return all.filter(figure => figure.offsetHeight > 0).map(figure => figure.dataset.step)"
    )
    output = "return document.querySelector('.slider output').textContent"
    assert browser.execute_script(shown) == ["120", "120"]
    browser.execute_script("document.querySelector('.slider input[type=range]').focus()")
    press(browser, key("ARROW_LEFT"))
    assert browser.execute_script(shown) == ["60", "60"]
    assert browser.execute_script(output) == "step 60, epoch 1"
    press(browser, key("ARROW_RIGHT"))
    assert browser.execute_script(shown) == ["120", "120"]
    assert browser.execute_script(output) == "step 120, epoch 2"


def test_actual_size(browser: WebDriver, pages: dict[str, Path]) -> None:
    open_page(browser, pages["full"])
    browser.execute_script("document.querySelector('.slider input[type=checkbox]').focus()")
    press(browser, " ")
    width = "return [...document.images].find(i => i.offsetHeight > 0).offsetWidth"
    assert browser.execute_script(width) == 60


def test_hover_and_keys_show_values(browser: WebDriver, pages: dict[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    open_page(browser, pages["both"])
    chart = next(
        figure
        for figure in browser.find_elements(By.CSS_SELECTOR, "figure.chart")
        if figure.find_element(By.TAG_NAME, "figcaption").text == "Learning rate"
    )
    plot, tip = chart.find_element(By.CSS_SELECTOR, ".plot"), chart.find_element(By.CSS_SELECTOR, ".tip")
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element(plot).perform()
    assert tip.is_displayed()
    head, *values = tip.text.splitlines()
    assert re.fullmatch(r"step (70|80|90)", head)
    assert values == ["<b>full", "0.001", "other", "0.001"]
    assert tip.location["x"] - chart.location["x"] >= 0
    assert tip.location["x"] + tip.size["width"] <= chart.location["x"] + chart.size["width"] + 1

    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].focus()", plot)
    press(browser, key("HOME"))
    assert tip.text.startswith("step 10\n")
    press(browser, key("ARROW_RIGHT"), key("ARROW_RIGHT"))
    assert tip.text.startswith("step 30\n")
    press(browser, key("END"))
    assert tip.text.splitlines()[0] == "step 150"
    assert "<b>full (at 120)" in tip.text, "the shorter run's last value, and where it is from"
    press(browser, key("ESCAPE"))
    assert not tip.is_displayed()


def test_the_page_is_reached_by_tab_alone(browser: WebDriver, pages: dict[str, Path]) -> None:
    open_page(browser, pages["full"])
    reached = []
    for _ in range(90):
        press(browser, key("TAB"))
        active = browser.execute_script("const now = document.activeElement; return now.className || now.tagName")
        reached.append(active)
    assert {"skip", "A", "scroll", "SUMMARY", "plot", "INPUT", "frame"} <= set(reached)


def test_no_foreign_script_runs(browser: WebDriver, pages: dict[str, Path], tmp_path: Path) -> None:
    """The second lock: had a name come through unescaped, the page's policy would stop it."""
    page = tmp_path / "broken.html"
    broken = "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title = 'taken over'\">"
    page.write_text(pages["bare"].read_text().replace("<main>", f"<main>{broken}"))
    open_page(browser, page)
    assert browser.title == "bare – CRISP"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_it_prints(browser: WebDriver, pages: dict[str, Path]) -> None:
    open_page(browser, pages["full"], scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return document.querySelector('nav').offsetHeight") == 0
    document = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(document["data"]) > 20_000
