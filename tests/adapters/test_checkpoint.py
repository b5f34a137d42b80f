"""An adapter's folder, read by mowa, by PEFT and by stock transformers; and several of them over one base."""

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
from mowa.types import Preprocessing, Vocabulary
from tests.adapters.made import OTHER, adapted, logits, saved
from tests.checkpoints import tiny

KINDS = ["lora", "adapters"]
PEFT_IS_LATE = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("words", [None, OTHER], ids=["same letters", "other letters"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_what_is_loaded(base, tmp_path, kind, words):
    ours = saved(base, kind, tmp_path / "medical", words=words, language="pl")
    model = loading.load(str(base))
    alone = logits(model.net)
    theirs = checkpoint.load_adapter(model, tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert theirs.vocabulary == ours.vocabulary
    assert theirs.preprocessing == ours.preprocessing
    assert theirs.origin.name == f"{model.origin.name}+medical"
    assert torch.equal(logits(model.net), alone)  # the base is as it was
    assert not any(parameter.requires_grad for parameter in theirs.net.parameters())
    assert not theirs.net.training


@PEFT_IS_LATE
@pytest.mark.parametrize("words", [None, OTHER], ids=["same letters", "other letters"])
def test_peft_reads_our_folder(base, tmp_path, words):
    ours = saved(base, "lora", tmp_path / "medical", words=words)
    size = {"vocab_size": len(ours.vocabulary), "ignore_mismatched_sizes": True} if words else {}
    stock = AutoModelForCTC.from_pretrained(base, **size)
    theirs = peft.PeftModel.from_pretrained(stock, str(tmp_path / "medical")).eval()
    torch.testing.assert_close(logits(theirs), logits(ours.net), atol=1e-6, rtol=1e-6)
    config = json.loads((tmp_path / "medical" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    assert config["base_model_name_or_path"] == str(base)


@PEFT_IS_LATE
def test_we_read_what_peft_saved(base, tmp_path):
    """PEFT's own file of the same adapter has the same names and numbers as ours."""
    ours = saved(base, "lora", tmp_path / "ours")
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


@pytest.mark.parametrize("words", [None, OTHER], ids=["same letters", "other letters"])
def test_transformers_loads_the_mms_file_by_its_language(base, tmp_path, words):
    ours = saved(base, "adapters", tmp_path / "medical", words=words, language="pl")
    theirs = Wav2Vec2ForCTC.from_pretrained(base, adapter_attn_dim=5).eval()
    theirs.config._name_or_path = str(tmp_path / "medical")
    theirs.load_adapter("pl")
    assert torch.equal(logits(theirs), logits(ours.net))
    shutil.copytree(base, tmp_path / "mms")
    shutil.copy(tmp_path / "medical" / "adapter.pl.safetensors", tmp_path / "mms")
    if not words:
        theirs = Wav2Vec2ForCTC.from_pretrained(tmp_path / "mms", adapter_attn_dim=5, target_lang="pl").eval()
        assert torch.equal(logits(theirs), logits(ours.net))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_files_beside(base, tmp_path, kind):
    saved(base, kind, tmp_path / "cyrillic", words=OTHER)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "cyrillic")
    assert tokenizer.decode([5, 5, 0, 5, 4, 6, 0]) == "аа б"
    assert tokenizer("аб в").input_ids == [5, 6, 4, 7]
    sound = AutoFeatureExtractor.from_pretrained(tmp_path / "cyrillic")
    assert (sound.sampling_rate, sound.do_normalize, sound.return_attention_mask) == (16_000, True, True)


def test_it_is_small_and_says_what_it_is(base, tmp_path):
    ours = saved(base, "lora", tmp_path / "medical", language="pl")
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
    assert len({file.stat().st_mode for file in (tmp_path / "medical").iterdir()}) == 1  # whoever reads one reads all


def test_a_bundled_base_is_known_by_its_name(tmp_path):
    model = adapted("pl-tiny", "lora")
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    checkpoint.save_adapter(model.net, tmp_path / "court", adapter_type="lora", base=model.origin, **settings)
    assert checkpoint.read_adapter(tmp_path / "court").base.load_name == "pl-tiny"
    theirs = checkpoint.load_adapter(loading.load("pl-tiny"), tmp_path / "court")
    assert torch.equal(logits(theirs.net, samples=16_000), logits(model.net, samples=16_000))
    assert (tmp_path / "court" / "adapter_model.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_refused_in_one_line(base, tmp_path, kind):
    saved(base, kind, tmp_path / "medical")
    same = shutil.copytree(base, tmp_path / "elsewhere")  # the same weights in another place are the same base
    assert checkpoint.load_adapter(loading.load(str(same)), tmp_path / "medical")
    for name, changes in {
        "narrow": {"hidden_size": 16, "num_attention_heads": 1},
        "deep": {"num_hidden_layers": 3},
    }.items():
        other = tiny(tmp_path / name, **changes)
        with pytest.raises(ModelError, match=f"wants {base}.*as its base") as refused:
            checkpoint.load_adapter(loading.load(str(other)), tmp_path / "medical")
        assert "\n" not in str(refused.value)
    weights = load_file(same / "model.safetensors")
    weights["wav2vec2.encoder.layer_norm.bias"][0] += 1e-3  # further trained: same shapes, other numbers
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is another"):
        checkpoint.load_adapter(loading.load(str(same)), tmp_path / "medical")


def test_shards_have_a_fingerprint(base, tmp_path):
    model = loading.load(str(base))
    model.net.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    assert checkpoint.hash_weights(tmp_path / "sharded") != checkpoint.hash_weights(base)
    with pytest.raises(ModelError, match="has no weights"):
        checkpoint.hash_weights(tmp_path)


@pytest.mark.parametrize("below", KINDS)
@pytest.mark.parametrize("above", KINDS)
def test_an_adapter_cannot_stand_on_another(base, tmp_path, below, above):
    saved(base, below, tmp_path / "below")
    saved(base, above, tmp_path / "above")
    model = checkpoint.load_adapter(loading.load(str(base)), tmp_path / "below")
    with pytest.raises(ModelError, match="cannot stand on the adapter"):
        checkpoint.load_adapter(model, tmp_path / "above")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed(base, tmp_path, kind):
    saved(base, kind, tmp_path / "medical")
    model = loading.load(str(base))
    file = tmp_path / "medical" / checkpoint.read_adapter(tmp_path / "medical").weights_file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match="checksum"):
        checkpoint.load_adapter(model, tmp_path / "medical")
    file.unlink()
    with pytest.raises(ModelError, match="lacks its weights"):
        checkpoint.load_adapter(model, tmp_path / "medical")
    with pytest.raises(ModelError, match="holds no adapter"):
        checkpoint.load_adapter(model, base)
    with pytest.raises(ModelError, match="is no folder"):
        checkpoint.load_adapter(model, tmp_path / "lost")
    note = json.loads((tmp_path / "medical" / "mowa.json").read_text())
    (tmp_path / "medical" / "mowa.json").write_text(json.dumps(note | {"format": 99}))
    with pytest.raises(ModelError, match="update mowa"):
        checkpoint.read_adapter(tmp_path / "medical")
    (tmp_path / "medical" / "mowa.json").write_text(json.dumps({k: v for k, v in note.items() if k != "vocabulary"}))
    with pytest.raises(ModelError, match="do not say 'vocabulary'"):
        checkpoint.read_adapter(tmp_path / "medical")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_lack_a_part_are_refused(base, tmp_path, kind):
    saved(base, kind, tmp_path / "medical")
    found = checkpoint.read_adapter(tmp_path / "medical")
    file, note = tmp_path / "medical" / found.weights_file, tmp_path / "medical" / "mowa.json"
    weights = load_file(file)
    del weights[next(name for name in weights if "lora_B" in name or "linear_2" in name)]
    save_file(weights, file)
    known = json.loads(note.read_text())
    known["weights"]["sha256"] = checkpoint.sha256_file(file)
    note.write_text(json.dumps(known))
    with pytest.raises(ModelError, match="does not fit"):
        checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical")


def test_a_broken_off_writing_leaves_no_adapter_and_a_whole_one_replaces_it(base, tmp_path, monkeypatch):
    saved(base, "lora", tmp_path / "medical", seed=1)
    (tmp_path / "medical" / "report.json").write_text("{}")
    replaced, real = [], checkpoint.os.replace

    def broken(source, target):
        if len(replaced) == 2:
            raise OSError("no more")
        replaced.append(target)
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", broken)
    with pytest.raises(OSError, match="no more"):
        saved(base, "lora", tmp_path / "medical", seed=2)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="holds no adapter"):
        checkpoint.read_adapter(tmp_path / "medical")
    ours = saved(base, "lora", tmp_path / "medical", seed=2)
    theirs = checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert (tmp_path / "medical" / "report.json").exists()


def test_several_share_the_weights_of_one_base(base, tmp_path):
    kinds = {"a": ("lora", None), "b": ("lora", OTHER), "c": ("adapters", OTHER)}
    ours = {
        name: saved(base, kind, tmp_path / name, seed=index, words=words)
        for index, (name, (kind, words)) in enumerate(kinds.items())
    }
    model = loading.load(str(base))
    model.net.lm_head.weight.requires_grad_(True)  # somebody's affair, not the adapters'
    alone = logits(model.net)
    theirs = {name: checkpoint.load_adapter(model, tmp_path / name) for name in kinds}
    assert [name for name, p in model.net.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    own = {id(parameter): name for name, parameter in model.net.named_parameters()}
    for name, one in theirs.items():
        shared = {own[id(parameter)] for parameter in one.net.parameters() if id(parameter) in own}
        assert shared == {name for name in own.values() if not name.startswith("lm_head.")}
        assert torch.equal(logits(one.net), logits(ours[name].net))
    assert torch.equal(logits(model.net), alone)
    assert (model.net.config.vocab_size, model.net.config.adapter_attn_dim) == (len(model.vocabulary), None)


def test_several_threads_may_ask_at_once(base, tmp_path):
    models = {}
    for index, kind in enumerate(KINDS * 2):
        saved(base, kind, tmp_path / str(index), seed=index)
    model = loading.load(str(base))
    models = [checkpoint.load_adapter(model, tmp_path / str(index)) for index in range(4)] + [model]
    expected = [[logits(one.net, seed) for seed in range(3)] for one in models]
    wrong = []

    def ask(which):
        for turn in range(12):
            seed = turn % 3
            if not torch.equal(logits(models[which].net, seed), expected[which][seed]):
                wrong.append((which, turn))

    threads = [threading.Thread(target=ask, args=(which,)) for which in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_adapter_takes_the_base_s_precision(base, tmp_path):
    saved(base, "lora", tmp_path / "a")
    saved(base, "adapters", tmp_path / "b")
    model = loading.load(str(base), dtype="bfloat16")
    for name in "ab":
        net = checkpoint.load_adapter(model, tmp_path / name).net
        assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
        values = torch.zeros(1, 4_000, dtype=torch.bfloat16)
        with torch.no_grad():
            assert net(values).logits.dtype == torch.bfloat16


def test_odd_vocabularies_come_back_whole(base, tmp_path):
    model = adapted(base, "lora")
    tokens = ("[UNK]", "a", "[PAD]", "'", "[CLS]", "<odd>", *"bcdefghij")
    words = Vocabulary(tokens, blank=2, delimiter=None, specials=frozenset({0, 4, 5}))
    sound = Preprocessing(rate_hz=8_000, normalize=False, attention_mask=False, padding_value=0.5)
    settings = {"vocabulary": words, "preprocessing": sound, "metrics": {}}
    checkpoint.save_adapter(model.net, tmp_path / "odd", adapter_type="lora", base=model.origin, **settings)
    found = checkpoint.read_adapter(tmp_path / "odd")
    assert (found.vocabulary, found.preprocessing) == (words, sound)
    shutil.copy(base / "config.json", tmp_path / "odd")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"pad_token_id": 2}))
    assert loading.read_vocabulary(tmp_path / "odd", len(words)) == words  # what a merged checkpoint would say
    assert loading.read_preprocessing(tmp_path / "odd") == sound


def test_only_what_the_net_has_is_saved(base, tmp_path):
    model = loading.load(str(base))
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    for kind in KINDS:
        with pytest.raises(ModelError, match="to save"):
            checkpoint.save_adapter(model.net, tmp_path / kind, adapter_type=kind, base=model.origin, **settings)
        assert not list((tmp_path / kind).iterdir())


@pytest.mark.parametrize(
    ("family", "norm"), [("hubert", "layer"), ("hubert", "group"), ("wavlm", "layer"), ("wav2vec2", "group")]
)
def test_every_family_keeps_its_updates(family, norm, tmp_path):
    base = tiny(tmp_path / "base", family, norm)
    ours = saved(base, "lora", tmp_path / "medical")
    theirs = checkpoint.load_adapter(loading.load(str(base)), tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert not torch.allclose(logits(theirs.net), logits(loading.load(str(base)).net), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_with_adapters_of_its_own_keeps_them(tmp_path, kind):
    base = tiny(tmp_path / "mms", adapter_attn_dim=5)
    ours = saved(base, kind, tmp_path / "medical")
    model = loading.load(str(base))
    alone = logits(model.net)
    theirs = checkpoint.load_adapter(model, tmp_path / "medical")
    assert torch.equal(logits(theirs.net), logits(ours.net))
    assert torch.equal(logits(model.net), alone)


def test_a_hub_base_is_known_by_its_commit(base, tmp_path):
    """A commit is enough: its weights may have been fetched in another format."""
    hub = {"name": "polish", "source": "owner/polish", "revision": "a" * 40}
    model = adapted(base, "lora")
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
    with pytest.raises(ModelError, match="wants owner/polish@aaaa"):
        checkpoint.load_adapter(newer, tmp_path / "court")
