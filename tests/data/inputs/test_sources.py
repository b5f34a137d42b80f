"""Live audio sources, their buffer, and their error messages."""

import http.server
import io
import os
import pty
import socket
import struct
import sys
import threading
import time
import types
from contextlib import contextmanager

import av
import numpy as np
import pytest
import soundfile

from mowa.data import audio
from mowa.data.audio.decoders import AudioBytes
from mowa.data.inputs import microphone, network, stdin
from mowa.data.inputs import source as source_module
from mowa.data.inputs.source import AudioChunk, AudioSource, BufferedSource
from mowa.errors import AudioError, MissingDependency

RATE_HZ = 16_000


def clip(seed, samples):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, samples).astype(np.float32)


def read_all(source, **how):
    with BufferedSource(source, **how) as blocks:
        found = list(blocks)
    return np.concatenate([block.samples for block in found])


def failing(source):
    """Return the samples before the failure and its message."""
    found = []
    with BufferedSource(source) as blocks, pytest.raises(AudioError) as wrong:
        found.extend(block.samples for block in blocks)
    assert "\n" not in str(wrong.value)
    return np.concatenate([np.zeros(0, np.float32), *found]), str(wrong.value)


def counting(count, *, pausable, after=lambda number: None):
    """Return a source of chunks of 25 samples, each filled with its number."""

    def open_stream(rate_hz):
        for number in range(count):
            yield AudioChunk(np.full(25, number, np.float32), rate_hz, time.monotonic())
            after(number + 1)

    return AudioSource("counting", open_stream, pausable=pausable)


# --- the buffer -------------------------------------------------------------------------------------------------------


def test_a_pausable_source_waits_for_the_buffer():
    produced = [0]
    source = counting(60, pausable=True, after=lambda number: produced.__setitem__(0, number))
    taken, most = 0, 0
    with BufferedSource(source, 1000, max_buffer_s=0.25) as blocks:
        for block in blocks:
            assert block.samples[0] == taken
            assert not block.lost_s
            taken += 1
            most = max(most, blocks.buffered_s)
            time.sleep(0.002)
            assert produced[0] <= taken + 10
    assert taken == 60
    assert most <= 0.25
    assert blocks.dropped_s == 0


def test_a_realtime_source_drops_the_oldest_audio():
    full = threading.Event()
    source = counting(95, pausable=False, after=lambda number: number == 95 and full.set())
    with BufferedSource(source, 1000, max_buffer_s=0.25) as blocks:
        assert full.wait(10)
        assert blocks.buffered_s <= 0.25
        found = list(blocks)
    assert [block.samples[0] for block in found] == [90, 91, 92, 93, 94]
    assert [block.lost_s for block in found] == pytest.approx([2.25, 0, 0, 0, 0])
    assert blocks.dropped_s == pytest.approx(2.25)


def test_buffered_audio_is_yielded_after_stop():
    full = threading.Event()
    source = counting(60, pausable=True, after=lambda number: number == 10 and full.set())
    with BufferedSource(source, 1000, max_buffer_s=0.25) as blocks:
        iterator = iter(blocks)
        first = next(iterator)
        assert full.wait(10)
        blocks.stop()
        rest = list(iterator)
    assert 9 <= len([first, *rest]) <= 12


@pytest.mark.parametrize(
    ("failure", "line"),
    [(AudioError("gone"), "gone"), (OSError(5, "Input/output error"), "counting: cannot be read (Input/output error)")],
)
def test_failures_are_raised_after_the_audio_before_them(failure, line):
    def fail(number):
        if number == 3:
            raise failure

    samples, message = failing(counting(9, pausable=True, after=fail))
    assert len(samples) == 75
    assert message == line


def test_other_exceptions_are_passed_on():
    def fail(number):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), BufferedSource(counting(2, pausable=True, after=fail)) as blocks:
        list(blocks)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    soundfile.write(tmp_path / "one.wav", clip(0, 20_000), RATE_HZ)
    return tmp_path / "one.wav"


