"""Tokenizers and generation configs are written so that a batch of prompts can be padded."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import mowa
from mowa.adapters import causal as adapters
from mowa.adapters.loading import atomic_checkpoint
from mowa.io.tokenizer import align_generation_config, choose_pad_token, with_padding
from tests.data.chat.tokenizers import tokenizer as make_tokenizer
from tests.tiny_causal import tiny_causal

PROMPTS = ["how are you", "what is this that and now, then what of Poland?", "Warsaw"]


@pytest.mark.parametrize(
    ("family", "added", "own", "expected"),
    [
        ("chatml", [], None, "<|endoftext|>"),  # as Qwen's own tokenizers
        ("llama", ["<|finetune_right_pad_id|>", "<|reserved_special_token_1|>"], None, "<|finetune_right_pad_id|>"),
        ("llama", [], None, "<|end_of_text|>"),
        ("gemma", ["<pad>", "<unused3>"], None, "<pad>"),
        ("gemma", ["<unused3>"], "<eos>", "<unused3>"),
        ("mistral", ["[PAD]"], "</s>", "[PAD]"),
        ("mistral", [], None, "</s>"),  # it has no other special token
        ("mistral", [], "[INST]", "[INST]"),  # chosen by its author
    ],
)
def test_the_pad_token_is_not_the_end_token_where_the_tokenizer_has_another(family, added, own, expected):
    tokenizer = copy.deepcopy(make_tokenizer(family))  # it is cached
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.pad_token = own
    assert choose_pad_token(tokenizer) == expected
    padded = with_padding(tokenizer)
    assert (padded.pad_token, padded.padding_side) == (expected, "left")
    assert len(padded) == len(tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side) == (own, "right")  # it does not change


def test_the_unknown_token_pads_as_in_llama_2():
    tokenizer = copy.deepcopy(make_tokenizer("mistral"))
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    assert choose_pad_token(tokenizer) == "<unk>"


def test_the_generation_config_ends_with_the_tokenizers_token_and_drops_what_is_not_sampled(tmp_path):
    tokenizer = with_padding(make_tokenizer("chatml"))
    eos, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    aligned = align_generation_config(GenerationConfig(eos_token_id=other, temperature=0.6, max_length=50), tokenizer)
    aligned.save_pretrained(tmp_path)  # transformers refuses a temperature without sampling
    written = GenerationConfig.from_pretrained(tmp_path)
    assert (written.eos_token_id, written.pad_token_id, written.max_length) == ([other, eos], other, 50)
    sampled = GenerationConfig(eos_token_id=eos, temperature=0.6, do_sample=True)
    aligned = align_generation_config(sampled, tokenizer)
    assert (aligned.eos_token_id, aligned.temperature) == (eos, 0.6)
    assert sampled.pad_token_id is None


def answers(folder, adapter=None, **tokenizer_options):
    """The answers of stock transformers to PROMPTS in one batch, and to each alone."""
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter or folder, **tokenizer_options)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    together = net.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    alone = [net.generate(**tokenizer(one, return_tensors="pt"), max_new_tokens=6, do_sample=False) for one in PROMPTS]
    width = [len(tokenizer(one)["input_ids"]) for one in PROMPTS]
    decode = [tokenizer.decode(row, skip_special_tokens=True) for row in together]
    return decode, [
        tokenizer.decode(row[0, count:], skip_special_tokens=True) for row, count in zip(alone, width, strict=True)
    ]


@pytest.fixture
def base(tmp_path):
    """A checkpoint without a pad token, and with a temperature but no sampling, as Llama 2's."""
    folder = tiny_causal(tmp_path / "base")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    return folder


def test_transformers_answers_a_batch_of_prompts_with_a_merged_checkpoint_as_each_alone(base, tmp_path):
    model = mowa.load(str(base))
    with atomic_checkpoint(adapters.merge_adapter(model), tmp_path / "merged"):
        pass
    together, alone = answers(tmp_path / "merged")
    assert together == alone
    written = GenerationConfig.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert written.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.tokenizer.pad_token is None
    assert model.net.generation_config.temperature == 0.6


def test_transformers_answers_a_batch_of_prompts_with_an_export_as_each_alone(base, tmp_path):
    mowa.export(str(base), to="safetensors", scheme="bf16", out=tmp_path / "small")
    assert answers(tmp_path / "small")[0] == answers(tmp_path / "small")[1]
    assert torch.equal(
        mowa.load(tmp_path / "small").net(torch.arange(3, 9)[None]).logits.argmax(-1),
        mowa.load(base).net(torch.arange(3, 9)[None]).logits.argmax(-1),
    )
