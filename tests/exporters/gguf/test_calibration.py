"""Importance is what a direct computation in float64 finds; calibration text is cut as llama-imatrix cuts it."""

import copy

import pytest
import torch
from torch.nn import functional

from mowa.errors import DataError, ModelError
from mowa.exporters.gguf.calibration import calibration_batches, collect_importance
from mowa.models.gguf import net_state, to_gguf
from tests.data.chat.tokenizers import tokenizer
from tests.families.tiny import VOCABULARY, tiny
from tests.models.gguf.tiny_files import CASES, net, token_ids

CHUNKS = [torch.tensor(token_ids(20)), torch.tensor(token_ids(33)[13:])]


def collect(model, chunks=CHUNKS, **options):
    return collect_importance(model, model.config, chunks, **options)


def double_inputs(model, chunks):
    """Return the inputs of every linear layer and router, float64 [n, K], of a copy in float64."""
    model, seen = copy.deepcopy(model).double(), {}
    model.config._experts_implementation = "eager"  # the others have no float64

    def record(module, args, name):
        seen.setdefault(name, []).append((args[0].flatten(0, -2), *args[1:]))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: record(module, args, name) if args else None)
    with torch.inference_mode():
        for chunk in chunks:
            model(chunk[None])
    return model, seen


def test_a_llama_in_float64():
    model = tiny("llama")
    matrix = collect(model, process_output=True)
    _, seen = double_inputs(model, CHUNKS)
    names = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    names = {f"blk.1.{target}.weight": f"model.layers.1.{source}" for target, source in names.items()}
    for target, source in (names | {"output.weight": "lm_head"}).items():
        rows = torch.cat([args[0] for args in seen[source]])
        assert rows.shape[0] == matrix.counts[target] == 40
        expected = rows.square().mean(0)
        torch.testing.assert_close(matrix.values[target].double(), expected, rtol=1e-5, atol=0)
    for shared in ("attn_k", "attn_v"):
        assert torch.equal(matrix.values[f"blk.1.{shared}.weight"], matrix.values["blk.1.attn_q.weight"])
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (2, 20, ())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_float64(family):
    model = tiny(family, num_local_experts=7)
    matrix = collect(model)
    copied, seen = double_inputs(model, CHUNKS)
    experts = copied.model.layers[0].mlp.experts
    tokens, chosen = (torch.cat([args[part] for args in seen["model.layers.0.mlp.experts"]]) for part in (0, 1))
    unseen = 0
    for index in range(7):
        rows = tokens[(chosen == index).any(1)]
        if family == "mixtral":
            gate, up = (rows @ experts.gate_up_proj[index].T).chunk(2, -1)
            inner = functional.silu(gate) * up
        else:
            both = rows @ experts.gate_up_proj[index] + experts.gate_up_proj_bias[index]
            gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        for name, inputs in {"gate": rows, "up": rows, "down": inner}.items():
            target = f"blk.0.ffn_{name}_exps.weight"
            assert matrix.counts[target][index] == len(rows)
            expected = inputs.square().mean(0) if len(rows) else torch.ones(inputs.shape[1], dtype=torch.float64)
            torch.testing.assert_close(matrix.values[target][index].double(), expected, rtol=1e-4, atol=1e-9)
        unseen += not len(rows)
    assert matrix.counts["blk.0.ffn_up_exps.weight"].sum() == 2 * 40
    assert torch.equal(matrix.counts["blk.0.ffn_gate_inp.weight"], torch.tensor(40))


def test_an_expert_that_no_token_chose_counts_1():
    model = tiny("mixtral", num_local_experts=4, num_experts_per_tok=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] = 0
        model.model.layers[0].mlp.gate.weight[[0, 1]] = torch.stack([torch.ones(32), -torch.ones(32)])
    matrix = collect(model)
    unseen = matrix.counts["blk.0.ffn_down_exps.weight"] == 0
    assert unseen[2]
    for name in ("gate", "up", "down"):
        values = matrix.values[f"blk.0.ffn_{name}_exps.weight"]
        assert (values[unseen] == 1).all()
        assert not values.isnan().any()


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_of_every_architecture_has_importance(case):
    model = net(case)
    matrix = collect(model, process_output=True)
    shapes = {name: tensor.shape for name, tensor in to_gguf(model.config, net_state(model)).tensors.items()}
    for name, values in matrix.values.items():
        assert values.shape == (*shapes[name][:-2], shapes[name][-1])
        assert matrix.counts[name].shape == values.shape[:-1]
        assert values.isfinite().all()
        assert (values > 0).any()
    matrices = {name for name, shape in shapes.items() if len(shape) > 1 and not name.endswith(".bias")}
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    assert (
        matrices - {"token_embd.weight"}
        <= set(matrix.values)
        <= matrices | {f"blk.{index}.ffn_gate_inp_shexp.weight" for index in range(2)}
    )
    assert head in matrix.values
    assert set(matrix.values) - set(collect(model).values) == {head}


