"""Transcribe a recording with a model from `mowa export --to tensorrt`, using tensorrt, torch, numpy and soundfile.

python FOLDER/build.py                    once per machine: build FOLDER/model.engine and verify it
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
manifest = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
vocabulary, preprocessing = manifest["vocabulary"], manifest["preprocessing"]
profile = manifest["details"]["profile"]
(batch, min_samples), _, (_, max_samples) = profile["input_values"]
samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
if rate_hz != preprocessing["rate_hz"] or not min_samples <= len(samples) <= max_samples:
    expected = f"{min_samples} to {max_samples} samples at {preprocessing['rate_hz']} Hz"
    sys.exit(f"the engine needs {expected}, {recording} has {len(samples)} at {rate_hz} Hz")
mono = samples.mean(1)
mono = (mono - mono.mean()) / np.sqrt(mono.var() + 1e-7) if preprocessing["normalize"] else mono

engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine((folder / "model.engine").read_bytes())
context, values = engine.create_execution_context(), torch.from_numpy(np.stack([mono] * batch)).cuda()
inputs = {"input_values": values, "attention_mask": torch.ones_like(values, dtype=torch.int64)}
for name in profile:
    context.set_input_shape(name, tuple(values.shape))
    context.set_tensor_address(name, inputs[name].data_ptr())
logits = torch.empty(tuple(context.get_tensor_shape("logits")), device="cuda")
context.set_tensor_address("logits", logits.data_ptr())
context.execute_async_v3(torch.cuda.current_stream().cuda_stream)

logits[..., vocabulary["specials"]] = -torch.inf
best = logits[0].argmax(-1).tolist()
text = "".join(vocabulary["texts"][index] for index, _ in groupby(best) if index != vocabulary["blank"])
print(" ".join(text.split()))
