"""The teacher and what is initialized from it, compared with transformers and CTranslate2."""

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
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.positions import freeze_absolute_positions
from mowa.training import checkpoints, run_dir
from projects.pl_tiny import pretrain, teachers, whisper_encoder
from projects.pl_tiny.feature_distillation import (
    FeatureDistillationModule,
    LossWeights,
    Teacher,
    first_frame_center,
    measure_feature_std,
)
from projects.pl_tiny.front_end import front_end_config, write_front_end
from projects.pl_tiny.recipe import DevSet, OptimizerConfig, Source, Stage, StagedRecipe, StreamingConfig
from projects.pl_tiny.text import POLISH_ALPHABET
from projects.pl_tiny.whisper_encoder import FRAME_SAMPLES, INPUT_RMS, LOG_MEL_MAX, WhisperEncoder, copy_blocks
from projects.pl_tiny.write_positions import CONSTANT, order_channels, permute_channels, write_positions
from tests.checkpoints import clip, corpus

NET = front_end_config(64) | {
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
    """Its weights in a file written by CTranslate2's converter."""
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


def new_net(**changes):
    recipe = StagedRecipe("x", "", "abc", (), model_config=NET | changes)
    return AutoModelForCTC.from_config(pretrain.build_config(recipe, pretrain.build_vocabulary("abc")))


@pytest.fixture(scope="module")
def encoder(folder):
    return WhisperEncoder(teachers.read_ctranslate2(teachers.fetch_teacher(str(folder), folder)))


@pytest.fixture(scope="module")
def teacher(encoder):
    feature_std = measure_feature_std(encoder, [clip(seed, 240_000) for seed in range(6)])
    return Teacher(encoder, new_net().config, feature_std)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return new_net()


def test_log_mel_matches_transformers(encoder):
    samples = 0.1 * clip(0, 480_000)
    theirs = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(encoder.log_mel(torch.from_numpy(samples)[None]), theirs, atol=2e-5, rtol=0)


def test_encoder_matches_transformers_and_ctranslate2(encoder, whisper, folder):
    mel = encoder.log_mel(torch.from_numpy(0.1 * clip(1, 480_000))[None])
    ours = encoder.encode(encoder.embed(mel))[-1]
    with torch.no_grad():
        theirs = whisper.model.encoder(mel).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    peer = ctranslate2.models.Whisper(str(folder), compute_type="float32")
    features = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel.numpy()))
    reference = torch.from_numpy(np.array(peer.encode(features, to_cpu=True)))
    assert (ours - reference).norm() / reference.norm() < 1e-4


