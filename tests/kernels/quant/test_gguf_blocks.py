"""Block codecs of GGUF: stored bytes of ggml, invariants, odd inputs and errors. Oracles: test_gguf_blocks_oracles."""

import json
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.errors import DataError, ModelError
from mowa.io.gguf.types import TENSOR_TYPES
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES, codec, decode, encode
from tests.kernels.quant.gguf_rows import QUANTIZED, adversarial_rows, digest, importance, noise

GOLDEN = json.loads(Path(__file__).with_name("gguf_golden.json").read_text())  # written by ggml 0.20.2 on x86-64
OVERFLOWING = {"1e20", "1e30"}
STABLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")
SEARCHED = [name for name in QUANTIZED if name not in STABLE]
PLAIN = [name for name in BLOCK_TYPES if name not in QUANTIZED]
few = settings(max_examples=15, deadline=None)


def normal(rows, columns, seed=0, spread=1.0):
    return torch.from_numpy(noise(rows * columns, seed)).reshape(rows, columns) * spread


def rms(x):
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("kind", ["plain", "importance"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_are_those_that_ggml_wrote(name, kind):
    rows = adversarial_rows()
    weights = torch.from_numpy(importance()) if kind == "importance" else None
    one = encode(torch.from_numpy(rows["normal"][:256]), name, None if weights is None else weights[:256])
    assert one.numpy().tobytes().hex() == GOLDEN[name][kind]["normal"]
    x = torch.from_numpy(np.stack([row for key, row in rows.items() if key not in OVERFLOWING]))
    assert digest(encode(x, name, weights)) == GOLDEN[name][kind]["all"]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_shapes_and_sizes(name):
    one = BLOCK_TYPES[name]
    columns = 2 * max(one.block_size, 7)
    for shape in [(columns,), (3, columns), (2, 3, columns), (0, columns)]:
        blocks = encode(torch.randn(shape), name)
        assert (blocks.shape, blocks.dtype) == ((*shape[:-1], one.row_bytes(shape[-1])), torch.uint8)
        weights = decode(blocks, name)
        assert (weights.shape, weights.dtype) == (shape, torch.float32)
    assert one.bits_per_weight == 8 * one.row_bytes(columns) / columns


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_all_float_dtypes_and_strides(name):
    weight = normal(5, 512)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(encode(weight.to(dtype), name), encode(weight.to(dtype).float(), name))
    columns_first = weight.T.contiguous().T
    assert not columns_first.is_contiguous()
    assert torch.equal(encode(columns_first, name), encode(weight, name))
    assert torch.equal(encode(torch.nn.Parameter(weight), name), encode(weight, name))
    assert torch.equal(decode(encode(weight, name).T.contiguous().T, name), decode(encode(weight, name), name))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_slices_and_threads_do_not_change_bytes(name, weighted, monkeypatch):
    weight = normal(7, 1024) * torch.logspace(-3, 1, 7)[:, None]
    weights = torch.rand(1024) if weighted else None
    whole = encode(weight, name, weights)
    for size, threads in [(256, 1), (512, 3), (2048, 2), (3 * 1024, 1)]:
        monkeypatch.setattr(codec, "SLICE", size)
        assert torch.equal(encode(weight, name, weights, threads=threads), whole)
        assert torch.equal(decode(whole, name), decode(whole.clone(), name))


@pytest.mark.parametrize("name", QUANTIZED)
def test_uninitialised_memory_is_not_used(name):
    weight, weights = normal(4, 512), torch.rand(512)
    expected = [encode(weight, name, one) for one in (None, weights)]
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = [encode(weight, name, one) for one in (None, weights)]
        decoded = decode(found[0], name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(decoded, decode(expected[0], name))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_types_are_torch_dtypes(name):
    weight, dtype = normal(3, 63), codec.PLAIN[name]
    assert torch.equal(encode(weight, name).view(dtype), weight.to(dtype))
    assert torch.equal(decode(encode(weight, name), name), weight.to(dtype).float())


@pytest.mark.parametrize("name", STABLE)
@few
@given(seed=st.integers(0, 2**31), exponent=st.integers(-9, 9), offset=st.sampled_from([0.0, 0.0, 1.0, -3.0]))
def test_errors_are_at_most_half_a_step(name, seed, exponent, offset):
    x = (normal(4, 64, seed) + offset) * 2.0**exponent
    blocks = encode(x, name)
    wrong, groups = (decode(blocks, name) - x).abs().view(-1, 32), x.view(-1, 32)
    peak, spread = groups.abs().amax(1), groups.amax(1) - groups.amin(1)
    if name == "mxfp4":  # steps between levels are a quarter of the value or less; the largest is 3/4 of a power of two
        step = torch.maximum(groups.abs() / 2, 2.0 ** (peak.log2().floor() - 2)[:, None] / 2)
        assert (wrong <= torch.where(groups.abs() > 0.75 * peak[:, None], peak[:, None] / 4, step * 0.5001)).all()
        return
    divisions = {"q4_0": 8, "q5_0": 16, "q8_0": 127, "q4_1": 15, "q5_1": 31}[name]
    step = ((spread if name.endswith("1") else peak) / divisions)[:, None]
    rounding = (peak if name.endswith("1") else step[:, 0] * divisions)[:, None] * 2.0**-10  # of d and m to float16
    clipped = (groups.abs() > (divisions - 0.5) / divisions * peak[:, None]) & (name in ("q4_0", "q5_0"))
    assert (wrong <= torch.where(clipped, 1.0, 0.5) * step + rounding).all()


@pytest.mark.parametrize("name", STABLE)
@few
@given(seed=st.integers(0, 2**31), exponent=st.integers(-6, 6))
def test_decoded_blocks_are_encoded_to_themselves(name, seed, exponent):
    blocks = encode(normal(4, 64, seed, 2.0**exponent), name)
    assert torch.equal(encode(decode(blocks, name), name), blocks)


@pytest.mark.parametrize("name", SEARCHED)
def test_a_second_encoding_loses_little_where_scales_are_searched(name):
    """The search may find a better scale for decoded weights, so bytes change: in up to half of the blocks of q3_k."""
    x = normal(32, 1024)
    once = decode(encode(x, name), name)
    twice = decode(encode(once, name), name)
    assert rms(twice - once) <= 0.3 * rms(once - x)
    assert rms(twice - x) <= 1.03 * rms(once - x)


BOUNDS = {
    **{"q8_0": 0.0055, "q6_k": 0.018, "q5_k": 0.036, "q5_0": 0.042, "q5_1": 0.038, "q4_k": 0.071, "q4_1": 0.078},
    **{"q4_0": 0.084, "iq4_nl": 0.076, "iq4_xs": 0.077, "mxfp4": 0.115, "q3_k": 0.15, "q2_k": 0.30},
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_relative_error_of_normal_weights(name):
    x = normal(32, 1024)
    assert 0.9 * BOUNDS[name] < rms(decode(encode(x, name), name) - x) / rms(x) <= BOUNDS[name]


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name not in codec.UNWEIGHTED])
def test_important_columns_get_smaller_errors(name):
    x, weights = normal(32, 1024), torch.where(torch.arange(1024) % 8 == 0, 1.0, 1e-3)
    plain, weighted = ((decode(encode(x, name, one), name) - x)[:, ::8] for one in (None, weights))
    assert rms(weighted) < 0.95 * rms(plain)


@pytest.mark.parametrize("name", codec.UNWEIGHTED)
def test_types_without_a_search_ignore_importance(name):
    x = normal(2, 64)
    assert torch.equal(encode(x, name, torch.rand(64)), encode(x, name))


@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_stay_zeros(name):
    weight = torch.zeros(2, 256)
    for weights in (None, torch.ones(256), torch.zeros(256)):
        assert not decode(encode(weight, name, weights), name).any()


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_that_do_not_fill_blocks(name):
    size = BLOCK_TYPES[name].block_size
    with pytest.raises(ModelError, match=rf"{name} has blocks of {size} weights, and rows of {size + 16} are"):
        encode(torch.zeros(2, size + 16), name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_weights_that_are_not_finite(name, value, monkeypatch):
    monkeypatch.setattr(codec, "SLICE", 512)
    weight = torch.zeros(4, 1024)
    weight[2, 700] = value
    with pytest.raises(ModelError, match=rf"{name} cannot store -?(nan|inf): row 2, column 700 of weights \[4, 1024\]"):
        encode(weight, name)
    with pytest.raises(ModelError, match="row 0, column 700"):
        encode(weight[2], name, torch.ones(1024))


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in ("f32", "bf16", "mxfp4")])
@pytest.mark.parametrize("size", [1e9, 1e20, 1e30, 3e38])
def test_weights_beyond_the_range_of_float16_scales(name, size):
    weight = normal(3, 256)
    weight[1] *= size / weight[1].abs().max()
    for weights in (None, torch.ones(256)):
        with pytest.raises(ModelError, match=rf"{name} cannot store row 1 of weights \[3, 256\]: its"):
            encode(weight, name, weights)


def test_float32_that_bfloat16_rounds_to_infinity():
    with pytest.raises(ModelError, match="bf16 cannot store row 0"):
        encode(torch.full((1, 4), 3.4e38), "bf16")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(255), r"importance has shape \[255\], and the weights have 256 columns"),
        (torch.ones(1, 256), r"importance has shape \[1, 256\]"),
        (torch.full((256,), -1.0), "column 0 is -1"),
        (torch.full((256,), torch.nan), "column 0 is nan"),
        (torch.full((256,), torch.inf), "column 0 is inf"),
    ],
)
def test_importance_that_does_not_fit(weights, message):
    with pytest.raises(DataError, match=message):
        encode(torch.zeros(2, 256), "q4_k", weights)


