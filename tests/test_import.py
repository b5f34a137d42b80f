"""`import mowa` and `mowa --help` must stay light: no torch, no transformers."""

import subprocess
import sys

HEAVY = "{'torch', 'transformers', 'numpy', 'onnxruntime', 'soundfile', 'av', 'huggingface_hub'}"


def loaded(code: str) -> str:
    check = f"{code}; import sys; print(*sorted({HEAVY} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    assert loaded("import mowa") == ""


def test_help_is_light():
    run = "from click.testing import CliRunner; from mowa.cli.main import cli"
    assert loaded(f"{run}; assert 'transcribe' in CliRunner().invoke(cli, ['--help']).output") == ""


def test_verbs_survive_one_another():
    code = "import mowa; mowa.transcribe; import mowa.loading; assert callable(mowa.load) and callable(mowa.transcribe)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import mowa; mowa.tune; import mowa.training.ctc.trainer; assert callable(mowa.tune)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    code = "import mowa\ntry: mowa.nothing\nexcept AttributeError as e: print(e)"
    assert "nothing" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
