"""`llama_model_quantize` chooses the types that tests/exporters/gguf/mixes.json records.

`python -m tests.parity.test_gguf_mixes` records them again.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mowa.exporters.gguf.mixes import FILE_TYPES, choose_types, file_type_metadata
from mowa.io.gguf import TENSOR_TYPES, read_gguf
from tests.exporters.gguf import mix_cases
from tests.exporters.gguf.mix_cases import CASES, IMPORTANT, WITH_IMPORTANCE, compact, config_of
from tests.models.gguf.tiny_files import write_float32
from tests.parity import llama_cpp

RECORD = Path(mix_cases.__file__).with_name("mixes.json")


def write_source(path, config):
    """Write a random net in float32, and return what `to_gguf` made of it."""
    torch.manual_seed(0)
    return write_float32(path, AutoModelForCausalLM.from_config(config).float().eval())


def types_in_llama_cpp(source, file_type, **options):
    """Return name → type that `llama_model_quantize` says it would write."""
    types = {name: info.type_name for name, info in read_gguf(source).tensors.items()}
    target = source.with_name("quantized.gguf")
    return types | llama_cpp.quantize(source, target, FILE_TYPES[file_type].id, dry_run=True, **options)


def importance_for(source):
    """Return ones for every matrix, as an importance matrix."""
    shapes = {name: info.shape for name, info in read_gguf(source).tensors.items()}
    return {name: np.ones(shape[-1], np.float32) for name, shape in shapes.items() if len(shape) > 1}


def choices(case, folder):
    """Return what llama.cpp chooses for a case, as it is recorded."""
    source = folder / "source.gguf"
    write_source(source, config_of(case))
    found = {case: {}}
    for file_type, kind in FILE_TYPES.items():
        found[case][file_type] = compact(types_in_llama_cpp(source, file_type), kind.tensor_type)
    if case in WITH_IMPORTANCE:
        importance = importance_for(source)
        found[f"{case} with importance"] = {
            file_type: compact(
                types_in_llama_cpp(source, file_type, importance=importance), FILE_TYPES[file_type].tensor_type
            )
            for file_type in IMPORTANT
        }
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_record_is_what_llama_cpp_does(case, tmp_path):
    llama_cpp.library()
    recorded = json.loads(RECORD.read_text())
    for name, found in choices(case, tmp_path).items():
        assert found == recorded[name]


def test_overrides_are_applied_as_by_llama_cpp(tmp_path):
    llama_cpp.library()
    overrides = [(r"blk\.[01]\.attn_v", "q8_0"), ("attn_v", "q6_k"), ("ffn_gate", "q4_0")]
    mapped = write_source(tmp_path / "source.gguf", config_of("llama"))
    shapes = {name: tensor.shape for name, tensor in mapped.tensors.items()}
    ids = [(pattern, TENSOR_TYPES[type_name].id) for pattern, type_name in overrides]
    for file_type in ("q4_k_m", "q3_k_m", "q2_k"):
        found = types_in_llama_cpp(tmp_path / "source.gguf", file_type, overrides=ids)
        assert choose_types(shapes, mapped.metadata, file_type, overrides=overrides) == found


@pytest.mark.slow
def test_a_llama_of_hidden_size_2048(tmp_path):
    llama_cpp.library()
    sizes = {"hidden_size": 2048, "intermediate_size": 2816, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=4, vocab_size=1024)
    source, target = tmp_path / "source.gguf", tmp_path / "quantized.gguf"
    mapped = write_source(source, config)
    shapes = {name: tensor.shape for name, tensor in mapped.tensors.items()}
    chosen = {name: choose_types(shapes, mapped.metadata, name) for name in FILE_TYPES}
    for name in FILE_TYPES:
        assert types_in_llama_cpp(source, name) == chosen[name]
    for name in ("q8_0", "q6_k", "q5_k_m", "q4_k_m"):
        llama_cpp.quantize(source, target, FILE_TYPES[name].id)
        file = read_gguf(target)
        assert {tensor: info.type_name for tensor, info in file.tensors.items()} == chosen[name]
        assert {key: file.metadata[key] for key in file_type_metadata(name)} == file_type_metadata(name)
    assert Counter(chosen["q4_k_m"].values()) == {"f32": 9, "q4_k": 25, "q6_k": 5}


def record():
    """Write mixes.json."""
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found |= choices(case, Path(folder))
        print(case, file=sys.stderr)
    lines = [
        f"{json.dumps(case)}: {{\n"
        + ",\n".join(f" {json.dumps(file_type)}: {json.dumps(chosen)}" for file_type, chosen in mixes.items())
        + "\n}"
        for case, mixes in found.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
