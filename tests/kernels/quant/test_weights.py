"""Quantized matrices and linears: invariants at odd sizes, and the same values as bitsandbytes and ONNX Runtime."""

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
from mowa.kernels.quant.weights import FP16_TINY, QuantizedWeight, choose_qparams, quantize, quantize_dequantize

SIZES = [(1, 1), (1, 63), (63, 1), (5, 64), (2, 4_097)]
KINDS = [(8, True), (8, False), (4, True), (4, False)]
few = settings(max_examples=30, deadline=None)


def matrix(rows, columns, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * spread


def scale_per_weight(quantized):
    return quantized.scale.repeat_interleave(quantized.group_size, 1)[:, : quantized.qweight.shape[1]]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("group", [0, 32, 63, 128])
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_shapes_dtypes_and_ranges(size, group, bits, symmetric):
    weight = matrix(*size)
    quantized = quantize(weight, bits, group, symmetric=symmetric)
    groups, top = -(-size[1] // (group or size[1])), 2 ** (bits - 1)
    assert (quantized.qweight.shape, quantized.qweight.dtype) == (weight.shape, torch.int8)
    assert (quantized.scale.shape, quantized.scale.dtype) == ((size[0], groups), torch.float32)
    assert (quantized.zero_point is None) == symmetric
    for codes in (quantized.qweight, *(() if symmetric else (quantized.zero_point,))):
        assert -top <= int(codes.min()) <= int(codes.max()) < top
    assert torch.equal(quantized.scale.half().float(), quantized.scale)
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@few
@given(
    rows=st.integers(1, 4), columns=st.sampled_from([1, 2, 31, 63, 64, 100]), seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-4, 1.0, 300.0]), group=st.sampled_from([0, 32, 63]),
)  # fmt: skip
def test_errors_are_at_most_half_a_step_where_nothing_is_clipped(bits, symmetric, rows, columns, seed, spread, group):
    weight = matrix(rows, columns, seed, spread)
    quantized = quantize(weight, bits, group, symmetric=symmetric)
    wrong = (quantized.dequantize() - weight).abs()
    assert torch.isfinite(wrong).all()
    inside = (quantized.qweight > -(2 ** (bits - 1))) & (quantized.qweight < 2 ** (bits - 1) - 1)
    step = scale_per_weight(quantized)
    assert (wrong <= 0.5001 * step)[inside].all()
    if bits == 8:  # steps below 2⁻¹⁴ are whole multiples of the least that float16 has
        assert (wrong <= 1.1 * step + 128 * FP16_TINY).all()


@pytest.mark.parametrize("bits", [4, 8])
@few
@given(
    rows=st.integers(1, 3), columns=st.sampled_from([1, 5, 63, 64, 129]), seed=st.integers(0, 2**31),
    group=st.sampled_from([0, 32]),
)  # fmt: skip
def test_weights_on_a_grid_keep_it(bits, rows, columns, seed, group):
    once = quantize(matrix(rows, columns, seed), bits, group)
    again = quantize(once.dequantize(), bits, group)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@few
@given(zero=st.integers(-8, 7), seed=st.integers(0, 2**31))
def test_weights_on_a_full_asymmetric_grid_keep_it(zero, seed):
    codes = torch.cat([torch.arange(-8, 8), torch.randint(-8, 8, (16,), generator=torch.Generator().manual_seed(seed))])
    before = QuantizedWeight(
        codes.to(torch.int8)[None], torch.tensor([[0.0625]]), torch.tensor([[zero]]).to(torch.int8), 4, 32
    )
    after = quantize(before.dequantize(), 4, 32, symmetric=False)
    assert torch.equal(after.dequantize(), before.dequantize())
    assert torch.equal(after.qweight, before.qweight)