def test_copied_blocks_compute_the_same(encoder, folder, net):
    """With the positions added by hand and the positional convolution silenced, the net's encoder is the teacher."""
    blocks = net.wav2vec2.encoder.eval()
    copy_blocks(teachers.read_ctranslate2(folder / "model.bin"), blocks)
    blocks.pos_conv_embed = torch.nn.Module()
    blocks.pos_conv_embed.forward = torch.zeros_like
    frames = encoder.embed(encoder.log_mel(torch.from_numpy(clip(2, 32_000))[None]))
    inputs = frames + encoder.positions[: frames.shape[1]]
    torch.testing.assert_close(blocks(inputs).last_hidden_state, encoder.encode(frames)[-1], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(teacher):
    short, long = clip(3, 16_000), clip(4, 24_000)
    values = torch.zeros(2, 24_000)
    values[0, :16_000], values[1] = torch.from_numpy(short), torch.from_numpy(long)
    mask = (torch.arange(24_000) < torch.tensor([[16_000], [24_000]])).long()
    alone = teacher.extract(torch.from_numpy(short)[None], None)[-1]
    padded = teacher.extract(values, mask)[-1][:1]
    torch.testing.assert_close(padded[:, :40], alone[:, :40], atol=0.05, rtol=0.05)  # the last window has the cut


def test_frames_of_net_and_teacher_have_the_same_centers(teacher, net):
    """A click at the center of the net's frame 10 changes as many frames before 10 as after it."""
    at = first_frame_center(net.config) + 10 * FRAME_SAMPLES
    quiet = torch.from_numpy(clip(7, 32_000))[None]
    loud = quiet.clone()
    loud[:, at - 20 : at + 20] += 5.0
    with torch.no_grad():
        theirs = teacher.extract(loud, None, with_blocks=False)[0] - teacher.extract(quiet, None, with_blocks=False)[0]
        extract = net.eval().wav2vec2.feature_extractor
        ours = (extract(loud) - extract(quiet)).transpose(1, 2)
    for change in (theirs, ours):
        size = change[0].abs().sum(-1)
        moved = (size > 0.05 * size.max()).nonzero().float()
        assert moved.mean() == pytest.approx(10, abs=0.5)
    assert first_frame_center(net.config) == (400 + 2 * 160 + 2 * 160) // 2 == 520
    net.config.conv_stride = (5, 2, 2, 1)
    with pytest.raises(RecipeError, match="frames of 20 samples"):
        first_frame_center(net.config)


def test_loss_terms(teacher, net):
    values = torch.from_numpy(np.stack([clip(5, 32_000), clip(6, 32_000)]))
    batch = {
        "input_values": values,
        "attention_mask": torch.ones(2, 32_000, dtype=torch.long),
        "labels": torch.tensor([[5, 6, 7], [-100, -100, -100]]),
        "use_features": torch.tensor([False, True]),
    }

    def loss(**weights):
        torch.manual_seed(0)
        return FeatureDistillationModule(net, LossWeights(**weights), teacher)(**batch)["loss"]

    net.eval()  # no dropout; the module itself is in training mode
    ctc = loss(ctc=1.0)
    front_end, features = loss(ctc=0.0, front_end=1.0, features=1e-9), loss(ctc=0.0, features=1.0)
    assert min(ctc, front_end, features) > 0
    torch.testing.assert_close(loss(ctc=2.0, front_end=3.0, features=1.0), 2 * ctc + 3 * front_end + features)
    torch.testing.assert_close(loss(ctc=0.0, front_end=1.0), front_end, atol=1e-4, rtol=1e-4)  # without the blocks
    stock = net(values[:1], labels=batch["labels"][:1]).loss
    torch.testing.assert_close(ctc, stock, atol=1e-4, rtol=1e-4)
    loss(ctc=0.0, features=1.0).backward()
    assert net.lm_head.weight.grad is None or not net.lm_head.weight.grad.any()


def test_above_frozen_blocks_the_teacher_continues_from_the_net(encoder, folder, teacher, net):
    """The distance is zero while the upper blocks are the teacher's, whatever the front end gives; padding included."""
    copy_blocks(teachers.read_ctranslate2(folder / "model.bin"), net.wav2vec2.encoder)
    net.eval()
    lengths = torch.tensor([32_000, 20_000])
    mask = (torch.arange(32_000) < lengths[:, None]).long()
    values = torch.from_numpy(np.stack([clip(5, 32_000), clip(6, 32_000)])) * mask
    module = FeatureDistillationModule(net, LossWeights(ctc=0.0, features=1.0), teacher, frozen_blocks=2)
    optimizer = pretrain.build_optimizer(module, OptimizerConfig())
    batch = {"labels": torch.tensor([[5], [6]]), "use_features": torch.tensor([True, True]), "attention_mask": mask}
    assert module(values, **batch)["loss"] < 1e-3
    torch.nn.init.normal_(net.wav2vec2.encoder.layers[3].feed_forward.output_dense.weight)
    loss = module(values, **batch)["loss"]
    assert loss > 0.1
    loss.backward()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in trained}
    assert {name.split(".")[3] for name in names if ".layers." in name} == {"2", "3"}
    assert not any(name.startswith(("wav2vec2.feature", "wav2vec2.encoder.pos_conv")) for name in names)
    assert all(p.grad is None for name, p in net.named_parameters() if name not in names)
    extract = net.train().wav2vec2.feature_extractor  # in training, transformers' asks for the gradient of the samples
    assert not extract(values).requires_grad
    pretrain.build_optimizer(FeatureDistillationModule(net, LossWeights()), OptimizerConfig())
    assert extract(values).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frozen_blocks": 4}, "frozen_blocks is 4; at most 3 of 4 can be"),
        ({"frozen_blocks": 1, "ctc_weight": 0.0}, "frozen_blocks needs the CTC loss"),
        ({"frozen_blocks": 1, "front_end_weight": 1.0}, "front_end_weight trains the front end"),
        ({"frozen_blocks": 1, "feature_weight": 1.0, "streaming": StreamingConfig()}, "feature_weight must be 0"),
    ],
)
def test_contradictory_frozen_blocks_are_refused(net, teacher, changes, message):
    with pytest.raises(RecipeError, match=message):
        pretrain._validate_stage(Stage("x", (), (), **changes), net, teacher)


