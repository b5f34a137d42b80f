"""A tour of mowa in Python: transcribe, train an adapter, merge, quantize, export, evaluate, generate.

    python examples/python_tour.py

Takes about five minutes on two cores and writes into the folder tour/. The speech part runs offline with the bundled
model. The last part needs a small language model: CHAT_MODEL is a Hub id or a folder; None leaves it out.
"""

import numpy as np

import mowa

CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # downloaded on first use (270 MB)
RECORDING = "examples/dzien-dobry.flac"
TEXT = (
    "dzień dobry to jest mowa program który słucha i zapisuje każde słowo wczoraj wieczorem spotkaliśmy się w małej"
    " kawiarni i rozmawialiśmy o dawnych czasach"
)

model = mowa.load("pl-tiny")
print(f"1. load: {model.origin.name} ({model.task}), {sum(p.numel() for p in model.net.parameters()):,} parameters")

transcript = mowa.transcribe(RECORDING, model)
first = transcript.words[0]
print(f"2. transcribe: {transcript.text}\n   first word: {first.text!r}, {first.start_s:.2f}–{first.end_s:.2f} s")

rate = 16_000
silence = np.zeros(2 * rate, np.float32)
rows = [{"path": RECORDING}, {"array": silence, "sampling_rate": rate}, {"path": "missing.wav"}]
for result in mowa.transcribe(rows, model):
    print("3. a row:", result.error if isinstance(result, mowa.Failure) else repr(result.text[:60]))

# One recording teaches a model nothing but itself; it is enough to see the two misspelled words corrected.
with open("tour.jsonl", "w", encoding="utf-8") as file:
    file.write(f'{{"audio": "{RECORDING}", "text": "{TEXT}"}}\n')
run = mowa.train(
    model="pl-tiny", data="tour.jsonl", dev="tour.jsonl", method="lora", out="tour/adapter",
    max_steps=30, eval_steps=10, learning_rate=1e-3,
)  # fmt: skip
print(f"4. train: {run.folder}, {run.report['train_runtime_s']:.0f} s")
print(f"   before: {mowa.evaluate('pl-tiny', 'tour.jsonl')}")
print(f"   after:  {mowa.evaluate(run, 'tour.jsonl')}")
print(f"   {mowa.transcribe(RECORDING, run).text}")

merged = mowa.merge(run)
small = mowa.quantize(merged, "int8")
print(f"5. merge and quantize: {small.scheme.name}, {mowa.transcribe(RECORDING, small).text[:60]}…")

artifact = mowa.export(merged, "onnx", "tour/onnx-int8", scheme="int8-dynamic")
print(f"6. export: {artifact.size_bytes / 1e6:.0f} MB, same top token in {artifact.agreement:.1%} of frames")
print(f"   {mowa.transcribe(RECORDING, artifact.folder).text[:60]}…")

if CHAT_MODEL is not None:
    chat = mowa.load(CHAT_MODEL)
    print("7. generate: ", end="")
    for piece in mowa.generate(chat, "What is the capital of Poland?", stream=True, max_new_tokens=40, temperature=0):
        print(piece, end="", flush=True)
    print()
