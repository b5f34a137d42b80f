"""Several adapters over one engine, chosen for each recording; their texts are those of their own checkpoints."""

import numpy as np
import pytest
import soundfile
import torch

import mowa
from mowa.adapters import checkpoint, merge
from mowa.engines import protocol
from mowa.errors import ModelError
from tests.adapters.made import OTHER, logits, saved
from tests.checkpoints import clip, tiny

KINDS = {"medical": ("lora", None), "cyrillic": ("lora", OTHER), "court": ("adapters", OTHER)}
ALL = {"speech": 0.0}  # the clips are no speech, and must be read all the same


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = tiny(root / "base")
    for index, (name, (kind, words)) in enumerate(KINDS.items()):
        saved(base, kind, root / name, seed=index, words=words)
    return root


@pytest.fixture(scope="module")
def engine(folders):
    adapters = {name: folders / name for name in KINDS}
    return mowa.open_engine(mowa.load(str(folders / "base")), device="cpu", dtype="float32", adapters=adapters)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    file = tmp_path_factory.mktemp("audio") / "noise.wav"
    soundfile.write(file, clip(3, 20_000), 16_000)
    return file


@pytest.mark.parametrize("name", KINDS)
def test_a_name_reads_as_the_merged_checkpoint_does(engine, folders, recording, tmp_path, name):
    adapted = checkpoint.load_adapter(mowa.load(str(folders / "base")), folders / name)
    with merge.atomic_checkpoint(merge.merge_adapter(adapted), tmp_path / "whole"):
        pass
    whole = mowa.transcribe(recording, str(tmp_path / "whole"), device="cpu", dtype="float32", **ALL)
    by_name = mowa.transcribe(recording, engine, adapter=name, **ALL)
    by_folder = mowa.transcribe(recording, engine, adapter=folders / name, **ALL)
    alone = mowa.transcribe(recording, adapter=folders / name, device="cpu", dtype="float32", **ALL)
    assert by_name.text == by_folder.text == alone.text == whole.text
    assert by_name.text
    assert by_name.model == f"{folders / 'base'}+{name}"
    assert by_name.text != mowa.transcribe(recording, engine, **ALL).text
    if KINDS[name][1] is OTHER:
        assert set(by_name.text) <= {*"абвгдежз ", " "}


def test_choosing_costs_a_look_up_and_shares_the_weights(engine):
    chosen = engine.choose("medical")
    assert engine.choose("medical") is chosen
    assert engine.choose(None) is engine
    assert (chosen.device, chosen.precision, chosen.sharing) == (engine.device, engine.precision, engine.sharing)
    ours = {weight.data_ptr() for weight in engine.model.net.parameters()}
    theirs = {weight.data_ptr() for weight in chosen.model.net.parameters()}
    assert len(ours - theirs) == 2  # the head


def test_a_converted_base_has_converted_adapters(folders):
    half = mowa.open_engine(
        mowa.load(str(folders / "base")), device="cpu", dtype="bfloat16", adapters={"court": folders / "court"}
    )
    net = half.with_adapter("court").model.net
    assert {weight.dtype for weight in net.parameters()} == {torch.bfloat16}
    (scores,) = half.with_adapter("court").emissions([clip(0, 8_000)])
    assert np.isfinite(scores).all()


def test_unknown_names_and_foreign_folders_are_refused(engine, folders, recording, tmp_path):
    with pytest.raises(ModelError, match="no adapter is called 'medicine': loaded are medical, cyrillic, court"):
        mowa.transcribe(recording, engine, adapter="medicine", **ALL)
    with pytest.raises(ModelError, match="is no folder"):
        engine.choose(tmp_path / "lost")
    other = tiny(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ModelError, match="as its base"):
        mowa.transcribe(recording, str(other), adapter=folders / "medical", **ALL)


def test_the_bundled_model_looks_its_positions_up_under_an_adapter_too(tmp_path):
    ours = saved("pl-tiny", "lora", tmp_path / "medical")
    chosen = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32", adapters={"m": tmp_path / "medical"})
    net = chosen.with_adapter("m").model.net
    assert "forward" in vars(net.wav2vec2.encoder.pos_conv_embed)
    base = chosen.model.net.wav2vec2.encoder.pos_conv_embed
    assert net.wav2vec2.encoder.pos_conv_embed.forward.args[1] is net.wav2vec2.encoder.pos_conv_embed
    assert base.forward.args[1] is base
    sound = clip(0, 16_000)
    (scores,) = chosen.with_adapter("m").emissions([sound])
    expected = logits(ours.net, samples=16_000)[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert protocol.num_frames(net.config, 16_000) == len(expected)
