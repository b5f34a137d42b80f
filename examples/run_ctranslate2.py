"""Text of a recording by a folder that `mowa export --to ctranslate2` wrote: ctranslate2, numpy and soundfile alone.

    python run_ctranslate2.py FOLDER RECORDING

For recordings of up to about half a minute: attention needs memory by the square of the length.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import ctranslate2
import numpy as np
import soundfile

folder, recording = Path(sys.argv[1]), sys.argv[2]
note = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
words, asked = note["vocabulary"], note["preprocessing"]

samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
if rate_hz != asked["rate_hz"]:
    sys.exit(f"{recording} is at {rate_hz} Hz and the model hears {asked['rate_hz']}: resample it first")
sound = samples.mean(1)
if asked["normalize"]:
    sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)

# In half precision it is kept; on a processor it is multiplied in float32.
computes = "int8_float32" if note["scheme"]["weights"] == "int8" else "float32"
model = ctranslate2.models.Wav2Vec2(str(folder / note["details"]["model"]), "cpu", compute_type=computes)
logits = np.array(model.encode(ctranslate2.StorageView.from_array(sound[None, None]), to_cpu=True))[0]

logits[:, words["specials"]] = -np.inf
tokens = [" " if index == words["delimiter"] else token for index, token in enumerate(words["tokens"])]
text = "".join(tokens[index] for index, _ in groupby(logits.argmax(-1)) if index != words["blank"])
print(" ".join(text.split()))
