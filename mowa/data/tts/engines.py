"""Build and check the command lines of text-to-speech programs: espeak-ng, festival, or any command.

Each engine is a program that reads one sentence from standard input and writes one WAV file. `open_engine` checks
that the program and the voices exist and returns a `SpeechEngine`, which builds the command line of each recording.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from mowa.errors import DataError, MissingDependency

ENGINES = ("espeak-ng", "festival", "command")
ESPEAK_RATES = (120, 140, 160, 180, 200, 220)  # words per minute
ESPEAK_PITCHES = (25, 40, 55, 70)
_ESPEAK_LIMITS = {"rates": (80, 450), "pitches": (0, 99)}
_FESTIVAL_LIMITS = (0.25, 4.0)
# Variants that are left out by default: robots, whispers and other effects, and copies of other variants.
_EFFECTS = re.compile(r"(?i).*robo|whisper|croak|demonic|tweaky|ricishay|kaukovalta|fast$|storm$|caleb$|klatt6$")
# The encodings that festival's voices read; voices of other languages read UTF-8.
FESTIVAL_ENCODINGS = {
    "ca": "iso-8859-15",
    "cs": "iso-8859-2",
    "en": "ascii",
    "es": "iso-8859-1",
    "fi": "iso-8859-15",
    "it": "iso-8859-1",
    "pl": "iso-8859-2",
}


@dataclass(frozen=True, slots=True)
class Voice:
    """How a sentence is spoken. `rate` and `pitch` are in the engine's units; None is the engine's default."""

    name: str
    rate: float | None = None
    pitch: float | None = None


@dataclass(frozen=True, slots=True)
class SpeechEngine:
    """A text-to-speech program.

    Attributes:
        name: one of `ENGINES`.
        voices, rates, pitches: the values to choose from; `(None,)` where the engine's default is used.
        encoding: of the text on standard input.
        template: the command template of engine `command`, else "".
        build_command: (voice, WAV file to write) → arguments of the program.
    """

    name: str
    voices: tuple[str, ...]
    rates: tuple[float | None, ...]
    pitches: tuple[float | None, ...]
    encoding: str
    template: str
    build_command: Callable[[Voice, Path], list[str]]

    def encode(self, text: str) -> bytes:
        """Return what the program reads from standard input.

        Raises:
            UnicodeError: the text has a character that the engine's encoding lacks.
        """
        if self.name == "espeak-ng":
            text = text.replace("[[", "[ [")  # "[[" starts phoneme mnemonics
        return text.encode(self.encoding) + b"\n"


def open_engine(
    name: str,
    language: str,
    *,
    voices: Sequence[str] = (),
    rates: Sequence[float] = (),
    pitches: Sequence[float] = (),
    command: str = "",
    encoding: str = "",
) -> SpeechEngine:
    """Return the engine `name` for `language`, after checking that its program and voices are installed.

    Args:
        name: `espeak-ng`, `festival` or `command`.
        language: a language code, such as `pl`. espeak-ng must know it; festival only takes its encoding from it.
        voices: espeak-ng: variants (`f1`) or whole voices (`pl+f1`, `mb-pl1`), by default every variant but
            effects; festival: voices as `(voice.list)` prints them; command: values of `{voice}`.
        rates: espeak-ng: words per minute; festival: speed, 1 = the voice's own; command: values of `{rate}`.
        pitches: espeak-ng: 0 to 99; command: values of `{pitch}`.
        command: the template of engine `command`: a program with arguments, among them `{wav}`.
        encoding: of the text that the program reads. By default UTF-8, and for festival by `FESTIVAL_ENCODINGS`.

    Raises:
        DataError: an unknown language, voice or encoding, a value out of range, or a template that does not fit.
        MissingDependency: the program is not installed.
    """
    voices, rates, pitches = tuple(dict.fromkeys(voices)), tuple(dict.fromkeys(rates)), tuple(dict.fromkeys(pitches))
    if command and name != "command":
        raise DataError(f"--command needs --engine command, not {name}")
    if encoding:
        try:
            "a".encode(encoding)
        except (LookupError, UnicodeError):
            raise DataError(f"unknown encoding {encoding!r}; use a name such as iso-8859-2") from None
    if name == "espeak-ng":
        return _espeak(language, voices, rates or ESPEAK_RATES, pitches or ESPEAK_PITCHES, encoding or "utf-8")
    if name == "festival":
        default = FESTIVAL_ENCODINGS.get(language.partition("-")[0].lower(), "utf-8")
        return _festival(voices, rates, pitches, encoding or default)
    if name == "command":
        return _command(command, voices, rates, pitches, encoding or "utf-8")
    raise DataError(f"unknown engine {name!r}; choose one of {', '.join(ENGINES)}")


# --- espeak-ng --------------------------------------------------------------------------------------------------------


class _EspeakVoice(NamedTuple):
    """A line of `espeak-ng --voices`. `aliases`: other language codes of the voice → their priority, least first."""

    code: str
    name: str
    file: str
    aliases: dict[str, int]


def _espeak(
    language: str, voices: Sequence[str], rates: Sequence[float], pitches: Sequence[float], encoding: str
) -> SpeechEngine:
    _require_program("espeak-ng", "apt-get install espeak-ng")
    if encoding.lower().replace("-", "") != "utf8":
        raise DataError(f"espeak-ng reads UTF-8; leave --encoding {encoding} out")
    _check_range("rates", rates, *_ESPEAK_LIMITS["rates"])
    _check_range("pitches", pitches, *_ESPEAK_LIMITS["pitches"])
    listed = [*_list_espeak_voices(), *_list_espeak_voices("mb")]
    base = _find_espeak_language(language, listed)
    variants = [voice.file.removeprefix("!v/") for voice in _list_espeak_voices("variant")]
    if voices:
        bases = {voice.code for voice in listed} | {Path(voice.file).name for voice in listed}
        names = [_find_espeak_voice(voice, base, bases, variants) for voice in voices]
    else:
        names = [base, *(f"{base}+{variant}" for variant in sorted(variants) if not _EFFECTS.match(variant))]

    def build_command(voice: Voice, wav: Path) -> list[str]:
        how = ["-s", f"{voice.rate:.0f}", "-p", f"{voice.pitch:.0f}"]
        return ["espeak-ng", "-v", voice.name, *how, "--stdin", "-w", str(wav)]

    return SpeechEngine("espeak-ng", tuple(names), tuple(rates), tuple(pitches), "utf-8", "", build_command)


def _list_espeak_voices(kind: str = "") -> list[_EspeakVoice]:
    """List the voices of a kind: "" (languages), "mb" (MBROLA) or "variant"."""
    row = re.compile(r"\s*\d+\s+(\S+)\s+\S+\s+(\S+)\s+(\S.*?)(?:\s*(\(.*\))|\s{2,}.*)?\s*")
    found = []
    for line in _run_query(["espeak-ng", f"--voices={kind}" if kind else "--voices"]).splitlines()[1:]:
        if match := row.fullmatch(line):
            code, name, file, others = match.groups()
            aliases = {alias: int(priority) for alias, priority in re.findall(r"\((\S+) (\d+)\)", others or "")}
            found.append(_EspeakVoice(code, name, file, aliases))
    return found


def _find_espeak_language(language: str, listed: Sequence[_EspeakVoice]) -> str:
    """Return the code that espeak-ng accepts with a variant: `language`, or that of the best voice with this alias."""
    names = {voice.code: voice.name for voice in listed if not voice.file.startswith("mb/")}
    if language in names:
        return language
    aliased = [(voice.aliases[language], voice.code) for voice in listed if language in voice.aliases]
    if known := [(priority, code) for priority, code in aliased if code in names]:
        return min(known)[1]
    codes = {name.lower().replace("_", " "): code for code, name in names.items()} | {code: code for code in names}
    near = [code for code in names if code.split("-")[0] == language.split("-")[0].lower()]
    near += [codes[match] for match in get_close_matches(language.lower(), list(codes), n=3)]
    suggestions = _format_near([f"{code} ({names[code]})" for code in near])
    raise DataError(f"espeak-ng has no language {language!r}{suggestions}; `espeak-ng --voices` lists them")


def _find_espeak_voice(voice: str, base: str, bases: Iterable[str], variants: Sequence[str]) -> str:
    if voice in variants:
        return f"{base}+{voice}"
    whole, _, variant = voice.partition("+")
    if whole in bases and (not variant or variant in variants):  # espeak-ng itself ignores unknown variants
        return voice
    unknown, known = (variant, variants) if whole in bases else (whole, [*variants, *bases])
    near = get_close_matches(unknown, known, n=5, cutoff=0.5)
    raise DataError(
        f"espeak-ng has no voice {voice!r}{_format_near(near)}; "
        "`espeak-ng --voices=variant` and `espeak-ng --voices` list them"
    )


# --- festival ---------------------------------------------------------------------------------------------------------


def _festival(voices: Sequence[str], rates: Sequence[float], pitches: Sequence[float], encoding: str) -> SpeechEngine:
    install = "apt-get install festival, and a voice (`apt-cache search festvox` lists them)"
    _require_program("text2wave", install)
    _require_program("festival", install)
    if pitches:
        raise DataError("festival has no common pitch setting; leave --pitches out, or name voices of different pitch")
    _check_range("rates", rates, *_FESTIVAL_LIMITS)
    installed = sorted(_run_query(["festival", "-b", "(print (voice.list))"]).strip().strip("()").split())
    if not voices:
        raise DataError(f"festival needs --voices; installed: {', '.join(installed) or 'none'}")
    for voice in voices:
        if voice not in installed:
            near = get_close_matches(voice, installed, n=3) or installed[:5]
            raise DataError(
                f"festival has no voice {voice!r}{_format_near(near)}; `apt-cache search festvox` lists more"
            )

    def build_command(voice: Voice, wav: Path) -> list[str]:
        stretch = ["-eval", f"(Parameter.set 'Duration_Stretch {1 / voice.rate:.4f})"] if voice.rate else []
        return ["text2wave", "-eval", f"(voice_{voice.name})", *stretch, "-o", str(wav)]

    return SpeechEngine("festival", tuple(voices), tuple(rates) or (None,), (None,), encoding, "", build_command)


# --- any command ------------------------------------------------------------------------------------------------------


def _command(
    template: str, voices: Sequence[str], rates: Sequence[float], pitches: Sequence[float], encoding: str
) -> SpeechEngine:
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise DataError(f"--command {template!r} cannot be split into words: {error}") from None
    if not words:
        raise DataError("--engine command needs --command, such as 'piper --model v.onnx --output_file {wav}'")
    if "{wav}" not in template:
        raise DataError(f"--command {template!r} has no {{wav}}, the file that the program should write")
    for field, values in (("voice", voices), ("rate", rates), ("pitch", pitches)):
        option = {"pitch": "--pitches"}.get(field, f"--{field}s")
        if values and f"{{{field}}}" not in template:
            raise DataError(f"{option} has no effect: --command has no {{{field}}}")
        if not values and f"{{{field}}}" in template:
            raise DataError(f"--command has {{{field}}}, so {option} is needed")
    _require_program(words[0], "install it, or give its path in --command")

    def build_command(voice: Voice, wav: Path) -> list[str]:
        rate, pitch = ("" if value is None else str(value) for value in (voice.rate, voice.pitch))
        fields = {"{wav}": str(wav), "{voice}": voice.name, "{rate}": rate, "{pitch}": pitch}
        return [re.sub(r"\{(wav|voice|rate|pitch)\}", lambda match: fields[match[0]], word) for word in words]

    names = tuple(voices) or (Path(words[0]).name,)
    return SpeechEngine(
        "command", names, tuple(rates) or (None,), tuple(pitches) or (None,), encoding, template, build_command
    )


# --- shared -----------------------------------------------------------------------------------------------------------


def _require_program(program: str, advice: str) -> None:
    if shutil.which(program) is None:
        raise MissingDependency(f"{program} is not installed: {advice}")


def _check_range(option: str, values: Sequence[float], lowest: float, highest: float) -> None:
    for value in values:
        if not lowest <= value <= highest:
            raise DataError(f"--{option} {value:g} is out of range: {lowest:g} to {highest:g}")


def _run_query(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    return done.stdout.decode(errors="replace")


def _format_near(near: Sequence[str]) -> str:
    return f" (near: {', '.join(list(dict.fromkeys(near))[:5])})" if near else ""
