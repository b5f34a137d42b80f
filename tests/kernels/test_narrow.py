"""Laws of narrow matrices at odd sizes, and bitsandbytes and ONNX Runtime beside them."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mowa.kernels.narrow import (
    HALF_TINY,
    Narrow,
    NarrowLinear,
    compensated,
    grid,
    rounded,
    side_group,
    steps,
    to_int,
    to_nf4,
)

SIZES = [(1, 1), (1, 63), (63, 1), (5, 64), (2, 4_097)]
KINDS = [(8, True), (8, False), (4, True), (4, False)]
few = settings(max_examples=30, deadline=None)


def matrix(rows, columns, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * spread


def step_of_each(narrow):
    return narrow.scales.repeat_interleave(narrow.group, 1)[:, : narrow.codes.shape[1]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("group", [0, 32, 63, 128])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_codes_scales_and_zeros_are_what_they_say(size, group, bits, symmetric):
    weight = matrix(*size)
    narrow = to_int(weight, bits, group, symmetric=symmetric)
    groups, top = -(-size[1] // (group or size[1])), 2 ** (bits - 1)
    assert (narrow.codes.shape, narrow.codes.dtype) == (weight.shape, torch.int8)
    assert (narrow.scales.shape, narrow.scales.dtype) == ((size[0], groups), torch.float32)
    assert (narrow.zeros is None) == symmetric
    for codes in (narrow.codes, *(() if symmetric else (narrow.zeros,))):
        assert -top <= int(codes.min()) <= int(codes.max()) < top
    assert torch.equal(narrow.scales.half().float(), narrow.scales)
    assert (narrow.scales > 0).all()


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@few
@given(
    rows=st.integers(1, 4), columns=st.sampled_from([1, 2, 31, 63, 64, 100]), seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-4, 1.0, 300.0]), group=st.sampled_from([0, 32, 63]),
)  # fmt: skip
def test_no_weight_is_a_step_away_but_where_a_range_was_cut(bits, symmetric, rows, columns, seed, spread, group):
    weight = matrix(rows, columns, seed, spread)
    narrow = to_int(weight, bits, group, symmetric=symmetric)
    wrong = (narrow.wide() - weight).abs()
    assert torch.isfinite(wrong).all()
    inside = (narrow.codes > -(2 ** (bits - 1))) & (narrow.codes < 2 ** (bits - 1) - 1)
    step = step_of_each(narrow)
    assert (wrong <= 0.5001 * step)[inside].all()
    if bits == 8:  # steps below 2⁻¹⁴ are whole multiples of the least that float16 has
        assert (wrong <= 1.1 * step + 128 * HALF_TINY).all()


@pytest.mark.parametrize("bits", [4, 8])
@few
@given(
    rows=st.integers(1, 3), columns=st.sampled_from([1, 5, 63, 64, 129]), seed=st.integers(0, 2**31),
    group=st.sampled_from([0, 32]),
)  # fmt: skip
def test_what_lies_on_a_grid_stays(bits, rows, columns, seed, group):
    once = to_int(matrix(rows, columns, seed), bits, group)
    again = to_int(once.wide(), bits, group)
    torch.testing.assert_close(again.wide(), once.wide(), rtol=1e-6, atol=0)


@few
@given(zero=st.integers(-8, 7), seed=st.integers(0, 2**31))
def test_a_grid_with_a_zero_that_is_used_from_end_to_end_stays(zero, seed):
    codes = torch.cat([torch.arange(-8, 8), torch.randint(-8, 8, (16,), generator=torch.Generator().manual_seed(seed))])
    before = Narrow(codes.to(torch.int8)[None], torch.tensor([[0.0625]]), torch.tensor([[zero]]).to(torch.int8), 4, 32)
    after = to_int(before.wide(), 4, 32, symmetric=False)
    assert torch.equal(after.wide(), before.wide())
    assert torch.equal(after.codes, before.codes)


@few
@given(bits=st.sampled_from([4, 8]), columns=st.sampled_from([1, 63, 64]), seed=st.integers(0, 2**31))
def test_no_grid_errs_more_than_the_widest(bits, columns, seed):
    weight = matrix(3, columns, seed)
    scales, zeros = grid(weight, bits)
    widest = (weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    ours, theirs = ((rounded(weight, s, None, bits)[1] - weight).square().sum(1) for s in (scales, widest))
    assert zeros is None
    assert (ours <= theirs).all()


def test_what_weighs_more_errs_less():
    weight = matrix(64, 32)
    weight[:, 0] *= 4
    importance = torch.ones(32)
    importance[1:] = 1e4
    plain, weighed = to_int(weight, 4, 32), to_int(weight, 4, 32, importance=importance)
    wrong = [((one.wide() - weight)[:, 1:].square().sum()) for one in (plain, weighed)]
    assert wrong[1] < wrong[0]


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_nothing_is_made_of_nothing(bits, symmetric):
    narrow = to_int(torch.zeros(3, 63), bits, 32, symmetric=symmetric)
    assert not narrow.wide().any()
    assert (narrow.scales == HALF_TINY).all()
    assert not to_nf4(torch.zeros(2, 64)).wide().any()


def correlated(columns, rows=400, seed=0):
    """Inputs that share much of what they say, as those of a net do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (4, 0, True), (8, 0, True)])
