"""Fine-tune a tiny language model end to end: the saved model equals the trained one and loads in PEFT."""

import json
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mowa import loading
from mowa.adapters import causal as adapters
from mowa.adapters.loading import atomic_checkpoint
from mowa.errors import DataError, ModelError, RecipeError, TrainingStopped
from mowa.models.causal import accelerate
from mowa.models.diff import ModelDiff
from mowa.tasks import causal
from mowa.training import optimizer
from mowa.training.causal import dataset
from mowa.training.config import dispatch
from tests.training.causal import chats


def train(folder, out="out", **overrides):
    recipe = dispatch.parse(chats.recipe(folder, **overrides), "test")
    dispatch.train(recipe, folder / out, threads=1)
    return folder / out


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return train(tmp_path_factory.mktemp("lora"), optimizer__max_steps=40, evaluation__eval_steps=20)


def test_training_reduces_the_loss_on_held_out_data(adapter):
    before, after = (report(adapter)[when]["dev"] for when in ("baseline_metrics", "metrics"))
    assert after["loss"] < before["loss"] - 0.3
    assert before["tokens"] == after["tokens"] > 0


def test_dev_samples_in_another_case_or_unicode_form_are_found_in_train(tmp_path):
    chats.recipe(tmp_path)
    tokenizer = loading.load(str(tmp_path / "base")).tokenizer

    def sample(name, text):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return SimpleNamespace(id=name, input_ids=np.array(ids, np.int32))

    train = [sample("one", "Zażółć gęślą jaźń!"), sample("two", "how are you")]
    dev = {"dev": [sample("a", unicodedata.normalize("NFD", "zażółć gęślą jaźń")), sample("b", "how are they")]}
    finding = dataset.find_leakage(train, dev, tokenizer)
    assert "1 of 2 samples in dev and test are in train as well (a)" in str(finding)
    assert dataset.find_leakage(train, {"dev": dev["dev"][1:]}, tokenizer) is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft uses the old name
def test_peft_loads_the_adapter_with_the_reported_loss(adapter):
    base = adapter.parent / "base"
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    recipe = dispatch.read_recipe(adapter / "recipe.yaml")
    held_out = dataset.load_splits(recipe, loading.load(str(base))).dev["dev"]
    assert dataset.evaluate(net, held_out)["loss"] == pytest.approx(report(adapter)["metrics"]["dev"]["loss"], abs=1e-5)


def test_a_merged_checkpoint_has_the_same_logits(adapter, tmp_path):
    base = loading.load(str(adapter.parent / "base"))
    adapted = adapters.load_adapter(base, adapter)
    with atomic_checkpoint(adapters.merge_adapter(adapted, "float32"), tmp_path / "merged"):
        pass
    again = loading.load(str(tmp_path / "merged"))
    samples = dataset.load_splits(dispatch.read_recipe(adapter / "recipe.yaml"), base).dev["dev"]
    batches = [causal.pad([sample], 0, pad_to_multiple_of=1) for sample in samples]
    found = adapters.compare_logits(adapted, again, batches)
    assert found.agreement == 1.0
    assert found.max_kl < 1e-8
    assert adapters.compare_logits(base, again, batches).kl > 1e-3  # the adapter changes the logits
    assert not list(tmp_path.glob(".merged*"))


def test_merging_does_not_change_the_base(adapter):
    base = loading.load(str(adapter.parent / "base"))
    before = {name: value.clone() for name, value in base.net.state_dict().items()}
    adapters.merge_adapter(adapters.load_adapter(base, adapter), "bfloat16")
    assert all(torch.equal(value, before[name]) for name, value in base.net.state_dict().items())


def test_the_chat_template_is_saved_with_the_adapter_and_the_merged_model(tmp_path):
    template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    (tmp_path / "ours.jinja").write_text(template)
    out = train(tmp_path, data__chat_template=str(tmp_path / "ours.jinja"), optimizer__max_steps=1)
    assert AutoTokenizer.from_pretrained(out).chat_template == template
    base = loading.load(str(tmp_path / "base"))
    with atomic_checkpoint(adapters.merge_adapter(adapters.load_adapter(base, out), "float32"), tmp_path / "merged"):
        pass
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template
    assert base.tokenizer.chat_template != template


def test_an_adapter_of_another_base_is_refused(adapter, tmp_path):
    other = loading.load(str(chats.model(tmp_path / "other", hidden_size=16)))
    with pytest.raises(ModelError, match=r"was trained over .* not over"):
        adapters.load_adapter(other, adapter)


def test_a_merge_that_drifts_is_refused():
    def diff(divergence, agreement):
        return ModelDiff(1.0, 0.1, 0.1, divergence, 1.0, agreement, 1000)

    adapters.verify_merge(diff(0.0, 0.996))
    with pytest.raises(ModelError, match="the merged model differs from the trained one"):
        adapters.verify_merge(diff(0.0, 0.99))
    with pytest.raises(ModelError, match="differs from the trained one"):
        adapters.verify_merge(diff(np.inf, 0.999))  # NaN somewhere
    rounding = diff(1e-3, 0.98)  # of the base itself, in half precision
    adapters.verify_merge(diff(1.5e-3, 0.97), rounding)
    for found in (diff(1.5e-3, 0.95), diff(5e-3, 0.99)):
        with pytest.raises(ModelError, match="rounding the base model alone"):
            adapters.verify_merge(found, rounding)