def test_other_bad_input():
    with pytest.raises(ModelError, match="'q4_K' is not a GGUF type that mowa encodes; choose one of f32, f16, q4_0"):
        encode(torch.zeros(256), "q4_K")
    with pytest.raises(ModelError, match="'iq2_xs' is not"):
        decode(torch.zeros(256, dtype=torch.uint8), "iq2_xs")
    for weight in (torch.zeros(2, 256, dtype=torch.int8), torch.tensor(1.0)):
        with pytest.raises(ModelError, match="encodes rows of floating-point weights, not"):
            encode(weight, "q8_0")
    for blocks in (torch.zeros(2, 143, dtype=torch.uint8), torch.zeros(2, 144)):
        with pytest.raises(ModelError, match="q4_k decodes rows of uint8, 144 bytes for each block, not"):
            decode(blocks, "q4_k")


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_cuda_writes_the_same_bytes(name, weighted):
    rows = {key: row for key, row in adversarial_rows().items() if key not in OVERFLOWING}
    x = torch.from_numpy(np.stack(list(rows.values())))
    x = x.clamp(-6e4, 6e4)
    weights = torch.from_numpy(importance()) if weighted else None
    expected = encode(x, name, weights)
    found = encode(x.cuda(), name, None if weights is None else weights.cuda())
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(decode(found, name).cpu(), decode(expected, name))


def test_types_are_those_of_gguf_files():
    for name, one in BLOCK_TYPES.items():
        assert (one.type_id, one.block_size, one.block_bytes) == astuple(TENSOR_TYPES[name])