@few
@given(bits=st.sampled_from([4, 8]), columns=st.sampled_from([1, 63, 64]), seed=st.integers(0, 2**31))
def test_no_chosen_grid_is_worse_than_the_full_range(bits, columns, seed):
    weight = matrix(3, columns, seed)
    scales, zeros = choose_qparams(weight, bits)
    widest = (weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
    ours, theirs = ((quantize_dequantize(weight, s, None, bits)[1] - weight).square().sum(1) for s in (scales, widest))
    assert zeros is None
    assert (ours <= theirs).all()


def test_important_columns_get_smaller_errors():
    weight = matrix(64, 32)
    weight[:, 0] *= 4
    importance = torch.ones(32)
    importance[1:] = 1e4
    plain, weighed = quantize(weight, 4, 32), quantize(weight, 4, 32, importance=importance)
    wrong = [((one.dequantize() - weight)[:, 1:].square().sum()) for one in (plain, weighed)]
    assert wrong[1] < wrong[0]


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_zeros_stay_zeros(bits, symmetric):
    quantized = quantize(torch.zeros(3, 63), bits, 32, symmetric=symmetric)
    assert not quantized.dequantize().any()
    assert (quantized.scale == FP16_TINY).all()
    assert not quantize_nf4(torch.zeros(2, 64)).dequantize().any()


def correlated(columns, rows=400, seed=0):
    """Strongly correlated inputs, as a trained model has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, True), (4, 32, False), (4, 0, True), (8, 0, True)])
@pytest.mark.parametrize("columns", [64, 257])
def test_gptq_has_a_smaller_output_error(bits, group, symmetric, columns):
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
def test_gptq_on_uncorrelated_inputs_rounds_to_nearest(group):
    weight = matrix(7, 96)
    plain, other = quantize(weight, 4, group), quantize_gptq(weight, torch.eye(96) * 3, 4, group)
    assert torch.equal(plain.qweight, other.qweight)
    assert torch.equal(plain.scale, other.scale)


def test_gptq_rounds_columns_whose_inputs_are_zero():
    x = correlated(64)
    x[:, 5] = 0
    quantized = quantize_gptq(matrix(3, 64), x.T @ x, 4, 32)
    assert torch.isfinite(quantized.dequantize()).all()
    assert quantized.qweight[:, 5].any()


@pytest.mark.parametrize("size", [(1, 64), (63, 64), (3, 4_096 + 64)], ids=str)
def test_nf4_equals_bitsandbytes(size):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = matrix(*size).half().float()  # so that each absmax is a float16 number, as our scales are
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        dequantized = bnb.dequantize_4bit(packed, state)
    ours = quantize_nf4(weight)
    flat = packed.flatten()
    assert torch.equal(torch.stack([flat >> 4, flat & 15], 1).view(size), ours.qweight.to(torch.uint8))
    assert torch.equal(state.absmax, ours.scale.flatten())
    assert torch.equal(dequantized, ours.dequantize())


@pytest.fixture(scope="module")
def ort_quantize():
    """x → uint8 values, scale and zero point from ONNX Runtime's DynamicQuantizeLinear."""
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
def test_inputs_are_quantized_as_by_onnx_runtime(ort_quantize, count, seed, shift, spread):
    x = (matrix(1, count, seed)[0] + shift) * spread
    values, scale, zero_point = ort_quantize(x)
    our_scale, our_zero_point = choose_input_qparams(x)
    assert float(our_scale) == pytest.approx(float(scale), rel=1e-6)
    assert int(our_zero_point) == int(zero_point)
    one = QuantizedLinear(
        QuantizedWeight(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None, 8, 1), None, "dynamic"
    )
    ours = one(x[:, None])[:, 0] / our_scale + our_zero_point
    assert (ours - values).abs().max() <= 1.001  # ties between two integers
    assert ((ours - values).abs() > 0.01).float().mean() <= 1 / 63 + 1e-6


def test_zero_inputs_have_scale_one():
    scale, zero_point = choose_input_qparams(torch.zeros(5))
    assert (float(scale), float(zero_point)) == (1, 0)


LINEARS = [
    ("none", None, quantize(matrix(5, 63), 8)),
    ("dynamic", None, quantize(matrix(5, 63), 8)),
    ("static", (0.03, 120), quantize(matrix(5, 63), 8)),
    ("none", None, quantize(matrix(5, 63), 4, 32, symmetric=False)),
    ("none", None, quantize_nf4(matrix(5, 64))),
]


@pytest.mark.parametrize(("activations", "qparams", "quantized"), LINEARS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_formula(activations, qparams, quantized, bias):
    x = matrix(7, quantized.qweight.shape[1], 3) + 0.3
    b = torch.arange(5.0) if bias else None
    linear = QuantizedLinear(quantized, b, activations, qparams)
    inputs = x
    if activations != "none":
        t, z = qparams or [float(one) for one in choose_input_qparams(x)]
        inputs = ((x / t).round() + z).clamp(0, 255).sub(z) * t
        assert (inputs - x).abs().max() > 0
    truth = functional.linear(inputs.double(), quantized.dequantize().double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x[None])[0].double(), truth, rtol=1e-5, atol=1e-5)
    assert linear(x.bfloat16()).dtype is torch.bfloat16
    assert linear.input_qparams == (qparams and pytest.approx(qparams))
    assert torch.equal(linear.weight, quantized.dequantize())


@pytest.mark.parametrize(("activations", "qparams", "quantized"), LINEARS)
def test_linear_ignores_dtype_conversions(activations, qparams, quantized):
    net = nn.Sequential(nn.Linear(4, 4), QuantizedLinear(quantized, torch.ones(5) / 3, activations, qparams))
    before = {name: value.clone() for name, value in net[1].state_dict().items()}
    net.bfloat16().float()
    for name, value in net[1].state_dict().items():
        assert value.dtype is before[name].dtype
        assert torch.equal(value, before[name]), name


def test_repr():
    assert "63, 5, int8 by row, activations=dynamic" in repr(
        QuantizedLinear(quantize(matrix(5, 63), 8), None, "dynamic")
    )
    assert "63, 5, int4 by 32, activations=none" in repr(QuantizedLinear(quantize(matrix(5, 63), 4, 32), None))