def test_written_front_end_matches_the_teacher(encoder, folder, teacher, net):
    """The written front end gives the teacher's frames for waveforms, without training."""
    order = order_channels(teacher.scales[1], 16)
    permuted = WhisperEncoder(permute_channels(teachers.read_ctranslate2(folder / "model.bin"), order))
    waves = [torch.from_numpy(clip(seed, 160_000))[None] for seed in range(9)]
    torch.testing.assert_close(
        permuted.encode(permuted.embed(permuted.log_mel(waves[0])))[-1],
        encoder.encode(encoder.embed(encoder.log_mel(waves[0])))[-1][..., order],
    )
    write_front_end(net.wav2vec2, permuted, [wave[0].numpy() for wave in waves[:8]])
    net.eval()
    with torch.no_grad():
        wave = waves[8]
        targets = permuted.embed(permuted.log_mel(wave[:, 200:] * INPUT_RMS, LOG_MEL_MAX))[:, 1:]
        ours = net.wav2vec2.feature_projection(net.wav2vec2.feature_extractor(wave).transpose(1, 2))[0]
        count = min(targets.shape[1], ours.shape[1])
        error = (ours[:, :count] - targets[:, :count]).square().mean() / targets.var()
    assert error < 0.05


def test_positional_convolution_gives_positions(encoder, net):
    """On any input, live channels get the sinusoid of their frame, constant ones their mean and the sinusoid."""
    projection, blocks = net.wav2vec2.feature_projection.projection, net.wav2vec2.encoder.eval()
    frames = torch.randn(2, 180, NET["conv_dim"][-1])
    with torch.no_grad():
        projection.bias.normal_()
        before, means = projection(frames), projection.bias.clone()
        write_positions(net, encoder.positions[1:])
        low = projection(frames)
        after = low + blocks.pos_conv_embed(low)
        expected = before + encoder.positions[1:181]
        expected[..., ::4] = (means + encoder.positions[1:181])[:, ::4]
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
        long = torch.zeros(1, 300, 64)
        long[..., ::4] = -CONSTANT
        conv = blocks.pos_conv_embed(long)
        with freeze_absolute_positions(net):
            torch.testing.assert_close(blocks.pos_conv_embed(long), conv, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(low + blocks.pos_conv_embed(low), after)
        assert read_anatomy(net).absolute_positions is None  # the convolution is restored


def test_frozen_positions_keep_their_channels_constant(encoder, net):
    write_positions(net, encoder.positions[1:])
    projection = net.wav2vec2.feature_projection.projection
    with freeze_absolute_positions(net):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        net(torch.from_numpy(clip(1, 32_000))[None]).logits.square().mean().backward()
        optimizer.step()
    assert not projection.weight[::4].any()
    assert projection.weight[1::4].any()
    with pytest.raises(RecipeError, match="less than 100"):
        write_positions(net, encoder.positions[:50])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"conv_kernel": [400, 3, 3, 3]}, "conv_kernel is"), ({"conv_bias": False}, "conv_bias: true")],
)
def test_a_front_end_of_other_sizes_is_refused(encoder, changes, message):
    with pytest.raises(RecipeError, match=message):
        write_front_end(new_net(**changes).wav2vec2, encoder, [clip(0, 16_000)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "ends after the file does"),
        (lambda data: b"\x09" + data[1:], "version 9, supported are 4 to 6"),
        (lambda data: b"", "not a CTranslate2 model"),
        (lambda data: bytes(200), "version 0"),
    ],
)
def test_a_damaged_teacher_is_refused(folder, tmp_path, damage, message):
    path = tmp_path / "model.bin"
    path.write_bytes(damage((folder / "model.bin").read_bytes()))
    with pytest.raises(ModelError, match=message) as error:
        teachers.read_ctranslate2(path)
    assert str(path) in str(error.value)


def test_other_models_and_sizes_are_refused(folder):
    with pytest.raises(ModelError, match="not a Whisper encoder"):
        whisper_encoder.encoder_sizes({"decoder/x": np.zeros(1)})
    arrays = teachers.read_ctranslate2(folder / "model.bin")
    with pytest.raises(RecipeError, match="'intermediate_size': 48"):
        copy_blocks(arrays, new_net(intermediate_size=32).wav2vec2.encoder)
    with pytest.raises(RecipeError, match="'num_hidden_layers': 4"):
        copy_blocks(arrays, new_net(num_hidden_layers=5).wav2vec2.encoder)


def test_unknown_teacher(tmp_path):
    with pytest.raises(ModelError, match="Known: whisper-base"):
        teachers.fetch_teacher("whisper-huge", tmp_path)


