"""A student is initialized from some of its teacher's layers, and training brings it closer to the teacher."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCTC

from mowa import loading
from mowa.errors import RecipeError
from mowa.training.config import ctc, dispatch
from mowa.training.ctc import distillation
from tests.checkpoints import corpus, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny(tmp_path_factory.mktemp("base"), conv_dim=(8,) * 7, intermediate_size=32, num_hidden_layers=5)
    net = AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():  # untrained layers change little; make them matter
        for weight in net.wav2vec2.encoder.layers.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("teacher", "student", "kept"),
    [(6, 3, (0, 2, 5)), (24, 12, None), (5, 5, (0, 1, 2, 3, 4)), (5, 1, (4,)), (2, 2, (0, 1))],
)
def test_layers_are_selected_evenly_from_first_to_last(teacher, student, kept):
    chosen = distillation.select_layers(teacher, student)
    assert len(set(chosen)) == student
    assert chosen[-1] == teacher - 1
    assert kept is None or chosen == kept
    assert student == 1 or chosen[0] == 0


@pytest.mark.parametrize("layers", [0, 6])
def test_a_student_larger_than_its_teacher_is_refused(layers):
    with pytest.raises(RecipeError, match=f"student_layers is {layers}; it must be between 1 and the teacher's 5"):
        distillation.select_layers(5, layers)


def test_a_student_of_all_layers_equals_its_teacher(base):
    teacher = loading.load(str(base))
    student = distillation.init_student(teacher, 5)
    values = torch.randn(1, 8000)
    assert torch.equal(student.net(values).logits, teacher.net(values).logits)
    assert student.net is not teacher.net
    half = distillation.init_student(teacher, 2)
    assert len(half.net.wav2vec2.encoder.layers) == half.net.config.num_hidden_layers == 2
    assert len(teacher.net.wav2vec2.encoder.layers) == 5


def test_kl_loss_ignores_padding():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    frames = [(0, t) for t in range(7)] + [(1, t) for t in range(3)]
    expected = sum(
        F.kl_div((student[place] / 2).log_softmax(-1), (teacher[place] / 2).softmax(-1), reduction="sum")
        for place in frames
    )
    torch.testing.assert_close(distillation.kl_loss(student, teacher, [7, 3], 2.0), 4 * expected / len(frames))
    student[1, 3:] = 100.0
    torch.testing.assert_close(distillation.kl_loss(student, teacher, [7, 3], 2.0), 4 * expected / len(frames))
    assert float(distillation.kl_loss(teacher, teacher, [7, 3], 1.0)) == pytest.approx(0, abs=1e-6)


def test_hidden_state_loss_of_the_mean_is_one():
    torch.manual_seed(0)
    teacher = torch.randn(500, 8) * 3 + 1
    mean = teacher.mean(0).expand(500, 8)
    assert float(distillation.hidden_state_loss([mean], [teacher])) == pytest.approx(1, rel=1e-4)
    assert float(distillation.hidden_state_loss([teacher, teacher], [teacher, teacher])) == 0


@pytest.mark.parametrize("texts", [True, False])
def test_distillation_reduces_the_divergence_from_the_teacher(base, tmp_path, texts):
    manifest = Path(corpus(tmp_path / "corpus", 24))
    if not texts:
        rows = [json.loads(line) | {"text": ""} for line in manifest.read_text().splitlines()]
        (manifest.parent / "without-texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = manifest if texts else manifest.parent / "without-texts.jsonl"
    recipe = ctc.parse(
        {
            "model": str(base),
            "data": {"train": str(train), "dev": str(manifest), "max_eval_samples": 4},
            "distillation": {"student_layers": 3, "ctc_weight": 0.01},  # a random teacher does not output the texts
            "optimizer": {"max_steps": 40, "learning_rate": 1e-3, "precision": "float32"},
            "batch": {"seconds": 4.0},
            "spec_augment": {"mask_time_prob": 0.0},
            "evaluation": {"eval_steps": 40},
        },
        "test",
    )
    teacher = loading.load(str(base))
    initial = distillation.init_student(loading.load(str(base)), 3)
    out = dispatch.train(recipe, tmp_path / "out", model=copy.deepcopy(teacher), threads=1)
    finished = AutoModelForCTC.from_pretrained(out)
    assert finished.config.num_hidden_layers == 3
    values = torch.randn(4, 8000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher.net(values).logits
        frames = [expected.shape[1]] * 4
        before, after = (
            distillation.kl_loss(net.eval()(values).logits, expected, frames, 1.0) for net in (initial.net, finished)
        )
    assert after < before


@pytest.mark.parametrize("section", [{"method": "head"}, {"vocabulary": "new"}, {"batch": {"packing": False}}])
def test_what_a_student_needs(section):
    tree = {"model": "x", "data": {"train": "y"}, "distillation": {"student_layers": 2}}
    with pytest.raises(RecipeError, match="a student needs method: full, vocabulary: keep and batch: packing: true"):
        ctc.parse(tree | section, "test")
