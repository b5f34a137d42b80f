"""Tuning a language model, end to end on a tiny one: what is written is what was trained, and anybody can read it."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mowa import loading
from mowa.adapters import causal as language
from mowa.errors import DataError, ModelError, RecipeError, TrainingStopped
from mowa.models.causal import accelerate
from mowa.tasks import causal
from mowa.training.causal import dataset, trainer
from mowa.training.config import dispatch
from tests.training.causal import chats


def tune(folder, out="out", **turned):
    plan = dispatch.parse(chats.recipe(folder, **turned), "test")
    dispatch.train(plan, loading.load(plan.model), folder / out, threads=1)
    return folder / out


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("lora"), optimise__steps=40, evaluate__every=20)


def test_what_is_learnt_is_held_out_and_learnt(adapter):
    before, after = (report(adapter)[when]["dev"] for when in ("before", "results"))
    assert after["loss"] < before["loss"] - 0.3
    assert before["tokens"] == after["tokens"] > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_peft_and_transformers_read_the_adapter_and_lose_what_was_measured(adapter):
    base = adapter.parent / "base"
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    plan = dispatch.read_recipe(adapter / "recipe.yaml")
    held_out = dataset.load_splits(plan, loading.load(str(base))).dev["dev"]
    assert dataset.evaluate(net, held_out)["loss"] == pytest.approx(report(adapter)["results"]["dev"]["loss"], abs=1e-5)


def test_merged_it_is_a_plain_checkpoint_that_says_the_same(adapter, tmp_path):
    base = loading.load(str(adapter.parent / "base"))
    adapted = language.load_adapter(base, adapter)
    with language.atomic_checkpoint(language.merge_adapter(adapted, "float32"), tmp_path / "merged"):
        pass
    again = loading.load(str(tmp_path / "merged"))
    rows = dataset.load_splits(dispatch.read_recipe(adapter / "recipe.yaml"), base).dev["dev"]
    batches = [causal.pad([row], 0, pad_to_multiple_of=1) for row in rows]
    found = language.compare_logits(adapted, again, batches)
    assert found.agreement == 1.0
    assert found.max_kl < 1e-8
    assert language.compare_logits(base, again, batches).mean_kl > 1e-3  # there was something to merge
    assert not list(tmp_path.glob(".merged*"))


def test_the_base_is_as_it_was_after_merging(adapter):
    base = loading.load(str(adapter.parent / "base"))
    before = {name: value.clone() for name, value in base.net.state_dict().items()}
    language.merge_adapter(language.load_adapter(base, adapter), "bfloat16")
    assert all(torch.equal(value, before[name]) for name, value in base.net.state_dict().items())


def test_a_template_that_was_given_goes_with_what_learnt_it(tmp_path):
    ours = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    (tmp_path / "ours.jinja").write_text(ours)
    out = tune(tmp_path, data__template=str(tmp_path / "ours.jinja"), optimise__steps=1)
    assert AutoTokenizer.from_pretrained(out).chat_template == ours
    base = loading.load(str(tmp_path / "base"))
    with language.atomic_checkpoint(
        language.merge_adapter(language.load_adapter(base, out), "float32"), tmp_path / "merged"
    ):
        pass
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == ours
    assert base.tokenizer.chat_template != ours


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    other = loading.load(str(chats.model(tmp_path / "other", hidden_size=16)))
    with pytest.raises(ModelError, match=r"wants .* as its base"):
        language.load_adapter(other, adapter)


def test_a_merge_that_drifts_is_refused():
    def apart(divergence, agreeing):
        return language.LogitDiff(divergence, 1.0, agreeing, 1000)

    language.verify_merge(apart(0.0, 0.996))
    with pytest.raises(ModelError, match="not what was trained"):
        language.verify_merge(apart(0.0, 0.99))
    rounding = apart(1e-3, 0.98)  # what half precision does to the base itself
    language.verify_merge(apart(1.5e-3, 0.97), rounding)
    for found in (apart(1.5e-3, 0.95), apart(5e-3, 0.99)):
        with pytest.raises(ModelError, match="the base rounded so"):
            language.verify_merge(found, rounding)


@pytest.mark.parametrize("train", ["all", "top-1"])
def test_a_checkpoint_is_written_that_transformers_reads(tmp_path, train):
    out = tune(tmp_path, train=train)
    net, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tmp_path / "base"))
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    everything = {name for name, _ in net.named_parameters()}
    of_top = {name for name in everything if ".layers.1." in name or name == "model.norm.weight"}
    assert moved == (everything if train == "all" else of_top)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not list((out / "run").glob("checkpoint-*"))


def losses(out):
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_accelerated_and_stock_packed_and_padded_runs_have_the_same_losses(tmp_path):
    how = {"optimise__steps": 12, "evaluate__every": 1, "batch__tokens": 10_000, "optimise__schedule": "constant"}
    ours = losses(tune(tmp_path, "ours", **how))
    stock = losses(tune(tmp_path, "stock", **how, memory__accelerate=False))
    padded = losses(tune(tmp_path, "padded", **how, batch__layout="padded"))
    assert len(ours) == 12
    assert ours == pytest.approx(stock, rel=1e-4)
    assert ours == pytest.approx(padded, rel=1e-3)  # one batch holds all: only the order in it is another


def test_a_broken_run_goes_on_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    whole = tune(tmp_path, "whole")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.optimiser, "lr_lambda", lambda how, steps: lambda step: killed() if step > 4 else 1.0)
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path, "broken", optimise__schedule="constant", optimise__warmup=0.0)
    assert (tmp_path / "broken" / "run" / "checkpoint-3" / "whole").is_file()
    same = {"optimise__schedule": "constant", "optimise__warmup": 0.0}
    broken, unbroken = tune(tmp_path, "broken", **same), tune(tmp_path, "unbroken", **same)
    files = [(out / "adapter_model.safetensors").read_bytes() for out in (broken, unbroken)]
    assert files[0] == files[1]
    assert files[0] != (whole / "adapter_model.safetensors").read_bytes()


def test_gradients_are_accumulated_by_tokens_and_blocks_recomputed(tmp_path):
    how = {"optimise__steps": 4, "evaluate__every": 1, "optimise__schedule": "constant"}
    once = losses(tune(tmp_path, "once", **how, batch__accumulate=2))
    again = losses(tune(tmp_path, "again", **how, batch__accumulate=2, optimise__checkpointing=True))
    assert once == pytest.approx(again, rel=1e-5)


def test_the_net_is_put_back_when_a_run_ends_or_is_stopped(tmp_path):
    plan = dispatch.parse(chats.recipe(tmp_path, optimise__learning_rate=1e9, watch__divergence=1.5), "test")
    model = loading.load(plan.model)
    with pytest.raises(TrainingStopped):
        dispatch.train(plan, model, tmp_path / "out", threads=1)
    assert not accelerate._UNDO.get(model.net)
    assert model.net.config._attn_implementation != "mowa"


def test_packing_that_lets_documents_see_each_other_is_noticed(tmp_path, monkeypatch):
    pack = causal.pack

    def leaking(rows):
        batch = pack(rows)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    monkeypatch.setattr(causal, "pack", leaking)
    with pytest.raises(TrainingStopped, match="packed and faster"):
        tune(tmp_path)


@pytest.mark.parametrize(
    ("turned", "kind", "said"),
    [
        ({"data__template": "chatmi"}, DataError, "template: chatmi is no file, and none of"),
        ({"data__hold_out": 0.0}, DataError, "no texts to measure on"),
        ({"train": "top-9"}, RecipeError, "the net has 2 blocks"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_trained(tmp_path, turned, kind, said):
    with pytest.raises(kind, match=said):
        tune(tmp_path, **turned)


def test_a_model_of_another_kind_is_refused(tmp_path):
    plan = dispatch.parse({"model": str(chats.model(tmp_path / "base")), "data": {"train": "none"}}, "test")
    with pytest.raises(RecipeError, match="is a language model; say task: causal"):
        dispatch.train(plan, loading.load(plan.model), tmp_path / "out")


def test_another_recipe_in_the_same_folder_is_refused(adapter):
    with pytest.raises(RecipeError, match="holds a run by another recipe"):
        tune(adapter.parent, optimise__steps=7)


def test_what_both_train_and_dev_have_is_said(tmp_path, capsys):
    chats.recipe(tmp_path)
    out = tune(tmp_path, data__dev=str(tmp_path / "chats.jsonl"))
    assert "leakage" in (out / "watch.jsonl").read_text()
