"""examples/browser in Chromium gives the transcript of mowa, and reports errors.

For float samples and a float32 model the text is the same. Chromium scales positive 16-bit samples by 1/32767 instead
of 1/32768, which may change uncertain tokens in int8: there 2 % of the characters may differ.
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
MIN_SIMILARITY = 0.98
DONE = "#facts div"


@pytest.fixture(scope="module")
def browser():
    """Chromium; the tests fail if a page contacts another server."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as playing:
        chromium = playing.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def serve(folder: Path) -> Iterator[str]:
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
def float32_page(float32_export):
    yield from serve(float32_export)


@pytest.fixture(scope="module")
def int8_page(int8_export):
    yield from serve(int8_export)


@pytest.fixture
def page(browser):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if "127.0.0.1" in request.url else errors.append(request.url))
    yield page
    page.close()
    assert errors == []


def transcribe(page, file: Path) -> str:
    page.set_input_files("#file", file)
    page.wait_for_selector(DONE, timeout=WAIT_MS)
    return page.inner_text("#text").strip()


def wait_for_status(page, text: str) -> None:
    page.locator("#status", has_text=text).wait_for(timeout=WAIT_MS)


def test_the_text_in_float32_is_that_of_mowa(page, float32_page, float32_export, sample, tmp_path):
    soundfile.write(tmp_path / "speech.wav", *soundfile.read(sample, dtype="float32"), subtype="FLOAT")
    page.goto(float32_page)
    text = mowa.transcribe(tmp_path / "speech.wav", str(float32_export)).text
    assert len(text) > 20
    assert transcribe(page, tmp_path / "speech.wav") == text


def test_the_text_of_pl_tiny_in_int8_is_similar_to_that_of_mowa(page, int8_page, int8_export, sample, tmp_path):
    page.goto(int8_page)
    assert page.evaluate("crossOriginIsolated")
    text, theirs = mowa.transcribe(sample, str(int8_export)).text, transcribe(page, sample)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert theirs.startswith("dzień dobry to jest mowa")
    assert difflib.SequenceMatcher(None, theirs, text, autojunk=False).ratio() >= MIN_SIMILARITY
    assert f"{len(theirs.split())} words" in page.inner_text("#status")
    assert "int8-dynamic" in page.inner_text("#facts")


def test_the_current_word_is_highlighted(page, int8_page, int8_export, sample):
    page.goto(int8_page)
    transcribe(page, sample)
    words = mowa.transcribe(sample, str(int8_export)).words
    middle = words[len(words) // 2]
    page.evaluate(f"document.getElementById('player').currentTime = {(middle.start_s + middle.end_s) / 2}")
    page.wait_for_selector("#text .now", timeout=WAIT_MS)
    assert page.inner_text("#text .now") == middle.text


def test_a_long_stereo_recording_at_another_rate_is_split(page, int8_page, int8_export, sample, tmp_path):
    samples, rate_hz = soundfile.read(sample, dtype="float32")
    twice = np.concatenate([samples, np.zeros(4 * rate_hz, np.float32), samples])
    soundfile.write(tmp_path / "twice.wav", np.stack([np.repeat(twice, 3)] * 2, 1), 3 * rate_hz)
    page.goto(int8_page)
    text, theirs = mowa.transcribe(sample, str(int8_export)).text, transcribe(page, tmp_path / "twice.wav")
    assert difflib.SequenceMatcher(None, theirs, f"{text} {text}", autojunk=False).ratio() >= 0.95


def test_the_same_recording_can_be_transcribed_again(page, float32_page, sample):
    page.goto(float32_page)
    before = transcribe(page, sample)
    page.click("#sample")
    page.wait_for_selector(DONE, state="detached", timeout=WAIT_MS)
    page.wait_for_selector(DONE, timeout=WAIT_MS)
    assert page.inner_text("#text").strip() == before
    page.set_input_files("#file", sample)
    wait_for_status(page, "dzien-dobry.flac: ")
    assert page.inner_text("#text").strip() == before


def test_a_file_that_cannot_be_decoded_is_reported(page, float32_page, tmp_path):
    (tmp_path / "words.wav").write_text("no sound at all")
    page.goto(float32_page)
    page.set_input_files("#file", tmp_path / "words.wav")
    wait_for_status(page, "words.wav cannot be decoded")
    assert page.is_hidden("#result")
    assert page.is_enabled("#file")


def test_a_recording_that_is_too_short_is_reported(page, float32_page, sample, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.ones(100, np.float32), 16_000)
    page.goto(float32_page)
    page.set_input_files("#file", tmp_path / "short.wav")
    wait_for_status(page, "Transcription failed: the recording has fewer than")
    assert transcribe(page, sample)


def test_a_folder_without_an_export_is_rejected(tmp_path):
    command = [sys.executable, str(BROWSER / "serve.py"), str(tmp_path), "--port", "0"]
    completed = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert completed.returncode == 1
    assert "is not an export" in completed.stderr


def test_other_files_are_not_served(page, float32_page):
    for path in ("../run_onnx.py", "model/../../../README.md", "model/../../run_onnx.py"):
        assert page.request.get(float32_page + path).status == 404
