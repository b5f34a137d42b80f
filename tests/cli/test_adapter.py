"""`mowa adapt` and `mowa transcribe --adapter` as a user meets them."""

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
from tests.adapters.made import OTHER, logits, saved
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


@pytest.mark.parametrize("kind", ["lora", "adapters"])
def test_merge_writes_what_transformers_loads(run, base, tmp_path, kind):
    ours = saved(base, kind, tmp_path / "medical")
    soundfile.write(tmp_path / "a.wav", clip(0, 300_000), 16_000)
    code, out, err = run(
        "adapt", "merge", tmp_path / "medical", "-o", tmp_path / "whole", "--audio", tmp_path / "a.wav"
    )
    assert (code, err) == (0, "")
    head, merged, alone, path = out.splitlines()
    assert head.split() == ["emissions", "largest", "difference", "same", "output", "frames"]
    assert merged.startswith("base with adapter → merged")
    assert float(merged.split()[-3]) < 1e-5
    assert merged.split()[-2:] == ["100.00%", "936"]
    assert float(alone.split()[-3]) > 1e-2
    assert path == str(tmp_path / "whole")
    stock = AutoModelForCTC.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(stock), logits(ours.net), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def court(tmp_path_factory):
    """An adapter of the bundled model that has learnt nothing yet."""
    folder = tmp_path_factory.mktemp("adapters") / "court"
    model = mowa.load("pl-tiny")
    lora.add(model.net, model.family, rank=4, alpha=8, target_modules=("attention", "mlp"))
    settings = {"vocabulary": model.vocabulary, "preprocessing": model.preprocessing, "metrics": {}}
    return checkpoint.save_adapter(model.net, folder, adapter_type="lora", base=model.origin, **settings)


def test_the_bundled_base_is_found_by_name_and_understands_its_sample(run, court):
    code, out, _ = run("transcribe", SAMPLE, "--dtype", "float32", "--speech", "0", "--adapter", court)
    assert code == 0
    assert error_rates([json.loads(SAMPLE.with_suffix(".json").read_text())["said"]], [out.strip()])["cer"] < 0.15


def test_the_bundled_base_is_merged(run, court, tmp_path):
    soundfile.write(tmp_path / "a.wav", clip(0, 16_000), 16_000)
    code, out, err = run("adapt", "merge", court, "-o", tmp_path / "whole", "--audio", tmp_path / "a.wav")
    assert (code, err) == (0, "")
    assert out.count("100.00%") == 2
    weights, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", PL_TINY))
    assert weights.keys() == base.keys()
    assert all(torch.equal(value, base[name].float()) for name, value in weights.items())


def test_merge_refuses_what_is_not_the_same(run, base, tmp_path, monkeypatch):
    def wrong(model):
        merged = real(model)
        merged.net.lm_head.bias = torch.nn.Parameter(merged.net.lm_head.bias.flip(0))
        return merged

    real = merge.merge_adapter
    monkeypatch.setattr(merge, "merge_adapter", wrong)
    saved(base, "lora", tmp_path / "medical")
    code, out, err = run("adapt", "merge", tmp_path / "medical", "-o", tmp_path / "whole")
    assert code == 2
    assert out.startswith("emissions")
    assert err.startswith("mowa: the merged checkpoint says something else")
    assert err.endswith("whole was not written\n")
    assert [path.name for path in tmp_path.iterdir()] == ["medical"]


def test_merge_names_the_base_it_wants(run, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    saved(moved, "adapters", tmp_path / "medical")
    shutil.rmtree(moved)
    code, _, err = run("adapt", "merge", tmp_path / "medical", "-o", tmp_path / "whole")
    assert (code, err.count("\n")) == (2, 1)
    assert str(moved) in err
    code, _, err = run("adapt", "merge", tmp_path / "medical", "-o", tmp_path / "whole", "--model", base)
    assert (code, err) == (0, "")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.bias"] += 1
    other = shutil.copytree(base, tmp_path / "other")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("adapt", "merge", tmp_path / "medical", "-o", tmp_path / "again", "--model", other)
    assert (code, err.count("\n")) == (2, 1)
    assert f"wants {moved}" in err


def test_show_says_what_it_is(run, base, tmp_path):
    saved(base, "adapters", tmp_path / "cyrillic", words=OTHER, language="ru")
    code, out, _ = run("adapt", "show", tmp_path / "cyrillic")
    assert code == 0
    said = dict(line.split("  ", 1) for line in out.splitlines())
    assert said["kind"].strip() == "bottleneck adapters (MMS)"
    assert said["base"].strip() == str(base)
    assert said["language"].strip() == "ru"
    assert said["letters"].strip() == "8: абвгдежз"
    assert said["dev"].strip() == "WER 25.0%, CER 12.5%"
    assert said["file"].strip().startswith("adapter.ru.safetensors, ")
    assert run("adapt", "show", base) == (
        2,
        "",
        f"mowa: {base} holds no adapter: an adapter is a folder with a mowa.json, as `mowa train` writes it\n",
    )


def test_transcribe_with_an_adapter(run, base, tmp_path):
    saved(base, "lora", tmp_path / "cyrillic", words=OTHER)
    soundfile.write(tmp_path / "a.wav", clip(0, 20_000), 16_000)
    settings = ["--speech", "0", "--dtype", "float32", "--format", "json"]
    told = [
        json.loads(run("transcribe", tmp_path / "a.wav", "--adapter", tmp_path / "cyrillic", *settings, *more)[1])
        for more in ([], ["--model", str(base)])
    ]
    assert told[0]["text"] == told[1]["text"]
    assert set(told[0]["text"]) <= set("абвгдежз ")
    assert told[0]["model"].endswith("+cyrillic")
    code, out, err = run("transcribe", tmp_path / "a.wav", "--adapter", tmp_path / "cyrillic", "--model", "pl-tiny")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"wants {base}" in err
    code, _, err = run("transcribe", tmp_path / "a.wav", "--adapter", tmp_path / "lost")
    assert (code, err.count("\n")) == (2, 1)
    assert "is no folder" in err
