"""Transcribe a recording with sherpa-onnx and a model from `mowa export --to onnx --no-attention-mask`.

    python run_sherpa.py FOLDER RECORDING

sherpa-onnx runs on phones and small boards. It supports graphs with one input, without an attention mask, and reads the
vocabulary from tokens.txt, with `<blk>` for the blank and `▁` for a space. It needs only that file, the graph and its
weights. Use recordings of up to about half a minute: the memory of attention grows with the square of the length.
"""

import json
import sys
from pathlib import Path

import sherpa_onnx
import soundfile

folder, recording = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
if manifest["details"]["attention_mask"]:
    sys.exit(f"{folder} has an attention mask, which sherpa-onnx does not support: export with --no-attention-mask")
if not manifest["preprocessing"]["normalize"]:
    sys.exit(f"{folder} takes audio without normalization, and sherpa-onnx always normalizes")

graph, tokens = folder / manifest["details"]["graph"], folder / "tokens.txt"
model = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(str(graph), str(tokens))
samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
stream = model.create_stream()
# sherpa-onnx adds 1e-5 to the variance and the model was trained with 1e-7: a gain of 10 makes the two equal.
stream.accept_waveform(rate_hz, 10 * samples.mean(1))
model.decode_stream(stream)
print(" ".join(stream.result.text.split()))
