"""encoder_attention compared with torch's, in float64 and half precision, at odd sizes and strides."""

import pytest
import torch
from torch.nn import functional

from mowa.kernels.attention import encoder as module
from mowa.kernels.attention.encoder import encoder_attention


def theirs(q, k, v, scale):
    inputs = (one.transpose(0, 1)[None] for one in (q, k, v))
    return functional.scaled_dot_product_attention(*inputs, scale=scale)[0].transpose(0, 1)


@pytest.mark.parametrize(("length", "heads", "width"), [(1, 1, 1), (63, 5, 16), (257, 16, 64), (1_025, 3, 8)])
def test_equals_sdpa(length, heads, width, monkeypatch):
    torch.manual_seed(length)
    q, k, v = torch.randn(length, 3, heads, width, dtype=torch.float64).unbind(1)
    for max_bytes in (1, module.MAX_SCORE_BYTES):
        monkeypatch.setattr(module, "MAX_SCORE_BYTES", max_bytes)
        out = encoder_attention(q, k, v, 0.3)
        assert out.is_contiguous()
        torch.testing.assert_close(out, theirs(q, k, v, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padding_does_not_matter(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(48, 3, 4, 16).to(dtype).unbind(1)
    k[37:], v[37:] = 1e3, 1e3
    out = encoder_attention(q, k, v, 0.25, 37)[:37]
    torch.testing.assert_close(out, encoder_attention(q[:37], k[:37], v[:37], 0.25))


def step_by_step(q, k, v, scale):
    """transformers' eager attention, with every step rounded to the dtype."""
    q, k, v = (one.transpose(0, 1) for one in (q, k, v))
    return (torch.softmax(q @ k.transpose(1, 2) * scale, -1) @ v).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_those_of_eager_attention(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 251, 4, 64) * 2).to(dtype).unbind(0)
    truth = theirs(q.double(), k.double(), v.double(), 0.125)
    ours, others = (f(q, k, v, 0.125).double() for f in (encoder_attention, step_by_step))
    assert (ours - truth).norm() <= 2 * (others - truth).norm()