class Clock:
    """A clock that advances only during sleep, 1 ms too far each time."""

    def __init__(self):
        self.now_s, self.slept = 100.0, 0

    def monotonic(self):
        return self.now_s

    def sleep(self, seconds):
        self.slept += 1
        self.now_s += seconds + 0.001


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_realtime_chunks_come_when_they_would_have_been_recorded(file, monkeypatch, speed):
    clock = Clock()
    monkeypatch.setattr(source_module, "time", clock)
    position = 0
    for chunk in source_module.open_realtime_file(file, speed).open_stream(RATE_HZ):
        position += len(chunk.samples)
        assert chunk.captured_at_s == pytest.approx(100 + position / RATE_HZ / speed)
        assert 0 <= clock.now_s - chunk.captured_at_s < 0.0011  # delays do not add up
    assert position == 20_000
    assert clock.slept >= 20_000 // 512


def test_realtime_is_never_early(file):
    started_s = time.monotonic()
    assert np.array_equal(read_all(source_module.open_realtime_file(file, speed=20)), audio.load_audio(file))
    assert time.monotonic() - started_s >= 1.25 / 20


def test_a_file_equals_load_audio(file):
    assert np.array_equal(read_all(source_module.open_file(file)), audio.load_audio(file))


@pytest.mark.parametrize("source", [source_module.open_file, source_module.open_realtime_file])
def test_missing_files_raise(tmp_path, source):
    for name, word in (("lost.wav", "does not exist"), ("", "is a folder")):
        with pytest.raises(AudioError, match=word):
            source(tmp_path / name)


# --- standard input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(monkeypatch):
    """Replace standard input by a real pipe, into which a thread writes bytes in pieces."""
    reads, threads = [], []

    def feed(data, piece=3000):
        read, write = os.pipe()

        def run():
            with open(write, "wb", buffering=0) as out:
                for start in range(0, len(data), piece):
                    try:
                        out.write(data[start : start + piece])
                    except BrokenPipeError:
                        return

        reads.append(open(read, "rb", buffering=0))  # noqa: SIM115
        threads.append(threading.Thread(target=run))
        monkeypatch.setattr(sys, "stdin", reads[-1])
        threads[-1].start()

    yield feed
    for file in reads:
        file.close()
    for thread in threads:
        thread.join()


def encode_sndfile(samples, rate_hz=RATE_HZ, **how):
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, **how)
    return file.getvalue()


def encode_ffmpeg(samples, form, codec, rate_hz=RATE_HZ):
    """Encode as FFmpeg does into a pipe, where it cannot go back to write sizes."""
    data = []
    sink = types.SimpleNamespace(write=lambda piece: data.append(bytes(piece)) or len(piece))
    with av.open(sink, "w", format=form) as container:
        track = container.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], "s16", "mono")
        frame.rate = rate_hz
        for one in [*av.AudioResampler(track.format, "mono", rate_hz).resample(frame)]:
            container.mux(track.encode(one))
        container.mux(track.encode(None))
    return b"".join(data)


def encode_raw(samples):
    return (samples * 32768).round().astype("<i2").tobytes()


SOUND = clip(3, 24_001)
RECORDINGS = {
    "wav": lambda: encode_sndfile(SOUND, format="WAV", subtype="PCM_16"),
    "wav of 24 bits": lambda: encode_sndfile(SOUND, format="WAV", subtype="PCM_24"),
    "wav from a pipe": lambda: encode_ffmpeg(SOUND, "wav", "pcm_s16le"),
    "flac": lambda: encode_sndfile(SOUND, format="FLAC"),
    "ogg": lambda: encode_sndfile(SOUND, format="OGG"),
    "mp3": lambda: encode_sndfile(SOUND, format="MP3"),
    "matroska": lambda: encode_ffmpeg(SOUND, "matroska", "pcm_s16le"),
    "adts": lambda: encode_ffmpeg(SOUND, "adts", "aac"),
    "mpegts": lambda: encode_ffmpeg(SOUND, "mpegts", "aac"),
    "sphere": lambda: encode_sndfile(SOUND, format="NIST", subtype="PCM_16"),
}


