"""The sweep page in a real browser: opened, clicked, driven by keys, and looked at."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from bokehflux.aperture import aperture_text, parse_aperture
from bokehflux.focus import parse_focus
from bokehflux.pictures import metadata
from bokehflux.pictures.page import write_page
from bokehflux.pictures.series import Scene, Shot
from bokehflux.pipeline.lens import drawn
from bokehflux.record import Provenance, Record
from bokehflux.rendering.lens_map import LensMap
from bokehflux.settings import GenerateSettings
from tests.browser import chromium

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"none of {chromium.NAMES} is installed")
LEVELS = (0.0, 4.2, 15.0, 30.0)
EVIL = '</script><script>document.title="evil"</script><img src=x onerror=document.title="evil"> @@DATA@@'
LONG = "Ein Käfer – 5 € – und ein 猫 auf dem Café-Tisch; " * 20
FINE = tuple(i / 4 for i in range(121))
UNEVEN = (0.0, 0.5, 1.0, 29.5, 30.0)
DESKTOP, PHONE = (1100, 900), (390, 844)


def shot(level: float, seed: int, is_pivot: bool = False) -> Shot:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Shot(
        level=level,
        image=Image.fromarray(noise).filter(ImageFilter.GaussianBlur(level / 6)),
        is_pivot=is_pivot,
    )


def scene(prompt: str, seed: int, with_pivot: bool = True, levels: tuple[float, ...] = LEVELS) -> Scene:
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
    return Scene(record=record, targets=tuple(shot(level, seed) for level in levels), pivot=pivot)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    scenes = [
        scene(EVIL, 1),
        scene("a cup", 2),
        scene("no pivot", 3, with_pivot=False),
        scene(LONG, 4, levels=FINE),
        scene("one level", 5, with_pivot=False, levels=(8.0,)),
        scene("twice", 6, with_pivot=False, levels=(0.0, 8.0, 8.0, 30.0)),
        scene("uneven", 7, levels=UNEVEN),
    ]
    write_page(scenes, path)
    return path


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose pictures lie beside it."""
    path = tmp_path_factory.mktemp("linked") / "index.html"
    made = scene("a cup", 2)
    folder = path.with_name("a cup #1")
    folder.mkdir()
    for picture in made.pictures():
        (folder / f"{picture.stem}.png").write_bytes(metadata.encode(picture.image, picture.recipe))
    files = [f"{folder.name}/{picture.stem}.png" for picture in made.pictures()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bokehflux.pictures.page.MAX_EMBEDDED_PIXELS", 0)
        write_page([made.saved_at(files)], path)
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
    chrome.screen(*DESKTOP)
    chrome.open(page)
    yield chrome
    assert chrome.errors == []
    assert {url.split(":")[0] for url in chrome.requests} <= {"file", "data", "about"}
    assert {url.split("#")[0] for url in chrome.requests if url.startswith("file:")} == {page.as_uri()}


def choose(browser: chromium.Browser, selector: str, value: object) -> None:
    """Take an option of a select."""
    script = "(e, value) => { e.value = value; e.dispatchEvent(new Event('change', {bubbles: true})) }"
    browser.evaluate(f"({script})(document.querySelector('{selector}'), '{value}')")


def until(browser: chromium.Browser, condition: str) -> None:
    """Wait for a condition in JavaScript, at most 30 s."""
    look = f"if ({condition}) done(true); else if (Date.now() > end) done(false); else setTimeout(look, 20);"
    script = f"new Promise(done => {{ const end = Date.now() + 30000; (function look() {{ {look} }})(); }})"
    assert browser.evaluate(script), condition


def pixels(browser: chromium.Browser) -> np.ndarray:
    """What the stage shows once its pictures are decoded and painted."""
    browser.evaluate(
        "Promise.all([...document.querySelectorAll('.pane:not([hidden]) img')].map(i => i.decode()))"
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
    assert browser.text("#now") == "bokeh 0"
    assert browser.text("#made") == "nano \u00b7 20 steps, 16 grounded \u00b7 guidance 3 \u00b7 seed 1"
    seen = pixels(browser)
    assert_shows(seen, enlarged(shot(0.0, 1).image, seen))


def test_a_hostile_prompt_is_text(browser: chromium.Browser) -> None:
    assert browser.text("h1") == EVIL and browser.evaluate("document.title") != "evil"


def test_a_script_that_is_not_the_pages_own_does_not_run(browser: chromium.Browser) -> None:
    browser.evaluate(
        "const alien = document.createElement('script'); alien.textContent = 'document.title = 1';"
        "document.body.append(alien)"
    )
    assert browser.evaluate("document.title") != "1"
    assert [error for error in browser.errors if "Content Security Policy" not in error] == []
    assert browser.errors, "and the browser says so"
    browser.errors.clear()


# Levels -------------------------------------------------------------------------------------------


def test_the_slider_moves_by_level(browser: chromium.Browser) -> None:
    """A click goes to the level that is nearest on the scale, and the thumb stands where it is marked."""
    for across, level in ((0.02, 0.0), (0.17, 4.2), (0.3, 4.2), (0.4, 15.0), (0.73, 15.0), (0.77, 30.0)):
        browser.click("#level", across=across)
        i = LEVELS.index(level)
        assert browser.text("#now") == f"bokeh {level:g}"
        assert float(browser.evaluate("at('level').value")) == level
        assert browser.evaluate("[...document.querySelectorAll('.dot.now')].map(d => d.dataset.index)") == [
            str(i)
        ]
        seen = pixels(browser)
        assert_shows(seen, enlarged(shot(level, 1).image, seen))
    x, _, width, _ = browser.box("#level")
    middles = browser.evaluate(
        "[...document.querySelectorAll('#ticks span:not(.anchor)')].map(t => {"
        " const b = t.getBoundingClientRect(), shift = parseFloat(t.style.getPropertyValue('--shift')) || 0;"
        " return b.x + b.width / 2 - shift; })"
    )
    assert middles == pytest.approx([x + 12 + level / 30 * (width - 24) for level in LEVELS], abs=0.6)
    until(browser, "location.hash.includes('level=30')")


def test_dragging_the_slider_shows_what_is_passed(browser: chromium.Browser) -> None:
    browser.drag("#level", 0.02, 0.51)
    assert browser.text("#now") == "bokeh 15"


@pytest.mark.parametrize("screen", [DESKTOP, PHONE, (320, 600)])
@pytest.mark.parametrize("number", [1, 4, 7])
def test_ticks_neither_touch_nor_overflow(
    browser: chromium.Browser, page: Path, screen: tuple[int, int], number: int
) -> None:
    browser.screen(*screen, is_phone=screen != DESKTOP)
    browser.open(page, f"#scene={number}")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing leaves the screen"
    boxes = browser.evaluate(
        "[...document.querySelectorAll('#ticks span:not(.unlabelled)')].map(t => {"
        " const b = t.getBoundingClientRect(); return [b.left, b.right, t.textContent]; })"
    )
    left, _, width, _ = browser.box("#dial")
    boxes.sort()
    assert len(boxes) >= 2 and boxes[0][0] >= left - 0.6 and boxes[-1][1] <= left + width + 0.6
    assert all(a[1] + 4 <= b[0] for a, b in zip(boxes, boxes[1:], strict=False))
    assert {boxes[0][2], boxes[-1][2]} == {"0", "30"}
    assert (
        browser.evaluate("document.querySelectorAll('#ticks span:not(.anchor)').length")
        == ({1: len(LEVELS), 4: len(FINE), 7: len(UNEVEN)}[number])
    )


def test_one_level_needs_no_slider(browser: chromium.Browser, page: Path) -> None:
    browser.open(page, "#scene=5&view=wipe")
    assert browser.text("#now") == "bokeh 8"
    for id in ("transport", "views", "against"):
        assert browser.evaluate(f"at('{id}').hidden")
    for key in ("ArrowRight", " ", "w", "d", "p"):
        browser.key(key)
        assert browser.text("#now") == "bokeh 8"


def test_a_level_that_was_asked_twice_is_two_pictures(browser: chromium.Browser, page: Path) -> None:
    browser.open(page, "#scene=6")
    seen = []
    for _ in range(4):
        seen.append(browser.text("#now"))
        browser.key("ArrowRight")
    assert seen == ["bokeh 0", "bokeh 8", "bokeh 8-2", "bokeh 30"]
    for title in ("bokeh 8", "bokeh 8-2"):
        browser.evaluate(f"set({{ shot: scene.shots.findIndex(shot => shot.label === '{title}') }})")
        browser.drag("#level", 0.28, 0.3)
        assert browser.text("#now") == title, "where both are nearest, the one that is shown stays"


def test_scenes_are_chosen_and_one_without_a_pivot_compares_levels(browser: chromium.Browser) -> None:
    browser.click("#level", across=0.99)
    choose(browser, "#scene", 1)
    assert browser.text("h1") == "a cup" and browser.text("#now") == "bokeh 30", "the level stays"
    choose(browser, "#scene", 2)
    browser.key("ArrowLeft")
    browser.key("d")
    assert browser.text("#now") == "bokeh 15 against bokeh 30, difference times 4"


def test_a_long_prompt_is_folded(browser: chromium.Browser, page: Path) -> None:
    assert browser.evaluate("at('unfold').hidden"), "a short one is not"
    for screen in (DESKTOP, PHONE):
        browser.screen(*screen, is_phone=screen == PHONE)
        browser.open(page, "#scene=4")
        height = "at('prompt').clientHeight / parseFloat(getComputedStyle(at('prompt')).lineHeight)"
        assert browser.evaluate(height) == pytest.approx(3, abs=0.1)
        browser.click("#unfold")
        assert browser.evaluate(height) > 5
        assert browser.evaluate("at('unfold').getAttribute('aria-expanded')") == "true"
        browser.click("#unfold")
        assert browser.evaluate(height) == pytest.approx(3, abs=0.1)


# Comparisons --------------------------------------------------------------------------------------


def test_pivot_and_difference_are_shown(browser: chromium.Browser) -> None:
    browser.click("[value=other]")
    assert browser.text("#now") == "pivot 15" and browser.text("#other-label") == "Pivot 15"
    seen = pixels(browser)
    assert_shows(seen, enlarged(shot(15.0, 1).image, seen))
    browser.click("[value=difference]")
    seen = pixels(browser)
    a, b = (enlarged(shot(level, 1).image, seen) for level in (0.0, 15.0))
    assert_shows(seen, (4 * np.abs(a - b)).clip(0, 255))
    browser.click(".dot[data-index='2']")
    assert browser.text("#now") == "bokeh 15 against pivot 15, difference times 4"
    assert_shows(pixels(browser), np.zeros(3))  # the pivot's own level does not differ from it


def test_the_amplification_can_be_chosen(browser: chromium.Browser) -> None:
    assert browser.evaluate("at('amplified').hidden")
    browser.click("[value=difference]")
    choose(browser, "#times", 1)
    seen = pixels(browser)
    a, b = (enlarged(shot(level, 1).image, seen) for level in (0.0, 15.0))
    assert_shows(seen, np.abs(a - b))


def test_any_two_levels_are_compared(browser: chromium.Browser) -> None:
    choose(browser, "#other", 3)
    browser.click("[value=difference]")
    browser.click("#level", across=0.15)
    assert browser.text("#now") == "bokeh 4.2 against bokeh 30, difference times 4"
    seen = pixels(browser)
    a, b = (enlarged(shot(level, 1).image, seen) for level in (4.2, 30.0))
    assert_shows(seen, (4 * np.abs(a - b)).clip(0, 255))
    assert browser.evaluate("document.querySelector('.dot.other').dataset.index") == "3"
    until(browser, "location.hash.includes('with=30') && location.hash.includes('times=4')")


def without_controls(seen: np.ndarray, image: np.ndarray, left: float, right: float) -> None:
    """Compares a strip of the stage above the labels and the handle."""
    rows, columns = slice(4, seen.shape[0] // 3), slice(int(left), int(right))
    assert_shows(seen[rows, columns], image[rows, columns])


def test_a_wipe_shows_one_level_on_either_side(browser: chromium.Browser) -> None:
    choose(browser, "#other", 3)
    browser.click("[value=wipe]")
    for start, end in ((0.5, 0.25), (0.25, 0.8), (0.6, 0.7)):  # the last one begins beside the handle
        browser.drag("#stage", start, end)
        assert browser.evaluate("now.split") == pytest.approx(end, abs=0.01)
        seen = pixels(browser)
        width, edge = seen.shape[1], end * seen.shape[1]
        without_controls(seen, enlarged(shot(0.0, 1).image, seen), 4, edge - 22)
        without_controls(seen, enlarged(shot(30.0, 1).image, seen), edge + 22, width - 4)
    assert [browser.text(f".pane:nth-child({i}) .chip") for i in (1, 2)] == ["bokeh 0", "bokeh 30"]
    browser.evaluate("at('handle').focus()")
    browser.key("ArrowLeft")
    assert browser.evaluate("at('handle').getAttribute('aria-valuenow')") == "68"
    assert browser.text("#now") == "bokeh 0 against bokeh 30", "the handle's arrows move the wipe alone"


@pytest.mark.parametrize("screen", [DESKTOP, PHONE])
def test_two_levels_side_by_side(browser: chromium.Browser, page: Path, screen: tuple[int, int]) -> None:
    browser.screen(*screen, is_phone=screen == PHONE)
    browser.open(page, "#scene=1&level=30&view=beside&with=0")
    assert browser.text("#now") == "bokeh 30 against bokeh 0"
    seen = Image.fromarray(pixels(browser).astype(np.uint8))
    stacked = screen == PHONE
    assert (seen.height > seen.width) == stacked
    half = (seen.width, seen.height // 2) if stacked else (seen.width // 2, seen.height)
    for i, level in enumerate((30.0, 0.0)):
        corner = (0, i * (seen.height - half[1])) if stacked else (i * (seen.width - half[0]), 0)
        part = seen.crop((*corner, corner[0] + half[0], corner[1] + half[1]))
        coarse = [np.asarray(image.resize((12, 8))).ravel() for image in (part, shot(level, 1).image)]
        assert np.corrcoef(*coarse)[0, 1] > 0.4, "the picture: another one has 0.0"
        assert (np.asarray(part).std() > 50) == (level == 0), "at its level"


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2])
def test_a_picture_pixel_is_a_screen_pixel(browser: chromium.Browser, scale: float) -> None:
    browser.screen(*DESKTOP, scale=scale)
    browser.click("#actual")
    assert browser.evaluate("at('under').getBoundingClientRect().width") == pytest.approx(96 / scale)
    browser.evaluate("document.activeElement.blur()")
    if scale == 1:
        seen = pixels(browser)
        y, x = ((seen.shape[i] - size) // 2 for i, size in enumerate((64, 96)))
        assert (np.abs(seen[y : y + 64, x : x + 96] - np.asarray(shot(0.0, 1).image)) <= 2).all()
        assert (seen[8 : y - 1, 8:-8] == 0).all()
    browser.key("1")
    assert browser.evaluate("at('under').getBoundingClientRect().width") > 96


def test_what_is_larger_than_the_screen_is_dragged(browser: chromium.Browser, page: Path) -> None:
    browser.screen(320, 568, is_phone=True)
    browser.open(page, "#view=wipe")
    browser.evaluate("scene.size = [960, 640]; set({ actual: true })")
    width = browser.evaluate("at('stage').clientWidth")
    place = "at('under').getBoundingClientRect().x - at('stage').getBoundingClientRect().x"
    assert browser.evaluate(place) == pytest.approx((width - 960) / 2, abs=1), "the middle at first"
    browser.drag("#stage", 0.2, 0.1)
    assert browser.evaluate(place) == pytest.approx((width - 960) / 2 - 0.1 * width, abs=1.5)
    assert browser.evaluate("now.split") == 0.5
    browser.drag("#stage", 0.5, 0.7)
    assert browser.evaluate("now.split") == pytest.approx(0.7, abs=0.02), "the handle is the wipe's"
    browser.evaluate("at('stage').focus()")
    for _ in range(30):
        browser.key("ArrowLeft")
    assert browser.evaluate(place) == pytest.approx(0, abs=1), "and no further than its edge"
    both = "[at('under'), at('over')].map(i => i.getBoundingClientRect().x)"
    assert len(set(browser.evaluate(both))) == 1, "both pictures move together"


def test_full_screen(browser: chromium.Browser) -> None:
    before = browser.box("#stage")
    browser.click("#full")
    until(browser, "document.fullscreenElement === at('figure')")
    until(browser, "at('full').getAttribute('aria-pressed') === 'true'")
    assert browser.evaluate("at('stage').clientWidth") > before[2]
    assert browser.evaluate("at('level').getBoundingClientRect().bottom <= innerHeight"), (
        "the slider is there"
    )
    browser.key("ArrowRight")
    assert browser.text("#now") == "bokeh 4.2"
    browser.key("f")
    until(browser, "document.fullscreenElement === null")


# Play and save ------------------------------------------------------------------------------------


def test_play_runs_through_the_levels_and_back(browser: chromium.Browser) -> None:
    browser.evaluate(
        "window.seen = []; const old = draw; draw = () => { old(); seen.push(scene.shots[now.shot].level) }"
    )
    browser.click("#play")
    assert browser.evaluate("at('play').getAttribute('aria-pressed')") == "true"
    until(browser, "seen.length >= 8")
    assert "4.2,15,30,15,4.2,0" in browser.evaluate("seen.join()")
    assert browser.evaluate("at('now').getAttribute('aria-live')") == "off", (
        "it is not read aloud all the time"
    )
    browser.key(" ")  # the button is in focus
    assert browser.evaluate("at('play').getAttribute('aria-pressed')") == "false"
    count = browser.evaluate("new Promise(done => setTimeout(() => done(seen.length), 50))")
    assert browser.evaluate("new Promise(done => setTimeout(() => done(seen.length), 900))") == count
    browser.evaluate("document.activeElement.blur()")
    browser.key(" ")
    until(browser, f"seen.length > {count}")
    browser.click("#level", across=0.5)
    assert browser.evaluate("timer") == 0, "whoever takes the slider stops it"
    browser.evaluate("at('under').decode = () => new Promise(done => window.decoded = done); play(true)")
    until(browser, "window.decoded")
    browser.evaluate("play(false); decoded()")
    assert browser.evaluate("timer") == 0, "even while a picture is on its way"


def test_a_picture_is_saved_with_its_recipe(browser: chromium.Browser, tmp_path: Path) -> None:
    browser.call("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.click("#level", across=0.99)
    assert browser.text("#save") == "Save this picture"
    for view, name, level in (
        ("level", "scene-1-bokeh-30.0.webp", 30),
        ("other", "scene-1-pivot-bokeh-15.0.webp", 15),
    ):
        browser.click(f"[value={view}]")
        with browser.awaiting("Page.downloadProgress", state="completed"):
            browser.click("#save")
        assert metadata.read_recipe(tmp_path / name)["bokeh_level"] == level
        with Image.open(tmp_path / name) as image:
            assert image.convert("RGB").tobytes() == shot(level, 1).image.tobytes()


# Pictures beside the page -------------------------------------------------------------------------


def test_pictures_beside_the_page_are_shown(chrome: chromium.Browser, linked: Path) -> None:
    chrome.errors.clear()
    chrome.screen(*DESKTOP)
    chrome.open(linked, "#level=15")
    seen = pixels(chrome)
    assert_shows(seen, enlarged(shot(15.0, 2).image, seen))
    chrome.key("d")
    assert_shows(pixels(chrome), np.zeros(3))
    assert chrome.evaluate("[at('save').textContent, at('save').target]") == ["Open its file", "_blank"]
    assert chrome.evaluate("decodeURI(at('save').href)").endswith("/a cup %231/bokeh-15.0.png")
    assert chrome.errors == [] and linked.stat().st_size < 60_000


def test_a_picture_that_is_not_there_is_named(chrome: chromium.Browser, linked: Path) -> None:
    alone = linked.with_name("sent") / "index.html"
    alone.parent.mkdir()
    alone.write_bytes(linked.read_bytes())
    chrome.open(alone)
    until(chrome, "!at('lost').hidden")
    assert chrome.text("#lost").startswith("a cup %231/bokeh-00.0.png cannot be shown: expected in a folder")
    chrome.errors.clear()  # the browser's own word on it


# Keys, fingers, ears ------------------------------------------------------------------------------


def test_keys_alone_do_everything(browser: chromium.Browser) -> None:
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert browser.text("#now") == "bokeh 15"
    browser.key("ArrowLeft")
    assert browser.text("#now") == "bokeh 4.2"
    for key, title in (
        ("p", "pivot 15"), ("d", "bokeh 4.2 against pivot 15, difference times 4"), ("l", "bokeh 4.2"),
        ("w", "bokeh 4.2 against pivot 15"), ("s", "bokeh 4.2 against pivot 15"), ("L", "bokeh 4.2"),
    ):  # fmt: skip
        browser.key(key)
        assert browser.text("#now") == title
    reached = set()
    for _ in range(14):
        browser.key("Tab")
        reached.add(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"scene", "play", "level", "other", "actual", "full", "save", "SUMMARY"} <= reached
    browser.evaluate("document.querySelector('#level').focus()")
    browser.key("ArrowRight")
    assert browser.text("#now") == "bokeh 15", "one step, not two, with the slider in focus"
    browser.key("ArrowDown")
    assert browser.text("#now") == "bokeh 4.2"
    browser.key("End")
    assert browser.text("#now") == "bokeh 30"


def test_page_keys_make_longer_steps(browser: chromium.Browser, page: Path) -> None:
    browser.open(page, "#scene=4&level=10")
    browser.evaluate("at('level').focus()")
    browser.key("PageUp")
    assert browser.text("#now") == "bokeh 13.25"


def test_shortcuts_can_be_switched_off(browser: chromium.Browser, page: Path) -> None:
    browser.click("summary")
    browser.click("#keys")
    browser.evaluate("document.activeElement.blur()")
    for key in ("ArrowRight", "p", "d", "w", "s", "1", " "):
        browser.key(key)
        assert browser.text("#now") == "bokeh 0"
    assert browser.evaluate("[now.actual, timer]") == [False, 0]
    browser.evaluate("at('level').focus()")
    browser.key("ArrowRight")
    assert browser.text("#now") == "bokeh 4.2", "the slider has keys of its own"
    until(browser, "location.hash.includes('keys=off')")
    browser.open(page, "#keys=off")
    browser.key("d")
    assert browser.text("#now") == "bokeh 0" and not browser.evaluate("at('keys').checked")


@pytest.mark.parametrize("view", ["level", "difference", "wipe"])
def test_everything_is_large_enough_for_a_finger(browser: chromium.Browser, page: Path, view: str) -> None:
    browser.screen(*PHONE, scale=3, is_phone=True)
    browser.open(page, f"#scene=4&view={view}")
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    small = browser.evaluate(
        "[...document.querySelectorAll('a, button, select, summary, label, #level, #handle, #curve svg')]"
        ".filter(e => e.checkVisibility()).map(e => [e.id || e.textContent, e.getBoundingClientRect()])"
        ".filter(([, b]) => b.height < 44 || b.width < 44).map(([name]) => name)"
    )
    assert small == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_every_control_has_a_name(browser: chromium.Browser) -> None:
    browser.key("w")
    browser.click("summary")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "combobox", "slider", "radio", "checkbox", "link", "image", "DisclosureTriangle")
    named = [
        (n["role"]["value"], n["name"]["value"])
        for n in nodes
        if not n["ignored"] and n["role"]["value"] in roles
    ]
    assert {role for role, _ in named} >= set(roles) and all(name.strip() for _, name in named)


def test_labels_for_those_who_do_not_see(browser: chromium.Browser) -> None:
    browser.click("#level", across=0.99)
    assert browser.evaluate("at('level').getAttribute('aria-valuetext')") == "bokeh 30"
    assert browser.evaluate("at('under').alt").endswith(": bokeh 30")


# Looks --------------------------------------------------------------------------------------------

CONTRAST = """(() => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = color => { const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const paper = e => { const color = getComputedStyle(e).backgroundColor;
    return color === 'rgba(0, 0, 0, 0)' ? paper(e.parentElement) : color; };
  const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll('body *')]
    .filter(e => e.checkVisibility() && hasText(e) && !e.closest('svg, script, .chip'))
    .map(e => [light(getComputedStyle(e).color), light(paper(e)), e.textContent])
    .filter(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5);
})()"""


@pytest.mark.parametrize("screen", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_can_be_read_in_dark_and_light(
    browser: chromium.Browser, page: Path, screen: tuple[int, int], scheme: str
) -> None:
    browser.screen(*screen, is_phone=screen == PHONE, scheme=scheme)
    browser.open(page, "#scene=4&view=difference&level=7")
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(CONTRAST) == []
    with Image.open(io.BytesIO(browser.screenshot("body"))) as image:
        corner = sum(image.convert("RGB").getpixel((2, 2)))
    assert corner < 100 if scheme == "dark" else corner > 700


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("screen", [DESKTOP, PHONE, (1920, 1000)])
def test_picture_and_slider_are_on_the_screen_together(
    browser: chromium.Browser, page: Path, screen: tuple[int, int], number: int
) -> None:
    """Below a long prompt, too, and when the pictures are square."""
    browser.screen(*screen, is_phone=screen == PHONE)
    browser.open(page, f"#scene={number}")
    browser.evaluate("scene.size = [64, 64]; draw()")
    assert browser.evaluate("at('ticks').getBoundingClientRect().bottom <= innerHeight")


def test_the_curve_is_where_it_was_measured(browser: chromium.Browser) -> None:
    heights = browser.evaluate("[...document.querySelectorAll('.dot')].map(d => +d.getAttribute('cy'))")
    assert heights == sorted(heights) and len(heights) == len(LEVELS), "more blur lies lower on the screen"
    assert browser.evaluate("document.querySelectorAll('rect.pivot').length") == 1


# The address --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fragment", "now"), [
    ("#scene=2&level=15&view=other", "pivot 15"), ("#level=4.2", "bokeh 4.2"), ("#level=99", "bokeh 30"),
    ("#level=9", "bokeh 4.2"), ("#scene=-3&level=x&view=<b>", "bokeh 0"),
    ("#view=difference", "bokeh 0 against pivot 15, difference times 4"),
    ("#view=difference&with=30&times=16", "bokeh 0 against bokeh 30, difference times 16"),
    ("#view=difference&times=3", "bokeh 0 against pivot 15, difference times 4"),
    ("#scene=3&view=wipe&with=pivot&level=15", "bokeh 15 against bokeh 30"),
])  # fmt: skip
def test_an_address_keeps_what_is_shown(
    browser: chromium.Browser, page: Path, fragment: str, now: str
) -> None:
    browser.open(page, fragment)
    assert browser.text("#now") == now
    browser.evaluate("set({})")
    browser.evaluate("new Promise(done => setTimeout(done, 250))")
    kept = browser.evaluate("location.hash")
    browser.open(page, kept)
    assert browser.text("#now") == now


def test_a_changed_address_is_followed(browser: chromium.Browser) -> None:
    browser.evaluate("location.hash = '#scene=2&level=30'")
    until(browser, "at('now').textContent === 'bokeh 30'")
    assert browser.text("h1") == "a cup"


# Lens ---------------------------------------------------------------------------------------------


def lens_map() -> LensMap:
    """A near disc before what is far, and a floor between them."""
    x, y = torch.arange(96.0) - 40, torch.arange(64.0)[:, None] - 30
    floor = ((y + 30) / 64 - 1).expand(64, 96)
    return LensMap(blur=0.5 * torch.where(x**2 + y**2 < 15**2, 0.0, floor), far=0.0, near=0.0, glow=0.5)


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A page with a lens, and its sharp picture."""
    made = scene("a ball", 8, levels=(0.0, 28.0))
    assert made.pivot is not None
    sharp = shot(8.0, 8, is_pivot=True)
    pixels = np.array(sharp.image)
    pixels[4:7, 80:83] = 255  # a light
    sharp = dataclasses.replace(sharp, image=Image.fromarray(pixels), level=0.0)
    path = tmp_path_factory.mktemp("through") / "index.html"
    settings = dataclasses.replace(made.record.settings, bokeh_pivot=0.0, aperture="polygon:3")
    record = dataclasses.replace(made.record, settings=settings)
    scenes = [
        dataclasses.replace(made, record=record, pivot=sharp, blur_map=drawn(lens_map())),
        scene("a cup", 2),
    ]
    write_page(scenes, path)
    return path, torch.from_numpy(pixels).movedim(-1, 0) / 255


@pytest.fixture
def lens(chrome: chromium.Browser, through: tuple[Path, Tensor]) -> Iterator[chromium.Browser]:
    chrome.errors.clear()
    chrome.requests.clear()
    chrome.screen(*DESKTOP)
    chrome.open(through[0], "#view=lens&level=20")
    until(chrome, "at('asked').textContent")
    yield chrome
    # Pixels are read back here, which a person does not do; a driver remarks that it takes time.
    assert [error for error in chrome.errors if "GPU stall due to ReadPixels" not in error] == []
    assert {url.split(":")[0] for url in chrome.requests} <= {"file", "data", "about"}


def off(browser: chromium.Browser, expected: Tensor) -> float:
    """Root mean square difference of what the lens shows, display values 0 to 1."""
    data = browser.evaluate("at('through').toDataURL()").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        seen = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0) / 255
    return float((seen - expected).square().mean().sqrt())


@pytest.mark.parametrize(
    ("level", "focus", "aperture"),
    [
        (20.0, None, "polygon:3"),
        (30.0, "45,30", "disc"),
        (12.5, "90,5", "donut:0.5"),
        (30.0, "90,5", "polygon:5"),
    ],
)
def test_a_lens_shows_what_the_renderer_makes(
    lens: chromium.Browser, through: tuple[Path, Tensor], level: float, focus: str | None, aperture: str
) -> None:
    own = lens_map() if focus is None else lens_map().focused_at(parse_focus(focus))
    parsed = parse_aperture(aperture)
    assert not isinstance(parsed, Path)
    expected = own.render(through[1], level, parsed, highlights=None)
    grey = "lens.own" if focus is None else f"lens.at({focus})"
    name = aperture_text(parsed) if aperture == "polygon:3" else aperture
    lens.evaluate(f"lens.render({level}, {grey}, '{name}')")
    # A shape that is turned, or another one, is off by half.
    assert off(lens, expected) < 0.3 * float((through[1] - expected).square().mean().sqrt())


def test_a_click_is_the_focus_and_the_dial_is_continuous(lens: chromium.Browser) -> None:
    assert lens.text("#now") == "bokeh 20 through the lens" and lens.evaluate("now.focus") is None
    assert lens.text("#asked") == "--bokeh-targets 20 --aperture polygon:3@0"
    before = lens.evaluate("at('through').toDataURL()")
    lens.click("#stage", across=0.95)
    point = lens.evaluate("now.point")
    assert point in ("91,31", "91,32")
    assert lens.text("#asked") == f"--bokeh-targets 20 --focus {point} --aperture polygon:3@0"
    assert lens.evaluate("now.focus") == pytest.approx(0.5, abs=0.02) and before != lens.evaluate(
        "at('through').toDataURL()"
    )
    lens.click("#level", across=0.5)
    level = lens.evaluate("now.through")
    assert level == pytest.approx(15, abs=0.2) and lens.text("#now").startswith(
        f"bokeh {level:.1f}".rstrip("0.")
    )
    lens.click("#depth", across=0.99)
    assert lens.text("#asked").endswith("--focus 1 --aperture polygon:3@0")
    choose(lens, "#shape", "disc")
    assert lens.text("#asked").endswith("--aperture disc")
    lens.evaluate("document.activeElement.blur()")
    lens.key("ArrowRight")
    assert lens.evaluate("now.through") == pytest.approx(level + 0.5)
    lens.click("#own")
    assert "--focus" not in lens.text("#asked")
    choose(lens, "#scene", 1)
    assert lens.text("#now") == "bokeh 30" and lens.evaluate("at('lens').hidden && at('has-lens').hidden")


@pytest.mark.parametrize("screen", [DESKTOP, PHONE])
def test_a_lens_fits_the_screen(lens: chromium.Browser, screen: tuple[int, int]) -> None:
    lens.screen(*screen, is_phone=screen == PHONE)
    assert lens.evaluate("document.documentElement.scrollWidth <= innerWidth")
    lens.key("l")
    assert lens.evaluate("at('through').hidden && !at('under').hidden"), "and goes when a level is shown"
