"""Transcribe a recording with a model from `mowa export --to coreml`, using only coremltools, numpy and soundfile.

    python run_coreml.py FOLDER RECORDING

Needs macOS: on Linux, coremltools writes models but does not run them. A recording is padded to the next length that
the model accepts; longer ones must be cut first.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import coremltools
import numpy as np
import soundfile

if sys.platform != "darwin":
    sys.exit("Core ML needs macOS")
folder, recording = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
vocabulary, preprocessing, details = manifest["vocabulary"], manifest["preprocessing"], manifest["details"]

samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
min_samples, max_samples = details["receptive_field"], details["lengths"][-1]
if rate_hz != preprocessing["rate_hz"] or not min_samples <= len(samples) <= max_samples:
    sys.exit(f"the model needs {min_samples} to {max_samples} samples at {preprocessing['rate_hz']} Hz")
mono = samples.mean(1)
mono = (mono - mono.mean()) / np.sqrt(mono.var() + 1e-7) if preprocessing["normalize"] else mono

length = next(length for length in details["lengths"] if length >= len(mono))
inputs = {"input_values": np.pad(mono, (0, length - len(mono)))[None].astype(np.float32)}
if details["attention_mask"]:
    inputs["samples"] = np.array([len(mono)], np.int32)
logits = coremltools.models.MLModel(str(folder / details["model"])).predict(inputs)["logits"][0]
logits = logits[: (len(mono) - details["receptive_field"]) // details["hop"] + 1]

logits[:, vocabulary["specials"]] = -np.inf
text = "".join(vocabulary["texts"][index] for index, _ in groupby(logits.argmax(-1)) if index != vocabulary["blank"])
print(" ".join(text.split()))
