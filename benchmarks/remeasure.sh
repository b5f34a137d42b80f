#!/bin/sh
# Measures the figures of README and docs/language-models.md again: transcription speed, and fine-tuning beside TRL and
# Unsloth, three rounds each. About 15 minutes on two idle cores, plus ten minutes of downloads the first time.
#
#     sh benchmarks/remeasure.sh          # HUMAN=folder-with-transcripts.tsv measures the error rates of pl-tiny too
#
# Commit first: the results name the commit, and say -dirty where files differ from it. Nothing else should be running.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
test -x build/envs/unsloth/bin/python || sh benchmarks/unsloth_env.sh
"$python" -m benchmarks.smollm2
"$python" -m benchmarks.debian_packages
"$python" -m benchmarks.transcribe --clips 24 --rounds 3 --arms transformers-1 transformers-bfloat16 \
    pytorch-float32 pytorch-bfloat16 pytorch-int8 onnx-float32 onnx-int8
"$python" -m benchmarks.train_text --steps 4 --rounds 3 --held-out 10
if [ -n "${HUMAN:-}" ]; then "$python" -m benchmarks.error_rates --human "$HUMAN"; fi
"$python" -m benchmarks.figures --plots
