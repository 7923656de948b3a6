"""The page in headless Chromium, as people use it: `make test-app`, which names the browser.

With APP_SCREENSHOTS=DIR the packaged model is painted with as well, and pictures of it are kept.
"""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest
from app_server import WAIT, free_port, serving
from grey_pipeline import FRAMES, SIZE, GreyPipeline, grey_model
from media_files import greys
from PIL import Image
from source_tree import ROOT

from dicode_jax.media.video import read_video

BROWSER = os.environ.get("APP_BROWSER")
SCREENSHOTS = os.environ.get("APP_SCREENSHOTS")
if not BROWSER:
    pytest.skip("make test-app names a browser", allow_module_level=True)
pytest.importorskip("gradio")
from playwright.sync_api import expect, sync_playwright  # noqa: E402

expect.set_options(timeout=1000 * WAIT)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Gradio are its own to mend


@pytest.fixture(scope="module")
def browser():
    """One profile, whose pages are visitors of their own."""
    args = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=BROWSER, args=args)
        size = {"width": 1200, "height": 980}
        yield chromium.new_context(viewport=size, reduced_motion="reduce", accept_downloads=True)
        chromium.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """An address and the pipeline behind it. What visitors leave is removed soon."""
    folder, pipe = tmp_path_factory.mktemp("models"), GreyPipeline()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_IS_E2E_TEST", "1")
        models = [grey_model(folder), grey_model(folder, name="frames", **FRAMEWISE)]
        with serving(folder, *models, pipe=pipe) as address:
            yield address, pipe


FRAMEWISE = {"takes": frozenset({"num_frames"}), "has_presets": False, "examples": ("Archery",)}


@pytest.fixture
def visit(browser, house):
    """Opens a page of a new visitor; at the end none has asked other servers or had an error."""
    opened, wrong = [], []

    def open_page(address=house[0]):
        page = browser.new_page()
        opened.append(page)
        page.set_default_timeout(1000 * WAIT)
        own = (address, "data:", "blob:")

        def note(one):
            if not one.url.startswith(own) and one.failure != "csp":  # which none is asked for
                wrong.append(one.url)

        page.on("requestfinished", note)
        page.on("requestfailed", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        expect(page.locator("#paint")).to_be_enabled()
        return page

    house[1].before = lambda index: None
    yield open_page
    for page in opened:
        page.close()
    assert not wrong


class Gate:
    """Lets the first clip pass, and the others when it is opened."""

    def __init__(self):
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self, index):
        if index > 0:
            self.reached.set()
            assert self.open.wait(WAIT)


def paint(page, prompt, clips=1):
    page.fill("#prompt textarea", prompt)
    page.fill("#clips input[type=number]", str(clips))
    page.press("#clips input[type=number]", "Tab")
    page.click("#paint")


def said(page):
    return page.locator("#said textarea")


DONE = re.compile(r"^[\d.]+ s of video, painted in")


def test_a_prompt_becomes_a_video_with_tokens_history_and_a_download(visit, tmp_path):
    page = visit()
    paint(page, "grey on grey", clips=2)
    expect(said(page)).to_have_value(DONE)
    page.wait_for_function(
        f"document.querySelector('#video video')?.videoWidth === {SIZE}", timeout=1000 * WAIT
    )
    expect(page.locator("#tokens img")).to_be_visible()
    expect(page.locator("#history img")).to_have_count(1)
    expect(page.locator("#history")).to_contain_text("grey on grey (0)")
    expect(page.locator("#stop")).to_be_disabled()
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "grey-on-grey-0.mp4"
    download.value.save_as(tmp_path / "got.mp4")
    assert len(read_video(tmp_path / "got.mp4").frames) == 2 * FRAMES


def test_clips_are_shown_as_they_stream(visit, house):
    house[1].before = gate = Gate()
    page = visit()
    paint(page, "grey", clips=2)
    assert gate.reached.wait(WAIT)
    expect(said(page)).to_have_value(re.compile("^Painted clip 1 of 2"))
    expect(page.locator("#video video")).to_have_attribute("src", re.compile(r"0001\.mp4"))
    assert "width: 50" in page.locator("#bar").inner_html()
    gate.open.set()
    expect(said(page)).to_have_value(DONE)
    expect(page.locator("#video video")).to_have_attribute("src", re.compile(r"grey-0\.mp4"))


def test_an_example_a_die_and_an_entry_of_the_history_fill_the_form(visit):
    page = visit()
    page.locator("#examples").get_by_text("grey on grey").click()
    expect(page.locator("#prompt textarea")).to_have_value("grey on grey")
    page.click("#paint")
    expect(said(page)).to_have_value(DONE)
    page.click("#dice")
    expect(page.locator("#seed input")).not_to_have_value("0")
    page.fill("#prompt textarea", "something else")
    page.locator("#history button").first.click()
    expect(page.locator("#prompt textarea")).to_have_value("grey on grey")
    expect(page.locator("#seed input")).to_have_value("0")


def test_a_prompt_is_shown_as_text(visit):
    page = visit()
    prompt = "<img src=x onerror=bad=1><b>hi</b>"
    paint(page, prompt)
    expect(said(page)).to_have_value(DONE)
    expect(page.locator("#history")).to_contain_text(f"{prompt} (0)")
    assert page.locator("#history b, img[src=x]").count() == 0
    assert page.evaluate("window.bad") is None


