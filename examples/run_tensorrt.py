"""Text of a recording by a folder that `mowa export --to tensorrt` wrote: tensorrt, torch, numpy and soundfile alone.

python FOLDER/build.py                    once, on this machine: makes FOLDER/model.engine and checks it
python run_tensorrt.py FOLDER RECORDING
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import soundfile
import tensorrt as trt
import torch

folder, recording = Path(sys.argv[1]), sys.argv[2]
note = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
words, asked, profile = note["vocabulary"], note["preprocessing"], note["details"]["profile"]
(rows, least), _, (_, most) = profile["input_values"]
samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
if rate_hz != asked["rate_hz"] or not least <= len(samples) <= most:
    sys.exit(f"the engine takes {least} to {most} samples at {asked['rate_hz']} Hz, not {len(samples)} at {rate_hz}")
sound = samples.mean(1)
sound = (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7) if asked["normalize"] else sound

engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine((folder / "model.engine").read_bytes())
context, values = engine.create_execution_context(), torch.from_numpy(np.stack([sound] * rows)).cuda()
given = {"input_values": values, "attention_mask": torch.ones_like(values, dtype=torch.int64)}
for name in profile:
    context.set_input_shape(name, tuple(values.shape))
    context.set_tensor_address(name, given[name].data_ptr())
logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
context.set_tensor_address("logits", logits.data_ptr())
context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
logits[..., words["specials"]] = -torch.inf
tokens = [" " if index == words["delimiter"] else token for index, token in enumerate(words["tokens"])]
best = logits[0].argmax(-1).tolist()
print(" ".join("".join(tokens[index] for index, _ in groupby(best) if index != words["blank"]).split()))
