"""Fine-tune tiny CTC nets end to end: the result loads anywhere, and a killed run resumes to the same bits."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCTC,
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2PhonemeCTCTokenizer,
    pipeline,
)

from mowa import loading
from mowa.adapters import checkpoint
from mowa.data.manifests import examples as sources
from mowa.errors import DataError, RecipeError
from mowa.models.ctc_encoder import packing
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.quantization import quantize
from mowa.tasks import ctc as tasks
from mowa.training import loop
from mowa.training.config import ctc, dispatch, schema
from mowa.training.ctc import batches, module, setup, trainer
from tests.checkpoints import clip, corpus, tiny

SHORT = {
    "optimizer.max_steps": 6,
    "optimizer.learning_rate": 1e-3,
    "optimizer.precision": "float32",
    "batch.seconds": 4.0,
    "evaluation.eval_steps": 3,
    "data.max_eval_samples": 6,
}
# Parameters without gradient by design: the mask embedding without masks, biases that softmax cancels.
ZERO_GRADIENT = ("masked_spec_embed", "k_proj.bias")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"), conv_dim=(8,) * 7, intermediate_size=32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"), 24)


def recipe(base, manifest, **overrides):
    tree = {"model": str(base), "data": {"train": [manifest], "dev": [manifest]}}
    return ctc.parse(schema.apply_overrides(tree, SHORT | overrides), "test")


def run(recipe, out):
    model = loading.load(recipe.model, require_head=recipe.vocabulary != "new")
    return dispatch.train(recipe, out, model=model, threads=1)


@pytest.mark.parametrize("method", ["head", "top-1", "encoder", "full"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_only_the_selected_weights_change_and_the_result_is_a_stock_checkpoint(
    base, manifest, tmp_path, method, packing
):
    out = run(recipe(base, manifest, **{"method": method, "batch.packing": packing}), tmp_path / "out")
    before, after = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (base, out))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name].to(value.dtype))}
    selects = {
        "head": lambda name: name.startswith("lm_head"),
        "top-1": lambda name: name.startswith(("lm_head", "wav2vec2.encoder.layers.1", "wav2vec2.encoder.layer_norm")),
        "encoder": lambda name: "feature_extractor" not in name,
        "full": lambda name: True,
    }[method]
    expected = {name for name in after if selects(name)}
    assert changed <= expected
    assert not [name for name in expected - changed if not name.endswith(ZERO_GRADIENT)]
    assert isinstance(pipeline("automatic-speech-recognition", model=str(out))(clip(0, 16_000))["text"], str)
    report = json.loads((out / "report.json").read_text())
    assert report["metrics"]["dev"]["recordings"] == 6
    assert report["num_parameters"] == sum(value.numel() for value in after.values())
    assert report["num_trainable_parameters"] == sum(after[name].numel() for name in expected)
    assert report["global_step"] == 6
    assert (out / "curve.png").stat().st_size > 1000


def test_a_new_vocabulary_is_built_from_the_texts(base, manifest, tmp_path):
    out = run(recipe(base, manifest, vocabulary="new", method="head"), tmp_path / "out")
    vocabulary = json.loads((out / "vocab.json").read_text())
    characters = {
        character for line in Path(manifest).read_text().splitlines() for character in json.loads(line)["text"]
    }
    assert set(vocabulary) - {"<pad>", "<s>", "</s>", "<unk>", "|"} == characters - {" "}
    assert len(loading.load(str(out)).vocabulary) == len(vocabulary)


def vocabulary_base(base, folder, tokens, tokenizer_class=Wav2Vec2CTCTokenizer, **options):
    """Copy `base` with a head for other tokens."""
    shutil.copytree(base, folder)
    (folder / "vocab.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    tokenizer_class(str(folder / "vocab.json"), **options).save_pretrained(folder)
    net = AutoModelForCTC.from_pretrained(folder, vocab_size=len(tokens), ignore_mismatched_sizes=True)
    net.save_pretrained(folder)
    return folder


PHONEME_OPTIONS = {"tokenizer_class": Wav2Vec2PhonemeCTCTokenizer, "do_phonemize": False, "word_delimiter_token": "|"}


@pytest.mark.parametrize(
    ("tokens", "options", "text", "expected", "note"),
    [
        (["<space>", *"almakot"], {"word_delimiter_token": "<space>"}, "ala kot", "ala kot", ""),
        ([*"almakot"[:3], "ko", "t"], {"word_delimiter_token": None}, "ala kot", "alakot", "without their spaces"),
        (["|", *"lmt", "a", "ko"], {}, "ala kot", "ala kot", ""),
        (["|", "ʔ", "aː", "l"], PHONEME_OPTIONS, "aː l | ʔ aː", "aː l ʔ aː", ""),
        (["|", *"ALMKOT"], {"do_lower_case": True}, "ala kot", "ala kot", ""),
    ],
    ids=["<space>", "no delimiter", "digraphs", "phonemes", "lower case"],
)
def test_every_kind_of_vocabulary_is_trained_on_whole_texts(
    base, manifest, tmp_path, tokens, options, text, expected, note
):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(tokens)]
    folder = vocabulary_base(base, tmp_path / "base", tokens, **options)
    rows = [json.loads(line) | {"text": text} for line in Path(manifest).read_text().splitlines()]
    for row in rows:
        row["audio"] = str(Path(manifest).with_name(row["audio"]))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = loading.load(str(folder))
    data = setup.read_data(recipe(folder, str(tmp_path / "train.jsonl")), model, tmp_path / "out")
    assert note in "\n".join(data.notes)
    example = data.train[0][0][0]
    ids = tasks.encode_labels(example.text, model.vocabulary)
    assert module.decode_labels([ids], data.vocabulary) == [expected]
    # built anew: transformers 5 saves a word_delimiter_token and then loads | for it
    settings = {key: value for key, value in options.items() if key != "tokenizer_class"}
    tokenizer_class = options.get("tokenizer_class", Wav2Vec2CTCTokenizer)
    assert tokenizer_class(str(folder / "vocab.json"), **settings).decode(ids, group_tokens=False) == expected
    out = run(recipe(folder, str(tmp_path / "train.jsonl"), **{"optimizer.max_steps": 2}), tmp_path / "out")
    assert loading.load(str(out)).vocabulary == model.vocabulary
    assert type(AutoTokenizer.from_pretrained(out)) is tokenizer_class
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert all(written[key] in (value, str(value)) for key, value in settings.items())  # transformers writes "None"


def test_words_where_phonemes_are_expected_end_the_run_before_it_starts(base, manifest, tmp_path):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "a", "l"]
    folder = vocabulary_base(base, tmp_path / "base", tokens, Wav2Vec2PhonemeCTCTokenizer, do_phonemize=False)
    with pytest.raises(DataError, match="the model outputs phonemes: separate those of the texts by spaces"):
        setup.read_data(recipe(folder, manifest), loading.load(str(folder)), tmp_path / "out")


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_a_loaded_adapter_equals_the_trained_net(base, manifest, tmp_path, method):
    trained = loading.load(str(base))
    out = dispatch.train(recipe(base, manifest, method=method), tmp_path / "out", model=trained, threads=1)
    assert not (out / "model.safetensors").exists()
    adapted = checkpoint.load_adapter(loading.load(str(base)), out)
    values = torch.from_numpy(clip(0, 16_000))[None]
    with torch.no_grad():
        logits, expected = adapted.net.eval()(values).logits, trained.net.eval()(values).logits
        original = loading.load(str(base)).net(values).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (original - expected).abs().max() > 1e-2


RESUMED = {
    "optimizer.ema_decay": 0.9,
    "batch.gradient_accumulation_steps": 2,
    "method": "full",
    "spec_augment.mask_feature_prob": 0.1,
}


def run_command(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_killed_run_resumes_to_the_same_bits(base, manifest, tmp_path):
    """SIGKILL after the first checkpoint, with dropout, masks and EMA. Each run is a process of its own, since what ran
    before in a process may change the order of summation."""
    file, whole, out = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "killed"
    schema.write_yaml(recipe(base, manifest, **RESUMED, **{"optimizer.max_steps": 9}), file)
    command = [sys.executable, "-m", "mowa", "train", str(file), "--threads", "1", "-o", str(whole)]
    run_command(command)
    command[-1] = str(out)
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while killed.poll() is None and not list((out / "run").glob("checkpoint-*/complete")):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (out / "model.safetensors").exists()
    run_command(command)
    resumed, expected = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert not list((out / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_run_killed_five_times_resumes_to_the_same_bits(base, manifest, tmp_path):
    """SIGKILL at five random moments: while it trains, evaluates or writes a checkpoint."""
    config = recipe(base, manifest, **RESUMED, **{"optimizer.max_steps": 40, "evaluation.eval_steps": 2})
    whole = run(config, tmp_path / "whole")
    file, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    schema.write_yaml(config, file)
    command = [sys.executable, "-m", "mowa", "train", str(file), "-o", str(out), "--threads", "1"]

    def reached():
        return max((int(mark.parent.name.partition("-")[2]) for mark in out.glob("run/*/complete")), default=0)

    rng, killed_at = np.random.default_rng(), []
    for _ in range(5):
        goal = reached() + int(rng.integers(2, 7))
        killed = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while killed.poll() is None and reached() < goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        killed_at.append(reached())
    assert not (out / "model.safetensors").exists(), killed_at
    run_command(command)
    resumed, expected = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items()), killed_at


def test_another_recipe_in_the_same_folder_is_refused(base, manifest, tmp_path):
    run(recipe(base, manifest), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    run(recipe(base, manifest), tmp_path / "out")  # already finished
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"another recipe \(method\)"):
        run(recipe(base, manifest, method="head"), tmp_path / "out")


def test_a_run_of_an_older_format_is_refused(base, manifest, tmp_path):
    run(recipe(base, manifest), tmp_path / "out")
    (tmp_path / "out" / "run" / "format").unlink()
    with pytest.raises(RecipeError, match=r"holds a run of format 1.*: use another folder, or delete"):
        run(recipe(base, manifest), tmp_path / "out")


def test_a_quantized_net_is_refused(base, manifest, tmp_path):
    quantized = quantize(loading.load(str(base)), "int8-weight")
    with pytest.raises(RecipeError, match=r"is quantized \(int8-weight\) and cannot be fine-tuned"):
        dispatch.train(recipe(base, manifest), tmp_path / "out", model=quantized)


def test_accumulated_batches_weigh_all_tokens_equally(base, manifest, tmp_path):
    """The loss and gradient norm of a step of two batches equal those of the two in a loop."""
    config = recipe(
        base,
        manifest,
        **{
            "batch.gradient_accumulation_steps": 2,
            "optimizer.max_steps": 1,
            "evaluation.eval_steps": 1,
            "spec_augment.mask_time_prob": 0.0,
        },
    )
    config = dataclasses.replace(config, augment=ctc.NO_AUGMENT)
    model = loading.load(config.model)
    disable_dropout(model.net)
    losses = []
    compute_loss = module.build_compute_loss(model.vocabulary.blank, None)
    prepared = loop.prepare(trainer.TASK, config, model, tmp_path / "out")
    data = batches.BatchDataset(prepared.batches, setup.eval_batch_options(prepared))
    trained = module.CTCModule(model.net, packing=True, use_attention_mask=False)
    items = [data[0], data[1]]
    tokens = sum(int((item["labels"] != -100).sum()) for item in items)
    with packing.packed_attention(model.net):
        for item in items:
            labels = item.pop("labels")
            loss = compute_loss(trained(**item), labels, tokens)
            loss.backward()
            losses.append(float(loss.detach()))
    expected = sum(float(p.grad.square().sum()) for p in model.net.parameters() if p.grad is not None) ** 0.5
    again = loading.load(config.model)
    disable_dropout(again.net)
    out = dispatch.train(config, tmp_path / "out", model=again, threads=1)
    (row,) = [row for line in (out / "history.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert row["loss"] == pytest.approx(sum(losses), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(expected, rel=1e-3)


def disable_dropout(net):
    for layer in net.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    net.config.attention_dropout = net.config.layerdrop = 0.0
    for block in net.wav2vec2.encoder.layers:
        block.attention.dropout = 0.0


def test_packed_batches_hold_what_was_planned(base, manifest):
    model = loading.load(str(base))
    examples = [dataclasses.replace(example, text="ab a") for example in sources.read_examples(manifest)]
    planned = batches.plan_batches(
        [(examples, 0.0)], max_seconds=4.0, packing=True, epochs=2, num_batches=0, multiple_of=2, seed=1
    )
    assert len(planned) % 2 == 0
    ids = [example.id for batch in planned for example in batch]
    assert all(ids.count(example.id) >= 2 for example in examples)
    assert all(sum(e.duration_s for e in batch) <= 4.0 or len(batch) == 1 for batch in planned)
    options = batches.BatchOptions(
        model.vocabulary,
        model.preprocessing,
        frame_geometry(model.net.config),
        32,
        True,
        augment=ctc.DEFAULT_AUGMENT,
        spec_augment=ctc.SpecAugmentConfig(mask_feature_prob=0.2),
        seed=3,
    )
    data = batches.BatchDataset(planned, options)
    item, again = data[1], data[1]
    assert all(torch.equal(value, again[name]) for name, value in item.items())
    counts = [options.frames.num_frames(n) for n in item["lengths"].tolist()]
    assert item["mask_time_indices"].shape == (sum(counts),)
    assert item["mask_feature_indices"].shape == (len(counts), 32)
    assert item["input_values"].shape[0] == 1
    assert np.isfinite(item["input_values"].numpy()).all()
