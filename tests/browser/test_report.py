"""The page of an evaluation in a real browser: sorting, filters, sliders, keyboard, the viewer, dark, and silence."""

import json

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.pages import HOSTILE, make_run

SWITCHES = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,900"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """40 images, some with names that attack the page, of weights chosen on the test set."""
    return make_run(tmp_path_factory.mktemp("page") / "run", count=20, size=32, rule="paper")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def written(run):
    run.write()
    return run.directory / "report.html"


def opened(browser, path):
    """The page as it opens; once it is left: no error on the console, nothing asked of any network."""
    browser.get_log("performance")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [path.as_uri()]
    assert browser.execute_script("return window.attacked") is None


@pytest.fixture
def page(browser, written):
    yield from opened(browser, written)


def shown(page):
    """Index, label and score of the cards that can be seen, in order."""
    return page.execute_script(
        "return [...document.querySelectorAll('#cards > li')].filter(e => e.offsetParent)"
        ".map(e => [+e.dataset.index, +e.dataset.label, +e.dataset.score])"
    )


def text(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector).text


def choose(page, identity, value):
    Select(page.find_element(By.ID, identity)).select_by_value(value)


def slide(page, element, keys):
    element.send_keys(*keys)
    return page.execute_script("return getComputedStyle(document.documentElement).getPropertyValue('--heat')")


def test_200_images_of_noise_fit_in_20_megabytes_and_open(browser, tmp_path):
    run = make_run(tmp_path / "run", count=100, size=240)
    assert len(run.write().encode()) < 20e6
    for page in opened(browser, run.directory / "report.html"):
        assert len(shown(page)) == 200
        assert page.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth === 240)")


def test_sorting(page):
    assert len(shown(page)) == 40
    threshold = page.execute_script("return JSON.parse(document.getElementById('data').textContent).threshold")
    wrong = [(threshold - s) if label else (s - threshold) for _, label, s in shown(page)]
    assert wrong == sorted(wrong, reverse=True)
    choose(page, "sort", "high")
    scores = [s for *_, s in shown(page)]
    assert scores == sorted(scores, reverse=True)
    choose(page, "sort", "low")
    assert [s for *_, s in shown(page)] == scores[::-1]
    choose(page, "sort", "name")
    named = page.execute_script("return [...document.querySelectorAll('#cards .name')].map(e => e.textContent)")
    plain = [name for name in named if "/good_" in name]
    assert plain == [f"good/good_{i:03d}.png" for i in range(6, 20)]


def test_filters(page):
    choose(page, "class", "1")
    assert {label for _, label, _ in shown(page)} == {1}
    assert text(page, "#shown") == "20 of 40 images"
    threshold = page.execute_script("return JSON.parse(document.getElementById('data').textContent).threshold")
    choose(page, "outcome", "missed")
    missed = shown(page)
    assert missed
    assert all(label == 1 and score < threshold for _, label, score in missed)
    assert len(missed) == int(text(page, "#n-fn"))
    choose(page, "outcome", "alarm")
    assert shown(page) == []
    assert page.find_element(By.ID, "nothing").is_displayed()
    choose(page, "class", "")
    assert len(shown(page)) == int(text(page, "#n-fp"))
    choose(page, "outcome", "")
    page.find_element(By.ID, "search").send_keys("/GOOD_01")
    assert [index for index, *_ in sorted(shown(page))] == list(range(10, 20))


def test_the_threshold_moves_counts_marks_and_outcomes(page):
    slider = page.find_element(By.ID, "threshold")
    best = text(page, "#r-f1")
    marker = page.find_element(By.CSS_SELECTOR, '[data-kind="image-roc"] .marker')
    before = marker.get_attribute("cx")
    slider.send_keys(Keys.HOME)
    assert (text(page, "#n-fn"), text(page, "#n-tn"), text(page, "#n-tp")) == ("0", "0", "20")
    assert marker.get_attribute("cx") != before
    assert text(page, "#r-sensitivity") == "1.000"
    choose(page, "outcome", "missed")
    assert shown(page) == []
    slider.send_keys(Keys.ARROW_RIGHT)
    assert int(text(page, "#n-tn")) + int(text(page, "#n-fn")) == 1  # the lowest score alone is below now
    page.find_element(By.ID, "threshold-reset").click()
    assert text(page, "#r-f1") == best
    assert marker.get_attribute("cx") == before


def test_the_opacity_of_heat_maps(page):
    slider = page.find_element(By.ID, "opacity")
    heat = page.find_element(By.CSS_SELECTOR, "#cards .heat")
    assert float(heat.value_of_css_property("opacity")) == 0.5
    slide(page, slider, [Keys.HOME])
    assert float(heat.value_of_css_property("opacity")) == 0
    slide(page, slider, [Keys.END])
    assert float(heat.value_of_css_property("opacity")) == 1
    slide(page, slider, [Keys.ARROW_LEFT])
    assert float(heat.value_of_css_property("opacity")) == pytest.approx(0.99)
    assert text(page, ".heat-label .heat-value") == "99 %"
    outline = page.find_element(By.CSS_SELECTOR, "#cards .outline")
    assert outline.is_displayed()
    page.find_element(By.ID, "outline").send_keys(Keys.SPACE)
    assert not outline.is_displayed()


def test_the_keyboard_alone_is_enough(page):
    def focused(what="dataset.index"):
        return page.execute_script(f"return document.activeElement.parentElement.{what}")

    def press(*keys):
        ActionChains(page).send_keys(*keys).perform()

    order = [str(index) for index, *_ in shown(page)]
    page.find_element(By.ID, "outline").send_keys(Keys.TAB)
    assert focused() == order[0]
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert focused() == order[2]
    press(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert focused() == order[4]  # three columns at this width
    press(Keys.END)
    assert focused() == order[-1]
    press(Keys.HOME, Keys.ENTER)
    viewer = page.find_element(By.ID, "viewer")
    assert viewer.is_displayed()
    assert text(page, "#viewer-place") == "1 of 40"
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert text(page, "#viewer-place") == "2 of 40"
    score = [s for *_, s in shown(page)][1]
    assert f"{score:.4g}" in text(page, "#viewer-facts")
    press(Keys.ESCAPE)
    assert not viewer.is_displayed()
    WebDriverWait(page, 20).until(lambda _: focused() == order[1])  # the browser says that it closed a moment later
    press(Keys.TAB)  # one image of all is in the order of Tab
    assert page.execute_script("return document.activeElement.className") != "card"


def test_enlarging_with_the_mouse(page):
    choose(page, "class", "1")
    page.find_elements(By.CSS_SELECTOR, "#cards > li:not([hidden]) .card")[0].click()
    viewer = page.find_element(By.ID, "viewer")
    pictures = viewer.find_elements(By.CSS_SELECTOR, "#viewer-panes img")
    assert [p.get_attribute("class") for p in pictures] == ["image", "mask", "image", "heat", "outline"]
    assert all(page.execute_script("return arguments[0].naturalWidth", picture) == 32 for picture in pictures)
    assert pictures[0].size["width"] > 300
    assert "chosen on test data" in viewer.text
    viewer.find_element(By.ID, "next").click()
    assert text(page, "#viewer-place") == "2 of 20"
    viewer.find_element(By.ID, "close").click()
    assert not viewer.is_displayed()


def test_names_that_attack_are_shown_as_they_are(page):
    choose(page, "sort", "name")
    names = page.execute_script("return [...document.querySelectorAll('.name')].map(e => e.textContent)")
    for name in HOSTILE[:3]:
        assert f"good/{name}" in names
    assert r"good/not utf-8 \xff.png" in names
    page.find_element(By.ID, "search").send_keys("onerror")
    page.find_element(By.CSS_SELECTOR, "#cards > li:not([hidden]) .card").click()
    assert text(page, "#viewer-name") == f"good/{HOSTILE[0]}"
    assert page.execute_script("return document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page, scheme):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colours = page.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map("
        "c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))"
    )
    assert (colours[0] > colours[1]) == (scheme == "light")
    assert abs(colours[0] - colours[1]) > 500


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_print_shows_settings_and_hides_what_needs_a_mouse(page):
    page.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert page.find_element(By.CSS_SELECTOR, ".settings").is_displayed()
    assert not page.find_element(By.ID, "sort").is_displayed()
    assert "chosen on test data" in text(page, "h1")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
