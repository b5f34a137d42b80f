"""One language of an MMS checkpoint: its vocabulary, adapters and head, as transformers loads them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC, Wav2Vec2Processor

import mowa
from mowa.adapters import bottleneck
from mowa.cli.main import main
from mowa.engines import onnx
from mowa.errors import MowaError, RecipeError
from mowa.exporters.manifest import loaded_model_sha256
from tests.checkpoints import clip, corpus, tiny
from tests.hub import running

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "|"]
LETTERS = {"eng": "abcdeloktmn", "pol": "aąbcćdeęlłokmnt", "ces": "aábcčdeělokmnt"}


@pytest.fixture(scope="module")
def mms(tmp_path_factory):
    """A tiny checkpoint with an adapter file per language, of which the Czech one is a pickle."""
    vocabularies = {
        lang: {token: index for index, token in enumerate([*SPECIAL, *letters])} for lang, letters in LETTERS.items()
    }
    sizes = {"adapter_attn_dim": 5, "vocab_size": len(vocabularies["eng"])}
    folder = tiny(tmp_path_factory.mktemp("hub") / "mms", **sizes)
    for number, (lang, vocabulary) in enumerate(vocabularies.items()):
        torch.manual_seed(number)
        net = Wav2Vec2ForCTC.from_pretrained(
            folder, vocab_size=len(vocabulary), ignore_mismatched_sizes=True, local_files_only=True
        )
        with torch.no_grad():
            for value in net._get_adapters().values():
                value.normal_(std=0.5)
        tensors = {name: value.detach().clone() for name, value in net._get_adapters().items()}
        if lang == "ces":
            torch.save(tensors, folder / "adapter.ces.bin")
        else:
            save_file(tensors, folder / f"adapter.{lang}.safetensors", metadata={"format": "pt"})
    (folder / "vocab.json").write_text(json.dumps(vocabularies))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), target_lang="eng").save_pretrained(folder)
    return folder


def logits(net):
    with torch.no_grad():
        return net(torch.from_numpy(clip(3, 24_000))[None]).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lang", ["pol", "ces", "eng"])
def test_a_language_equals_that_of_transformers(mms, lang):
    model = mowa.load(mms, target_lang=lang)
    theirs = Wav2Vec2ForCTC.from_pretrained(mms, target_lang=lang, ignore_mismatched_sizes=True).eval()
    processor = Wav2Vec2Processor.from_pretrained(mms, target_lang=lang)
    assert torch.equal(logits(model.net), logits(theirs))
    assert model.net.config.vocab_size == len(model.vocabulary) == len(SPECIAL) + len(LETTERS[lang])
    tokens = processor.tokenizer.convert_ids_to_tokens(list(range(len(model.vocabulary))))
    assert list(model.vocabulary.tokens) == tokens
    assert model.origin.target_lang == lang
    transcript = mowa.transcribe(clip(3, 24_000), model, sampling_rate=16_000, vad_threshold=0.0, dtype="float32")
    assert set(transcript.text) <= {*LETTERS[lang], " "}


def test_without_a_language_the_default_is_used_and_logged(mms, caplog):
    with caplog.at_level(logging.INFO, "mowa"):
        model = mowa.load(mms)
    assert "no target_lang was given, using the default of its tokenizer, eng" in caplog.text
    assert len(model.vocabulary) == len(SPECIAL) + len(LETTERS["eng"])


def test_a_language_that_it_does_not_have(mms, tmp_path):
    with pytest.raises(MowaError, match=r"has no language 'poll' among its 3: did you mean pol\?"):
        mowa.load(mms, target_lang="poll")
    with pytest.raises(MowaError, match="among its 3: for example ces, eng, pol"):
        mowa.load(mms, target_lang="xyz")
    with pytest.raises(MowaError, match=r"has no language adapters .*omit 'pol'"):
        mowa.load(tiny(tmp_path / "plain"), target_lang="pol")
    with pytest.raises(MowaError, match="has no language adapters"):
        mowa.load("pl-tiny", target_lang="pol")


def test_adapter_files_that_are_missing_or_do_not_fit(mms, tmp_path):
    import shutil

    folder = Path(shutil.copytree(mms, tmp_path / "mms"))
    tensors = load_file(folder / "adapter.pol.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "adapter.pol.safetensors")
    with pytest.raises(MowaError, match=r"adapter.pol.safetensors does not fit the checkpoint"):
        mowa.load(folder, target_lang="pol")
    (folder / "adapter.pol.safetensors").write_bytes(b"cut off")
    with pytest.raises(MowaError, match=r"adapter.pol.safetensors is damaged"):
        mowa.load(folder, target_lang="pol")
    (folder / "adapter.pol.safetensors").unlink()
    with pytest.raises(MowaError, match=r"has no adapter.pol.safetensors or adapter.pol.bin"):
        mowa.load(folder, target_lang="pol")


def test_only_the_adapter_of_the_language_is_downloaded(mms, tmp_path, monkeypatch):
    with running(tmp_path / "hf", monkeypatch) as hub:
        hub.publish("someone/mms", mms)
        with pytest.raises(MowaError, match="did you mean pol"):
            mowa.load("someone/mms", target_lang="poll")
        assert "model.safetensors" not in hub.downloads
        mowa.load("someone/mms", target_lang="pol")
        assert {name for name in hub.downloads if "adapter" in name} == {"adapter.pol.safetensors"}
        mowa.load("someone/mms", target_lang="ces")  # another one of a cached checkpoint
        hub.log.clear()
        mowa.load("someone/mms", target_lang="pol", offline=True)
        assert not hub.log


def test_a_bottleneck_starts_from_the_language_and_is_loaded_over_the_checkpoint(mms, tmp_path):
    data = corpus(tmp_path / "data", 24)
    options = {"data": data, "target_lang": "pol", "max_steps": 2, "learning_rate": 1e-6, "batch": {"seconds": 4.0}}
    run = mowa.train(model=mms, method="bottleneck", out=tmp_path / "tuned", **options)
    before, after = mowa.load(mms, target_lang="pol"), run.model
    assert after.vocabulary.tokens == before.vocabulary.tokens
    assert bottleneck.has(after.net)
    assert after.net.config.adapter_attn_dim == 5
    assert torch.allclose(logits(after.net), logits(before.net), atol=1e-2)
    assert not torch.equal(after.net.lm_head.weight, before.net.lm_head.weight)
    with pytest.raises(RecipeError, match="method: lora: the adapter would not record target_lang"):
        mowa.train(model=mms, method="lora", out=tmp_path / "lora", **options)


def test_the_commands_take_a_language(mms, tmp_path, capsys):
    import soundfile

    soundfile.write(tmp_path / "a.wav", clip(3, 24_000), 16_000)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code, *capsys.readouterr()

    options = ["--target-lang", "pol", "--dtype", "float32", "--vad-threshold", "0"]
    transcribed = run("transcribe", tmp_path / "a.wav", "--model", mms, *options)
    assert transcribed[0] == 0
    assert run("export", mms, "--to", "onnx", "-o", tmp_path / "onnx", "--target-lang", "pol")[0] == 0
    exported = run("transcribe", tmp_path / "a.wav", "--model", tmp_path / "onnx", *options[2:])
    assert exported[:2] == transcribed[:2]
    assert (
        "is an export and takes no target_lang"
        in run("transcribe", tmp_path / "a.wav", "--model", tmp_path / "onnx", *options)[2]
    )


def test_languages_have_onnx_exports_of_their_own(mms):
    models = [mowa.load(mms, target_lang=lang) for lang in ("pol", "ces", "pol")]
    same_letters = [replace(model, processor=models[0].processor) for model in models]
    paths = [onnx.cache_path(model, from_disk=True) for model in same_letters]
    assert (paths[0] == paths[2], paths[0] == paths[1]) == (True, False)
    assert loaded_model_sha256(models[0]) != loaded_model_sha256(models[1])
