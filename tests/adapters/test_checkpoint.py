"""Adapters on disk, read by mowa, PEFT and transformers, and several of them over one base model."""

import json
import shutil
import threading
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModelForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

from mowa import loading
from mowa.adapters import checkpoint
from mowa.errors import ModelError
from mowa.io import atomic
from mowa.io.hashing import hash_weights, sha256_file
from mowa.io.processor import read_preprocessing, read_vocabulary
from mowa.types import Preprocessing, Vocabulary
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, logits, save_tiny_adapter, tiny_adapter_model
from tests.checkpoints import tiny

KINDS = ["lora", "bottleneck"]
PEFT_WARNING = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("vocabulary", [None, OTHER_VOCABULARY], ids=["same vocabulary", "other vocabulary"])
@pytest.mark.parametrize("adapter_type", KINDS)
def test_a_loaded_adapter_equals_the_saved_one(base, tmp_path, adapter_type, vocabulary):
    ours = save_tiny_adapter(base, adapter_type, tmp_path / "medical", vocabulary=vocabulary, language="pl")
    model = loading.load(str(base))
    base_logits = logits(model.net)
    theirs = checkpoint.load_adapter(model, tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert theirs.vocabulary == ours.vocabulary
    assert theirs.preprocessing == ours.preprocessing
    assert theirs.origin.name == f"{model.origin.name}+medical"
    assert torch.equal(logits(model.net), base_logits)
    assert not any(parameter.requires_grad for parameter in theirs.net.parameters())
    assert not theirs.net.training


@PEFT_WARNING
@pytest.mark.parametrize("vocabulary", [None, OTHER_VOCABULARY], ids=["same vocabulary", "other vocabulary"])
def test_peft_reads_the_folder(base, tmp_path, vocabulary):
    ours = save_tiny_adapter(base, "lora", tmp_path / "medical", vocabulary=vocabulary)
    options = {"vocab_size": len(ours.vocabulary), "ignore_mismatched_sizes": True} if vocabulary else {}
    stock = AutoModelForCTC.from_pretrained(base, **options)
    theirs = peft.PeftModel.from_pretrained(stock, str(tmp_path / "medical")).eval()
    torch.testing.assert_close(logits(theirs), logits(ours.net), atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "medical" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    assert config["base_model_name_or_path"] == str(base)


@PEFT_WARNING
def test_adapters_saved_by_peft_are_read(base, tmp_path):
    """PEFT's own file of the same adapter has the same tensors."""
    ours = save_tiny_adapter(base, "lora", tmp_path / "ours")
    stock = AutoModelForCTC.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(stock, str(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    shutil.copy(tmp_path / "theirs" / "adapter_config.json", tmp_path / "ours" / "adapter_config.json")
    assert torch.equal(
        logits(checkpoint.load_adapter(loading.load(str(base)), tmp_path / "ours").net), logits(ours.net)
    )


@pytest.mark.parametrize("vocabulary", [None, OTHER_VOCABULARY], ids=["same vocabulary", "other vocabulary"])
def test_transformers_loads_the_mms_file_by_its_language(base, tmp_path, vocabulary):
    ours = save_tiny_adapter(base, "bottleneck", tmp_path / "medical", vocabulary=vocabulary, language="pl")
    theirs = Wav2Vec2ForCTC.from_pretrained(base, adapter_attn_dim=5).eval()
    theirs.config._name_or_path = str(tmp_path / "medical")
    theirs.load_adapter("pl")
    assert torch.equal(logits(theirs), logits(ours.net))
    shutil.copytree(base, tmp_path / "mms")
    shutil.copy(tmp_path / "medical" / "adapter.pl.safetensors", tmp_path / "mms")
    if not vocabulary:
        theirs = Wav2Vec2ForCTC.from_pretrained(tmp_path / "mms", adapter_attn_dim=5, target_lang="pl").eval()
        assert torch.equal(logits(theirs), logits(ours.net))


@pytest.mark.parametrize("adapter_type", KINDS)
def test_transformers_reads_vocabulary_and_audio_settings(base, tmp_path, adapter_type):
    save_tiny_adapter(base, adapter_type, tmp_path / "cyrillic", vocabulary=OTHER_VOCABULARY)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "cyrillic")
    assert tokenizer.decode([5, 5, 0, 5, 4, 6, 0]) == "аа б"
    assert tokenizer("аб в").input_ids == [5, 6, 4, 7]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "cyrillic")
    assert (extractor.sampling_rate, extractor.do_normalize, extractor.return_attention_mask) == (16_000, True, True)


def test_the_manifest_describes_the_adapter(base, tmp_path):
    ours = save_tiny_adapter(base, "lora", tmp_path / "medical", language="pl")
    found = checkpoint.read_adapter(tmp_path / "medical")
    assert (found.adapter_type, found.language, found.base.load_name) == ("lora", "pl", str(base))
    assert found.metrics["dev"]["wer"] == 0.25
    assert {"torch", "peft"} <= found.package_versions.keys()
    weights = load_file(tmp_path / "medical" / "adapter_model.safetensors")
    assert found.parameters == sum(value.numel() for value in weights.values())
    frozen = {name for name, _ in loading.load(str(base)).net.named_parameters() if "lm_head" not in name}
    assert not {name.removeprefix(checkpoint.PEFT_PREFIX) for name in weights} & frozen
    assert sum(p.numel() for name, p in ours.net.named_parameters() if ".lora_" in name) < found.parameters
    assert not list((tmp_path / "medical").glob(".*"))
    assert (
        len({file.stat().st_mode for file in (tmp_path / "medical").iterdir()}) == 1
    )  # all files are readable by the same users


def test_a_bundled_base_is_referred_to_by_its_alias(tmp_path):
    model = tiny_adapter_model("pl-tiny", "lora")
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    checkpoint.save_adapter(model.net, tmp_path / "court", adapter_type="lora", base=model.origin, **settings)
    assert checkpoint.read_adapter(tmp_path / "court").base.load_name == "pl-tiny"
    theirs = checkpoint.load_adapter(loading.load("pl-tiny"), tmp_path / "court")
    assert torch.equal(logits(theirs.net, samples=16_000), logits(model.net, samples=16_000))
    assert (tmp_path / "court" / "adapter_model.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize("adapter_type", KINDS)
def test_another_base_is_rejected(base, tmp_path, adapter_type):
    save_tiny_adapter(base, adapter_type, tmp_path / "medical")
    same = shutil.copytree(base, tmp_path / "elsewhere")  # the same weights in another folder
    assert checkpoint.load_adapter(loading.load(str(same)), tmp_path / "medical")
    for name, changes in {
        "small": {"hidden_size": 16, "num_attention_heads": 1},
        "deep": {"num_hidden_layers": 3},
    }.items():
        other = tiny(tmp_path / name, **changes)
        with pytest.raises(ModelError, match=f"was trained over {base} .*, not over") as raised:
            checkpoint.load_adapter(loading.load(str(other)), tmp_path / "medical")
        assert "\n" not in str(raised.value)
    weights = load_file(same / "model.safetensors")
    weights["wav2vec2.encoder.layer_norm.bias"][0] += 1e-3  # same shapes, other values
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="was trained over"):
        checkpoint.load_adapter(loading.load(str(same)), tmp_path / "medical")


def test_shards_have_a_checksum(base, tmp_path):
    model = loading.load(str(base))
    model.net.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert hash_weights(tmp_path / "sharded") != hash_weights(base)
    with pytest.raises(ModelError, match="has no weights"):
        hash_weights(tmp_path)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_an_adapter_cannot_be_loaded_over_another(base, tmp_path, first, second):
    save_tiny_adapter(base, first, tmp_path / "first")
    save_tiny_adapter(base, second, tmp_path / "second")
    model = checkpoint.load_adapter(loading.load(str(base)), tmp_path / "first")
    with pytest.raises(ModelError, match="cannot be loaded over the adapter"):
        checkpoint.load_adapter(model, tmp_path / "second")


@pytest.mark.parametrize("adapter_type", KINDS)
def test_damaged_folders_are_rejected(base, tmp_path, adapter_type):
    save_tiny_adapter(base, adapter_type, tmp_path / "medical")
    model = loading.load(str(base))
    file = tmp_path / "medical" / checkpoint.read_adapter(tmp_path / "medical").weights_file
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match="is missing or damaged: train the adapter again"):
        checkpoint.load_adapter(model, tmp_path / "medical")
    file.unlink()
    with pytest.raises(ModelError, match="is missing or damaged: train the adapter again"):
        checkpoint.load_adapter(model, tmp_path / "medical")
    with pytest.raises(ModelError, match="holds no adapter"):
        checkpoint.load_adapter(model, base)
    with pytest.raises(ModelError, match="is not a folder"):
        checkpoint.load_adapter(model, tmp_path / "lost")
    file = tmp_path / "medical" / "mowa.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ModelError, match="update mowa"):
        checkpoint.read_adapter(tmp_path / "medical")
    file.write_text(json.dumps(manifest | {"format": 1, "format_version": None}))
    with pytest.raises(ModelError, match=r"older version of mowa .*: train the adapter again"):
        checkpoint.read_adapter(tmp_path / "medical")
    file.write_text(json.dumps({key: value for key, value in manifest.items() if key != "vocabulary"}))
    with pytest.raises(ModelError, match=r"is damaged \('vocabulary' is missing\)"):
        checkpoint.read_adapter(tmp_path / "medical")


@pytest.mark.parametrize("adapter_type", KINDS)
def test_incomplete_weights_are_rejected(base, tmp_path, adapter_type):
    save_tiny_adapter(base, adapter_type, tmp_path / "medical")
    found = checkpoint.read_adapter(tmp_path / "medical")
    file, manifest_file = tmp_path / "medical" / found.weights_file, tmp_path / "medical" / "mowa.json"
    weights = load_file(file)
    del weights[next(name for name in weights if "lora_B" in name or "linear_2" in name)]
    save_file(weights, file)
    manifest = json.loads(manifest_file.read_text())
    manifest["files"][file.name] = sha256_file(file)
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="does not fit"):
        checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical")


