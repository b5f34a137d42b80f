"""Text of a recording by sherpa-onnx, from a folder that `mowa export --to onnx --no-mask` wrote.

    python run_sherpa.py FOLDER RECORDING

sherpa-onnx runs on phones and small boards. It gives a graph one input, hence no mask, and reads from a file what each
output means: `<blk>` is the blank, `▁` a space. The graph, its weights beside it and that file are all it needs. For
recordings of up to about half a minute: attention needs memory by the square of the length.
"""

import json
import sys
from pathlib import Path

import sherpa_onnx
import soundfile

folder, recording = Path(sys.argv[1]), sys.argv[2]
note = json.loads((folder / "mowa.json").read_text(encoding="utf-8"))
words = note["vocabulary"]
if note["details"]["masked"]:
    sys.exit(f"the graph in {folder} asks for a mask, and sherpa-onnx has none: export it with --no-mask")
if not note["preprocessing"]["normalize"]:
    sys.exit("sherpa-onnx scales what it hears to unit variance, and this model hears recordings as loud as they are")

tokens = folder / "tokens.txt"
if not tokens.exists():
    named = {words["blank"]: "<blk>", words["delimiter"]: "▁"}
    rows = [f"{named.get(index, token.replace(' ', '▁'))} {index}\n" for index, token in enumerate(words["tokens"])]
    tokens.write_text("".join(rows), encoding="utf-8")

model = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(str(folder / note["details"]["graph"]), str(tokens))
samples, rate_hz = soundfile.read(recording, dtype="float32", always_2d=True)
stream = model.create_stream()
# It adds 1e-5 to the variance it divides by, the model was trained with 1e-7: ten times as loud, both are the same.
stream.accept_waveform(rate_hz, 10 * samples.mean(1))
model.decode_stream(stream)
print(" ".join(stream.result.text.split()))