def check_equal(samples, recording, more=0):
    """Check that samples equal `load_audio` bit for bit; `more` samples of padding may follow."""
    expected = audio.load_audio(recording)
    assert len(expected) <= len(samples) <= len(expected) + more
    assert bool((samples[: len(expected)] == expected).all())


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_are_read_from_a_pipe_as_from_a_file(pipe, name):
    data = RECORDINGS[name]()
    assert stdin.is_container(data[:2048])
    pipe(data)
    check_equal(read_all(stdin.open_stdin()), AudioBytes(name, data), more=512 if name == "mp3" else 0)


@pytest.mark.parametrize("piece", [1, 4097, 10**6])
def test_raw_samples_are_read_from_a_pipe(pipe, piece):
    data = encode_raw(SOUND[:3001]) + b"\x01"  # half a sample is dropped
    pipe(data, piece)
    assert np.array_equal(read_all(stdin.open_stdin()), np.frombuffer(data[:-1], "<i2") / np.float32(32768))


@pytest.mark.parametrize("encoding", ["mulaw", "alaw"])
def test_raw_g711_is_decoded_as_ffmpeg_does(pipe, encoding):
    codes = np.random.default_rng(0).integers(0, 256, 16_000, np.uint8).tobytes() + b"\xff" * 8000  # noise and silence
    decoder = av.CodecContext.create(f"pcm_{encoding}", "r")
    decoder.sample_rate, decoder.layout = 8_000, "mono"
    expected = np.concatenate([frame.to_ndarray().ravel() for frame in decoder.decode(av.Packet(codes))])
    pipe(codes, 777)
    got = read_all(stdin.open_stdin(encoding=encoding), rate_hz=8_000)
    assert np.array_equal(got, expected / np.float32(32768))


@pytest.mark.parametrize(("rate_hz", "channels"), [(8_000, 1), (44_100, 2), (48_000, 1)])
def test_other_rates_are_resampled(pipe, rate_hz, channels):
    tone = np.sin(np.arange(rate_hz) * 2 * np.pi * 440 / rate_hz).astype(np.float32) * 0.5
    pipe(encode_sndfile(np.stack([tone] * channels, 1), rate_hz, format="WAV"))
    samples = read_all(stdin.open_stdin())
    assert abs(len(samples) - RATE_HZ) <= 1
    expected = np.sin(np.arange(RATE_HZ) * 2 * np.pi * 440 / RATE_HZ) * 0.5
    assert np.abs(samples[800:15_000] - expected[800:15_000]).max() < 1e-3
    if channels == 1:
        pipe(encode_raw(tone))
        assert np.abs(read_all(stdin.open_stdin(rate_hz)) - samples).max() < 1e-4


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_a_wav_with_more_audio_than_it_states_is_read_from_a_pipe_to_its_end(pipe, caplog, seconds):
    data = bytearray(encode_sndfile(SOUND, format="WAV", subtype="PCM_16"))
    data[40:44] = struct.pack("<I", round(2 * seconds * RATE_HZ))
    pipe(bytes(data))
    assert len(read_all(stdin.open_stdin())) == len(SOUND)
    assert "has more audio than its header states" in caplog.text


@pytest.mark.parametrize("follows", [b"LIST" + struct.pack("<I", 20_000) + bytes(20_000), b"\0" * 2000])
def test_what_follows_a_wav_in_a_pipe_may_be_no_audio(pipe, caplog, follows):
    data = bytearray(encode_sndfile(SOUND[:16_000], format="WAV", subtype="PCM_16"))
    pipe(bytes(data) + follows)
    assert len(read_all(stdin.open_stdin())) == RATE_HZ
    assert not caplog.text