@pytest.mark.parametrize("columns", [64, 257])
def test_errors_that_are_made_good_are_smaller(bits, group, symmetric, columns):
    x = correlated(columns) + 0.1 * matrix(400, columns, 1)
    weight = matrix(33, columns, 2)
    truth = x @ weight.T
    plain = to_int(weight, bits, group, symmetric=symmetric)
    better = compensated(weight, x.T @ x, bits, group, symmetric=symmetric)
    wrong, less = ((x @ one.wide().T - truth).norm() for one in (plain, better))
    assert less < 0.7 * wrong
    assert better.codes.shape == plain.codes.shape
    assert better.scales.shape == plain.scales.shape


@pytest.mark.parametrize("group", [0, 32])
def test_inputs_that_share_nothing_leave_nothing_to_make_good(group):
    weight = matrix(7, 96)
    plain, other = to_int(weight, 4, group), compensated(weight, torch.eye(96) * 3, 4, group)
    assert torch.equal(plain.codes, other.codes)
    assert torch.equal(plain.scales, other.scales)


def test_columns_that_no_input_reached_are_rounded():
    x = correlated(64)
    x[:, 5] = 0
    narrow = compensated(matrix(3, 64), x.T @ x, 4, 32)
    assert torch.isfinite(narrow.wide()).all()
    assert narrow.codes[:, 5].any()


@pytest.mark.parametrize("size", [(1, 64), (63, 64), (3, 4_096 + 64)], ids=str)
def test_nf4_is_that_of_bitsandbytes(size):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(*size).half().float()  # so that the largest of a block is a number of float16, as our scales are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        wide = bnb.dequantize_4bit(packed, state)
    ours = to_nf4(weight)
    flat = packed.flatten()
    assert torch.equal(torch.stack([flat >> 4, flat & 15], 1).view(size), ours.codes.to(torch.uint8))
    assert torch.equal(state.absmax, ours.scales.flatten())
    assert torch.equal(wide, ours.wide())


@pytest.fixture(scope="module")
def quantized():
    """x → what ONNX Runtime's DynamicQuantizeLinear makes of it: codes, t, z."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    outputs = [("y", kinds.UINT8, ["n"]), ("t", kinds.FLOAT, []), ("z", kinds.UINT8, [])]
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "t", "z"])],
        "one",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n"])],
        [helper.make_tensor_value_info(*output) for output in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(one) for one in session.run(None, {"x": x.numpy()})]


@few
@given(
    count=st.sampled_from([1, 63, 4_097]), seed=st.integers(0, 2**31), shift=st.sampled_from([-30.0, 0.0, 0.5, 30.0]),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_inputs_are_rounded_as_onnx_runtime_rounds_them(quantized, count, seed, shift, spread):
    x = (matrix(1, count, seed)[0] + shift) * spread
    codes, step, zero = quantized(x)
    ours, middle = steps(x)
    assert float(ours) == pytest.approx(float(step), rel=1e-6)
    assert int(middle) == int(zero)
    one = NarrowLinear(Narrow(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None, 8, 1), None, "dynamic")
    seen = one(x[:, None])[:, 0] / ours + middle
    assert (seen - codes).abs().max() <= 1.001  # one on the edge between two integers
    assert ((seen - codes).abs() > 0.01).float().mean() <= 1 / 63 + 1e-6


def test_silence_has_a_step():
    step, zero = steps(torch.zeros(5))
    assert (float(step), float(zero)) == (1, 0)


LINEARS = [
    ("wide", None, to_int(matrix(5, 63), 8)),
    ("dynamic", None, to_int(matrix(5, 63), 8)),
    ("static", (0.03, 120), to_int(matrix(5, 63), 8)),
    ("wide", None, to_int(matrix(5, 63), 4, 32, symmetric=False)),
    ("wide", None, to_nf4(matrix(5, 64))),
]


@pytest.mark.parametrize(("activations", "range_", "narrow"), LINEARS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_the_formula(activations, range_, narrow, bias):
    x = matrix(7, narrow.codes.shape[1], 3) + 0.3
    b = torch.arange(5.0) if bias else None
    linear = NarrowLinear(narrow, b, activations, range_)
    inputs = x
    if activations != "wide":
        t, z = range_ or [float(one) for one in steps(x)]
        inputs = ((x / t).round() + z).clamp(0, 255).sub(z) * t
        assert (inputs - x).abs().max() > 0
    truth = functional.linear(inputs.double(), narrow.wide().double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x[None])[0].double(), truth, rtol=1e-5, atol=1e-5)
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    assert linear.range == (range_ and pytest.approx(range_))
    assert torch.equal(linear.weight, narrow.wide())


@pytest.mark.parametrize(("activations", "range_", "narrow"), LINEARS)
def test_a_linear_keeps_what_it_is_made_of(activations, range_, narrow):
    net = nn.Sequential(nn.Linear(4, 4), NarrowLinear(narrow, torch.ones(5) / 3, activations, range_))
    before = {name: value.clone() for name, value in net[1].state_dict().items()}
    net.bfloat16().float()
    for name, value in net[1].state_dict().items():
        assert value.dtype is before[name].dtype
        assert torch.equal(value, before[name]), name


def test_it_says_what_it_is():
    assert "63, 5, int8 by row, x dynamic" in repr(NarrowLinear(to_int(matrix(5, 63), 8), None, "dynamic"))
    assert "63, 5, int4 by 32, x wide" in repr(NarrowLinear(to_int(matrix(5, 63), 4, 32), None))


def test_what_is_too_small_has_no_groups():
    assert [side_group(torch.empty(size)) for size in ((512, 512), (4, 32), (16_384, 1), (1024, 10, 3))] == [
        32,
        0,
        0,
        0,
    ]
    assert side_group(torch.empty(512, 512, 3)) == 32