def wheels(folder, monkeypatch, content=b"abcdef"):
    """A known teacher in two wheels, as downloaded by pip."""
    parts = []
    for number, part in enumerate((content[:3], content[3:])):
        with zipfile.ZipFile(folder / f"part_{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"part_{number}/data", part)
        parts.append((f"part-{number}==1.0", f"part_{number}/data"))
    known = teachers.PackagedModel(tuple(parts), hashlib.sha256(b"abcdef").hexdigest(), 6, "MIT")
    monkeypatch.setitem(teachers.KNOWN_TEACHERS, "tiny", known)


def test_a_packaged_teacher_is_joined_and_verified(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    wheels(folder, monkeypatch)
    path = teachers.fetch_teacher("tiny", tmp_path)
    assert path.read_bytes() == b"abcdef"
    path.write_bytes(b"damaged later")
    assert teachers.fetch_teacher("tiny", tmp_path).read_bytes() == b"abcdef"


def test_failed_downloads_of_a_teacher(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    wheels(folder, monkeypatch, b"abcxyz")
    with pytest.raises(ModelError, match="checksum mismatch"):
        teachers.fetch_teacher("tiny", tmp_path)
    assert not list(folder.glob("model*"))
    (folder / "part_1-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    with pytest.raises(ModelError, match="damaged"):
        teachers.fetch_teacher("tiny", tmp_path)
    (folder / "part_1-1.0-py3-none-any.whl").unlink()
    done = teachers.subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for part-1==1.0\n")
    monkeypatch.setattr(teachers.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ModelError, match=r"part-1==1\.0.* cannot be downloaded: ERROR: No matching"):
        teachers.fetch_teacher("tiny", tmp_path)
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setitem(
        teachers.KNOWN_TEACHERS, "tiny", dataclasses.replace(teachers.KNOWN_TEACHERS["tiny"], bytes=1 << 30)
    )
    with pytest.raises(DataError, match="unpacking tiny needs 3072 MB, 0 MB are free"):
        teachers.fetch_teacher("tiny", tmp_path)


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes(folder, tmp_path, monkeypatch):
    """Two stages, front end and CTC; interrupted in the second, the run ends with the same weights."""
    manifest = corpus(tmp_path / "corpus", 8)
    how = OptimizerConfig(max_steps=4, batch_s=3.0, shortest_first=0, warmup_steps=1, bf16=False, eval_steps=2)
    sources, dev = (Source(manifest, features=True),), (DevSet("dev", manifest, 4),)
    frozen = dataclasses.replace(how, lr_multipliers={"wav2vec2.feature_projection": 0.0})  # in this stage alone
    averaged = dataclasses.replace(how, average_checkpoints=2)
    stages = (
        Stage("front", sources, dev, window_s=1.0, ctc_weight=0.0, front_end_weight=1.0, optimizer=frozen),
        Stage("letters", sources, dev, front_end_weight=0.1, feature_weight=0.5, optimizer=averaged),
    )
    recipe = StagedRecipe("test", "pl", POLISH_ALPHABET, stages, teacher=str(folder), model_config=NET)
    whole = pretrain.train(recipe, tmp_path / "whole", threads=1)
    marked = checkpoints.MarkCompleteCallback.on_save

    def interrupt(self, args, state, control, **more):
        marked(self, args, state, control, **more)
        if "1-letters" in args.output_dir:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.MarkCompleteCallback, "on_save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain.train(recipe, tmp_path / "broken", threads=1)
    assert [path.name for path in run_dir.list_checkpoints(tmp_path / "broken/stages/1-letters")] == ["checkpoint-2"]
    broken = pretrain.train(recipe, tmp_path / "broken", threads=1)
    ours, theirs = (AutoModelForCTC.from_pretrained(path, dtype=torch.float32) for path in (whole, broken))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert ours.config.absolute_positions == 200  # 4 s, the limit of `mowa transcribe`
    with torch.no_grad():
        quiet = ours.wav2vec2.feature_projection(torch.zeros(1, 100, NET["conv_dim"][-1]))[0]
    assert (quiet[..., ::4] == -CONSTANT).all()
    with pytest.raises(ModelError, match=r"windows of .*2 s"):
        mowa.transcribe(str(tmp_path / "corpus" / "0.wav"), str(whole), window_s=3.0, context_s=0.5)
    mowa.transcribe(str(tmp_path / "corpus" / "0.wav"), str(whole), window_s=2.0, context_s=0.5)