def test_audio_before_a_gap_is_not_resampled_into_what_follows():
    loud, silent = np.ones(48_000, np.float32), np.zeros(48_000, np.float32)
    chunks = [AudioChunk(loud, 48_000, 0.0), AudioChunk(silent, 48_000, 0.0, 2.0)]
    with BufferedSource(AudioSource("gap", lambda rate_hz: (chunk for chunk in chunks)), RATE_HZ, 9.0) as bounded:
        blocks = list(bounded)
    at = next(index for index, block in enumerate(blocks) if block.lost_s)
    before, after = (np.concatenate([block.samples for block in part]) for part in (blocks[:at], blocks[at:]))
    assert len(before) == len(after) == RATE_HZ
    assert not after.any()


def test_the_rate_may_change_during_the_stream():
    tone = [np.sin(np.arange(rate) * 0.5).astype(np.float32) for rate in (8000, 16_000, 48_000)]
    chunks = [AudioChunk(one, len(one), 0.0, 0.5 * at) for at, one in enumerate(tone)]
    with BufferedSource(AudioSource("changing", lambda rate_hz: (chunk for chunk in chunks)), RATE_HZ) as bounded:
        blocks = list(bounded)
    assert abs(sum(len(block.samples) for block in blocks) - 3 * RATE_HZ) <= 2
    assert sum(block.lost_s for block in blocks) == 1.5
    assert max(len(block.samples) for block in blocks) <= 512


