"""Importance matrices are what llama.cpp would collect, and its quantizer makes the same bytes of them as ours."""

import numpy as np
import pytest
import torch

from mowa.exporters.gguf.calibration import collect_importance
from mowa.exporters.gguf.mixes import FILE_TYPES
from mowa.io.gguf import read_gguf
from mowa.io.gguf.imatrix import importance_for, read_imatrix, write_imatrix
from mowa.kernels.quant.gguf_blocks import encode
from mowa.loading.gguf import read_tensor
from tests.families.tiny import tiny
from tests.io.test_imatrix import make_matrix, write_dat
from tests.models.gguf.tiny_files import CASES, net, token_ids, write_float32
from tests.parity import llama_cpp
from tests.parity.llama_cpp_inputs import load_imatrix, mean_squares

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
GELU_RTOL = 5e-3  # llama.cpp looks GELU up in a table of float16


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_has_the_same_inputs(case, tmp_path):
    path, model = tmp_path / "model.gguf", net(case)
    write_float32(path, model)
    ids = torch.tensor(token_ids())
    matrix = collect_importance(model, model.config, [ids], process_output=True)
    expected = mean_squares(path, token_ids())
    assert set(expected) == set(matrix.values)
    for name, values in matrix.values.items():
        rows = torch.from_numpy(expected[name])
        unseen = matrix.counts[name] == 0
        assert torch.equal(rows.isnan().any(-1), unseen), name
        assert (values[unseen] == 1).all()
        rtol = GELU_RTOL if "gemma" in case else 2e-5
        torch.testing.assert_close(values[~unseen].double(), rows[~unseen], rtol=rtol, atol=1e-7, msg=name)


@pytest.mark.parametrize("file_type", ["q4_k_m", "q2_k", "iq4_xs"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_llama_cpp_quantizes_to_the_same_bytes(family, file_type, tmp_path):
    model = tiny(family, **WIDE, **({"num_local_experts": 4} if family == "mixtral" else {}))
    source, target = tmp_path / "source.gguf", tmp_path / "quantized.gguf"
    write_float32(source, model)
    ids = torch.tensor(token_ids(64))
    write_imatrix(tmp_path / "imatrix.gguf", collect_importance(model, model.config, [ids]))
    matrix = read_imatrix(tmp_path / "imatrix.gguf")
    given = {name: values.numpy().ravel() for name, values in matrix.values.items()}
    llama_cpp.quantize(source, target, FILE_TYPES[file_type].id, importance=given)
    weights, file = read_gguf(source), read_gguf(target)
    compared = set()
    for name, info in file.tensors.items():
        weight, type_name = read_tensor(weights, name), info.type_name
        if type_name == "f32":
            continue
        importance = importance_for(matrix, name, weight.shape)
        if weight.ndim == 3:
            assert importance is not None
            found = torch.stack([encode(one, type_name, row) for one, row in zip(weight, importance, strict=True)])
        else:
            found = encode(weight, type_name, importance)
        assert np.array_equal(found.numpy(), file.blocks(name)), (name, type_name)
        if importance is not None:
            assert type_name == "q8_0" or not torch.equal(found, encode(weight, type_name)), name
            compared.add((type_name, weight.ndim))
    wanted = {"q4_k_m": "q4_k", "q2_k": "q2_k", "iq4_xs": "iq4_xs"}[file_type]
    assert {(wanted, 2)} | ({(wanted, 3)} if family == "mixtral" else set()) <= compared


def test_llama_cpp_reads_our_files(tmp_path):
    llama_cpp.library()
    write_imatrix(tmp_path / "imatrix.gguf", make_matrix())
    assert load_imatrix(tmp_path / "imatrix.gguf") == (3, 2, 3, 512)
    write_dat(tmp_path / "imatrix.dat", make_matrix())
    assert load_imatrix(tmp_path / "imatrix.dat") == (3, 1, 3, 0)
