"""The sweep page in a real browser: opened, clicked, driven by keys, and looked at."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from bokehflux.pictures.page import write_page
from bokehflux.pictures.series import Scene, Shot
from bokehflux.record import GenerateSettings, Provenance, Record
from tests.browser import chromium

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"none of {chromium.NAMES} is installed")
LEVELS = (0.0, 4.2, 15.0, 30.0)
EVIL = '</script><script>document.title="evil"</script><img src=x onerror=document.title="evil"> @@DATA@@'


def shot(level: float, seed: int, is_pivot: bool = False) -> Shot:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Shot(
        level=level,
        image=Image.fromarray(noise).filter(ImageFilter.GaussianBlur(level / 6)),
        is_pivot=is_pivot,
    )


def scene(prompt: str, seed: int, with_pivot: bool = True) -> Scene:
    settings = GenerateSettings(
        prompt=prompt,
        seed=seed,
        num_inference_steps=20,
        num_grounding_steps=16,
        bokeh_targets=(0.0,),
        bokeh_pivot=6.0,
    )
    record = Record(settings=settings, provenance=Provenance(model="nano"))
    pivot = shot(15.0, seed, is_pivot=True) if with_pivot else None
    return Scene(record=record, targets=tuple(shot(level, seed) for level in LEVELS), pivot=pivot)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page([scene(EVIL, 1), scene("a cup", 2), scene("no pivot", 3, with_pivot=False)], path)
    return path


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    assert PROGRAM is not None
    with chromium.Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chrome: chromium.Browser, page: Path) -> Iterator[chromium.Browser]:
    """The page, freshly opened; whatever a test does, nothing fails in it and nothing is loaded."""
    chrome.errors.clear()
    chrome.requests.clear()
    chrome.open(page)
    yield chrome
    assert chrome.errors == []
    assert {url.split(":")[0] for url in chrome.requests} <= {"file", "data", "about"}
    assert len([url for url in chrome.requests if url.startswith("file:")]) == 1, "the page itself"


def pixels(browser: chromium.Browser) -> np.ndarray:
    """What the stage shows once its pictures are decoded and painted."""
    browser.evaluate(
        "Promise.all([...document.querySelectorAll('#stage img:not([hidden])')].map(i => i.decode()))"
        ".then(() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))))"
    )
    with Image.open(io.BytesIO(browser.screenshot("#stage"))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def enlarged(image: Image.Image, like: np.ndarray) -> np.ndarray:
    size = like.shape[1], like.shape[0]
    return np.asarray(image.resize(size, Image.Resampling.NEAREST)).astype(int)


def assert_shows(seen: np.ndarray, image: np.ndarray) -> None:
    """Equal but for the corners, which are round, and for cells whose edges fall on another pixel."""
    assert (np.abs(seen - image).max(-1) > 2).mean() < 0.05


def test_a_page_opens_at_its_first_level(browser: chromium.Browser) -> None:
    assert browser.text("#now") == "bokeh level 0"
    assert browser.text("#made") == "nano \u00b7 20 steps, 16 grounded \u00b7 guidance 3 \u00b7 seed 1"
    seen = pixels(browser)
    assert_shows(seen, enlarged(shot(0.0, 1).image, seen))


def test_a_hostile_prompt_is_text(browser: chromium.Browser) -> None:
    assert browser.text("h1") == EVIL and browser.evaluate("document.title") != "evil"


def test_the_slider_is_clicked_through_the_levels(browser: chromium.Browser) -> None:
    for i, level in enumerate(LEVELS):
        browser.click("#level", across=(0.01, 0.33, 0.67, 0.99)[i])
        assert browser.text("#now") == f"bokeh level {level:g}"
        assert browser.evaluate("document.querySelectorAll('.dot.now').length") == 1
        assert browser.evaluate("document.querySelector('.dot.now').dataset.index") == str(i)
        seen = pixels(browser)
        assert_shows(seen, enlarged(shot(level, 1).image, seen))
    assert "level=3" in browser.evaluate("location.hash")


def test_pivot_and_difference_are_shown(browser: chromium.Browser) -> None:
    browser.click("[value=pivot]")
    assert browser.text("#now") == "pivot, level 15"
    seen = pixels(browser)
    assert_shows(seen, enlarged(shot(15.0, 1).image, seen))
    browser.click("[value=difference]")
    seen = pixels(browser)
    a, b = (enlarged(shot(level, 1).image, seen) for level in (0.0, 15.0))
    assert_shows(seen, (4 * np.abs(a - b)).clip(0, 255))
    browser.click(".dot[data-index='2']")
    assert browser.text("#now") == "bokeh level 15 against the pivot, difference times 4"
    assert_shows(pixels(browser), np.zeros(3))  # the pivot's own level does not differ from it


def test_the_amplification_can_be_chosen(browser: chromium.Browser) -> None:
    assert browser.evaluate("document.querySelector('#gain').disabled")
    browser.click("[value=difference]")
    script = "e => { e.value = '1'; e.dispatchEvent(new Event('change', {bubbles: true})); }"
    browser.evaluate(f"({script})(document.querySelector('#gain'))")
    seen = pixels(browser)
    a, b = (enlarged(shot(level, 1).image, seen) for level in (0.0, 15.0))
    assert_shows(seen, np.abs(a - b))


def test_keys_alone_do_everything(browser: chromium.Browser) -> None:
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert browser.text("#now") == "bokeh level 15"
    browser.key("ArrowLeft")
    assert browser.text("#now") == "bokeh level 4.2"
    for key, starts in (("p", "pivot"), ("d", "bokeh level 4.2 against"), ("l", "bokeh level 4.2")):
        browser.key(key)
        assert browser.text("#now").startswith(starts)
    reached = set()
    for _ in range(8):
        browser.key("Tab")
        reached.add(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"scene", "level", "SUMMARY"} <= reached
    browser.evaluate("document.querySelector('#level').focus()")
    browser.key("ArrowRight")
    assert browser.text("#now") == "bokeh level 15", "one step, not two, with the slider in focus"


def test_the_curve_is_where_it_was_measured(browser: chromium.Browser) -> None:
    heights = browser.evaluate("[...document.querySelectorAll('.dot')].map(d => +d.getAttribute('cy'))")
    assert heights == sorted(heights) and len(heights) == len(LEVELS), "more blur lies lower on the screen"
    assert browser.evaluate("document.querySelectorAll('rect.pivot').length") == 1


def test_scenes_are_chosen_and_one_without_a_pivot_offers_none(browser: chromium.Browser) -> None:
    def choose(i: int) -> None:
        script = f"e => {{ e.value = '{i}'; e.dispatchEvent(new Event('change')); }}"
        browser.evaluate(f"({script})(document.querySelector('#scene'))")

    choose(1)
    assert browser.text("h1") == "a cup"
    browser.click("[value=difference]")
    choose(2)
    assert browser.text("h1") == "no pivot" and browser.text("#now") == "bokeh level 0"
    assert browser.evaluate("document.querySelector('#views').hidden")
    browser.key("d")
    assert browser.text("#now") == "bokeh level 0"


@pytest.mark.parametrize(("fragment", "now"), [
    ("#scene=1&level=2&view=pivot", "pivot, level 15"), ("#level=1", "bokeh level 4.2"),
    ("#level=99", "bokeh level 30"), ("#scene=-3&level=x&view=<b>", "bokeh level 0"),
    ("#view=difference", "bokeh level 0 against the pivot, difference times 4"),
])  # fmt: skip
def test_an_address_keeps_what_is_shown(
    browser: chromium.Browser, page: Path, fragment: str, now: str
) -> None:
    browser.requests.clear()
    browser.open(page, fragment)
    assert browser.text("#now") == now


def test_labels_for_those_who_do_not_see(browser: chromium.Browser) -> None:
    browser.click("#level", across=0.99)
    assert (
        browser.evaluate("document.querySelector('#level').getAttribute('aria-valuetext')")
        == "bokeh level 30"
    )
    assert browser.evaluate("document.querySelector('#under').alt").endswith(": bokeh level 30")
