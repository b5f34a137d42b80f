"""Exported models of every family say in llama.cpp (xllamacpp) what they say in PyTorch, with their chat templates."""

import json

import pytest
import torch

import mowa
from mowa.data.chat.encode import encode_prompt
from mowa.engines import llama_cpp
from mowa.exporters.gguf.verify import MARGIN
from tests.exporters.gguf.tokenizer.trained import CHATML, GPT2_STEP, train_byte_level
from tests.families.tiny import tiny
from tests.models.gguf.tiny_files import CASES

pytestmark = pytest.mark.slow
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3"),
    *("smollm3", "granite", "granitemoe", "deepseek_v2-lite", "deepseek_v3", "gpt_oss"),
)
NEW_TOKENS = 24
CHAT = [{"role": "user", "content": "What is the quick brown fox?"}]


@pytest.fixture(params=FAMILIES)
def exported(request, tmp_path):
    """A random model with a byte-level tokenizer, and its folder of GGUF files."""
    pytest.importorskip("xllamacpp")
    family, changes = CASES[request.param]
    tokenizer = train_byte_level([GPT2_STEP])
    tokenizer.chat_template = CHATML
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    net = tiny(family, **changes | ids | {"vocab_size": len(tokenizer)})
    net.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifact = mowa.export(tmp_path / "model", "gguf", tmp_path / "out", scheme=["f32", "f16", "q8_0"])
    return mowa.load(tmp_path / "model"), artifact


def greedy(model, ids):
    """Yield (token, margin to the second) of a greedy answer."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            top = model.net(torch.tensor([ids])).logits[0, -1].float().topk(2)
            yield int(top.indices[0]), float(top.values[0] - top.values[1])
            ids.append(int(top.indices[0]))


def test_outputs_and_greedy_text(exported):
    model, artifact = exported
    report = json.loads((artifact.folder / "report.json").read_text())
    found = {(one["scheme"], each["runtime"]): each for one in report["files"] for each in one["outputs"]}
    for scheme in ("f32", "f16"):
        assert all(found[scheme, runtime]["kl"] <= 1e-4 for runtime in ("pytorch", "llama.cpp")), found
    assert found["q8_0", "pytorch"]["kl"] <= 5e-3
    for scheme in ("F32", "F16"):
        opened = llama_cpp.open_model(artifact.folder / f"model-{scheme}.gguf", threads=1, exact=True)
        ids = encode_prompt(opened.tokenizer, CHAT)
        assert ids == encode_prompt(model.tokenizer, CHAT)
        answer = []
        for token, margin in greedy(model, ids):
            if margin < MARGIN:
                break
            scores = llama_cpp.score(opened, [[*ids, *answer]], top=2)[0][-1]
            assert int(scores.argmax()) == token, (scheme, len(answer), margin)
            answer.append(token)
        opened.close()
