"""Importing, loading, accelerating, training and restoring patch nothing in transformers, peft, trl and torch.

In a separate process, every function and class of every loaded module, and every attribute of every class, must be the
same object as before.
"""

import subprocess
import sys
import textwrap

CODE = """
import json, sys, types, warnings
from pathlib import Path
warnings.filterwarnings("ignore")

import datasets, peft, torch, transformers, trl
import transformers.models.llama.modeling_llama
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

WATCHED = ("transformers", "peft", "trl", "torch")

def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in WATCHED or module is None:
            continue
        for key, value in list(vars(module).items()):
            if not isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
                continue
            found[name, key] = value
            if isinstance(value, type):
                found |= {(name, key, inner): held for inner, held in vars(value).items() if callable(held)}
    return found

def train(out):
    from tests.data.chat.tokenizers import tokenizer as make_tokenizer
    import mowa

    tokenizer = make_tokenizer("chatml")
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    net = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=len(tokenizer)))
    net.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    turns = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "well, thank you"}]
    (out / "chats.jsonl").write_text("".join(json.dumps({"messages": turns, "n": n}) + "\\n" for n in range(20)))
    tree = {
        "task": "causal", "model": str(out / "model"), "data": {"train": str(out / "chats.jsonl"), "hold_out": 0.2},
        "optimizer": {"max_steps": 2, "precision": "float32"},
    }
    mowa.train(tree, out=out / "tuned")
    assert (out / "tuned" / "adapter_model.safetensors").is_file()

# what these libraries load and change themselves when they train
import accelerate
args = SFTConfig(output_dir=sys.argv[1] + "/theirs", max_steps=1, report_to="none", use_cpu=True, bf16=False)
before = snapshot()
train(Path(sys.argv[1]))
after = snapshot()
print(json.dumps([".".join(key) for key, value in before.items() if key in after and after[key] is not value]))
print(json.dumps(len(before)))
"""


def test_no_object_of_the_libraries_is_replaced(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    changed, watched = run.stdout.splitlines()[-2:]
    assert int(watched) > 50_000
    assert changed == "[]"
