"""A student begins as some of its teacher's blocks, and is held to what the teacher says and hears."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCTC

from mowa import loading
from mowa.errors import RecipeError
from mowa.training.config import ctc
from mowa.training.ctc import distillation, trainer
from tests.checkpoints import corpus, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("base"), conv_dim=(8,) * 7, intermediate_size=32, num_hidden_layers=5)
    net = AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():  # blocks that were never trained hardly do anything; these are missed when they are gone
        for weight in net.wav2vec2.encoder.layers.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("teacher", "student", "kept"),
    [(6, 3, (0, 2, 5)), (24, 12, None), (5, 5, (0, 1, 2, 3, 4)), (5, 1, (4,)), (2, 2, (0, 1))],
)
def test_blocks_are_chosen_evenly_from_first_to_last(teacher, student, kept):
    chosen = distillation.select_layers(teacher, student)
    assert len(set(chosen)) == student
    assert chosen[-1] == teacher - 1
    assert kept is None or chosen == kept
    assert student == 1 or chosen[0] == 0


@pytest.mark.parametrize("layers", [0, 6])
def test_a_student_larger_than_its_teacher_is_refused(layers):
    with pytest.raises(RecipeError, match=f"layers is {layers}; the teacher has 5 blocks"):
        distillation.select_layers(5, layers)


def test_a_student_of_all_blocks_is_its_teacher(base):
    teacher = loading.load(str(base))
    student = distillation.init_student(teacher, 5)
    values = torch.randn(1, 8000)
    assert torch.equal(student.net(values).logits, teacher.net(values).logits)
    assert student.net is not teacher.net
    half = distillation.init_student(teacher, 2)
    assert len(half.net.wav2vec2.encoder.layers) == half.net.config.num_hidden_layers == 2
    assert len(teacher.net.wav2vec2.encoder.layers) == 5


def test_apart_is_the_divergence_of_true_frames_alone():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    frames = [(0, t) for t in range(7)] + [(1, t) for t in range(3)]
    expected = sum(
        F.kl_div((ours[u, t] / 2).log_softmax(-1), (theirs[u, t] / 2).softmax(-1), reduction="sum") for u, t in frames
    )
    torch.testing.assert_close(distillation.kl_loss(ours, theirs, [7, 3], 2.0), 4 * expected / len(frames))
    spoilt = ours.clone()
    spoilt[1, 3:] = 100.0
    torch.testing.assert_close(distillation.kl_loss(spoilt, theirs, [7, 3], 2.0), 4 * expected / len(frames))
    assert float(distillation.kl_loss(theirs, theirs, [7, 3], 1.0)) == pytest.approx(0, abs=1e-6)


def test_unlike_is_one_for_a_net_that_says_the_mean():
    torch.manual_seed(0)
    theirs = torch.randn(500, 8) * 3 + 1
    assert float(distillation.hidden_state_loss([theirs.mean(0).expand(500, 8)], [theirs])) == pytest.approx(
        1, rel=1e-4
    )
    assert float(distillation.hidden_state_loss([theirs, theirs], [theirs, theirs])) == 0


@pytest.mark.parametrize("texts", [True, False])
def test_a_distilled_student_comes_nearer_to_its_teacher(base, tmp_path, texts):
    manifest = Path(corpus(tmp_path / "corpus", 24))
    if not texts:
        rows = [json.loads(line) | {"text": ""} for line in manifest.read_text().splitlines()]
        (manifest.parent / "mute.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(manifest if texts else manifest.parent / "mute.jsonl"), "dev": str(manifest), "measured": 4}
    plan = ctc.parse(
        {
            "model": str(base),
            "data": data,
            "distil": {"layers": 3, "letters": 0.01},  # a random teacher says nothing like the texts
            "optimise": {"steps": 40, "learning_rate": 1e-3, "precision": "float32"},
            "batch": {"seconds": 4.0},
            "masks": {"time": 0.0},
            "evaluate": {"every": 40},
        },
        "test",
    )
    teacher = loading.load(str(base))
    begun = distillation.init_student(loading.load(str(base)), 3)
    out = trainer.train_ctc(plan, copy.deepcopy(teacher), tmp_path / "out", threads=1)
    finished = AutoModelForCTC.from_pretrained(out)
    assert finished.config.num_hidden_layers == 3
    values = torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = teacher.net(values).logits
        frames = [theirs.shape[1]] * 4
        before, after = (
            distillation.kl_loss(net.eval()(values).logits, theirs, frames, 1.0) for net in (begun.net, finished)
        )
    assert after < before


def test_what_a_student_cannot_be_is_refused(base):
    for settings in ({"train": "head"}, {"vocabulary": "new"}, {"batch": {"layout": "padded"}}):
        with pytest.raises(RecipeError, match="a student learns all"):
            ctc.parse({"model": "x", "data": {"train": "y"}, "distil": {"layers": 2}} | settings, "test")