def test_an_interrupted_write_leaves_no_adapter_and_can_be_repeated(base, tmp_path, monkeypatch):
    save_tiny_adapter(base, "lora", tmp_path / "medical", seed=1)
    (tmp_path / "medical" / "report.json").write_text("{}")
    replaced, replace_file = [], atomic.os.replace

    def interrupted(source, target):
        if len(replaced) == 2:
            raise OSError("interrupted")
        replaced.append(target)
        replace_file(source, target)

    monkeypatch.setattr(atomic.os, "replace", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        save_tiny_adapter(base, "lora", tmp_path / "medical", seed=2)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="holds no adapter"):
        checkpoint.read_adapter(tmp_path / "medical")
    ours = save_tiny_adapter(base, "lora", tmp_path / "medical", seed=2)
    theirs = checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert (tmp_path / "medical" / "report.json").exists()


def test_several_adapters_share_the_weights_of_one_base(base, tmp_path):
    kinds = {"a": ("lora", None), "b": ("lora", OTHER_VOCABULARY), "c": ("bottleneck", OTHER_VOCABULARY)}
    ours = {
        name: save_tiny_adapter(base, adapter_type, tmp_path / name, seed=index, vocabulary=vocabulary)
        for index, (name, (adapter_type, vocabulary)) in enumerate(kinds.items())
    }
    model = loading.load(str(base))
    model.net.lm_head.weight.requires_grad_(True)  # must stay as it is
    base_logits = logits(model.net)
    theirs = {name: checkpoint.load_adapter(model, tmp_path / name) for name in kinds}
    assert [name for name, p in model.net.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    base_names = {id(parameter): name for name, parameter in model.net.named_parameters()}
    for name, one in theirs.items():
        shared = {base_names[id(parameter)] for parameter in one.net.parameters() if id(parameter) in base_names}
        assert shared == {name for name in base_names.values() if not name.startswith("lm_head.")}
        assert torch.equal(logits(one.net), logits(ours[name].net))
    assert torch.equal(logits(model.net), base_logits)
    assert (model.net.config.vocab_size, model.net.config.adapter_attn_dim) == (len(model.vocabulary), None)


def test_adapters_are_used_by_several_threads(base, tmp_path):
    models = {}
    for index, adapter_type in enumerate(KINDS * 2):
        save_tiny_adapter(base, adapter_type, tmp_path / str(index), seed=index)
    model = loading.load(str(base))
    models = [checkpoint.load_adapter(model, tmp_path / str(index)) for index in range(4)] + [model]
    expected = [[logits(one.net, seed) for seed in range(3)] for one in models]
    failures, cores = [], torch.get_num_threads()

    def run(index):
        torch.set_num_threads(cores)  # which each thread has for itself, and earlier tests may have set here
        for round_ in range(12):
            seed = round_ % 3
            if not torch.equal(logits(models[index].net, seed), expected[index][seed]):
                failures.append((index, round_))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_adapter_has_the_dtype_of_the_base(base, tmp_path):
    save_tiny_adapter(base, "lora", tmp_path / "a")
    save_tiny_adapter(base, "bottleneck", tmp_path / "b")
    model = loading.load(str(base), dtype="bfloat16")
    for name in "ab":
        net = checkpoint.load_adapter(model, tmp_path / name).net
        assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
        values = torch.zeros(1, 4_000, dtype=torch.bfloat16)
        with torch.no_grad():
            assert net(values).logits.dtype == torch.bfloat16


def test_unusual_vocabularies_are_restored(base, tmp_path):
    model = tiny_adapter_model(base, "lora")
    tokens = ("[UNK]", "a", "[PAD]", "'", "[CLS]", "<odd>", *"bcdefghij")
    vocabulary = Vocabulary(tokens, blank=2, delimiter=None, specials=frozenset({0, 4, 5}))
    preprocessing = Preprocessing(rate_hz=8_000, normalize=False, attention_mask=False, padding_value=0.5)
    settings = {"vocabulary": vocabulary, "preprocessing": preprocessing, "metrics": {}}
    checkpoint.save_adapter(model.net, tmp_path / "odd", adapter_type="lora", base=model.origin, **settings)
    found = checkpoint.read_adapter(tmp_path / "odd")
    assert (found.vocabulary, found.preprocessing) == (vocabulary, preprocessing)
    shutil.copy(base / "config.json", tmp_path / "odd")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"pad_token_id": 2}))
    assert read_vocabulary(tmp_path / "odd", len(vocabulary)) == vocabulary  # as of a merged checkpoint
    assert read_preprocessing(tmp_path / "odd") == preprocessing


