"""Transcribe a recording with a model from `mowa export --to ctranslate2`, using only ctranslate2, numpy and soundfile.

    python run_ctranslate2.py FOLDER RECORDING

Use recordings of up to about half a minute: the memory of attention grows with the square of the length.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import ctranslate2
import numpy as np
import soundfile

folder, recording = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
vocabulary, preprocessing = manifest["vocabulary"], manifest["preprocessing"]

samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
if rate_hz != preprocessing["rate_hz"]:
    sys.exit(f"{recording} has a sample rate of {rate_hz} Hz, the model needs {preprocessing['rate_hz']}: resample it")
mono = samples.mean(1)
if preprocessing["normalize"]:
    mono = (mono - mono.mean()) / np.sqrt(mono.var() + 1e-7)

# Half-precision weights are computed in float32, which all CPUs support.
compute_type = "int8_float32" if manifest["scheme"]["weights"] == "int8" else "float32"
model = ctranslate2.models.Wav2Vec2(str(folder / manifest["details"]["model"]), "cpu", compute_type=compute_type)
logits = np.array(model.encode(ctranslate2.StorageView.from_array(mono[None, None]), to_cpu=True))[0]

logits[:, vocabulary["specials"]] = -np.inf
text = "".join(vocabulary["texts"][index] for index, _ in groupby(logits.argmax(-1)) if index != vocabulary["blank"])
print(" ".join(text.split()))