def test_one_that_is_stopped_keeps_its_clips_and_the_next_is_painted(visit, house):
    house[1].before = gate = Gate()
    page = visit()
    paint(page, "stopped", clips=3)
    assert gate.reached.wait(WAIT)
    expect(said(page)).to_have_value(re.compile("^Painted clip 1 of 3"))
    page.click("#stop")
    expect(said(page)).to_have_value("The first 1 of 3 clips; then it was stopped.")
    expect(page.locator("#history")).to_contain_text("stopped (0)")
    expect(page.locator("#paint")).to_be_enabled()
    gate.open.set()
    paint(page, "another")
    expect(said(page)).to_have_value(DONE)
    expect(page.locator("#history img")).to_have_count(2)


def test_a_mistake_is_a_line_and_the_page_goes_on(visit):
    page = visit()
    page.click("#paint")
    expect(said(page)).to_have_value("Not painted: the prompt is empty; say what to show")
    expect(page.locator("#paint")).to_be_enabled()


def test_a_broken_file_is_told_and_a_picture_is_shown(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Begin with").click()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    page.set_input_files("#start input[type=file]", tmp_path / "broken.mp4")
    expect(said(page)).to_have_value(
        re.compile("^Not painted: broken.mp4 cannot be read as a video")
    )
    assert "/" not in said(page).input_value()
    paint(page, "grey")
    expect(said(page)).to_have_value(re.compile("^Not painted: broken.mp4"))
    page.locator("#start").get_by_label("Clear").click()
    Image.fromarray(greys(2)[1]).save(tmp_path / "in.png")
    page.set_input_files("#start input[type=file]", tmp_path / "in.png")
    expect(page.locator("#preview img")).to_be_visible()
    paint(page, "grey")
    expect(said(page)).to_have_value(DONE)


def test_another_model_has_other_controls(visit):
    page = visit()
    expect(page.locator("#clips")).to_be_visible()
    page.click("#model input")
    page.get_by_role("option", name="frames").click()
    expect(page.locator("#frames")).to_be_visible()
    expect(page.locator("#clips")).to_be_hidden()
    expect(page.locator("#quality")).to_be_hidden()
    expect(page.locator("#examples")).to_contain_text("Archery")


def test_two_at_once_each_get_their_own(visit, house):
    house[1].before = gate = Gate()
    one, other = visit(), visit()
    paint(one, "mine", clips=2)
    assert gate.reached.wait(WAIT)
    paint(other, "theirs", clips=2)
    expect(other.locator("#stop")).to_be_enabled()
    expect(other.locator("body")).to_contain_text(re.compile(r"queue: 1/1|somebody else"))
    gate.open.set()
    for page, prompt, foreign in ((one, "mine", "theirs"), (other, "theirs", "mine")):
        expect(said(page)).to_have_value(DONE)
        expect(page.locator("#history")).to_contain_text(f"{prompt} (0)")
        expect(page.locator("#history")).not_to_contain_text(foreign)


def test_one_that_waits_can_be_stopped_too(visit, house):
    house[1].before = gate = Gate()
    one, other = visit(), visit()
    paint(one, "mine", clips=2)
    assert gate.reached.wait(WAIT)
    paint(other, "theirs")
    other.click("#stop")
    expect(said(other)).to_have_value("Stopped. No clip was there yet.")
    expect(other.locator("#paint")).to_be_enabled()
    gate.open.set()
    expect(said(one)).to_have_value(DONE)
    assert [call["seed"] for call in house[1].asked[-1:]] == [[0]]
    expect(other.locator("#history img")).to_have_count(0)


def test_who_leaves_stops_what_is_painted_and_leaves_nothing(visit, house):
    house[1].before = gate = Gate()
    page = visit()
    paint(page, "left", clips=3)
    assert gate.reached.wait(WAIT)
    painted = []
    expect(page.locator("#video video")).to_have_attribute("src", re.compile(r"0001\.mp4"))
    src = page.locator("#video video").get_attribute("src")
    folder = pathlib.Path(src.partition("file=")[2]).parents[1]
    assert folder.is_dir()
    page.close()
    house[1].before = painted.append
    gate.open.set()
    end = time.monotonic() + WAIT
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not folder.exists()
    assert painted in ([], [2])  # the clip in hand, and no other


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The address of `dicode app` as people start it: the packaged model, or a tiny one."""
    from tiny import tiny_pipeline

    folder, port = tmp_path_factory.mktemp("pipe") / "tiny", free_port()
    model = [] if SCREENSHOTS else ["--model", str(folder)]
    if not SCREENSHOTS:
        tiny_pipeline().save_pretrained(folder)
    words = [sys.executable, "-m", "dicode_jax.cli", "app", "--port", str(port), *model]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}  (Ctrl-C ends it)\n"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        assert server.wait(WAIT) == 143


def test_the_command_serves_a_model(visit, command):
    page = visit(command)
    paint(page, "a red circle moves right on a black background", clips=2)
    expect(said(page)).to_have_value(DONE, timeout=300_000)
    expect(page.locator("#tokens img")).to_be_visible()


@pytest.mark.skipif(not SCREENSHOTS, reason="APP_SCREENSHOTS names no folder")
def test_screenshots(visit, command):
    folder, page = pathlib.Path(SCREENSHOTS), visit(command)
    for prompt in ("a green square grows on a brown background",
                   "a red circle moves right on a black background"):  # fmt: skip
        paint(page, prompt, clips=3)
        expect(said(page)).not_to_have_value(DONE)
        expect(said(page)).to_have_value(re.compile("^Painted clip 2"), timeout=300_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=folder / "app_streaming.png")
        expect(said(page)).to_have_value(DONE, timeout=300_000)
        expect(page.locator("#tokens img")).to_be_visible()
    page.wait_for_timeout(1500)
    page.screenshot(path=folder / "app.png", full_page=True)
