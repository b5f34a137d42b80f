"""Block codecs of GGUF beside ggml, libgguf and the gguf package: the same bytes, and the same weights back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mowa
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES, decode
from mowa.kernels.quant.gguf_blocks.codec import UNWEIGHTED, encode_blocks
from tests.kernels.quant.gguf_rows import COLUMNS, QUANTIZED, Ggml, adversarial_rows, importance, noise

OVERFLOWING = {"1e20", "1e30"}  # where squares are summed ggml stores zeros or any numbers; here the scales are NaN
SQUARED = ("q3_k", "q6_k", "iq4_nl", "iq4_xs")


@pytest.fixture(scope="module")
def ggml():
    return Ggml()


def ours(rows, name, weights):
    weights = None if weights is None else torch.from_numpy(weights)
    return encode_blocks(torch.from_numpy(rows), BLOCK_TYPES[name], weights).numpy()


def importances():
    y = noise(COLUMNS, 3, 1) + np.float32(0.5)
    return [None, importance(), 1e6 * y, np.ones_like(y), np.zeros_like(y)]


def compare(rows, name, weights, encoder):
    """Compare the bytes of each row of a dict."""
    x = np.stack(list(rows.values()))
    found, expected = ours(x, name, weights), encoder(x, name, weights)
    different = {key: int(count) for key, count in zip(rows, (found != expected).sum(1), strict=True) if count}
    assert not different


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_adversarial_rows_have_the_bytes_of_ggml(name, ggml):
    rows = adversarial_rows()
    finite = {key: row for key, row in rows.items() if key not in OVERFLOWING}
    compare(finite if name in SQUARED else rows, name, None, ggml.encode)
    for weights in importances()[1:]:
        compare(finite, name, weights, ggml.encode)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_adversarial_rows_have_the_bytes_of_libgguf(name):
    libgguf = pytest.importorskip("libgguf")

    def encoder(x, name, weights):
        kind = libgguf.GGMLQuantizationType[name.upper()]
        return libgguf.quantize_rows(x, kind, weights).view(np.uint8).reshape(len(x), -1)

    for weights in importances()[:2]:
        rows = {key: row for key, row in adversarial_rows().items() if key not in OVERFLOWING}
        compare(rows, name, weights, encoder)


@pytest.mark.parametrize("name", QUANTIZED)
def test_other_distributions_have_the_bytes_of_ggml(name, ggml):
    for seed, shape in enumerate([(4, 256), (1, 2048), (3, 1536)], 10):
        x = noise(shape[0] * shape[1], seed).reshape(shape)
        for spread in (x / 50, x * x * x, np.round(x * 20) / 20, np.exp(4 * x) - 1, 2 * x + 0.5):
            weights = np.abs(noise(shape[1], seed + 1))
            for one in (None, weights) if name not in UNWEIGHTED else (None,):
                assert (ours(spread, name, one) == ggml.encode(spread, name, one)).all()


@pytest.mark.parametrize("columns", [512, 2048])
@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_of_a_model_have_the_bytes_of_ggml(name, columns, ggml):
    tensors = load_file(Path(mowa.__file__).parent / "assets" / "pl-tiny" / "model.safetensors")
    matrices = [one for one in tensors.values() if one.ndim == 2 and one.shape[1] == columns][::4]
    assert len(matrices) > 1
    x = np.concatenate([one[:16].float().numpy() for one in matrices])
    for weights in (None, x[::3].__pow__(2).mean(0)):
        assert (ours(x, name, weights) == ggml.encode(x, name, weights)).all()


def test_exponents_of_mxfp4_near_powers_of_two(ggml):
    """ggml rounds the logarithm of the largest weight to float32 first, which lifts numbers just below a power."""
    exponents, ulps = np.arange(-126, 128), np.arange(-3, 70)
    peaks = np.ldexp(1.0, exponents)[:, None] * (1 - ulps * 2.0**-24)
    peaks = np.concatenate([peaks.ravel(), np.ldexp(1.0, np.arange(-149, -125))]).astype(np.float32)
    x = np.zeros((len(peaks), 32), np.float32)
    x[:, 3], x[:, 4], x[:, 5] = peaks, -0.3 * peaks, 0.25 * peaks
    assert (ours(x, "mxfp4", None) == ggml.encode(x, "mxfp4")).all()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_decoded_weights_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    rows = [row for key, row in adversarial_rows().items() if key not in OVERFLOWING]
    blocks = ours(np.clip(np.stack(rows), -6e4, 6e4), name, None)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    assert (decode(torch.from_numpy(blocks), name).numpy().view(np.uint32) == theirs.view(np.uint32)).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_bytes_decode_as_in_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (64, 2 * BLOCK_TYPES[name].block_bytes), np.uint8)
    for offset in BLOCK_TYPES[name].half_offsets:  # finite scales
        for first in (0, BLOCK_TYPES[name].block_bytes):
            blocks[:, first + offset + 1] &= 0xBF
    with np.errstate(over="ignore"):  # the largest exponents of mxfp4
        theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    assert (decode(torch.from_numpy(blocks), name).numpy().view(np.uint32) == theirs.view(np.uint32)).all()
