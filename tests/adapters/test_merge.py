"""Merged is unmerged: the same emissions, in a checkpoint that plain transformers loads."""

import pytest
import torch
from transformers import AutoModelForCTC

from mowa import loading
from mowa.adapters import checkpoint, merge
from mowa.data import audio
from mowa.errors import DataError, ModelError
from tests.adapters.made import OTHER, logits, saved
from tests.checkpoints import clip, tiny

KINDS = ["lora", "adapters"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"))


def emissions(net, seed=0):
    return logits(net, seed).log_softmax(-1)


@pytest.mark.parametrize("words", [None, OTHER], ids=["same letters", "other letters"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged_and_stock_transformers_loads_it(base, tmp_path, kind, words):
    saved(base, kind, tmp_path / "medical", words=words)
    model = loading.load(str(base))
    adapted = checkpoint.load_adapter(model, tmp_path / "medical")
    before = [emissions(adapted.net, seed) for seed in range(3)]
    alone = emissions(model.net)
    merged = merge.merge_adapter(adapted)
    with merge.atomic_checkpoint(merged, tmp_path / "whole") as folder:
        assert not (tmp_path / "whole").exists()
        assert loading.load(str(folder)).vocabulary == adapted.vocabulary
    assert len({file.stat().st_mode for file in (tmp_path / "whole").iterdir()}) == 1
    stock, report = AutoModelForCTC.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for seed, expected in enumerate(before):
        for net in (merged.net, stock, adapted.net):  # and what was merged from still works
            torch.testing.assert_close(emissions(net.eval(), seed), expected, atol=1e-5, rtol=0)
    assert torch.equal(emissions(model.net), alone)
    assert loading.load(str(tmp_path / "whole")).preprocessing == adapted.preprocessing


def test_merged_lora_has_the_names_of_a_plain_net(base, tmp_path):
    saved(base, "lora", tmp_path / "medical")
    model = loading.load(str(base))
    merged = merge.merge_adapter(checkpoint.load_adapter(model, tmp_path / "medical")).net
    plain = loading.load(str(base)).net
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    kinds = [
        [type(module).__name__ for module in net.modules()] for net in (merged, plain)
    ]  # weight norm makes its own
    assert kinds[0] == kinds[1]
    assert not hasattr(merged, "peft_config")
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense", "lm_head",
    }  # fmt: skip


def test_a_merged_model_takes_an_adapter_no_more_than_it_should(base, tmp_path):
    """Merged in memory it still names its base's files; another adapter over it would be one over the wrong weights."""
    saved(base, "lora", tmp_path / "medical")
    merged = merge.merge_adapter(checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical"))
    with merge.atomic_checkpoint(merged, tmp_path / "whole"):
        pass
    with pytest.raises(ModelError, match="is another"):
        checkpoint.load_adapter(loading.load(str(tmp_path / "whole")), tmp_path / "medical")
    with pytest.raises(ModelError, match="merged"):
        checkpoint.load_adapter(merged, tmp_path / "medical")


def test_the_difference_is_what_it_says(base):
    before, after = loading.load(str(base)), loading.load(str(base))
    sounds = [clip(0, 8_000), clip(1, 8_000)]
    same = merge.compare_emissions(before, after, sounds)
    assert (same.max_abs_diff, same.agreement) == (0.0, 1.0)
    with torch.no_grad():
        after.net.lm_head.bias[3] += 8.0
    found = merge.compare_emissions(before, after, sounds)
    normal = [torch.from_numpy(audio.normalize(sound)) for sound in sounds]
    ours, theirs = (model.net(torch.stack(normal)).logits.detach().log_softmax(-1) for model in (before, after))
    assert found.frames == same.frames == ours.shape[0] * ours.shape[1]
    assert found.max_abs_diff == pytest.approx(float((ours - theirs).abs().max()), abs=1e-5)
    assert found.agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert found.agreement < 1.0


def test_what_does_not_compare_is_refused(base, tmp_path):
    model = loading.load(str(base))
    with pytest.raises(ModelError, match="no sound"):
        merge.compare_emissions(model, model, [])
    saved(base, "lora", tmp_path / "medical", words=OTHER)
    with pytest.raises(ModelError, match="other letters"):
        merge.compare_emissions(model, checkpoint.load_adapter(model, tmp_path / "medical"), [clip(0, 8_000)])


def test_nothing_is_overwritten_and_nothing_half_written(base, tmp_path):
    model = loading.load(str(base))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(DataError, match="is there already"), merge.atomic_checkpoint(model, tmp_path / "full"):
        pass
    with pytest.raises(RuntimeError, match="no"), merge.atomic_checkpoint(model, tmp_path / "new"):
        raise RuntimeError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    with merge.atomic_checkpoint(model, tmp_path / "empty"):
        pass
    assert (tmp_path / "empty" / "model.safetensors").is_file()
