"""Prepacked linears compared with float64: odd sizes, overlapping rows, and edge cases of int8."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from mowa.kernels.prepacked_linear import PrepackedLinear, is_supported
from mowa.kernels.quant.linear import QuantizedLinear
from mowa.kernels.quant.weights import quantize

SIZES = [(1, 1, 1), (63, 10, 65), (130, 96, 48), (513, 257, 3)]
KINDS = [kind for kind in ("float32", "bfloat16", "int8") if is_supported(kind)]


def random_linear(m, k, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator), torch.randn(n)


def relative(y, truth):
    return float((y.double() - truth).norm() / truth.norm())


def test_float32_is_supported():
    assert "float32" in KINDS


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_float32_is_as_exact_as_float32(size, gelu):
    x, weight, bias = random_linear(*size)
    truth = functional.linear(x.double(), weight.double(), bias.double())
    y = PrepackedLinear(weight, bias, "float32")(x, gelu=gelu)
    assert relative(y, functional.gelu(truth) if gelu else truth) < 5e-6


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
@pytest.mark.skipif("bfloat16" not in KINDS, reason="no bfloat16 here")
def test_bfloat16_errors_are_at_most_twice_torchs(size):
    x, weight, bias = random_linear(*size)
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    truth = functional.linear(x.double(), weight.double(), bias.double())
    ours, theirs = PrepackedLinear(weight, bias, "bfloat16")(x), functional.linear(x, weight, bias)
    assert ours.dtype is torch.bfloat16
    assert relative(ours, truth) <= 2 * relative(theirs, truth)


@pytest.mark.skipif("int8" not in KINDS, reason="no int8 here")
class TestInt8:
    @pytest.mark.parametrize("size", SIZES[1:], ids=str)
    @pytest.mark.parametrize("shift", [-30.0, 0.0, 3.0, 30.0])
    def test_is_the_formula(self, size, shift):
        x, weight, bias = random_linear(*size)
        x = x + shift
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        t = (high - low) / 255
        z = round(-low / t)
        x_uint8 = np.clip(np.floor(x.double().numpy() / t + z + 0.5), 0, 255)
        s = weight.abs().amax(1).double().numpy() / 127
        rows = np.clip(np.round(weight.double().numpy() / s[:, None]), -127, 127)
        truth = (x_uint8 - z) @ rows.T * t * s + bias.double().numpy()
        y = PrepackedLinear(weight, bias, "int8")(x).double().numpy()
        steps = t * s * np.abs(rows).max()  # ties between two integers
        assert np.abs(y - truth).max() <= 4 * steps.max() + 1e-3 * np.abs(truth).max()
        assert np.linalg.norm(y - truth) <= 3e-3 * np.linalg.norm(truth)

    def test_linear_add_does_not_modify_the_residual(self):
        x, weight, bias = random_linear(33, 64, 16)
        r = torch.randn(33, 16)
        before = r.clone()
        packed = PrepackedLinear(weight, bias, "int8")
        torch.testing.assert_close(packed.linear_add(x, r), packed(x) + before)
        assert torch.equal(r, before)

    def test_zero_inputs_give_the_bias(self):
        _, weight, bias = random_linear(4, 32, 16)
        torch.testing.assert_close(PrepackedLinear(weight, bias, "int8")(torch.zeros(4, 32)), bias.expand(4, 16))

    def test_a_row_of_zeros_in_the_weights(self):
        x, weight, bias = random_linear(8, 32, 16)
        weight[3] = 0
        y = PrepackedLinear(weight, bias, "int8")(x)
        torch.testing.assert_close(y[:, 3], bias[3].expand(8))
        assert torch.isfinite(y).all()

    def test_nan_stays_nan(self):
        x, weight, bias = random_linear(8, 32, 16)
        x[2, 3] = math.nan
        assert torch.isnan(PrepackedLinear(weight, bias, "int8")(x)[2]).all()

    @pytest.mark.parametrize("size", SIZES[1:], ids=str)
    def test_from_qweight(self, size):
        x, weight, bias = random_linear(*size)
        quantized = quantize(weight, 8)
        codes, scales = quantized.qweight.clone(), quantized.scale[:, 0]
        codes[0, 0] = -128
        packed = PrepackedLinear.from_qweight(codes, scales, bias)
        linear = QuantizedLinear(replace(quantized, qweight=codes), bias, "dynamic")
        assert relative(packed(x), linear(x).double()) <= 3e-3
        torch.testing.assert_close(packed(torch.zeros(3, size[1])), bias.expand(3, size[2]))
        eye = PrepackedLinear.from_qweight(codes, scales, None)(torch.eye(size[1]) * 255)  # t = 1, so x̂ = x
        torch.testing.assert_close(eye.T / 255, codes * scales[:, None], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("size", SIZES[1:], ids=str)
    @pytest.mark.parametrize("qparams", [(0.03, 117), (0.005, 0), (0.01, 255), (0.004, 128)])
    def test_static_input_qparams(self, size, qparams):
        x, weight, bias = random_linear(*size)
        quantized = quantize(weight, 8)
        packed = PrepackedLinear.from_qweight(quantized.qweight, quantized.scale[:, 0], bias, None, qparams)
        truth = QuantizedLinear(quantized, bias, "static", qparams)(x)
        assert relative(packed(x), truth.double()) <= 3e-3
        one = packed(x[:1])
        torch.testing.assert_close(packed(x)[:1], one, rtol=1e-4, atol=1e-4)  # independent of other rows

    def test_nan_stays_nan_with_static_qparams(self):
        x, weight, bias = random_linear(8, 32, 16)
        quantized = quantize(weight, 8)
        packed = PrepackedLinear.from_qweight(quantized.qweight, quantized.scale[:, 0], bias, None, (0.03, 117))
        assert torch.isfinite(packed(x * 1e6)).all()
        x[2, 3] = math.nan
        assert torch.isnan(packed(x)[2]).all()

    def test_output_in_bfloat16(self):
        x, weight, bias = random_linear(8, 32, 16)
        float32, bfloat16 = (PrepackedLinear(weight, bias, "int8", out)(x) for out in (None, torch.bfloat16))
        assert bfloat16.dtype is torch.bfloat16
        assert relative(bfloat16, float32.double()) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_overlap(kind):
    samples = torch.randn(1_000)
    rows = samples.unfold(0, 10, 5)
    weight, bias = torch.randn(48, 10), torch.randn(48)
    packed = PrepackedLinear(weight, bias, kind)
    cast = rows if kind != "bfloat16" else rows.bfloat16().contiguous().flatten()[: rows.numel()].view(rows.shape)
    torch.testing.assert_close(packed(cast), packed(cast.contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "int8"])
def test_linear_add_without_bias(kind):
    x, weight, _ = random_linear(33, 64, 16)
    r = torch.randn(33, 16)
    if kind == "bfloat16":
        x, weight, r = x.bfloat16(), weight.bfloat16(), r.bfloat16()
    before = r.clone()
    truth = functional.linear(x.double(), weight.double()) + r.double()
    assert relative(PrepackedLinear(weight, None, kind).linear_add(x, r), truth) < (2e-6 if kind == "float32" else 1e-2)
    assert torch.equal(r, before)


def test_without_onednn_nothing_is_supported(monkeypatch):
    is_supported.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not is_supported("float32")
    monkeypatch.undo()
    is_supported.cache_clear()