def test_wrong_standard_input(pipe, monkeypatch):
    whole = encode_sndfile(SOUND, format="WAV")
    for data, rate_hz, word in (
        (b"", None, "ended before any audio"),
        (b"OggS" + bytes(3000), None, "cannot be decoded"),
        (whole, 8000, "is a recording of 16000 Hz, not 8000 Hz"),
        (whole[: len(whole) // 2], None, "is cut off: its header promises 1.5 s, 0.7 s were received"),
    ):
        pipe(data)
        samples, line = failing(stdin.open_stdin(rate_hz))
        assert line.startswith("standard input: ")
        assert word in line
        assert bool(len(samples)) == ("cut off" in word)
    leader, follower = pty.openpty()
    with open(leader, "rb", buffering=0), open(follower, "rb", buffering=0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(AudioError, match="nothing is piped in"):
            stdin.open_stdin()


def test_raw_samples_are_not_detected_as_containers():
    rng = np.random.default_rng(0)
    for start in (b"\xff\xfb\x90\x64", b"\xff\xff\xff\xff", b"\xff\xf1\x50\x80", b"\x47\x00", b"\x00\x00", b""):
        for size in (0, 63, 4097):
            noise = rng.integers(-3, 3, size).astype("<i2").tobytes()
            assert not stdin.is_container((start + noise)[:2048])


# --- network ----------------------------------------------------------------------------------------------------------


@contextmanager
def server(answers):
    """Run a local HTTP server: path → bytes, or None to send no response."""
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = answers.get(self.path.partition("?")[0], b"")
            if data is None:
                done.wait(10)
                return
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://somebody:secret@127.0.0.1:{running.server_port}"
        done.set()
        running.shutdown()
        thread.join()


def test_audio_over_http():
    data = encode_sndfile(np.stack([SOUND, SOUND], 1), format="OGG")
    with server({"/a.ogg": data}) as url:
        source = network.open_url(f"{url}/a.ogg?key=1")
        assert source.pausable
        check_equal(read_all(source), AudioBytes("a.ogg", data))


def test_urls_without_audio_raise(monkeypatch):
    monkeypatch.setattr(network, "TIMEOUT_S", 0.3)
    with server({"/silent": None, "/text": b"no sound " * 999}) as url:
        for path, word in (("/silent", "no data for 0.3 s"), ("/lost", "404"), ("/text", "cannot be decoded")):
            samples, line = failing(network.open_url(f"{url}{path}?key=1"))
            assert not len(samples)
            assert word in line
            assert "secret" not in line
            assert "key" not in line
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "Connection refused" in failing(network.open_url(f"http://127.0.0.1:{closed.getsockname()[1]}/"))[1]
    with pytest.raises(AudioError, match="unsupported URL scheme 'file'"):
        network.open_url("file:///etc/passwd")


def test_a_playlist_opens_no_file(tmp_path):
    part = encode_ffmpeg(SOUND, "mpegts", "aac")
    (tmp_path / "part.ts").write_bytes(part)
    listed = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n".format
    there, here = listed("part.ts").encode(), listed((tmp_path / "part.ts").as_uri()).encode()
    with server({"/there.m3u8": there, "/part.ts": part, "/here.m3u8": here}) as url:
        assert len(read_all(network.open_url(f"{url}/there.m3u8"))) > 20_000
        assert not len(failing(network.open_url(f"{url}/here.m3u8"))[0])


def test_audio_over_rtp():
    """Send RTP packets (RFC 3550) of G.711 µ-law: 8 kHz, 20 ms each."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1] & ~1
        done = threading.Event()

        def send():
            number = 0
            while not done.wait(0.005):
                head = struct.pack(">BBHII", 0x80, 0, number & 0xFFFF, 160 * number, 7)
                out.sendto(head + bytes([0x80 if number % 2 else 0x00] * 160), ("127.0.0.1", port))
                number += 1

        thread = threading.Thread(target=send)
        thread.start()
        source, count, loudest = network.open_url(f"rtp://127.0.0.1:{port}"), 0, 0.0
        try:
            with BufferedSource(source) as blocks:
                for block in blocks:
                    count += len(block.samples)
                    loudest = max(loudest, np.abs(block.samples).max())
                    if count > RATE_HZ:
                        break
        finally:
            done.set()
            thread.join()
    assert not source.pausable
    assert loudest > 0.9


# --- microphones ------------------------------------------------------------------------------------------------------


class PortAudioError(Exception):
    pass


def fake(names=("Built-in", "USB one", "USB two"), *, rates=(16_000,), least=1, plays=(), ends="unplugged"):
    """Return a fake sounddevice whose microphones deliver the arrays of `plays` [n, channels] at once, then end."""
    opened = []

    def check(device, channels, dtype, samplerate):
        if samplerate not in rates or channels < least:
            raise PortAudioError("Invalid sample rate [PaErrorCode -9997]", -9997)

    class InputStream:
        def __init__(self, *, callback, finished_callback, **how):
            opened.append(how)
            self.callback, self.finished = callback, finished_callback
            if ends == "taken":
                raise PortAudioError("Device unavailable [PaErrorCode -9985]", -9985)

        def __enter__(self):
            def run():
                at_s = 5.0
                for sound, lost_s in plays:
                    at_s += lost_s
                    when = types.SimpleNamespace(inputBufferAdcTime=at_s)
                    self.callback(sound, len(sound), when, types.SimpleNamespace(input_overflow=lost_s > 0))
                    at_s += len(sound) / opened[-1]["samplerate"]
                if ends == "unplugged":
                    self.finished()

            self.thread = threading.Thread(target=run)
            self.thread.start()
            return self

        def __exit__(self, *_):
            self.thread.join()
            self.finished()

    devices = [{"name": "Speaker", "max_input_channels": 0, "default_samplerate": 48_000.0}]
    devices += [{"name": name, "max_input_channels": 2, "default_samplerate": 48_000.0} for name in names]
    return types.SimpleNamespace(
        default=types.SimpleNamespace(device=(2 if len(names) > 1 else -1, 0)),
        query_devices=lambda: devices,
        check_input_settings=check,
        InputStream=InputStream,
        PortAudioError=PortAudioError,
        opened=opened,
    )


@pytest.fixture
def with_fake(monkeypatch):
    def put(**how):
        module = fake(**how)
        monkeypatch.setitem(sys.modules, "sounddevice", module)
        return module

    return put


def test_a_microphone_is_read_until_it_is_unplugged(with_fake):
    module = with_fake(plays=[(SOUND[start : start + 512, None], 0.0) for start in range(0, 8192, 512)])
    source = microphone.open_microphone()
    assert (source.pausable, source.finite) == (False, False)
    samples, line = failing(source)
    assert np.array_equal(samples, SOUND[:8192])
    assert line == "microphone USB one: no more audio after 0.5 s. Is it unplugged?"
    assert module.opened[0] == {"samplerate": RATE_HZ, "blocksize": 512, "device": 2, "channels": 1, "dtype": "float32"}


def test_a_microphone_that_delivers_nothing_is_unplugged(with_fake, monkeypatch):
    monkeypatch.setattr(microphone, "TIMEOUT_S", 0.05)
    with_fake(plays=[(SOUND[:512, None], 0.0)], ends="silent")
    samples, line = failing(microphone.open_microphone())
    assert len(samples) == 512
    assert "no more audio" in line


def test_a_microphone_with_its_own_rate_and_channels(with_fake):
    tone = np.sin(np.arange(48_000) * 2 * np.pi * 440 / 48_000).astype(np.float32)
    both = np.stack([tone, np.zeros_like(tone)], 1)
    module = with_fake(rates=(48_000,), least=2, plays=[(both[at : at + 1536], 0.0) for at in range(0, 48_000, 1536)])
    samples, _ = failing(microphone.open_microphone("usb TWO"))
    assert (module.opened[0]["samplerate"], module.opened[0]["channels"], module.opened[0]["device"]) == (48_000, 2, 3)
    assert abs(len(samples) - RATE_HZ) <= 1
    assert np.abs(samples).max() == pytest.approx(0.5, abs=0.05)


def test_an_overflow_is_counted(with_fake):
    with_fake(plays=[(SOUND[:512, None], 0.0), (SOUND[:512, None], 0.25), (SOUND[:512, None], 0.0)])
    lost = []
    with BufferedSource(microphone.open_microphone()) as blocks, pytest.raises(AudioError):
        lost.extend(block.lost_s for block in blocks)
    assert lost == pytest.approx([0.0, 0.25, 0.0])


def test_missing_microphones_raise(with_fake):
    with_fake(names=())
    with pytest.raises(AudioError, match=r"^no microphone found\. Connect one, or pipe audio in"):
        microphone.open_microphone()
    with_fake()
    for name, line in (
        ("radio", "no microphone 'radio'. Choose by number: 1 Built-in; 2 USB one; 3 USB two"),
        ("0", "no microphone '0'. Choose"),
        ("usb", "2 microphones match 'usb'. Choose by number: 2 USB one; 3 USB two"),
    ):
        with pytest.raises(AudioError) as wrong:
            microphone.open_microphone(name)
        assert str(wrong.value).startswith(line)
    with_fake(rates=())
    assert "cannot be opened; is it in use? (Invalid sample rate" in failing(microphone.open_microphone())[1]
    with_fake(ends="taken")
    assert "is it in use? (Device unavailable" in failing(microphone.open_microphone())[1]


def test_the_only_microphone_is_the_default_one(with_fake):
    with_fake(names=("Built-in",))
    assert microphone.open_microphone().name == "microphone Built-in"
    assert [one.default for one in microphone.list_microphones()] == [False]


def test_without_sounddevice_or_portaudio(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingDependency, match=r"pip install 'mowa\[live\]'"):
        microphone.open_microphone()
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.delitem(sys.modules, "sounddevice")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="apt-get install libportaudio2"):
        microphone.list_microphones()
