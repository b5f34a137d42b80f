"""Transcribe a recording with a model from `mowa export --to onnx`, using only onnxruntime, numpy and soundfile.

    python run_onnx.py FOLDER RECORDING

The metadata of the graph holds all settings. Use recordings of up to about half a minute: the memory of attention grows
with the square of the length.
"""

import json
import sys
from itertools import groupby

import numpy as np
import onnxruntime
import soundfile

session = onnxruntime.InferenceSession(f"{sys.argv[1]}/model.onnx")
metadata = session.get_modelmeta().custom_metadata_map
texts = json.loads(metadata["texts"])  # what each token writes
samples, rate_hz = soundfile.read(sys.argv[2], dtype="float32", always_2d=True)
if rate_hz != int(metadata["sample_rate"]):
    sys.exit(f"{sys.argv[2]} has a sample rate of {rate_hz} Hz, the model needs {metadata['sample_rate']}: resample it")
mono = samples.mean(1)
if metadata["normalize"] == "1":
    mono = (mono - mono.mean()) / np.sqrt(mono.var() + 1e-7)
inputs = {"input_values": mono[None], "attention_mask": np.ones((1, len(mono)), np.int64)}
logits = session.run(["logits"], {one.name: inputs[one.name] for one in session.get_inputs()})[0][0]
logits[:, json.loads(metadata["specials"])] = -np.inf
text = "".join(texts[index] for index, _ in groupby(logits.argmax(-1)) if index != int(metadata["blank"]))
print(" ".join(text.split()))
