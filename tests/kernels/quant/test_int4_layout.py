"""Packed 4-bit integers: round trips, and the same words as compressed-tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.kernels.quant.int4_layout import pack_to_int32, unpack_from_int32
from mowa.kernels.quant.nf4 import pack_bnb_4bit, unpack_bnb_4bit

few = settings(max_examples=40, deadline=None)
SIZES = [(1, 1), (63, 7), (7, 63), (3, 4_097), (16, 8)]


def random_int4(rows, columns, seed=0, low=-8):
    return torch.randint(low, low + 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@few
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), seed=st.integers(0, 2**31), dim=st.sampled_from([0, 1]))
def test_int32_words_round_trip(rows, columns, seed, dim):
    ours = random_int4(rows, columns, seed)
    packed = pack_to_int32(ours, dim)
    assert packed.dtype is torch.int32
    assert packed.shape == ((rows, -(-columns // 8)) if dim else (-(-rows // 8), columns))
    assert torch.equal(unpack_from_int32(packed, columns if dim else rows, dim), ours)


@few
@given(rows=st.integers(1, 70), half=st.integers(1, 35), seed=st.integers(0, 2**31))
def test_bitsandbytes_bytes_round_trip(rows, half, seed):
    ours = random_int4(rows, 2 * half, seed, 0)
    packed = pack_bnb_4bit(ours)
    assert (packed.shape, packed.dtype) == ((rows * half, 1), torch.uint8)
    assert torch.equal(unpack_bnb_4bit(packed, (rows, 2 * half)), ours)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_words_equal_compressed_tensors(size, dim):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    ours = random_int4(*size)
    theirs = helpers.pack_to_int32(ours, 4, packed_dim=dim)
    packed = pack_to_int32(ours, dim)
    assert torch.equal(packed, theirs)
    assert torch.equal(unpack_from_int32(theirs, size[dim], dim), ours)
    assert torch.equal(helpers.unpack_from_int32(packed, 4, torch.Size(size), packed_dim=dim), ours)
