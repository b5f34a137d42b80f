"""examples/browser in a real browser: the text that mowa itself gives, and a line that says what went wrong.

Of float samples, in a float32 net, the text is the very same. Chromium reads 16-bit samples above 0 as 1/32767 each and
not as 1/32768, and in int8 such roundings decide a doubtful letter: there one in fifty may differ.
"""

import difflib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import mowa

pytestmark = pytest.mark.slow

BROWSER = Path(__file__).parents[2] / "examples" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_MS = 120_000
ALIKE = 0.98
HEARD, DONE = "#text span", "#facts div"


@pytest.fixture(scope="module")
def browser():
    """A context that reaches no other server than this machine."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as playing:
        chromium = playing.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def served(folder: Path) -> Iterator[str]:
    if not (BROWSER / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip(f"onnxruntime-web is not installed: npm ci --prefix {BROWSER}")
    command = [sys.executable, str(BROWSER / "serve.py"), str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def exact(masked):
    yield from served(masked)


@pytest.fixture(scope="module")
def whole(small):
    yield from served(small)


@pytest.fixture
def page(browser):
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda asked: None if "127.0.0.1" in asked.url else wrong.append(asked.url))
    yield page
    page.close()
    assert wrong == []


def heard(page, file: Path) -> str:
    page.set_input_files("#file", file)
    page.wait_for_selector(DONE, timeout=WAIT_MS)
    return page.inner_text("#text").strip()


def told(page, what: str) -> None:
    page.locator("#status", has_text=what).wait_for(timeout=WAIT_MS)


def test_in_float32_the_text_is_mowas(page, exact, masked, sample, tmp_path):
    soundfile.write(tmp_path / "said.wav", *soundfile.read(sample, dtype="float32"), subtype="FLOAT")
    page.goto(exact)
    text = mowa.transcribe(tmp_path / "said.wav", str(masked)).text
    assert len(text) > 20
    assert heard(page, tmp_path / "said.wav") == text


def test_pl_tiny_in_int8_says_what_it_says_in_mowa(page, whole, small, sample, tmp_path):
    page.goto(whole)
    assert page.evaluate("crossOriginIsolated")
    text, theirs = mowa.transcribe(sample, str(small)).text, heard(page, sample)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert theirs.startswith("dzień dobry to jest mowa")
    assert difflib.SequenceMatcher(None, theirs, text, autojunk=False).ratio() >= ALIKE
    assert f"{len(theirs.split())} words" in page.inner_text("#status")
    assert "int8-dynamic" in page.inner_text("#facts")


def test_words_are_where_they_were_said(page, whole, small, sample):
    page.goto(whole)
    heard(page, sample)
    said = mowa.transcribe(sample, str(small)).words
    middle = said[len(said) // 2]
    page.evaluate(f"document.getElementById('player').currentTime = {(middle.start_s + middle.end_s) / 2}")
    page.wait_for_selector("#text .now", timeout=WAIT_MS)
    assert page.inner_text("#text .now") == middle.text


def test_a_long_stereo_recording_at_another_rate_is_heard_in_parts(page, whole, small, sample, tmp_path):
    samples, rate_hz = soundfile.read(sample, dtype="float32")
    twice = np.concatenate([samples, np.zeros(4 * rate_hz, np.float32), samples])
    soundfile.write(tmp_path / "twice.wav", np.stack([np.repeat(twice, 3)] * 2, 1), 3 * rate_hz)
    page.goto(whole)
    text, theirs = mowa.transcribe(sample, str(small)).text, heard(page, tmp_path / "twice.wav")
    assert difflib.SequenceMatcher(None, theirs, f"{text} {text}", autojunk=False).ratio() >= 0.95


def test_the_same_recording_may_be_heard_again(page, exact, sample):
    page.goto(exact)
    before = heard(page, sample)
    page.click("#sample")
    page.wait_for_selector(DONE, state="detached", timeout=WAIT_MS)
    page.wait_for_selector(DONE, timeout=WAIT_MS)
    assert page.inner_text("#text").strip() == before
    page.set_input_files("#file", sample)
    told(page, "dzien-dobry.flac: ")
    assert page.inner_text("#text").strip() == before


def test_what_is_no_recording_is_said_to_be_none(page, exact, tmp_path):
    (tmp_path / "words.wav").write_text("no sound at all")
    page.goto(exact)
    page.set_input_files("#file", tmp_path / "words.wav")
    told(page, "words.wav cannot be decoded")
    assert page.is_hidden("#heard")
    assert page.is_enabled("#file")


def test_after_one_that_is_too_short_another_is_heard(page, exact, sample, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.ones(100, np.float32), 16_000)
    page.goto(exact)
    page.set_input_files("#file", tmp_path / "short.wav")
    told(page, "It did not work: shorter than")
    assert heard(page, sample)


def test_a_folder_without_an_export_is_refused(tmp_path):
    command = [sys.executable, str(BROWSER / "serve.py"), str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert "holds no export" in done.stderr


def test_nothing_beside_the_page_is_served(page, exact):
    for path in ("../run_onnx.py", "model/../../../README.md", "model/../../run_onnx.py"):
        assert page.request.get(exact + path).status == 404
