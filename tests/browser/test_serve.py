"""The service's page in headless Chromium: a scan goes in, a heat map comes out, by mouse and by keyboard."""

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from benchmarks import serve_load
from iqe_jax import calibration
from tests.runs import small_run

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1100,900"
)
TOKEN = "a token for the tests"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The address of a service that asks for a token."""
    run = small_run(tmp_path_factory.mktemp("run") / "run")
    calibration.fit(np.linspace(0, 1, 40), np.repeat([0, 1], [30, 10])).save(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IQE_JAX_TOKEN", TOKEN)
        process, port = serve_load.start_service(run, "--batch-size", "4")
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    assert process.wait(60) == 0
    process.stderr.close()


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """An image, a volume and a file that is neither."""
    import nibabel

    folder, draw = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (60, 90, 3), np.uint8)).save(folder / "scan <b>.png")
    volume = draw.integers(0, 1000, (20, 24, 5)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "volume.nii.gz")
    (folder / "notes.txt").write_text("no scan")
    return folder


@pytest.fixture
def page(service, tmp_path):
    """The page, with the token given."""
    options = webdriver.ChromeOptions()
    options.binary_location = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        driver.get_log("performance")  # of the browser's own first page
        driver.get(service)
        wait(driver, lambda: at(driver, "ask").is_displayed())
        at(driver, "token").send_keys(TOKEN, Keys.ENTER)
        wait(driver, lambda: "brain_fewshot" in at(driver, "about").text)
        yield driver
        seen = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in seen if m["method"] == "Network.requestWillBeSent"]
        assert asked and all(url.startswith((service, "data:", "blob:", "chrome:")) for url in asked)
        # That a refused scan was answered with 422 the browser notes by itself.
        errors = [e for e in driver.get_log("browser") if e["level"] == "SEVERE" and "predict" not in e["message"]]
        assert errors == []
    finally:
        driver.quit()


def at(driver, name):
    return driver.find_element(By.ID, name)


def wait(driver, condition):
    WebDriverWait(driver, 20).until(lambda _: condition())


def give(driver, path):
    at(driver, "file").send_keys(str(path))
    wait(driver, lambda: not at(driver, "status").text.startswith("Reading"))


def heat(driver):
    """The pixels of the heat map as they are drawn."""
    text = driver.execute_script("return document.getElementById('heat').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))))


def test_a_scan_and_its_heat_map(page, scans):
    give(page, scans / "scan <b>.png")
    assert at(page, "result").is_displayed()
    assert at(page, "name").text == "scan <b>.png"
    said = at(page, "said").text
    assert "Score" in said and "90 × 60" in said and "% where 25 % are anomalous" in said and ", threshold 0." in said
    assert not at(page, "volume").is_displayed()
    view = at(page, "view").size
    assert view["width"] / view["height"] == pytest.approx(1.5, abs=0.05)
    pixels = heat(page)
    assert pixels.shape == (32, 32, 4) and len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 3
    opacity = at(page, "opacity")
    for _ in range(50):
        opacity.send_keys(Keys.ARROW_LEFT)
    assert page.execute_script("return getComputedStyle(document.getElementById('heat')).opacity") == "0"
    assert at(page, "opacity-shown").text == "0 %"


def test_a_volume_slice_by_slice(page, scans):
    give(page, scans / "volume.nii.gz")
    assert at(page, "volume").is_displayed()
    first = at(page, "view").get_attribute("data-frame")
    assert f"in slice {int(first) + 1}" in at(page, "said").text
    slider = at(page, "frame")
    slider.send_keys(Keys.HOME)
    wait(page, lambda: at(page, "view").get_attribute("data-frame") == "0")
    before = heat(page)
    slider.send_keys(Keys.END)
    wait(page, lambda: at(page, "view").get_attribute("data-frame") == "4")
    assert (heat(page) != before).any()
    assert at(page, "frame-shown").text == slider.get_attribute("aria-valuetext") == "5 of 5"
    page.execute_script("document.querySelector('details').open = true")
    Select(at(page, "axis")).select_by_value("0")  # the volume that is shown is cut anew
    wait(page, lambda: " of 20, " in at(page, "status").text)


def test_a_bad_file_is_explained_and_the_next_one_works(page, scans):
    give(page, scans / "notes.txt")
    assert "notes.txt is of no kind that is read" in at(page, "status").text
    assert not at(page, "result").is_displayed()
    give(page, scans / "scan <b>.png")
    assert at(page, "status").text.startswith("scan <b>.png: score ") and at(page, "result").is_displayed()


def test_dropping_a_file_and_reaching_all_by_keyboard(page, scans):
    content = base64.b64encode((scans / "scan <b>.png").read_bytes()).decode()
    page.execute_script(
        """const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));""",
        content,
    )
    wait(page, lambda: at(page, "result").is_displayed())
    assert at(page, "name").text == "dropped.png"
    reached = []
    page.execute_script("document.activeElement.blur()")
    for _ in range(6):
        webdriver.ActionChains(page).send_keys(Keys.TAB).perform()
        reached.append(page.execute_script("return document.activeElement.id || document.activeElement.tagName"))
    assert {"token", "file", "SUMMARY", "opacity"} <= set(reached)
