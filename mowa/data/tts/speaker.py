"""Run a text-to-speech program for many recordings in parallel, and write each recording when it is finished."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
import unicodedata
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import soundfile

from mowa.data import audio
from mowa.data.text.normalize import normalize_text
from mowa.data.tts.engines import SpeechEngine
from mowa.data.tts.plan import Clip
from mowa.errors import AudioError, DataError
from mowa.io.atomic import atomic_write

MIN_DURATION_S = 0.1
TIMEOUT_S = 120.0  # per sentence; includes the time to load a neural model


@dataclass(frozen=True, slots=True)
class Failure:
    """A recording that was skipped, and why."""

    line: int
    text: str
    voice: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recording:
    """A finished recording; `is_reused` if it was there before."""

    duration_s: float
    is_reused: bool


class Speaker:
    """Make recordings in several threads; `stop` kills the programs that are running."""

    def __init__(self, engine: SpeechEngine, folder: Path, work: Path, sample_rate_hz: int) -> None:
        """Write FLAC files to `folder`, and the program's WAV files to `work`."""
        self.engine, self.folder, self.work, self.sample_rate_hz = engine, folder, work, sample_rate_hz
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, clip: Clip) -> Recording | Failure:
        """Return the recording of a clip, which is made unless it exists, or why it cannot be made."""
        file = self.folder / f"{clip.id}.flac"
        with suppress(OSError, soundfile.SoundFileError):  # missing or damaged
            if file.stat().st_size and (info := soundfile.info(file)).frames:
                return Recording(info.duration, is_reused=True)
        try:
            samples = self._speak(clip)
        except _SkippedError as error:
            return Failure(clip.line, clip.text, clip.voice.name, str(error))
        encoded = io.BytesIO()
        soundfile.write(encoded, samples, self.sample_rate_hz, format="FLAC", subtype="PCM_16")
        atomic_write(file, encoded.getvalue())
        return Recording(len(samples) / self.sample_rate_hz, is_reused=False)

    def stop(self) -> None:
        """Kill the running programs and start no more; recordings in progress raise instead of failing."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)

    def _speak(self, clip: Clip) -> audio.Samples:
        """Return float32 samples [n] at full scale ±1."""
        if control := next((char for char in clip.text if unicodedata.category(char) in ("Cc", "Cs")), None):
            raise _SkippedError(f"the sentence contains the control character U+{ord(control):04X}")
        if not normalize_text(clip.text):
            raise _SkippedError("the sentence contains no letter or digit")
        try:
            sentence = self.engine.encode(clip.text)
        except UnicodeError as error:
            lacking = repr(error.object[error.start]) if isinstance(error, UnicodeEncodeError) else "the sentence"
            encoding = self.engine.encoding.upper()
            raise _SkippedError(f"{lacking} is not in {encoding}, the encoding that the voice reads") from None
        wav = self.work / f"{clip.id}.wav"
        command = self.engine.build_command(clip.voice, wav)
        program = Path(command[0]).name
        try:
            code, message = self._run(command, sentence)
            detail = f": {message}" if message else ""
            if code:
                ended = f"exit code {code}" if code > 0 else f"signal {-code}"
                raise _SkippedError(f"{program} ended with {ended}{detail}")
            if "SIOD ERROR" in message:  # festival's exit code is 0 even then
                raise _SkippedError(f"{program} failed{detail}")
            if not wav.is_file() or not wav.stat().st_size:
                raise _SkippedError(f"{program} wrote no audio{detail}")
            samples = audio.load_audio(wav, self.sample_rate_hz)
        except AudioError as error:
            raise _SkippedError(f"{program}: {str(error).replace(f'{wav}: ', 'the audio ')}") from None
        finally:
            wav.unlink(missing_ok=True)
        if len(samples) < MIN_DURATION_S * self.sample_rate_hz or audio.is_silent(samples):
            raise _SkippedError(f"{program} wrote {len(samples) / self.sample_rate_hz:.2f} s of silence")
        return samples

    def _run(self, command: Sequence[str], data: bytes) -> tuple[int, str]:
        """Run the program in a process group of its own. Return its exit code and the last error message."""
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        with self._lock:
            if self._stopped:
                raise _StoppedError
            try:
                process = subprocess.Popen(command, stdin=pipe, stdout=null, stderr=pipe, start_new_session=True)
            except OSError as error:
                raise DataError(f"{command[0]} cannot be run: {error.strerror}") from None
            self._running.add(process)
        try:
            _, errors = process.communicate(data, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.communicate()
            raise _SkippedError(f"{Path(command[0]).name} did not finish within {TIMEOUT_S:.0f} s") from None
        finally:
            with self._lock:
                self._running.discard(process)
        if self._stopped:
            raise _StoppedError
        lines = [line.strip() for line in errors.decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if "SIOD ERROR" in line] or lines
        return process.returncode, lines[-1][:200] if lines else ""


class _SkippedError(Exception):
    """Why a recording cannot be made."""


class _StoppedError(Exception):
    """The run is being stopped, so the exit code and output of the program are meaningless."""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_parallel(
    speaker: Speaker, plan: Sequence[Clip], processes: int
) -> Generator[tuple[int, Recording | Failure], None, None]:
    """Yield (index, result) of each clip as it is finished. Closing the iterator stops the running programs."""
    waiting = iter(enumerate(plan))
    running: dict[Future[Recording | Failure], int] = {}
    pool = ThreadPoolExecutor(processes)
    try:
        while True:
            for index, clip in islice(waiting, 2 * processes - len(running)):
                running[pool.submit(speaker, clip)] = index
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    finally:
        speaker.stop()
        pool.shutdown(cancel_futures=True)
