import dataclasses
import gzip
import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from mowa.data.manifests.examples import read_examples
from mowa.errors import AudioError, DataError
from projects.pl_tiny import people
from projects.pl_tiny.cli import cli

RATE_HZ = 16_000
VOICE = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
GAME = "usr/share/games/fillets-ng"
PROMPTS = "usr/share/asterisk/sounds/it_IT_m_Carlo"


def tone(seconds, rate_hz=RATE_HZ):
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def wav(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), RATE_HZ, subtype="PCM_16")


def g722(path, seconds):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = av.CodecContext.create("g722", "w")
    encoder.sample_rate, encoder.format, encoder.layout = RATE_HZ, "s16", "mono"
    frame = av.AudioFrame.from_ndarray((tone(seconds) * 32767).astype(np.int16)[None], format="s16", layout="mono")
    frame.sample_rate = RATE_HZ
    path.write_bytes(b"".join(bytes(packet) for part in (frame, None) for packet in encoder.encode(part)))


def russian(root, *lines):
    listed = root / VOICE / "etc/txt.done.data"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f'( ru_{at:04} "{line}" )\n' for at, line in enumerate(lines)))


def italian(root, text):
    listed = root / "usr/share/doc/asterisk-core-sounds-it/core-sounds-it.txt.gz"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_bytes(gzip.compress(text.encode("utf-8-sig")))


def rows(manifest):
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_russian_sentences(tmp_path):
    russian(tmp_path, "Он, подн+ял вол+ос.", "Нет.", "Ей 3 года.", "Дома нет.")
    for at, seconds in enumerate((2.0, 0.1, 2.0)):
        wav(tmp_path / VOICE / f"wav/ru_{at:04}.wav", seconds)
    manifest = tmp_path / "out/festvox-ru.jsonl"
    report = people.write_source(people.SOURCES["festvox-ru"], tmp_path, manifest)
    assert report == people.ExtractionReport(
        1,
        2.0 / 3600,
        {"too short or too long": 1, "text not readable letter by letter": 1, "no recording": 1},
    )
    assert rows(manifest) == [
        {
            "id": "festvox-ru/ru_0000",
            "audio": "audio/festvox-ru/ru_0000.wav",
            "text": "on padniał walos".replace("ł", "l"),
            "duration_s": 2.0,
            "voice": "msu_ru_nsh",
            "language": "ru",
            "written": "Он, поднял волос.",
        }
    ]
    (example,) = read_examples(manifest)
    samples, rate_hz = soundfile.read(example.audio)
    assert (rate_hz, len(samples), soundfile.info(example.audio).subtype) == (RATE_HZ, 2 * RATE_HZ, "PCM_16")
    assert not list(tmp_path.rglob("*.part"))


def test_prompts_in_g722(tmp_path):
    lines = ["; Comment: no prompt", "", "activated: Attivato.", "activated: Due volte.", "digits/1: uno"]
    lines += ["beep: [tono]", "vm-star: premere *", "lost: Ciao.", "empty:", "long: " + "ciao " * 20]
    italian(tmp_path, "\n".join(lines))
    for name, seconds in {"activated": 1.0, "digits/1": 0.5, "beep": 1.0, "vm-star": 1.0, "long": 1.0}.items():
        g722(tmp_path / PROMPTS / f"{name}.g722", seconds)
    manifest = tmp_path / "out/asterisk-it.jsonl"
    report = people.write_source(people.SOURCES["asterisk-it"], tmp_path, manifest)
    assert [(row["id"], row["text"], row["voice"]) for row in rows(manifest)] == [
        ("asterisk-it/activated", "atiwato", "it_IT_m_Carlo"),
        ("asterisk-it/digits/1", "uno", "it_IT_m_Carlo"),
    ]
    assert [row["duration_s"] for row in rows(manifest)] == pytest.approx([1.0, 0.5], abs=0.02)
    assert report.skipped == {
        "text not readable letter by letter": 2,
        "no recording": 1,
        "no text": 1,
        "text too long for its recording": 1,
    }
    samples, _ = soundfile.read(manifest.parent / "audio/asterisk-it/activated.wav")
    spectrum = np.abs(np.fft.rfft(samples[:8000]))
    assert np.argmax(spectrum) == pytest.approx(150, abs=1)  # 300 Hz in half a second


