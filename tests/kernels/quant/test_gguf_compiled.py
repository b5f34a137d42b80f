"""The loops that numba compiles: the same bits as the operations on tensors, as plain Python and compiled."""

import numpy as np
import pytest
import torch

from mowa.kernels.quant.gguf_blocks import codec, compiled, encode
from mowa.kernels.quant.gguf_blocks.refine import fit_integers
from mowa.kernels.quant.gguf_blocks.search import AffineSearch, search_affine, search_symmetric
from tests.kernels.quant.gguf_rows import adversarial_rows, importance, noise

K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
PLAIN_PYTHON = compiled.Kernels(compiled.affine, compiled.symmetric, compiled.refine)


@pytest.fixture(autouse=True)
def _not_loaded(monkeypatch):
    monkeypatch.setattr(compiled, "_loaded", [])


def few_rows():
    """float32 [11, 32]: normal, ties, outliers, zeros, equal, denormal and nearly equal numbers."""
    x = noise(32 * 3).reshape(3, 32)
    ramp = np.arange(32, dtype=np.float32) - 16
    single = np.where(ramp == 3, 5, 0 * ramp)
    return np.stack(
        [*x, ramp / 4, single, 0 * ramp, 0 * ramp - 0.3, ramp * 1e-44, 5 + x[0] * 1e-7, np.abs(x[1]), x[2] * 1e-15]
    ).astype(np.float32)


def both(function, monkeypatch):
    """Return results with tensors and with the loops as plain Python."""
    expected = function()
    monkeypatch.setattr(compiled, "_loaded", [PLAIN_PYTHON])
    monkeypatch.setattr(compiled, "LANES", 8)
    with np.errstate(all="ignore"):
        return expected, function()


@pytest.mark.parametrize("search", [AffineSearch(15, -1.0, 0.1, 21), AffineSearch(3, -0.5, 0.1, 16, absolute=True)])
def test_affine_search(search, monkeypatch):
    x = torch.from_numpy(few_rows()).T.contiguous()
    expected, found = both(lambda: search_affine(x, x.abs() + 0.1, search), monkeypatch)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("top", [4, 32])
def test_symmetric_search(top, monkeypatch):
    x = torch.from_numpy(few_rows()).T.contiguous()
    expected, found = both(lambda: search_symmetric(x, x * x, top), monkeypatch)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_refined_integers(monkeypatch):
    x = torch.from_numpy(few_rows().reshape(22, 16)).T.contiguous()
    expected, found = both(lambda: fit_integers(x, 4), monkeypatch)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_large_tensors_compile_the_searches(monkeypatch):
    calls = []
    monkeypatch.setattr(compiled, "load", lambda: calls.append(1))
    monkeypatch.setattr(codec, "COMPILED_FROM", 512)
    weights = torch.ones(256)
    for name, importance_, rows, expected in [
        *(("q4_k", None, 2, 1), ("q4_k", None, 1, 0), ("q8_0", weights, 2, 0), ("iq4_xs", weights, 2, 0)),
        *(("q4_0", None, 2, 0), ("q4_0", weights, 2, 1), ("q6_k", weights, 2, 1)),
    ]:
        calls.clear()
        encode(torch.ones(rows, 256), name, importance_)
        assert len(calls) == expected


def test_without_numba_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    assert not compiled.load()
    assert compiled.loaded() is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", [*K_QUANTS, "q4_1", "q5_0"])
def test_compiled_searches_have_the_same_bytes(name, weighted, monkeypatch):
    pytest.importorskip("numba")
    rows = [row for key, row in adversarial_rows().items() if key not in ("1e20", "1e30")]
    x, weights = torch.from_numpy(np.stack(rows)), torch.from_numpy(importance()) if weighted else None
    expected = encode(x, name, weights)
    assert compiled.load()
    assert compiled.loaded() is not None
    assert torch.equal(encode(x, name, weights, threads=2), expected)
