"""The chunk graph in ONNX Runtime against the net under its chunk mask, for any chunk size."""

import numpy as np
import onnxruntime
import pytest

import mowa
from mowa.errors import ModelError
from mowa.exporters import export, manifest
from mowa.exporters.onnx import exporter, streaming
from mowa.exporters.prepare import prepare_for_export
from mowa.models.ctc_encoder.chunk_mask import ChunkConfig
from tests.checkpoints import clip
from tests.checkpoints import tiny as whole_tiny

pytest.importorskip("onnxscript")
SHORT = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8), "num_hidden_layers": 1}
TRAINED = {"chunk_frames": [16], "left_context_frames": None, "lookahead_frames": [0, 8]}


CHUNKS = [ChunkConfig(16, None, 8), ChunkConfig(1, 3), ChunkConfig(8, 0), ChunkConfig(7, 20, 3), ChunkConfig(200)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    model = mowa.load(str(whole_tiny(folder / "a", **SHORT, streaming=TRAINED)))
    return model, export(model, "onnx", folder / "onnx").folder


@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunks_give_what_the_net_gives(exported, chunks):
    model, folder = exported
    session = onnxruntime.InferenceSession(str(folder / streaming.CHUNK_GRAPH_FILE), providers=["CPUExecutionProvider"])
    net = prepare_for_export(model)
    found = streaming.compare_chunked(net, session, clip(1, 30_001), chunks)
    assert found.max_abs_diff <= 1e-4
    assert found.agreement == 1


def test_inputs_and_outputs_are_named(exported):
    _, folder = exported
    session = onnxruntime.InferenceSession(str(folder / streaming.CHUNK_GRAPH_FILE))
    assert [one.name for one in session.get_inputs()] == ["input_values", "position", "kv_cache", "conv_cache"]
    assert [one.name for one in session.get_outputs()] == ["logits", "new_kv", "new_conv"]


def test_the_manifest_has_its_name_and_checksum(exported):
    _, folder = exported
    assert manifest.read_artifact(folder).details["chunk"] == streaming.CHUNK_GRAPH_FILE
    (folder / streaming.CHUNK_GRAPH_FILE).write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"chunk\.onnx is missing or damaged"):
        manifest.read_artifact(folder)


def test_other_nets_have_none(tmp_path):
    model = mowa.load(str(whole_tiny(tmp_path / "a", **SHORT)))
    folder = export(model, "onnx", tmp_path / "onnx").folder
    assert manifest.read_artifact(folder).details["chunk"] is None
    assert not (folder / streaming.CHUNK_GRAPH_FILE).exists()


@pytest.mark.slow
def test_large_receptive_fields_are_exported(tmp_path):
    """As pl-tiny's, of 1040 samples."""
    far = {"conv_dim": (16,) * 4, "conv_kernel": (400, 1, 3, 3), "conv_stride": (160, 1, 1, 2), "num_hidden_layers": 1}
    model = mowa.load(str(whole_tiny(tmp_path / "a", **far)))
    folder = export(model, "onnx", tmp_path / "onnx").folder
    session = onnxruntime.InferenceSession(str(folder / exporter.GRAPH_FILE), providers=["CPUExecutionProvider"])
    values = np.zeros((1, 1040), np.float32)
    (logits,) = session.run(None, {"input_values": values, "attention_mask": np.ones((1, 1040), np.int64)})
    assert logits.shape[1] == 1
