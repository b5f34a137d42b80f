"""Merged models have the emissions of the unmerged ones, and transformers loads their checkpoints."""

import pytest
import torch
from transformers import AutoModelForCTC

from mowa import loading
from mowa.adapters import checkpoint, merge
from mowa.adapters.loading import atomic_checkpoint
from mowa.data import audio
from mowa.errors import DataError, ModelError
from mowa.io.manifest import find_manifest
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, logits, save_tiny_adapter
from tests.checkpoints import clip, tiny

KINDS = ["lora", "bottleneck"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"))


def emissions(net, seed=0):
    return logits(net, seed).log_softmax(-1)


@pytest.mark.parametrize("vocabulary", [None, OTHER_VOCABULARY], ids=["same vocabulary", "other vocabulary"])
@pytest.mark.parametrize("adapter_type", KINDS)
def test_merging_keeps_the_emissions_and_transformers_loads_the_checkpoint(base, tmp_path, adapter_type, vocabulary):
    save_tiny_adapter(base, adapter_type, tmp_path / "medical", vocabulary=vocabulary)
    model = loading.load(str(base))
    adapted = checkpoint.load_adapter(model, tmp_path / "medical")
    before = [emissions(adapted.net, seed) for seed in range(3)]
    base_emissions = emissions(model.net)
    merged = merge.merge_adapter(adapted)
    with atomic_checkpoint(merged, tmp_path / "whole") as folder:
        assert not (tmp_path / "whole").exists()
        assert loading.load(str(folder)).vocabulary == adapted.vocabulary
    assert len({file.stat().st_mode for file in (tmp_path / "whole").iterdir()}) == 1
    found = find_manifest(tmp_path / "whole")
    assert found.artifact == "checkpoint"
    assert found.origin["name"] == adapted.origin.name
    found.verify_files()
    stock, loading_info = AutoModelForCTC.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not loading_info["missing_keys"]
    assert not loading_info["unexpected_keys"]
    for seed, expected in enumerate(before):
        for net in (merged.net, stock, adapted.net):  # the unmerged model is still usable
            torch.testing.assert_close(emissions(net.eval(), seed), expected, atol=1e-5, rtol=0)
    assert torch.equal(emissions(model.net), base_emissions)
    assert loading.load(str(tmp_path / "whole")).preprocessing == adapted.preprocessing


def test_a_net_with_merged_lora_has_the_parameters_of_its_base(base, tmp_path):
    save_tiny_adapter(base, "lora", tmp_path / "medical")
    model = loading.load(str(base))
    merged = merge.merge_adapter(checkpoint.load_adapter(model, tmp_path / "medical")).net
    plain = loading.load(str(base)).net
    assert {name: value.shape for name, value in merged.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    classes = [[type(module).__name__ for module in net.modules()] for net in (merged, plain)]
    assert classes[0] == classes[1]
    assert not hasattr(merged, "peft_config")
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, plain.state_dict()[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense", "lm_head",
    }  # fmt: skip


def test_no_adapter_is_loaded_over_a_merged_model(base, tmp_path):
    """A model merged in memory still has the origin of its base, whose weights the adapter was trained over."""
    save_tiny_adapter(base, "lora", tmp_path / "medical")
    merged = merge.merge_adapter(checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical"))
    with atomic_checkpoint(merged, tmp_path / "whole"):
        pass
    with pytest.raises(ModelError, match="was trained over"):
        checkpoint.load_adapter(loading.load(str(tmp_path / "whole")), tmp_path / "medical")
    with pytest.raises(ModelError, match="merged"):
        checkpoint.load_adapter(merged, tmp_path / "medical")


def test_differences_of_emissions_are_measured(base):
    before, after = loading.load(str(base)), loading.load(str(base))
    clips = [clip(0, 8_000), clip(1, 8_000)]
    same = merge.compare_emissions(before, after, clips)
    assert (same.max_abs_diff, same.agreement) == (0.0, 1.0)
    with torch.no_grad():
        after.net.lm_head.bias[3] += 8.0
    found = merge.compare_emissions(before, after, clips)
    normal = [torch.from_numpy(audio.normalize(one)) for one in clips]
    ours, theirs = (model.net(torch.stack(normal)).logits.detach().log_softmax(-1) for model in (before, after))
    assert found.num_frames == same.num_frames == ours.shape[0] * ours.shape[1]
    assert found.max_abs_diff == pytest.approx(float((ours - theirs).abs().max()), abs=1e-5)
    assert found.agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert found.agreement < 1.0


def test_models_that_cannot_be_compared_are_rejected(base, tmp_path):
    model = loading.load(str(base))
    with pytest.raises(ModelError, match="no clip is long enough"):
        merge.compare_emissions(model, model, [])
    save_tiny_adapter(base, "lora", tmp_path / "medical", vocabulary=OTHER_VOCABULARY)
    with pytest.raises(ModelError, match="cannot be compared"):
        merge.compare_emissions(model, checkpoint.load_adapter(model, tmp_path / "medical"), [clip(0, 8_000)])


def test_checkpoints_are_written_atomically_and_overwrite_nothing(base, tmp_path):
    model = loading.load(str(base))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with (
        pytest.raises(DataError, match="already exists and is not empty"),
        atomic_checkpoint(model, tmp_path / "full"),
    ):
        pass
    with pytest.raises(RuntimeError, match="interrupted"), atomic_checkpoint(model, tmp_path / "new"):
        raise RuntimeError("interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    with atomic_checkpoint(model, tmp_path / "empty"):
        pass
    assert (tmp_path / "empty" / "model.safetensors").is_file()
