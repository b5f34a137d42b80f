"""Text of a recording by a folder that `mowa export --to onnx` wrote: onnxruntime, numpy and soundfile alone.

    python run_onnx.py FOLDER RECORDING

All that it must know stands in the graph's own metadata. For recordings of up to about half a minute: attention needs
memory by the square of the length.
"""

import json
import sys
from itertools import groupby

import numpy as np
import onnxruntime
import soundfile

net = onnxruntime.InferenceSession(f"{sys.argv[1]}/model.onnx")
says = net.get_modelmeta().custom_metadata_map
tokens = [" " if says["delimiter"] == str(i) else token for i, token in enumerate(json.loads(says["vocabulary"]))]
samples, rate_hz = soundfile.read(sys.argv[2], dtype="float32", always_2d=True)
if rate_hz != int(says["sample_rate"]):
    sys.exit(f"{sys.argv[2]} is at {rate_hz} Hz and the model hears {says['sample_rate']}: resample it first")
sound = samples.mean(1)
if says["normalize"] == "1":
    sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)
given = {"input_values": sound[None], "attention_mask": np.ones((1, len(sound)), np.int64)}
logits = net.run(["logits"], {one.name: given[one.name] for one in net.get_inputs()})[0][0]
logits[:, json.loads(says["specials"])] = -np.inf
text = "".join(tokens[index] for index, _ in groupby(logits.argmax(-1)) if index != int(says["blank"]))
print(" ".join(text.split()))