@pytest.mark.parametrize("method", ["full", "top-1"])
def test_only_the_selected_weights_change_and_transformers_loads_the_result(tmp_path, method):
    out = train(tmp_path, method=method)
    net, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, tmp_path / "base"))
    changed = {n for n, p in net.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    everything = {name for name, _ in net.named_parameters()}
    top = {name for name in everything if ".layers.1." in name or name == "model.norm.weight"}
    assert changed == (everything if method == "full" else top)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not list((out / "run").glob("checkpoint-*"))


def losses(out):
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_accelerated_and_stock_packed_and_padded_runs_have_the_same_losses(tmp_path):
    options = {
        "optimizer__max_steps": 12,
        "evaluation__eval_steps": 1,
        "batch__tokens": 10_000,
        "optimizer__lr_scheduler": "constant",
    }
    accelerated = losses(train(tmp_path, "accelerated", **options))
    stock = losses(train(tmp_path, "stock", **options, memory__accelerate=False))
    padded = losses(train(tmp_path, "padded", **options, batch__packing=False))
    assert len(accelerated) == 12
    assert accelerated == pytest.approx(stock, rel=1e-4)
    assert accelerated == pytest.approx(padded, rel=1e-3)  # one batch holds all samples, in another order


@pytest.mark.parametrize("added", [(), ("now then", "well")], ids=["", "with added tokens"])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, monkeypatch, added):
    same = {"optimizer__lr_scheduler": "constant", "optimizer__warmup_ratio": 0.0, "data__add_tokens": list(added)}
    other = train(tmp_path, "other", data__add_tokens=list(added))

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "lr_lambda", lambda config, steps: lambda step: killed() if step > 4 else 1.0)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, "interrupted", **same)
    assert (tmp_path / "interrupted" / "run" / "checkpoint-3" / "complete").is_file()
    resumed, uninterrupted = train(tmp_path, "interrupted", **same), train(tmp_path, "uninterrupted", **same)
    files = [(out / "adapter_model.safetensors").read_bytes() for out in (resumed, uninterrupted)]
    assert files[0] == files[1]
    assert files[0] != (other / "adapter_model.safetensors").read_bytes()


def test_gradient_checkpointing_does_not_change_the_losses(tmp_path):
    options = {"optimizer__max_steps": 4, "evaluation__eval_steps": 1, "optimizer__lr_scheduler": "constant"}
    stored = losses(train(tmp_path, "stored", **options, batch__gradient_accumulation_steps=2))
    recomputed = losses(
        train(
            tmp_path,
            "recomputed",
            **options,
            batch__gradient_accumulation_steps=2,
            optimizer__gradient_checkpointing=True,
        )
    )
    assert stored == pytest.approx(recomputed, rel=1e-5)


def test_acceleration_is_undone_when_a_run_is_stopped(tmp_path):
    recipe = dispatch.parse(
        chats.recipe(tmp_path, optimizer__learning_rate=1e9, monitors__divergence_factor=1.5), "test"
    )
    model = loading.load(recipe.model)
    with pytest.raises(TrainingStopped):
        dispatch.train(recipe, tmp_path / "out", model=model, threads=1)
    assert not accelerate._UNDO.get(model.net)
    assert model.net.config._attn_implementation != "mowa"


def test_packing_without_document_boundaries_is_detected(tmp_path, monkeypatch):
    pack = causal.pack

    def leaking_pack(samples):
        batch = pack(samples)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]}

    monkeypatch.setattr(causal, "pack", leaking_pack)
    with pytest.raises(TrainingStopped, match="the loss computed packed and unpacked differs"):
        train(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"data__chat_template": "chatmi"}, DataError, "chat_template: chatmi is neither a file nor one of"),
        ({"data__hold_out": 0.0}, DataError, "no texts to evaluate on"),
        ({"method": "top-9"}, RecipeError, "the net has 2 blocks"),
    ],
)
def test_errors_before_training(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path, **overrides)


def test_a_model_of_another_task_is_refused(tmp_path):
    recipe = dispatch.parse({"model": str(chats.model(tmp_path / "base")), "data": {"train": "none"}}, "test")
    with pytest.raises(RecipeError, match="is a language model; set task: causal"):
        dispatch.train(recipe, tmp_path / "out")


def test_another_recipe_in_the_same_folder_is_refused(adapter):
    with pytest.raises(RecipeError, match=r"holds a run with another recipe \(optimizer, evaluation\)"):
        train(adapter.parent, optimizer__max_steps=7)


def test_overlap_of_train_and_dev_is_reported(tmp_path):
    chats.recipe(tmp_path)
    out = train(tmp_path, data__dev=str(tmp_path / "chats.jsonl"))
    assert "train/test overlap" in (out / "monitor.jsonl").read_text()
