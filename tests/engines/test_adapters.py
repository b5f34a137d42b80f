"""Several adapters over one engine give the transcripts of their merged checkpoints."""

import numpy as np
import pytest
import soundfile
import torch

import mowa
from mowa.adapters import checkpoint, merge
from mowa.adapters.loading import atomic_checkpoint
from mowa.errors import ModelError
from mowa.models.ctc_encoder.geometry import frame_geometry
from tests.adapters.tiny_adapters import OTHER_VOCABULARY, logits, save_tiny_adapter
from tests.checkpoints import clip, tiny

KINDS = {"medical": ("lora", None), "cyrillic": ("lora", OTHER_VOCABULARY), "court": ("bottleneck", OTHER_VOCABULARY)}
ALL = {"vad_threshold": 0.0}  # the clips are noise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = tiny(root / "base")
    for index, (name, (kind, words)) in enumerate(KINDS.items()):
        save_tiny_adapter(base, kind, root / name, seed=index, vocabulary=words)
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
def test_an_adapter_by_name_equals_the_merged_checkpoint(engine, folders, recording, tmp_path, name):
    adapted = checkpoint.load_adapter(mowa.load(str(folders / "base")), folders / name)
    with atomic_checkpoint(merge.merge_adapter(adapted), tmp_path / "whole"):
        pass
    whole = mowa.transcribe(recording, str(tmp_path / "whole"), device="cpu", dtype="float32", **ALL)
    by_name = mowa.transcribe(recording, engine, adapter=name, **ALL)
    by_folder = mowa.transcribe(recording, engine, adapter=folders / name, **ALL)
    alone = mowa.transcribe(recording, adapter=folders / name, device="cpu", dtype="float32", **ALL)
    assert by_name.text == by_folder.text == alone.text == whole.text
    assert by_name.text
    assert by_name.model == f"{folders / 'base'}+{name}"
    assert by_name.text != mowa.transcribe(recording, engine, **ALL).text
    if KINDS[name][1] is OTHER_VOCABULARY:
        assert set(by_name.text) <= {*"абвгдежз ", " "}


def test_with_adapter_is_a_look_up_and_shares_the_weights(engine):
    chosen = engine.with_adapter("medical")
    assert engine.with_adapter("medical") is chosen
    assert engine.with_adapter(None) is engine
    assert (chosen.device, chosen.precision, chosen.batch_policy) == (
        engine.device,
        engine.precision,
        engine.batch_policy,
    )
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


def test_unknown_names_and_adapters_of_other_models_are_refused(engine, folders, recording, tmp_path):
    with pytest.raises(ModelError, match=r"unknown adapter 'medicine': .* loaded adapters .medical, cyrillic, court."):
        mowa.transcribe(recording, engine, adapter="medicine", **ALL)
    with pytest.raises(ModelError, match="is not a folder"):
        engine.with_adapter(tmp_path / "lost")
    other = tiny(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ModelError, match="was trained over"):
        mowa.transcribe(recording, str(other), adapter=folders / "medical", **ALL)


def test_the_bundled_model_precomputes_positions_with_an_adapter(tmp_path):
    ours = save_tiny_adapter("pl-tiny", "lora", tmp_path / "medical")
    chosen = mowa.open_engine(mowa.load("pl-tiny"), device="cpu", dtype="float32", adapters={"m": tmp_path / "medical"})
    net = chosen.with_adapter("m").model.net
    assert "forward" in vars(net.wav2vec2.encoder.pos_conv_embed)
    base = chosen.model.net.wav2vec2.encoder.pos_conv_embed
    assert net.wav2vec2.encoder.pos_conv_embed.forward.module is net.wav2vec2.encoder.pos_conv_embed
    assert base.forward.module is base
    sound = clip(0, 16_000)
    (scores,) = chosen.with_adapter("m").emissions([sound])
    expected = logits(ours.net, samples=16_000)[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(scores, expected, atol=2e-4)
    assert frame_geometry(net.config).num_frames(16_000) == len(expected)
