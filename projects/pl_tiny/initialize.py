"""Initialize a wav2vec2 net from a Whisper encoder: front end, positions and blocks, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mowa.io.atomic import replace_atomically
from mowa.types import Preprocessing
from projects.pl_tiny import teachers
from projects.pl_tiny.batches import Clip, WindowDataset
from projects.pl_tiny.feature_distillation import Teacher, measure_feature_std
from projects.pl_tiny.front_end import write_front_end
from projects.pl_tiny.whisper_encoder import WhisperEncoder, copy_blocks
from projects.pl_tiny.write_positions import order_channels, permute_channels, write_positions

NUM_WINDOWS, WINDOW_S = 20, 25.0  # the recordings that the front end and the feature statistics are fitted on


def initialize_from_teacher(
    net: Any, name: str, clips: Sequence[Sequence[Clip]], file: Path, downloads: Path
) -> Teacher:
    """Initialize `net` in place and return its teacher. `clips` are the recordings to fit on, one list per source.

    The result depends on those recordings, so it is kept in `file`, from which a resumed run reads it.
    """
    arrays = teachers.read_ctranslate2(teachers.fetch_teacher(name, downloads))
    if file.is_file():
        state = load_file(file)
        order = state.pop("channel_order").numpy()
        feature_std = [state.pop(f"feature_std.{depth}") for depth in range(net.config.num_hidden_layers + 1)]
        net.load_state_dict(state)
        net.config.absolute_positions = net.config.num_conv_pos_embeddings // 2
        return Teacher(WhisperEncoder(permute_channels(arrays, order)), net.config, feature_std)
    recordings = _sample_windows(clips)
    deviations = measure_feature_std(WhisperEncoder(arrays), recordings)
    order = order_channels(deviations[0], net.config.num_conv_pos_embedding_groups)
    arrays = permute_channels(arrays, order)
    feature_std = [deviation[torch.from_numpy(order)] for deviation in deviations]
    encoder = WhisperEncoder(arrays)
    teacher = Teacher(encoder, net.config, feature_std)
    write_front_end(net.wav2vec2, encoder, recordings)
    copy_blocks(arrays, net.wav2vec2.encoder)
    write_positions(net, encoder.positions[teacher.frame_offset :])
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    state["channel_order"] = torch.from_numpy(order)
    state |= {f"feature_std.{depth}": std for depth, std in enumerate(feature_std)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_atomically(file) as unfinished:
        save_file(state, unfinished)
    return teacher


def _sample_windows(clips: Sequence[Sequence[Clip]]) -> list[Any]:
    """Return about NUM_WINDOWS normalized windows float32 [N], the same number of each source."""
    per_source = -(-NUM_WINDOWS // len(clips))
    windows = [
        WindowDataset([(source, 1.0)], per_source, Preprocessing(), batch_s=WINDOW_S, window_s=WINDOW_S)
        for source in clips
    ]
    return [dataset[index]["input_values"][0].numpy() for dataset in windows for index in range(per_source)]
