#!/bin/sh
# Makes build/envs/unsloth: Unsloth on a CPU, in an environment of its own, for benchmarks/train_text.py. 3 GB.
#
#     sh benchmarks/unsloth_env.sh
#
# The pins of unsloth 2026.10.9 (transformers <= 5.17.0, trl <= 1.15.0, datasets < 5) are kept. Three of its requirements
# cannot be met, so it, unsloth_zoo and cut_cross_entropy are installed without theirs, and the others are named below:
# torchvision and xformers: their Linux wheels are linked against CUDA, and the mere presence of such a torchvision
# breaks `import transformers`; certifi >= 2026.10.19, which two of its packages ask for, is not to be had.
# Unsloth says at import that it trains on the CPU, and turns packing off there.
set -eu
cd "$(dirname "$0")/.."
place=$PWD/build/envs/unsloth
${PYTHON:-python3} -m venv "$place"
pip="$place/bin/python -m pip install -q"
$pip torch==2.13.0
$pip transformers==5.17.0 trl==1.15.0 peft==0.21.2 accelerate==1.15.0 datasets==4.8.5 \
    triton==3.7.1 bitsandbytes==0.50.2 torchao==0.18.0 einops sentencepiece protobuf tyro msgspec hf_transfer \
    structlog json5 nest-asyncio wheel diffusers pillow requests
$pip --no-deps cut_cross_entropy==25.1.1 unsloth==2026.10.9 unsloth_zoo==2026.10.9
cd "${TMPDIR:-/tmp}" # Unsloth may write generated sources where it is imported
"$place/bin/python" -W ignore -c 'import unsloth' 2>/dev/null | grep Unsloth
