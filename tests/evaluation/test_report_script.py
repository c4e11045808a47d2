"""Tests of the report's script in Debian's chromium; skipped where it or selenium is missing."""

import json
import shutil
import time

import numpy as np
import pytest

from dmpo_jax.data import sources
from dmpo_jax.data.sources import decode_image
from tests.support.made_evaluation import EVIL, write

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver, as Debian has them"
)
WAIT = 20  # seconds, at most


class Browser:
    """One page in a headless browser; every question is answered by its own script."""

    def __init__(self, downloads):
        webdriver = pytest.importorskip("selenium.webdriver")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        service = webdriver.ChromeService(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.key = pytest.importorskip("selenium.webdriver.common.keys").Keys

    def open(self, path):
        self.driver.get(f"file://{path}")
        self.run("localStorage.clear()")
        self.driver.refresh()

    def run(self, script):
        return self.driver.execute_script(script)

    def texts(self, selector):
        return self.run(
            f"return [...document.querySelectorAll('{selector}')].map(x => x.innerText)"
        )

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def choose(self, name, value):
        self.run(f"document.getElementById('{name}').value = '{value}'")
        self.run(f"document.getElementById('{name}').onchange()")

    def press(self, key):
        self.driver.switch_to.active_element.send_keys(key)

    def prompts(self):
        return self.texts("#cards .prompt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    write(out, count=6)
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("downloads"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def page(browser, folder):
    browser.open(folder / "report" / "index.html")
    yield browser
    assert browser.driver.get_log("browser") == []  # no errors, no warnings


def test_cards_are_in_order_and_all_images_load_and_have_alt_texts(page):
    page.run("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    images = "[...document.images].filter(image => image.src)"
    deadline = time.monotonic() + WAIT
    while not page.run(f"return {images}.every(x => x.complete)") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert page.run(f"return {images}.map(x => x.naturalWidth > 0)") == [True] * 12
    assert page.run(f"return {images}.filter(x => !x.alt).length") == 0
    assert page.find("#cards img").get_attribute("alt") == "base: prompt no. 5"
    gains = [5, 4, 3, 0, 2, 1]  # numbers, by how much is gained or lost; 1 is a tie
    assert [p for p in page.prompts()] == [EVIL if i == 0 else f"prompt no. {i}" for i in gains]
    assert page.texts("#cards .won b") == ["<tuned> 1%"] * 3 + ["base", "<tuned> 1%"]


def test_controls_filter_and_order(page):
    page.find("#search").send_keys("no. prompt 4")
    assert page.prompts() == ["prompt no. 4"]
    assert page.texts("#count") == ["1 of 6 comparisons"]
    page.find("#search").clear()
    page.run("document.getElementById('search').oninput()")
    page.choose("category", "Arts & Crafts")
    assert page.prompts() == ["prompt no. 5", "prompt no. 3", "prompt no. 1"]
    page.choose("category", "")
    page.choose("winner", "-1")
    assert page.prompts() == [EVIL]
    page.choose("winner", "0")
    assert page.prompts() == ["prompt no. 1"]
    page.choose("winner", "")
    page.choose("order", "losses")
    assert page.prompts()[:2] == [EVIL, "prompt no. 1"]
    page.choose("order", "number")
    assert page.prompts()[-1] == "prompt no. 5"


def test_the_enlarged_view_is_used_by_keys(page, folder):
    page.run("document.querySelector('#cards a').focus()")
    page.press(page.key.ENTER)
    assert page.run("return document.getElementById('zoom').open")
    assert page.texts("#position") == ["1 of 6"]
    page.press(page.key.ARROW_LEFT)  # there is none before
    page.press(page.key.ARROW_RIGHT)
    assert page.texts("#zoom-prompt") == ["prompt no. 4"]
    links = page.run("return [...document.querySelectorAll('#zoom a')].map(a => a.href)")
    assert links == [(folder / f"images/{m}/00004.png").as_uri() for m in ("base", "<tuned> 1%")]
    page.press(page.key.ESCAPE)
    assert not page.run("return document.getElementById('zoom').open")
    assert page.run("return document.activeElement === document.querySelector('#cards a')")


def test_blind_hides_names_scores_and_addresses(page):
    page.press("b")
    shown = page.run("return document.getElementById('cards').outerHTML")
    for telling in ("base", "tuned", "won", "20.00", "images/base"):
        assert telling not in shown
    assert page.texts("#cards .pair:first-child b") == ["left", "right"]
    sides = page.run("return list.map(row => Number(swapped(row)))")
    assert 0 < sum(sides) < 6
    page.press("b")
    assert page.texts("#cards .pair:first-child b") == ["base", "<tuned> 1%"]


def test_votes_are_saved_as_pairs_that_can_be_trained_on(page, folder, tmp_path):
    page.press("b")
    page.run("document.querySelector('#cards a').click()")
    for key in "120":  # the left one of no. 5, the right one of no. 4, a tie of no. 3
        page.press(key)
    page.press(page.key.ESCAPE)
    page.run("document.querySelector('#cards .pair:nth-child(4) .votes button').click()")
    assert page.texts("#tally") == ["4 voted on"]  # the sides stay hidden
    page.driver.refresh()  # votes are kept
    assert page.texts("#tally")[0].startswith("4 voted on: ")
    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.find("#save").click()
    saved, deadline = tmp_path / "votes.jsonl", time.monotonic() + WAIT
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    shutil.copy(saved, folder / "votes.jsonl")
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert {line["prompt"]: line["label_0"] for line in lines} == {
        "prompt no. 5": 1,
        "prompt no. 4": 0,
        "prompt no. 3": 0.5,
        EVIL: 1,
    }
    source = sources.open_source(f"table:{folder}/votes.jsonl", ties="keep")
    pairs = [pair for unit in source.units() for pair in source.read(unit)]
    swapped = page.run(
        "return Object.fromEntries(data.rows.map(row => [row.prompt, swapped(row)]))"
    )
    tuned = 0
    for pair in pairs:
        sides = [int(np.asarray(decode_image(image))[0, 0, 1] > 50) for image in pair.images]
        assert sides == ([1, 0] if swapped[pair.prompt] else [0, 1])  # as they were shown
        tuned += pair.preference == (1.0 if sides[0] else 0.0)
    assert f"{tuned} for <tuned> 1%, {3 - tuned} for base, 1 ties" in page.texts("#tally")[0]


def test_one_in_many_models_is_compared(browser, tmp_path):
    browser.open(write(tmp_path, models=("base", "one", "two"), categories=(), single_file=True))
    assert len(browser.texts("#cards .pair:first-child figure")) == 3
    browser.choose("model", "two")
    browser.press("b")
    assert len(browser.texts("#cards .pair:first-child figure")) == 2
    assert browser.driver.get_log("browser") == []


def test_many_rows_come_on_demand(browser, tmp_path, monkeypatch):
    monkeypatch.setattr("dmpo_jax.evaluation.report.AT_ONCE", 4)
    browser.open(write(tmp_path, count=6))
    assert len(browser.prompts()) == 4
    assert browser.texts("#count") == ["6 of 6 comparisons, 4 of them shown"]
    browser.find("#more").click()
    assert len(browser.prompts()) == 6
    assert not browser.find("#more").is_displayed()


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