def test_chunks_may_be_batches_of_any_size():
    model = tiny("llama")
    one = collect(model, [torch.stack(CHUNKS)])
    for name, values in collect(model).values.items():
        torch.testing.assert_close(one.values[name], values, rtol=1e-5, atol=0)
    assert (one.chunks, one.chunk_size) == (2, 20)
    assert collect(model, [torch.tensor([5])]).counts["blk.0.attn_q.weight"] == 1


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_net_is_as_before_even_after_an_error(family):
    model = tiny(family).train()
    attention = model.config._attn_implementation

    def fail(fraction):
        if fraction:
            assert hooks(model) > 10
            assert not model.training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, on_progress=fail)
    assert (hooks(model), model.training, model.config._attn_implementation) == (0, True, attention)
    collect(model)
    assert (hooks(model), model.training, model.config._attn_implementation) == (0, True, attention)


def test_progress_and_names():
    fractions = []
    matrix = collect(tiny("llama"), datasets=["a.txt"], on_progress=fractions.append)
    assert fractions == [0.0, 0.5, 1.0]
    assert matrix.datasets == ("a.txt",)


def test_faults():
    model = tiny("llama")
    with pytest.raises(DataError, match="there are no calibration tokens"):
        collect(model, [])
    with pytest.raises(DataError, match=f"token {VOCABULARY} is outside the model's vocabulary of {VOCABULARY}"):
        collect(model, [torch.tensor([1, VOCABULARY])])
    with pytest.raises(ModelError, match="gpt_neox cannot be written as GGUF"):
        collect_importance(model, tiny("gpt_neox").config, CHUNKS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(ModelError, match=r"the inputs of blk.1.ffn_down.weight are infinite or NaN"):
        collect(model)
    assert hooks(model) == 0


TEXT = "What is the capital of Poland? Warsaw, of course.\n\nZażółć gęślą jaźń. <|im_end|> 1 2 3\n" * 9


@pytest.mark.parametrize("family", ["chatml", "llama", "gemma"])
def test_text_is_cut_as_by_llama_imatrix(family):
    made = tokenizer(family)
    ids = made(TEXT, split_special_tokens=True)["input_ids"]
    bos = made.bos_token_id if family != "chatml" else None
    assert (ids[0] == bos) == (bos is not None)
    chunks = calibration_batches(made, TEXT, chunk_size=32)
    assert len(chunks) == len(ids) // 32 > 3
    for index, chunk in enumerate(chunks):
        expected = torch.tensor(ids[32 * index : 32 * index + 32])
        assert chunk.dtype == torch.int64
        assert torch.equal(chunk[1:], expected[1:])
        assert chunk[0] == (expected[0] if bos is None else bos)
    assert len(calibration_batches(made, TEXT, chunk_size=32, max_chunks=2)) == 2
    assert len(calibration_batches(made, TEXT, chunk_size=32, max_chunks=999)) == len(chunks)


def test_special_tokens_that_a_text_spells_stay_text():
    made = tokenizer("chatml")
    ids = torch.cat(calibration_batches(made, TEXT, chunk_size=16))
    assert made.convert_tokens_to_ids("<|im_end|>") not in ids
    assert "<|im_end|>" in made.decode(ids)


def test_files(tmp_path):
    made = tokenizer("chatml")
    (tmp_path / "a.txt").write_text(TEXT)
    expected = calibration_batches(made, TEXT, chunk_size=16)
    assert torch.equal(torch.cat(calibration_batches(made, tmp_path / "a.txt", chunk_size=16)), torch.cat(expected))
    turn = '{"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Warsaw."}]}\n'
    (tmp_path / "b.jsonl").write_text(turn * 9)
    chunks = torch.cat(calibration_batches(made, tmp_path / "b.jsonl", chunk_size=8))
    text = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nWarsaw.<|im_end|>\n" * 9
    assert chunks.tolist() == made(text)["input_ids"][: len(chunks)]
    with pytest.raises(DataError, match=r"c.txt: no such file or folder"):
        calibration_batches(made, tmp_path / "c.txt")


def test_too_little_text(tmp_path):
    made = tokenizer("llama")
    count = len(made("Warsaw")["input_ids"])
    with pytest.raises(DataError, match=rf"the calibration text has {count} tokens, and a chunk takes 512: give more"):
        calibration_batches(made, "Warsaw")
    (tmp_path / "a.txt").write_text("Warsaw")
    with pytest.raises(DataError, match=rf"a.txt: the calibration text has {count} tokens"):
        calibration_batches(made, tmp_path / "a.txt")
    with pytest.raises(DataError, match="chunk_size is 0 and max_chunks None: both must be at least 1"):
        calibration_batches(made, TEXT, chunk_size=0)