def test_a_net_without_an_adapter_cannot_be_saved(base, tmp_path):
    model = loading.load(str(base))
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    settings["base"] = model.origin
    for adapter_type in KINDS:
        with pytest.raises(ModelError, match="to save"):
            checkpoint.save_adapter(model.net, tmp_path / adapter_type, adapter_type=adapter_type, **settings)
        assert not list((tmp_path / adapter_type).iterdir())


@pytest.mark.parametrize(
    ("family", "norm"), [("hubert", "layer"), ("hubert", "group"), ("wavlm", "layer"), ("wav2vec2", "group")]
)
def test_adapters_of_every_family(family, norm, tmp_path):
    base = tiny(tmp_path / "base", family, norm)
    ours = save_tiny_adapter(base, "lora", tmp_path / "medical")
    theirs = checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))


@pytest.mark.parametrize("adapter_type", KINDS)
def test_a_base_with_its_own_adapters_does_not_change(tmp_path, adapter_type):
    base = tiny(tmp_path / "mms", adapter_attn_dim=5)
    ours = save_tiny_adapter(base, adapter_type, tmp_path / "medical")
    model = loading.load(str(base))
    base_logits = logits(model.net)
    theirs = checkpoint.load_adapter(model, tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert torch.equal(logits(model.net), base_logits)


def test_a_hub_base_is_identified_by_its_commit(base, tmp_path):
    """Its weights may have been downloaded in another format, with another checksum."""
    hub = {"name": "polish", "source": "owner/polish", "revision": "a" * 40}
    model = tiny_adapter_model(base, "lora")
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    checkpoint.save_adapter(
        model.net, tmp_path / "court", adapter_type="lora", base=replace(model.origin, **hub), **settings
    )
    assert checkpoint.read_adapter(tmp_path / "court").base.load_name == f"owner/polish@{'a' * 40}"
    config = json.loads((tmp_path / "court" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/polish", "a" * 40)
    plain = loading.load(str(base))
    elsewhere = replace(plain, origin=replace(plain.origin, **hub, folder=tmp_path / "other-format"))
    assert torch.equal(logits(checkpoint.load_adapter(elsewhere, tmp_path / "court").net), logits(model.net))
    (tmp_path / "newer").mkdir()
    shutil.copy(tiny(tmp_path / "other", num_hidden_layers=1) / "model.safetensors", tmp_path / "newer")
    newer = replace(plain, origin=replace(plain.origin, **hub | {"revision": "b" * 40}, folder=tmp_path / "newer"))
    with pytest.raises(ModelError, match="was trained over owner/polish@aaaa"):
        checkpoint.load_adapter(newer, tmp_path / "court")
