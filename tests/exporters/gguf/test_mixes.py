"""Mixes: every tensor gets the type that llama.cpp's quantizer gave it, recorded in mixes.json."""

import json
from functools import cache
from pathlib import Path

import pytest

from mowa.errors import ModelError
from mowa.exporters.gguf.mixes import FILE_TYPES, choose_types, file_type_metadata, may_quantize, parse_override
from mowa.kernels.quant.gguf_blocks import BLOCK_TYPES
from tests.exporters.gguf.mix_cases import CASES, IMPORTANT, WITH_IMPORTANCE, compact, describe

RECORDED = json.loads((Path(__file__).parent / "mixes.json").read_text())
described = cache(describe)


@pytest.mark.parametrize("case", CASES)
def test_types_are_those_of_llama_cpp(case):
    metadata, shapes = described(case)
    assert set(RECORDED[case]) == set(FILE_TYPES)
    for file_type, expected in RECORDED[case].items():
        found = choose_types(shapes, metadata, file_type)
        assert list(found) == list(shapes)
        assert compact(found, FILE_TYPES[file_type].tensor_type) == expected, file_type


@pytest.mark.parametrize("case", WITH_IMPORTANCE)
def test_an_importance_matrix_changes_types_as_in_llama_cpp(case):
    metadata, shapes = described(case)
    for file_type in IMPORTANT:
        found = choose_types(shapes, metadata, file_type, has_importance=True)
        base = FILE_TYPES[file_type].tensor_type
        assert compact(found, base) == RECORDED[f"{case} with importance"][file_type], file_type


def test_every_type_is_one_that_can_be_written_and_fits():
    for case in CASES:
        metadata, shapes = described(case)
        for file_type in FILE_TYPES:
            for name, chosen in choose_types(shapes, metadata, file_type).items():
                assert shapes[name][-1] % BLOCK_TYPES[chosen].block_size == 0
                assert may_quantize(name, shapes[name]) or chosen == "f32"


def test_overrides():
    metadata, shapes = described("llama")
    plain = choose_types(shapes, metadata, "q4_k_m")
    overrides = [(r"blk\.[01]\.attn_v", "q8_0"), ("attn_v", "q6_k"), (r"ffn_down", "bf16")]
    changed = choose_types(shapes, metadata, "q4_k_m", overrides=overrides)
    assert {changed[f"blk.{layer}.attn_v.weight"] for layer in (0, 1)} == {"q8_0"}
    assert {changed[f"blk.{layer}.attn_v.weight"] for layer in range(2, 9)} == {"q6_k"}
    assert {changed[f"blk.{layer}.ffn_down.weight"] for layer in range(9)} == {"bf16"}
    assert {name for name in shapes if plain[name] != changed[name]} <= {
        name for name in shapes if "attn_v" in name or "ffn_down" in name
    }
    assert choose_types(shapes, metadata, "f16", overrides=[("token_embd", "f32")])["token_embd.weight"] == "f32"


def test_rows_that_fill_no_block_stay_in_half_precision():
    metadata, _ = described("llama")
    chosen = choose_types({"blk.0.ffn_up.weight": (8, 48), "blk.0.ffn_down.weight": (8, 96)}, metadata, "q4_k_m")
    assert chosen == {"blk.0.ffn_up.weight": "f16", "blk.0.ffn_down.weight": "q8_0"}


@pytest.mark.parametrize(
    ("file_type", "overrides", "message"),
    [
        ("q4_k", [], "unknown GGUF scheme 'q4_k': known are f32, f16"),
        ("q4_k_m", [("attn_v", "q9")], "unknown type 'q9' for 'attn_v': known are f32"),
        ("q4_k_m", [("attn_(v", "q6_k")], r"'attn_\(v' is not a regular expression"),
        ("q4_k_m", [("attn_w", "q6_k")], "'attn_w' applies to no tensor: none that can be quantized"),
        ("q4_k_m", [("attn_norm", "q6_k")], "'attn_norm' applies to no tensor"),
    ],
)
def test_wrong_choices_are_named(file_type, overrides, message):
    metadata, shapes = described("llama")
    with pytest.raises(ModelError, match=message):
        choose_types(shapes, metadata, file_type, overrides=overrides)


def test_overrides_are_parsed():
    assert parse_override(r"blk\.(0|1)\.attn_v=Q6_K") == (r"blk\.(0|1)\.attn_v", "q6_k")
    for text in ("attn_v", "=q6_k"):
        with pytest.raises(ModelError, match="is not of the form PATTERN=TYPE"):
            parse_override(text)


def test_the_file_says_what_it_is():
    assert file_type_metadata("q4_k_m") == {"general.file_type": 15, "general.quantization_version": 2}
    gguf = pytest.importorskip("gguf")
    for name, file_type in FILE_TYPES.items():
        kind = "ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"
        assert gguf.LlamaFileType[kind] == file_type.id
