"""A training run of a few steps, end to end: it resumes with the same numbers and writes a stock checkpoint."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCTC, pipeline

from mowa.errors import MissingPart, RecipeError
from mowa.families.patch import ChannelLastGelu, channel_last_front_end
from mowa.nouns import Example
from mowa.train import batches, run
from mowa.train.recipe import Augment, Data, Optimise, Recipe
from tests.checkpoints import clip

NET = {
    "conv_dim": [8] * 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "conv_bias": True,
    "do_stable_layer_norm": True, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for index in range(24):
        soundfile.write(folder / f"{index}.wav", clip(index, 6_000 + 400 * index), 16_000)
        seconds = (6_000 + 400 * index) / 16_000
        rows.append({"id": str(index), "audio": f"{index}.wav", "text": "ala ma kota"[: 3 + index % 8].strip()})
        rows[-1]["duration_s"] = seconds
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = str(folder / "train.jsonl")
    how = Optimise(steps=6, batch_s=3.0, shortest_first=2, warmup_steps=1, bf16=False, evaluate_every=3, seed=5)
    return Recipe("test", net=NET, data=Data(manifest, manifest), augment=Augment(start=0, full=4), optimise=how)


def test_run_resumes_and_loads_anywhere(recipe, tmp_path):
    whole = run.train(recipe, tmp_path / "whole", threads=1)
    # The same run, broken off after step 3: the later checkpoint and the result never came to be.
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "broken" / "checkpoints")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "checkpoint-6")
    broken = run.train(recipe, tmp_path / "broken", threads=1)
    ours, theirs = (AutoModelForCTC.from_pretrained(folder).state_dict() for folder in (whole, broken))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4)
    other = dataclasses.replace(recipe, optimise=dataclasses.replace(recipe.optimise, learning_rate=1.0))
    with pytest.raises(RecipeError, match="another recipe"):
        run.train(other, tmp_path / "broken", threads=1)
    assert (whole / "curve.png").stat().st_size > 1000
    steps = [json.loads(line)["step"] for line in (whole / "history.jsonl").read_text().splitlines()]
    assert {3, 6} <= set(steps)
    assert isinstance(pipeline("automatic-speech-recognition", model=str(whole))(clip(0, 16_000))["text"], str)


def test_missing_packages_are_named_before_the_night(recipe, tmp_path, monkeypatch):
    parts = run.machine.parts() | {"matplotlib": None}
    monkeypatch.setattr(run.machine, "parts", lambda: parts)
    with pytest.raises(MissingPart, match="matplotlib"):
        run.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_is_exact_and_within_budget():
    rng = np.random.default_rng(0)
    examples = [Example(str(i), "", "", float(rng.uniform(0.5, 9))) for i in range(500)]
    plan = batches.plan(examples, count=200, budget_s=20, shortest_first=5, seed=1)
    assert plan == batches.plan(examples, count=200, budget_s=20, shortest_first=5, seed=1)
    assert len(plan) == 200
    assert all(len(group) * max(e.duration_s for e in group) <= 20 for group in plan)
    assert max(e.duration_s for group in plan[:5] for e in group) < np.median([e.duration_s for e in examples])
    in_one_epoch = len(list(batches.fill(sorted(examples, key=lambda e: e.duration_s), 20)))
    epoch = batches.plan(examples, count=in_one_epoch, budget_s=20, shortest_first=0, seed=1)
    assert {e.id for group in epoch for e in group} == {e.id for e in examples}


def test_channel_last_is_the_same_function():
    net = AutoModelForCTC.from_config(run._config(Recipe("x", net=NET), run.vocabulary("abc")))
    values = torch.from_numpy(np.stack([clip(0, 5000), clip(1, 5000)]))
    labels = torch.tensor([[5, 6], [7, 5]])

    def step():
        net.zero_grad()
        torch.manual_seed(0)
        loss = net.eval()(values, labels=labels).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]

    plain = step()
    with channel_last_front_end(net) as swapped:
        assert swapped == 7
        fast = step()
    assert not any(isinstance(module, ChannelLastGelu) for module in net.modules())
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-5)
