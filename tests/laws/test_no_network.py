"""With local files, mowa opens no socket, neither to the network nor to this machine.

Only Unix sockets are allowed: the worker processes of torch's DataLoader pass file descriptors through them. The
commands run in separate processes whose `sitecustomize` makes every connection and every name lookup an error, and
writes it down, because libraries catch such errors. Child processes are watched too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import corpus
from tests.training.causal import chats

ROOT = Path(__file__).parents[2]
MICRO = ROOT / "tests" / "assets" / "micro"
SAMPLE = ROOT / "examples" / "dzien-dobry.flac"

GUARD = """
import os, socket, traceback

def deny(name):
    def denied(*arguments, **options):
        with open(os.environ["SOCKET_LOG"], "a") as log:
            log.write(f"{name}{arguments[-2:]}\\n{''.join(traceback.format_stack())}\\n")
        raise OSError(f"{name}: no socket may be opened")
    return denied

Given = socket.socket

def deny_network(name):
    given, denied = getattr(Given, name), deny(name)
    def called(self, *arguments):
        return (given if self.family == socket.AF_UNIX else denied)(self, *arguments)
    return called

class Socket(Given):
    connect, connect_ex, bind, sendto = map(deny_network, ("connect", "connect_ex", "bind", "sendto"))

socket.socket = socket.SocketType = Socket
for name in ("create_connection", "create_server", "getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, deny(name))
"""
IMPORT_EVERYTHING = """
import importlib, pkgutil
import mowa

for module in pkgutil.walk_packages(mowa.__path__, "mowa."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
COMMANDS = """
import sys
from mowa.cli.main import main

def run(*arguments):
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        assert not end.code, (arguments, end.code)
"""


@pytest.fixture
def run(tmp_path):
    """Run Python code, and fail if it opened a socket."""
    guard, log = tmp_path / "guard", tmp_path / "sockets.log"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD)
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "http_proxy", "https_proxy", "all_proxy")
    env = {name: value for name, value in os.environ.items() if name.lower() not in map(str.lower, unset)}
    path = os.pathsep.join([str(guard), str(ROOT), env.get("PYTHONPATH", "")])
    env |= {"SOCKET_LOG": str(log), "PYTHONPATH": path, "MOWA_CACHE": str(tmp_path / "cache")}
    env |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONWARNINGS": "ignore"}

    def call(code):
        child = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert not log.exists(), log.read_text()
        assert child.returncode == 0, child.stderr[-3000:]

    yield call
    with pytest.raises(AssertionError, match=r"create_connection"):  # the guard was at work
        call("import urllib.request; urllib.request.urlopen('http://huggingface.co')")


def test_importing_everything_and_transcribing(run, tmp_path):
    transcribe = f"run('transcribe', {str(SAMPLE)!r}, '-o', 'out', '--dtype', 'float32')"
    run("\n".join([IMPORT_EVERYTHING, COMMANDS, transcribe, "run('models')"]))
    assert (tmp_path / "out" / "dzien-dobry.txt").is_file()


@pytest.mark.slow
def test_exporting_and_running_the_export(run, tmp_path):
    export = f"run('export', {str(MICRO)!r}, '--to', 'onnx', '-o', 'onnx')"
    transcribe = f"run('transcribe', {str(SAMPLE)!r}, '--model', 'onnx')"
    run("\n".join([COMMANDS, export, transcribe]))
    assert (tmp_path / "onnx" / "mowa.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_a_speech_model(run, tmp_path, method):
    data = corpus(tmp_path / "data", 24)
    arguments = ["train", "--model", MICRO, "--data", data, "--method", method, "--max-steps", 2, "-o", "tuned"]
    run(f"{COMMANDS}\nrun(*{list(map(str, arguments))})")
    assert (tmp_path / "tuned" / "report.json").is_file()


@pytest.mark.slow
def test_training_a_language_model(run, tmp_path):
    base, data = chats.model(tmp_path / "base"), chats.conversations(tmp_path / "chats.jsonl")
    arguments = ["train", "--task", "causal", "--model", base, "--data", data, "--max-steps", 2, "-o", "tuned"]
    run(f"{COMMANDS}\nrun(*{list(map(str, arguments))})")
    assert (tmp_path / "tuned" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_quantizing(run, tmp_path):
    data = corpus(tmp_path / "data", 3)
    arguments = ["quantize", MICRO, "--scheme", "int8-dynamic", "--data", data, "-o", "small"]
    run(f"{COMMANDS}\nrun(*{list(map(str, arguments))})")
    assert (tmp_path / "small" / "quant_report.json").is_file()
