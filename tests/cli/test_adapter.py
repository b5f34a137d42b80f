"""`mowa adapter` and `mowa transcribe --adapter` of speech models."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCTC

import mowa
from mowa.adapters import checkpoint, lora, merge
from mowa.cli.main import main
from mowa.tasks.metrics import error_rates
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, logits, save_tiny_adapter
from tests.checkpoints import clip, tiny

ASSETS = Path(mowa.__file__).parent / "assets"
SAMPLE, PL_TINY = ASSETS / "sample.flac", ASSETS / "pl-tiny"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_merge_writes_a_checkpoint_that_transformers_loads(run, base, tmp_path, kind):
    ours = save_tiny_adapter(base, kind, tmp_path / "medical")
    soundfile.write(tmp_path / "a.wav", clip(0, 300_000), 16_000)
    code, out, err = run(
        "adapter", "merge", tmp_path / "medical", "-o", tmp_path / "whole", "--audio", tmp_path / "a.wav"
    )
    assert (code, err) == (0, "")
    head, merged, alone, path = out.splitlines()
    assert head.split() == ["compared", "max", "abs", "diff", "KL", "agreement", "positions"]
    assert merged.startswith("base + adapter → merged")
    assert float(merged.split()[-4]) < 1e-5
    assert merged.split()[-2:] == ["100.00%", "936"]
    assert float(alone.split()[-4]) > 1e-2
    assert path == str(tmp_path / "whole")
    stock = AutoModelForCTC.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(stock), logits(ours.net), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def court(tmp_path_factory):
    """An untrained adapter of the bundled model."""
    folder = tmp_path_factory.mktemp("adapters") / "court"
    model = mowa.load("pl-tiny")
    lora.add(model.net, model.family, rank=4, alpha=8, target_modules=("attention", "mlp"))
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    return checkpoint.save_adapter(model.net, folder, adapter_type="lora", base=model.origin, **settings)


def test_the_bundled_base_model_is_found_by_name(run, court):
    code, out, _ = run("transcribe", SAMPLE, "--dtype", "float32", "--vad-threshold", "0", "--adapter", court)
    assert code == 0
    assert error_rates([json.loads(SAMPLE.with_suffix(".json").read_text())["text"]], [out.strip()])["cer"] < 0.15


def test_the_bundled_base_model_is_merged(run, court, tmp_path):
    soundfile.write(tmp_path / "a.wav", clip(0, 16_000), 16_000)
    code, out, err = run("adapter", "merge", court, "-o", tmp_path / "whole", "--audio", tmp_path / "a.wav")
    assert (code, err) == (0, "")
    assert out.count("100.00%") == 2
    weights, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", PL_TINY))
    assert weights.keys() == base.keys()
    assert all(torch.equal(value, base[name].float()) for name, value in weights.items())


def test_a_merge_that_differs_is_not_written(run, base, tmp_path, monkeypatch):
    def wrong(model):
        merged = real(model)
        merged.net.lm_head.bias = torch.nn.Parameter(merged.net.lm_head.bias.flip(0))
        return merged

    real = merge.merge_adapter
    monkeypatch.setattr(merge, "merge_adapter", wrong)
    save_tiny_adapter(base, "lora", tmp_path / "medical")
    code, out, err = run("adapter", "merge", tmp_path / "medical", "-o", tmp_path / "whole")
    assert code == 2
    assert out.startswith("compared")
    assert err.startswith("mowa: the merged checkpoint differs from base model plus")
    assert err.endswith("whole was not written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["medical"]


def test_merge_names_the_base_model_it_needs(run, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    save_tiny_adapter(moved, "bottleneck", tmp_path / "medical")
    shutil.rmtree(moved)
    code, _, err = run("adapter", "merge", tmp_path / "medical", "-o", tmp_path / "whole")
    assert (code, err.count("\n")) == (2, 1)
    assert str(moved) in err
    code, _, err = run("adapter", "merge", tmp_path / "medical", "-o", tmp_path / "whole", "--base-model", base)
    assert (code, err) == (0, "")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.bias"] += 1
    other = shutil.copytree(base, tmp_path / "other")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("adapter", "merge", tmp_path / "medical", "-o", tmp_path / "again", "--base-model", other)
    assert (code, err.count("\n")) == (2, 1)
    assert f"was trained over {moved}" in err


def test_show(run, base, tmp_path):
    save_tiny_adapter(base, "bottleneck", tmp_path / "cyrillic", vocabulary=OTHER_VOCABULARY, language="ru")
    code, out, _ = run("adapter", "show", tmp_path / "cyrillic")
    assert code == 0
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert rows["type"].strip() == "bottleneck adapters (MMS)"
    assert rows["base model"].strip() == str(base)
    assert rows["language"].strip() == "ru"
    assert rows["characters"].strip() == "8: абвгдежз"
    assert rows["dev"].strip() == "WER 25.0%, CER 12.5%"
    assert rows["file"].strip().startswith("adapter.ru.safetensors, ")
    assert run("adapter", "show", base) == (
        2,
        "",
        f"mowa: {base} holds no adapter: use a folder with a mowa.json that `mowa train` wrote\n",
    )


def test_transcribe_with_an_adapter(run, base, tmp_path):
    save_tiny_adapter(base, "lora", tmp_path / "cyrillic", vocabulary=OTHER_VOCABULARY)
    soundfile.write(tmp_path / "a.wav", clip(0, 20_000), 16_000)
    settings = ["--vad-threshold", "0", "--dtype", "float32", "--format", "json"]
    transcripts = [
        json.loads(run("transcribe", tmp_path / "a.wav", "--adapter", tmp_path / "cyrillic", *settings, *more)[1])
        for more in ([], ["--model", str(base)])
    ]
    assert transcripts[0]["text"] == transcripts[1]["text"]
    assert set(transcripts[0]["text"]) <= set("абвгдежз ")
    assert transcripts[0]["model"].endswith("+cyrillic")
    code, out, err = run("transcribe", tmp_path / "a.wav", "--adapter", tmp_path / "cyrillic", "--model", "pl-tiny")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"was trained over {base}" in err
    code, _, err = run("transcribe", tmp_path / "a.wav", "--adapter", tmp_path / "lost")
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a folder" in err
