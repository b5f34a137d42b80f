"""Laws of narrow matrices at odd sizes, and bitsandbytes and ONNX Runtime beside them."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mowa.kernels.quant.gptq import quantize_gptq
from mowa.kernels.quant.linear import QuantizedLinear, choose_input_qparams
from mowa.kernels.quant.nf4 import quantize_nf4
from mowa.kernels.quant.weights import (
    FP16_TINY,
    QuantizedWeight,
    choose_qparams,
    non_block_group_size,
    quantize,
    quantize_dequantize,
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
    narrow = quantize(weight, bits, group, symmetric=symmetric)
    groups, top = -(-size[1] // (group or size[1])), 2 ** (bits - 1)
    assert (narrow.qweight.shape, narrow.qweight.dtype) == (weight.shape, torch.int8)
    assert (narrow.scale.shape, narrow.scale.dtype) == ((size[0], groups), torch.float32)
    assert (narrow.zero_point is None) == symmetric
    for codes in (narrow.qweight, *(() if symmetric else (narrow.zero_point,))):
        assert -top <= int(codes.min()) <= int(codes.max()) < top
    assert torch.equal(narrow.scale.half().float(), narrow.scale)
    assert (narrow.scale > 0).all()


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@few
@given(
    rows=st.integers(1, 4), columns=st.sampled_from([1, 2, 31, 63, 64, 100]), seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-4, 1.0, 300.0]), group=st.sampled_from([0, 32, 63]),
)  # fmt: skip
def test_no_weight_is_a_step_away_but_where_a_range_was_cut(bits, symmetric, rows, columns, seed, spread, group):
    weight = matrix(rows, columns, seed, spread)
    narrow = quantize(weight, bits, group, symmetric=symmetric)
    wrong = (narrow.dequantize() - weight).abs()
    assert torch.isfinite(wrong).all()
    inside = (narrow.qweight > -(2 ** (bits - 1))) & (narrow.qweight < 2 ** (bits - 1) - 1)
    step = step_of_each(narrow)
    assert (wrong <= 0.5001 * step)[inside].all()
    if bits == 8:  # steps below 2⁻¹⁴ are whole multiples of the least that float16 has
        assert (wrong <= 1.1 * step + 128 * FP16_TINY).all()


@pytest.mark.parametrize("bits", [4, 8])
@few
@given(
    rows=st.integers(1, 3), columns=st.sampled_from([1, 5, 63, 64, 129]), seed=st.integers(0, 2**31),
    group=st.sampled_from([0, 32]),
)  # fmt: skip
def test_what_lies_on_a_grid_stays(bits, rows, columns, seed, group):
    once = quantize(matrix(rows, columns, seed), bits, group)
    again = quantize(once.dequantize(), bits, group)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@few
@given(zero=st.integers(-8, 7), seed=st.integers(0, 2**31))
def test_a_grid_with_a_zero_that_is_used_from_end_to_end_stays(zero, seed):
    codes = torch.cat([torch.arange(-8, 8), torch.randint(-8, 8, (16,), generator=torch.Generator().manual_seed(seed))])
    before = QuantizedWeight(
        codes.to(torch.int8)[None], torch.tensor([[0.0625]]), torch.tensor([[zero]]).to(torch.int8), 4, 32
    )
    after = quantize(before.dequantize(), 4, 32, symmetric=False)
    assert torch.equal(after.dequantize(), before.dequantize())
    assert torch.equal(after.qweight, before.qweight)


@few
@given(bits=st.sampled_from([4, 8]), columns=st.sampled_from([1, 63, 64]), seed=st.integers(0, 2**31))
def test_no_grid_errs_more_than_the_widest(bits, columns, seed):
    weight = matrix(3, columns, seed)
    scales, zeros = choose_qparams(weight, bits)
    widest = (weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    ours, theirs = ((quantize_dequantize(weight, s, None, bits)[1] - weight).square().sum(1) for s in (scales, widest))
    assert zeros is None
    assert (ours <= theirs).all()


def test_what_weighs_more_errs_less():
    weight = matrix(64, 32)
    weight[:, 0] *= 4
    importance = torch.ones(32)
    importance[1:] = 1e4
    plain, weighed = quantize(weight, 4, 32), quantize(weight, 4, 32, importance=importance)
    wrong = [((one.dequantize() - weight)[:, 1:].square().sum()) for one in (plain, weighed)]
    assert wrong[1] < wrong[0]


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_nothing_is_made_of_nothing(bits, symmetric):
    narrow = quantize(torch.zeros(3, 63), bits, 32, symmetric=symmetric)
    assert not narrow.dequantize().any()
    assert (narrow.scale == FP16_TINY).all()
    assert not quantize_nf4(torch.zeros(2, 64)).dequantize().any()


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
    plain = quantize(weight, bits, group, symmetric=symmetric)
    better = quantize_gptq(weight, x.T @ x, bits, group, symmetric=symmetric)
    wrong, less = ((x @ one.dequantize().T - truth).norm() for one in (plain, better))
    assert less < 0.7 * wrong
    assert better.qweight.shape == plain.qweight.shape
    assert better.scale.shape == plain.scale.shape


@pytest.mark.parametrize("group", [0, 32])
def test_inputs_that_share_nothing_leave_nothing_to_make_good(group):
    weight = matrix(7, 96)
    plain, other = quantize(weight, 4, group), quantize_gptq(weight, torch.eye(96) * 3, 4, group)
    assert torch.equal(plain.qweight, other.qweight)
    assert torch.equal(plain.scale, other.scale)


def test_columns_that_no_input_reached_are_rounded():
    x = correlated(64)
    x[:, 5] = 0
    narrow = quantize_gptq(matrix(3, 64), x.T @ x, 4, 32)
    assert torch.isfinite(narrow.dequantize()).all()
    assert narrow.qweight[:, 5].any()


@pytest.mark.parametrize("size", [(1, 64), (63, 64), (3, 4_096 + 64)], ids=str)
def test_nf4_is_that_of_bitsandbytes(size):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(*size).half().float()  # so that the largest of a block is a number of float16, as our scales are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        wide = bnb.dequantize_4bit(packed, state)
    ours = quantize_nf4(weight)
    flat = packed.flatten()
    assert torch.equal(torch.stack([flat >> 4, flat & 15], 1).view(size), ours.qweight.to(torch.uint8))
    assert torch.equal(state.absmax, ours.scale.flatten())
    assert torch.equal(wide, ours.dequantize())


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
    ours, middle = choose_input_qparams(x)
    assert float(ours) == pytest.approx(float(step), rel=1e-6)
    assert int(middle) == int(zero)
    one = QuantizedLinear(
        QuantizedWeight(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None, 8, 1), None, "dynamic"
    )
    seen = one(x[:, None])[:, 0] / ours + middle
    assert (seen - codes).abs().max() <= 1.001  # one on the edge between two integers
    assert ((seen - codes).abs() > 0.01).float().mean() <= 1 / 63 + 1e-6


def test_silence_has_a_step():
    step, zero = choose_input_qparams(torch.zeros(5))
    assert (float(step), float(zero)) == (1, 0)


LINEARS = [
    ("none", None, quantize(matrix(5, 63), 8)),
    ("dynamic", None, quantize(matrix(5, 63), 8)),
    ("static", (0.03, 120), quantize(matrix(5, 63), 8)),
    ("none", None, quantize(matrix(5, 63), 4, 32, symmetric=False)),
    ("none", None, quantize_nf4(matrix(5, 64))),
]


@pytest.mark.parametrize(("activations", "range_", "narrow"), LINEARS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_the_formula(activations, range_, narrow, bias):
    x = matrix(7, narrow.codes.shape[1], 3) + 0.3
    b = torch.arange(5.0) if bias else None
    linear = QuantizedLinear(narrow, b, activations, range_)
    inputs = x
    if activations != "none":
        t, z = range_ or [float(one) for one in choose_input_qparams(x)]
        inputs = ((x / t).round() + z).clamp(0, 255).sub(z) * t
        assert (inputs - x).abs().max() > 0
    truth = functional.linear(inputs.double(), narrow.wide().double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x[None])[0].double(), truth, rtol=1e-5, atol=1e-5)
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    assert linear.input_qparams == (range_ and pytest.approx(range_))
    assert torch.equal(linear.weight, narrow.wide())


@pytest.mark.parametrize(("activations", "range_", "narrow"), LINEARS)
def test_a_linear_keeps_what_it_is_made_of(activations, range_, narrow):
    net = nn.Sequential(nn.Linear(4, 4), QuantizedLinear(narrow, torch.ones(5) / 3, activations, range_))
    before = {name: value.clone() for name, value in net[1].state_dict().items()}
    net.bfloat16().float()
    for name, value in net[1].state_dict().items():
        assert value.dtype is before[name].dtype
        assert torch.equal(value, before[name]), name


def test_it_says_what_it_is():
    assert "63, 5, int8 by row, x dynamic" in repr(QuantizedLinear(quantize(matrix(5, 63), 8), None, "dynamic"))
    assert "63, 5, int4 by 32, x wide" in repr(QuantizedLinear(quantize(matrix(5, 63), 4, 32), None))


def test_what_is_too_small_has_no_groups():
    assert [non_block_group_size(torch.empty(size)) for size in ((512, 512), (4, 32), (16_384, 1), (1024, 10, 3))] == [
        32,
        0,
        0,
        0,
    ]
    assert non_block_group_size(torch.empty(512, 512, 3)) == 32
