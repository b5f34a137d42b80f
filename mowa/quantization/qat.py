"""A net that learns with its weights rounded, as they will be once it is shrunk; and the same net rounded for good.

Linears compute with ŵ = s q instead of their weights w, made anew in every step, and gradients go to w as if ŵ were w
(straight through, arXiv:1308.3432; arXiv:1712.05877):

    q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),   s = 2 max |w| / (2^b - 1)   of each group of a row, or of the row

This is torchao's fake quantisation, of which linears and in how many bits `nouns.Family` and the scheme decide. What
`settle` leaves are numbers that rounding to nearest (`kernels.narrow.to_int`) leaves as they are. It refuses to know
what the net learns, and from what.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from mowa.errors import MissingDependency, RecipeError
from mowa.kernels.quant import weights as narrow
from mowa.types import Family

SCHEMES = {"int8": "int8-dynamic", "int4": "int4-weight"}
BITS = {"int8": 8, "int4": 4}
CONFIG_KEY = "qat"  # the key in config.json that says for which scheme a net was trained

QuantGrid = tuple[int, int]  # bits, and how many columns share a step; 0: the row


def config_entry(qat: str, group_size: int) -> dict[str, Any]:
    """What config.json says of a net that was trained for `to`."""
    return {"scheme": SCHEMES[qat], "group": group_size if qat == "int4" else 0}


def prepare(net: Any, family: Family, qat: str, group_size: int = 32) -> None:
    """Let the linears of `net` (float32) that shrinking makes narrow compute with rounded weights, in place.

    to: int8 (a step a row, and inputs in eight bits, each frame by its own range) or int4 (a step for each `group`
    columns). Linears beside the blocks are in int8, with wide inputs, where the family keeps them so. Weights begin
    where rounding to nearest would put them: what lies beyond the range that it cuts off is brought to its end.

    RecipeError where the net cannot be in the scheme; MissingPart without torchao.
    """
    try:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    except ImportError:
        raise MissingDependency("training with rounded weights (qat) needs torchao: pip install 'mowa[qat]'") from None
    blocks, beside = select_linears(net, family, qat, group_size)
    if why := _unsupported_reason(net, blocks, qat):
        raise RecipeError(f"qat: {qat}: {why}")
    narrowed = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if qat == "int8" else None
    for linears, inputs in ((blocks, narrowed), (beside, None)):
        for name, (bits, columns) in linears.items():
            _clip_outliers(net.get_submodule(name).weight, bits, columns)
            share: dict[str, Any] = {"group_size": columns} if columns else {"granularity": "per_channel"}
            weights = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), is_symmetric=True, **share)
            config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
            quantize_(net, config, filter_fn=partial(_is_module, name))


def select_linears(
    net: Any, family: Family, qat: str, group_size: int
) -> tuple[dict[str, QuantGrid], dict[str, QuantGrid]]:
    """The linears in the blocks that are narrow in `to`, and those beside them, each with its grid."""
    names = {name for kind in family.linears.values() for name in kind}
    within: dict[str, QuantGrid] = {}
    for path, block in net.named_modules():
        if type(block).__name__ in family.blocks:
            for name, module in block.named_modules():
                if name.rpartition(".")[2] in names and isinstance(module, nn.Linear):
                    within[f"{path}.{name}"] = BITS[qat], group_size if qat == "int4" else 0
    beside: dict[str, QuantGrid] = {}
    for name, module in net.named_modules():
        where = name.removeprefix(f"{net.base_model_prefix}.")
        width = next(
            (kept for part, kept in family.non_block_weights.items() if where.startswith(f"{part}.")), "float32"
        )
        wide = width == "int8" and isinstance(module, nn.Linear) and name not in within
        if wide and (columns := narrow.non_block_group_size(module.weight)):
            beside[name] = 8, columns
    return within, beside


def _unsupported_reason(net: Any, blocks: dict[str, QuantGrid], to: str) -> str:
    """Why a net cannot learn with rounded weights; empty where it can."""
    if not blocks:
        return "none of this net's linears is wide: start from the checkpoint that it was shrunk from"
    for name, (_, columns) in blocks.items():
        linear = net.get_submodule(name)
        if linear.weight.dtype != torch.float32:
            kind = str(linear.weight.dtype).removeprefix("torch.")
            return f"{name} is in {kind}, in which small steps are lost: load the model in float32"
        if columns and linear.in_features % columns:
            return (
                f"the {linear.in_features} columns of {name} do not fill groups of {columns}: choose another qat_group,"
                " or int8"
            )
    return ""


def _is_module(wanted: str, _: nn.Module, name: str) -> bool:
    return name == wanted


@torch.no_grad()
def _clip_outliers(weight: nn.Parameter, bits: int, columns: int) -> None:
    """Bring outliers in, so far that the step that follows from the largest weight is the one rounding chooses."""
    chosen = narrow.quantize(weight, bits, columns)
    end = chosen.scale * (2**bits - 1) / 2
    end = end.repeat_interleave(chosen.group_size, 1)[:, : weight.shape[1]]
    weight.copy_(torch.minimum(torch.maximum(weight, -end), end))


@torch.no_grad()
def round_weights(net: Any) -> None:
    """Round the weights of a prepared net for good, in place; inputs are still rounded, so it can be measured.

    The steps become numbers that float16 has, as files keep them; codes stay what they were in training. Only the very
    smallest weights (a group's largest below 1e-5), for which float16 has few steps left, may be rounded once more.
    """
    for module in _prepared(net):
        fake = module.weight_fake_quantizer
        bits = int(str(fake.config.dtype).removeprefix("torch.int"))
        columns = getattr(fake.config.granularity, "group_size", 0)
        rounded, before = fake(module.weight), None
        while before is None or not torch.equal(rounded, before):
            rounded, before = narrow.quantize(rounded, bits, columns).dequantize(), rounded
        module.weight.copy_(rounded)
        fake.enabled = False


def convert(net: Any) -> None:
    """The stock net again, in place: linears that compute with their weights as they are."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    prepared = {id(module) for module in _prepared(net)}
    quantize_(net, QATConfig(step="convert"), filter_fn=lambda module, _: id(module) in prepared)


def _prepared(net: Any) -> list[Any]:
    return [module for module in net.modules() if hasattr(module, "weight_fake_quantizer")]
