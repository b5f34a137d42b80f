"""Rounding, reductions and packing under the block codecs: bit for bit as loops over single numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa.kernels.quant.gguf_blocks import packing, reductions, rounding
from mowa.kernels.quant.gguf_blocks.refine import fit_integers, fit_positive
from mowa.kernels.quant.gguf_blocks.search import AffineSearch, search_affine, search_symmetric
from tests.kernels.quant.gguf_rows import noise

few = settings(max_examples=30, deadline=None)
any_float = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows(n, groups, seed=0):
    return torch.from_numpy(noise(n * groups, seed)).reshape(n, groups)


def bits(x):
    return x.view(torch.int32)


@pytest.mark.parametrize("groups", [1, 2, 3, 7, 63, 4097])
@pytest.mark.parametrize("n", [1, 8, 16, 32, 256])
def test_sums_add_in_order(n, groups):
    x = rows(n, groups) * torch.logspace(-6, 6, n)[:, None]
    expected = np.zeros(groups, np.float32)
    for row in x.numpy():
        expected += row
    out = torch.empty(3, groups)
    for one in (x, x.clone().T.contiguous().T):  # the second is added without numpy
        assert torch.equal(bits(reductions.ordered_sum(one)), bits(torch.from_numpy(expected)))
        assert reductions.ordered_sum(one, out[1]).data_ptr() == out[1].data_ptr()
        assert torch.equal(out[1], torch.from_numpy(expected))


@few
@given(values=st.lists(st.tuples(any_float, any_float, st.booleans()), min_size=1, max_size=70))
def test_values_are_replaced_where_better(values):
    new, old, better = (torch.tensor(column) for column in zip(*values, strict=True))
    expected = torch.where(better, new, old)
    reductions.replace_where(better.int(), new, old)
    assert torch.equal(bits(old), bits(expected))


small = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])


@few
@given(columns=st.lists(st.lists(small, min_size=5, max_size=5), min_size=1, max_size=20))
def test_extremes_are_the_first_of_equals(columns):
    x = torch.tensor(columns).T.contiguous()
    for column, low, peak in zip(columns, reductions.lowest(x), reductions.first_peak(x), strict=True):
        first_low, first_peak = column[0], 0.0
        for value in column:
            first_low = value if value < first_low else first_low
            first_peak = value if abs(value) > abs(first_peak) else first_peak
        assert torch.equal(bits(torch.stack([low, peak])), bits(torch.tensor([first_low, first_peak])))


def test_errors_that_are_nan_never_win():
    nan, inf = torch.nan, torch.inf
    assert reductions.first_peak(torch.tensor([[nan, 2.0], [-3.0, -inf]])).isnan().tolist() == [True, False]
    errors = torch.tensor([[nan, 2.0, inf, 1.0], [0.0, nan, inf, 1.0], [1.0, 1.0, 5.0, 1.0]])
    assert reductions.first_smallest(errors).tolist() == [[0, 2, 2, 0]]


@few
@given(values=st.lists(any_float, min_size=1, max_size=50))
def test_integers_as_a_c_program_rounds(values):
    x = np.array(values, np.float32)
    with np.errstate(over="ignore"):
        shifted = (x + np.float32(12582912)).view(np.int32)
    expected = (shifted & 0x7FFFFF) - 0x400000
    assert rounding.nearest_int(torch.from_numpy(x)).tolist() == expected.tolist()
    near = np.clip(x, -4e6, 4e6)
    assert rounding.nearest_int(torch.from_numpy(near)).tolist() == np.rint(near).astype(int).tolist()
    assert rounding.nearest_int(torch.tensor([torch.nan, torch.inf])).tolist() == [0, -4194304]


@few
@given(values=st.lists(st.floats(-127.375, 127.375, width=32), min_size=1, max_size=50))
def test_ties_round_away_from_zero(values):
    ties = [np.trunc(value) + np.copysign(0.5, value) for value in values if abs(value) < 127]
    below = [float(np.nextafter(np.float32(tie), np.float32(0))) for tie in ties]
    x = np.array([*values, *ties, *below, 0.49999997, -0.49999997], np.float32)
    expected = np.trunc(x.astype(np.float64) + np.copysign(0.5, x))
    assert rounding.round_half_away(torch.from_numpy(x)).tolist() == expected.tolist()
    assert rounding.round_half_away(torch.tensor([torch.nan, torch.inf, -torch.inf])).tolist() == [0, 0, 0]


@few
@given(values=st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=50))
def test_quotients_and_roots_are_rounded_once(values):
    x = np.array(values, np.float32)
    tensor = torch.from_numpy(x)
    assert torch.equal(rounding.square_root(tensor), torch.from_numpy(np.sqrt(x)))
    with np.errstate(all="ignore"):
        for number in (1, 7, -128, 0.1):
            above, below = (torch.from_numpy(one) for one in (np.float32(number) / x, x / np.float32(number)))
            assert torch.equal(rounding.divide(number, tensor), above) or number == 0
            assert torch.equal(rounding.divide(tensor, number), below)


@pytest.mark.parametrize("bits_each", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_packed_bits_round_trip(bits_each, dim):
    generator = torch.Generator().manual_seed(bits_each + 10 * dim)
    packed = torch.randint(0, 256, (3, 5), dtype=torch.uint8, generator=generator)
    codes = packing.unpack_bits(packed, bits_each, dim)
    assert codes.shape == (*packed.shape[:dim], 8 // bits_each, *packed.shape[dim:])
    assert int(codes.max()) < 2**bits_each
    assert torch.equal(codes.select(dim, 0), packed & 2**bits_each - 1)
    assert torch.equal(packing.pack_bits(codes, bits_each, dim), packed)


@few
@given(values=st.lists(st.binary(min_size=12, max_size=12), min_size=1, max_size=9))
def test_six_bit_scales_round_trip(values):
    packed = torch.tensor([list(value) for value in values], dtype=torch.uint8).T.contiguous()
    scales, minima = packing.unpack_scales_and_minima(packed)
    assert torch.equal(packing.pack_scales_and_minima(scales, minima), packed)
    sixteen = packing.unpack_six_bits(packed)
    assert (sixteen.shape, int(sixteen.max()) < 64) == ((16, len(values)), True)
    assert torch.equal(packing.pack_six_bits(sixteen), packed)


@few
@given(seed=st.integers(0, 2**31), n=st.sampled_from([16, 32]), top=st.sampled_from([4, 8, 16, 32]))
def test_searched_scales_are_not_worse_than_the_first_try(seed, n, top):
    x = rows(n, 40, seed)
    weights = rows(n, 40, seed + 1).abs() + 0.01
    scale, codes = search_symmetric(x, weights, top)
    peak = reductions.first_peak(x)
    plain = (x * -top / peak).round().clamp(-top, top - 1)
    found, first = ((weights * (x - d * q) ** 2).sum(0) for d, q in ((scale, codes - top), (peak / -top, plain)))
    assert (found <= first * 1.0001 + 1e-6).all()
    assert (codes >= 0).all()
    assert (codes < 2 * top).all()


@few
@given(
    seed=st.integers(0, 2**31), n=st.sampled_from([16, 32]), top=st.sampled_from([3, 15, 31]), absolute=st.booleans()
)
def test_searched_minima_are_not_worse_than_the_range(seed, n, top, absolute):
    x = rows(n, 40, seed)
    weights = rows(n, 40, seed + 1).abs() + 0.01
    scale, minimum, codes = search_affine(x, weights, AffineSearch(top, -0.5, 0.1, 16, absolute))
    low = x.amin(0).clamp(max=0)
    step = (x.amax(0) - low) / top
    plain = ((x - low) / step).round()
    found, first = (
        (weights * (x - d * q - m).abs() ** (1 if absolute else 2)).sum(0)
        for d, q, m in ((scale, codes, minimum), (step, plain, low))
    )
    assert (found <= first * 1.0001 + 1e-6).all()
    assert (minimum <= 0).all()
    assert (codes >= 0).all()
    assert (codes <= top).all()


def refine_one(x, weights, codes, low, high):
    """Refine the integers of one group with loops, in float32 → integers, scale and number of changes."""
    f = np.float32
    sum_xl, sum_l2, changes = f(0), f(0), 0
    for value, weight, code in zip(x, weights, codes, strict=True):
        sum_xl, sum_l2 = sum_xl + weight * value * code, sum_l2 + weight * code * code
    for _ in range(5):
        changed = False
        for i, (value, weight) in enumerate(zip(x, weights, strict=True)):
            xl, l2 = sum_xl - weight * value * codes[i], sum_l2 - weight * codes[i] * codes[i]
            if xl <= 0:
                continue
            new = np.clip(np.rint(value * l2 / xl), f(low), f(high))
            if new == codes[i]:
                continue
            xl, l2 = xl + weight * value * new, l2 + weight * new * new
            if l2 > 0 and xl * xl * sum_l2 > sum_xl * sum_xl * l2:
                codes[i], sum_xl, sum_l2, changed, changes = new, xl, l2, True, changes + 1
        if not changed:
            break
    return codes, sum_xl / sum_l2 if sum_l2 > 0 else f(0), changes


@few
@given(seed=st.integers(0, 2**31), coarse=st.booleans())
def test_integers_are_refined_as_by_loops(seed, coarse):
    x = rows(16, 12, seed)
    x = (3 * x).round() / 3 + 0.01 * rows(16, 12, seed + 1) if coarse else x**3
    scales, codes = fit_integers(x, 4)
    for column, scale, found in zip(x.T.numpy(), scales, codes.T - 4, strict=True):
        peak = column[np.abs(column).argmax()]
        start = np.clip(np.rint(column * (np.float32(-4) / peak)), np.float32(-4), np.float32(3))
        expected, expected_scale, _ = refine_one(column, column * column, start, -4, 3)
        assert found.tolist() == expected.tolist()
        assert float(scale) == expected_scale


def test_some_groups_need_many_changes():
    x = rows(16, 3000, 5)
    changes = []
    for column in x.T.numpy():
        peak = column[np.abs(column).argmax()]
        start = np.clip(np.rint(column * (np.float32(-4) / peak)), np.float32(-4), np.float32(3))
        changes.append(refine_one(column, column * column, start, -4, 3)[2])
    assert np.mean(np.array(changes) == 0) > 0.5
    assert max(changes) >= 5


@few
@given(seed=st.integers(0, 2**31), top=st.sampled_from([15, 63]))
def test_scales_of_groups_fit_better_than_by_their_largest(seed, top):
    x, weights = rows(8, 20, seed).abs(), rows(8, 20, seed + 1).abs()
    scales, codes = fit_positive(x, weights, top)
    peak = x.amax(0)
    plain = (x / peak * top).round()
    found, first = ((weights * (x - d * q) ** 2).sum(0) for d, q in ((scales, codes), (peak / top, plain)))
    assert (found <= first * 1.0001 + 1e-7).all()
    assert (codes >= 0).all()
    assert (codes <= top).all()