def test_spanish_gets_its_tildes_back(tmp_path):
    listed = tmp_path / "usr/share/doc/asterisk-core-sounds-es/core-sounds-es.txt.gz"
    listed.parent.mkdir(parents=True)
    listed.write_bytes(gzip.compress(b"a: Su contrasena\nb: Contrasenas\nc: hasta manana\nd: semana\n"))
    clips = people.SOURCES["asterisk-es"].read(tmp_path)
    assert [clip.text for clip in clips] == ["Su contraseña", "Contraseñas", "hasta mañana", "semana"]


def test_czech_dialogues_are_for_evaluation_only(tmp_path):
    script = tmp_path / GAME / "script/city/dialogs_cs.lua"
    script.parent.mkdir(parents=True)
    script.write_text(
        'dialogId("a", "font_small", "Hello (there) fish.")\ndialogStr("Vítejte v městě.")\n\n'
        'dialogId("b", "font_big", "Two words")\ndialogStr("Dvě slova.")\n'
        'dialogId("c", "font_big", "Russian")\ndialogStr("Подожди, to je ono.")\n'
    )
    for name in "abc":
        path = tmp_path / GAME / f"sound/city/cs/{name}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(3.0, 22_050), 22_050, format="OGG", subtype="VORBIS")
    manifest = tmp_path / "out/fillets-cs.jsonl"
    report = people.write_source(people.SOURCES["fillets-cs"], tmp_path, manifest)
    (row,) = rows(manifest)
    assert (row["id"], row["text"], row["voice"]) == ("fillets-cs/city/a", "witejte w mniescie", "small")
    assert row["duration_s"] == pytest.approx(3.0, abs=0.05)
    assert report.skipped == {"too few words": 1, "text not readable letter by letter": 1}
    assert [name for name, source in people.SOURCES.items() if not source.training] == ["fillets-cs"]


@pytest.mark.parametrize("name", people.SOURCES)
def test_a_missing_transcript_is_named(tmp_path, name):
    with pytest.raises(DataError, match="in the package"):
        people.write_source(people.SOURCES[name], tmp_path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_damaged_wav_is_refused(tmp_path):
    russian(tmp_path, "Дома нет.")
    path = tmp_path / VOICE / "wav/ru_0000.wav"
    wav(path, 2.0)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(AudioError, match=r"ru_0000\.wav"):
        people.write_source(people.SOURCES["festvox-ru"], tmp_path, tmp_path / "out/festvox-ru.jsonl")
    assert not (tmp_path / "out/festvox-ru.jsonl").exists()


def test_an_empty_g722_is_refused(tmp_path):
    italian(tmp_path, "activated: Attivato.")
    path = tmp_path / PROMPTS / "activated.g722"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(AudioError, match=r"activated\.g722"):
        people.write_source(people.SOURCES["asterisk-it"], tmp_path, tmp_path / "out/asterisk-it.jsonl")


def test_no_usable_recording_is_an_error(tmp_path):
    italian(tmp_path, "beep: [tono]")
    with pytest.raises(DataError, match="no usable recording"):
        people.write_source(people.SOURCES["asterisk-it"], tmp_path, tmp_path / "out/asterisk-it.jsonl")


def package(folder, name, fill):
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: test\n"
    (tree / "DEBIAN/control").write_text(control)
    fill(tree)
    subprocess.run(["dpkg-deb", "--build", tree, folder / f"{name}_1_all.deb"], check=True, capture_output=True)
    shutil.rmtree(tree)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_from_packages_and_again(tmp_path):
    downloads, out = tmp_path / "debs", tmp_path / "out"

    def sentences(tree):
        russian(tree, "Дома нет.")
        wav(tree / VOICE / "wav/ru_0000.wav", 1.0)

    package(downloads, "festvox-ru", sentences)
    first = people.build_corpus(out, ["festvox-ru"], downloads)
    assert first == {"festvox-ru": people.ExtractionReport(1, 1 / 3600, {})}
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert people.build_corpus(out, ["festvox-ru"], downloads) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == written

    (out / "festvox-ru.jsonl").unlink()  # interrupted before the manifest: the audio is kept
    command = ["people", "-o", str(out), "--source", "festvox-ru", "--downloads", str(downloads)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "festvox-ru: 1 clips" in done.output
    assert (out / "audio/festvox-ru/ru_0000.wav").stat().st_mtime_ns in written.values()


def test_unknown_source(tmp_path):
    with pytest.raises(DataError, match=r"klingon: no such source.*festvox-ru"):
        people.build_corpus(tmp_path, ["klingon"], tmp_path)


def test_sources_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        people.SOURCES["fillets-cs"].training = True
