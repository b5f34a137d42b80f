# make demo   install, and transcribe a Polish recording with the bundled model, offline
# make test   install what tests need, and run them
# make check  style, types, docs, figures         make slow   the tests that take longer
# make model  build and train pl-tiny             make bench  speed and memory beside transformers
# make gpu    the tests that need a CUDA device
# make browser  pl-tiny in a web page, in int8, on http://127.0.0.1:8000/ (needs npm)

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
HUMAN ?=
RHVOICE ?=
WHISPER ?=

.PHONY: demo test slow check model micro score bench gpu docs browser apt-espeak apt-festival

demo: .venv/.run
	$(BIN)/mowa transcribe examples/dzien-dobry.flac
	@echo
	$(BIN)/mowa transcribe examples/dzien-dobry.flac --format tsv

test: .venv/.test apt-espeak
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu"

slow: .venv/.test apt-espeak
	$(BIN)/python -m pytest -m "slow and not gpu"

gpu: .venv/.test
	$(BIN)/python -m pytest -m gpu

check: .venv/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mowa.cli.docs_pages --check docs
	$(BIN)/python -m benchmarks.figures --check

docs: .venv/.run
	$(BIN)/python -m mowa.cli.docs_pages docs

# Builds pl-tiny (projects/pl_tiny/README.md). Steps whose result is under build/ are skipped, and an
# interrupted training run resumes. RHVOICE=folder names the Polish speech of RHVoice in tar shards; without it the
# model is trained on the other sources alone.
PL_TINY := $(BIN)/python -m projects.pl_tiny
model: .venv/.test apt-espeak apt-festival
	$(if $(RHVOICE),$(PL_TINY) shards "$(RHVOICE)" --out build/rhvoice)
	test -f build/pl-tiny/text.txt || $(PL_TINY) text --debian all --out build/pl-tiny/text.txt
	$(PL_TINY) synth build/pl-tiny/text.txt --out build/pl-tiny --clips 40000
	$(PL_TINY) people --out build/people
	$(PL_TINY) people --out build/people --source fillets-cs
	$(PL_TINY) festival build/pl-tiny/sentences.txt --out build/festival --clips 4000
	$(PL_TINY) festival build/pl-tiny/held-out.txt --out build/festival --voice czech_dita --clips 300
	test -f build/pl-tiny/fourth/model.safetensors || $(PL_TINY) train projects/pl_tiny/recipes/pl-tiny.yaml --out build/pl-tiny/fourth
	$(BIN)/python -m benchmarks.error_rates --model build/pl-tiny/fourth

micro: .venv/.test
	$(PL_TINY) train projects/pl_tiny/recipes/micro.yaml --out build/micro

# Prints the error rates of the model card. HUMAN=folder adds human recordings (transcripts.tsv and audio/);
# WHISPER=folder adds a Whisper model in CTranslate2 format on the same recordings.
score: .venv/.test
	$(BIN)/python -m benchmarks.error_rates $(if $(HUMAN),--human $(HUMAN)) $(if $(WHISPER),--whisper $(WHISPER))

bench: .venv/.test
	$(BIN)/python -m benchmarks.transcribe

browser: .venv/.test examples/browser/node_modules
	test -f build/browser/mowa.json || $(BIN)/mowa export pl-tiny --to onnx --scheme int8-dynamic -o build/browser
	$(BIN)/python examples/browser/serve.py build/browser

examples/browser/node_modules: examples/browser/package-lock.json
	npm ci --prefix examples/browser
	@touch $@

.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mowa needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

.venv/.test: .venv/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	@touch $@

.venv/.check: .venv/.test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[check]'
	@touch $@

apt-espeak:
	@command -v espeak-ng >/dev/null || { \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq espeak-ng >/dev/null; \
	  else echo "speech synthesis needs espeak-ng: sudo apt-get install espeak-ng"; exit 1; fi; }

apt-festival:
	@test -d /usr/share/festival/voices/russian -a -d /usr/share/festival/voices/czech/czech_dita || { \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq festival festvox-ru festvox-czech-dita >/dev/null; \
	  else echo "the corpus needs festival: sudo apt-get install festival festvox-ru festvox-czech-dita"; exit 1; fi; }
