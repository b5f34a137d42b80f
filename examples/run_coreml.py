"""Text of a recording by a folder that `mowa export --to coreml` wrote: coremltools, numpy and soundfile alone.

    python run_coreml.py FOLDER RECORDING

It needs macOS and cannot be run on Linux, where coremltools writes programs and runs none. A recording is padded to the
next length that the program takes; one that is longer than the longest has to be cut first.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import coremltools
import numpy as np
import soundfile

if sys.platform != "darwin":
    sys.exit("Core ML runs programs on Apple's systems alone")
folder, recording = Path(sys.argv[1]), sys.argv[2]
note = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
words, asked, how = note["vocabulary"], note["preprocessing"], note["details"]

samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
if rate_hz != asked["rate_hz"] or not how["reach"] <= len(samples) <= how["lengths"][-1]:
    sys.exit(f"the program takes {how['reach']} to {how['lengths'][-1]} samples at {asked['rate_hz']} Hz")
sound = samples.mean(1)
sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7) if asked["normalize"] else sound

length = next(length for length in how["lengths"] if length >= len(sound))
given = {"input_values": np.pad(sound, (0, length - len(sound)))[None].astype(np.float32)}
if how["masked"]:
    given["samples"] = np.array([len(sound)], np.int32)
logits = coremltools.models.MLModel(str(folder / how["model"])).predict(given)["logits"][0]
logits = logits[: (len(sound) - how["reach"]) // how["hop"] + 1]

logits[:, words["specials"]] = -np.inf
tokens = [" " if index == words["delimiter"] else token for index, token in enumerate(words["tokens"])]
text = "".join(tokens[index] for index, _ in groupby(logits.argmax(-1)) if index != words["blank"])
print(" ".join(text.split()))
