"""The registry: families are resolved by names and configs; families of other packages join by entry point."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mowa.errors import ModelError
from mowa.families import get_family, list_families, list_family_names, list_model_types, register, resolve_family
from mowa.types import Family

CALLED = {
    "meta-llama/Llama-2-7b-chat-hf": "llama",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama",
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": "llama",
    "unsloth/Meta-Llama-3.1-8B-bnb-4bit": "llama",
    "bartowski/Llama-3.2-3B-Instruct-GGUF": "llama",
    "meta-llama/Llama-3.3-70B-Instruct": "llama",
    "meta-llama/Llama-Guard-3-8B": "llama",
    "codellama/CodeLlama-13b-Python-hf": "llama",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "llama",
    "TinyLlama/TinyLlama_v1.1": "llama",
    "HuggingFaceTB/SmolLM-360M": "llama",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llama",
    "unsloth/SmolLM2-1.7B-Instruct-GGUF": "llama",
    "lmsys/vicuna-7b-v1.5": "llama",
    "01-ai/Yi-1.5-9B-Chat": "llama",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "llama",
    "deepseek-ai/deepseek-coder-6.7b-instruct": "llama",
    "HuggingFaceTB/SmolLM3-3B": "smollm3",
    "unsloth/SmolLM3-3B-128K-GGUF": "smollm3",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral",
    "unsloth/mistral-7b-bnb-4bit": "mistral",
    "mistralai/Mistral-Nemo-Instruct-2407": "mistral",
    "mistralai/Mistral-Small-24B-Instruct-2501": "mistral",
    "mistralai/Mistral-Large-Instruct-2407": "mistral",
    "mistralai/Codestral-22B-v0.1": "mistral",
    "mistralai/Devstral-Small-2505": "mistral",
    "HuggingFaceH4/zephyr-7b-beta": "mistral",
    "mistralai/Ministral-8B-Instruct-2410": "ministral",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral",
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": "mixtral",
    "Qwen/Qwen1.5-7B-Chat": "qwen2",
    "Qwen/Qwen2-0.5B": "qwen2",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF": "qwen2",
    "unsloth/Qwen2.5-Math-1.5B-bnb-4bit": "qwen2",
    "Qwen/QwQ-32B": "qwen2",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "qwen2",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": "qwen2_moe",
    "Qwen/Qwen2-57B-A14B-Instruct": "qwen2_moe",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3",
    "unsloth/Qwen3-14B-unsloth-bnb-4bit": "qwen3",
    "Qwen/Qwen3-8B-FP8": "qwen3",
    "Qwen/Qwen3-Embedding-0.6B": "qwen3",
    "Qwen/Qwen3-Reranker-4B": "qwen3",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "qwen3",
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "Qwen/Qwen3-235B-A22B-Thinking-2507": "qwen3_moe",
    "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF": "qwen3_moe",
    "google/gemma-2b-it": "gemma",
    "google/gemma-1.1-7b-it": "gemma",
    "google/codegemma-7b": "gemma",
    "google/gemma-2-2b-it": "gemma2",
    "unsloth/gemma-2-27b-it-bnb-4bit": "gemma2",
    "google/gemma-3-270m-it": "gemma3_text",
    "unsloth/gemma-3-1b-pt": "gemma3_text",
    "google/gemma-3-4b-it": "gemma3",
    "unsloth/gemma-3-27b-it-GGUF": "gemma3",
    "microsoft/phi-2": "phi",
    "microsoft/phi-1_5": "phi",
    "microsoft/Phi-3-mini-4k-instruct": "phi3",
    "unsloth/Phi-3.5-mini-instruct-bnb-4bit": "phi3",
    "microsoft/Phi-4-mini-instruct": "phi3",
    "microsoft/phi-4": "phi3",
    "microsoft/Phi-4-reasoning-plus": "phi3",
    "deepseek-ai/DeepSeek-V2-Lite-Chat": "deepseek_v2",
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct": "deepseek_v2",
    "deepseek-ai/DeepSeek-V3-0324": "deepseek_v3",
    "deepseek-ai/DeepSeek-R1-0528": "deepseek_v3",
    "deepseek-ai/DeepSeek-V3.1": "deepseek_v3",
    "ibm-granite/granite-3.1-8b-instruct": "granite",
    "ibm-granite/granite-3.3-2b-base": "granite",
    "ibm-granite/granite-3.1-1b-a400m-instruct": "granitemoe",
    "allenai/OLMo-2-1124-7B-Instruct": "olmo2",
    "allenai/OLMo-2-0425-1B": "olmo2",
    "allenai/Olmo-3-1025-7B": "olmo3",
    "allenai/Olmo-3-7B-Instruct": "olmo3",
    "allenai/Olmo-3.1-32B-Think": "olmo3",
    "zai-org/glm-4-9b-chat-hf": "glm",
    "zai-org/glm-edge-1.5b-chat": "glm",
    "zai-org/GLM-4-9B-0414": "glm4",
    "zai-org/GLM-Z1-32B-0414": "glm4",
    "zai-org/GLM-4-32B-Base-0414": "glm4",
    "CohereLabs/c4ai-command-r-v01": "cohere",
    "CohereLabs/c4ai-command-r-plus-08-2024": "cohere",
    "CohereLabs/aya-expanse-8b": "cohere",
    "CohereLabs/c4ai-command-r7b-12-2024": "cohere2",
    "CohereLabs/c4ai-command-a-03-2025": "cohere2",
    "bigcode/starcoder2-3b": "starcoder2",
    "EleutherAI/pythia-160m-deduped": "gpt_neox",
    "EleutherAI/gpt-neox-20b": "gpt_neox",
    "databricks/dolly-v2-3b": "gpt_neox",
    "openai/gpt-oss-20b": "gpt_oss",
    "unsloth/gpt-oss-120b-unsloth-bnb-4bit": "gpt_oss",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "unsloth/Qwen2.5-VL-3B-Instruct-GGUF": "qwen2_5_vl",
    "google-bert/bert-base-uncased": "bert",
    "sentence-transformers/all-MiniLM-L6-v2": "bert",
    "BAAI/bge-small-en-v1.5": "bert",
    "intfloat/e5-base-v2": "bert",
    "intfloat/multilingual-e5-small": "bert",
    "thenlper/gte-base": "bert",
    "mixedbread-ai/mxbai-embed-large-v1": "bert",
    "sentence-transformers/all-mpnet-base-v2": "mpnet",
    "microsoft/mpnet-base": "mpnet",
    "answerdotai/ModernBERT-large": "modernbert",
    "Alibaba-NLP/gte-modernbert-base": "modernbert",
    "facebook/wav2vec2-base-960h": "wav2vec2",
    "jonatasgrosman/wav2vec2-large-xlsr-53-polish": "wav2vec2",
    "facebook/mms-1b-all": "wav2vec2",
    "facebook/hubert-large-ls960-ft": "hubert",
    "microsoft/wavlm-base-plus": "wavlm",
    "facebook/data2vec-audio-large-960h": "data2vec-audio",
    "microsoft/unispeech-sat-base-100h-libri-ft": "unispeech-sat",
}
STRANGERS = (
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "mistralai/Mamba-Codestral-7B-v0.1",
    "mistralai/Pixtral-12B-2409",
    "mistralai/Ministral-3-8B-Instruct-2512",
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen2-Audio-7B",
    "Qwen/Qwen2.5-Omni-7B",
    "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "Qwen/Qwen3-Coder-Next",
    "Qwen/Qwen3.5-9B",
    "stabilityai/stablelm-base-alpha-7b",
    "zai-org/GLM-4.5-Air",
    "zai-org/glm-4v-9b",
    "CohereLabs/command-a-vision-07-2025",
    "google/gemma-3n-E2B-it",
    "google/recurrentgemma-2b",
    "google/paligemma-3b-pt-224",
    "google/embeddinggemma-300m",
    "microsoft/Phi-3-small-8k-instruct",
    "microsoft/Phi-3.5-vision-instruct",
    "microsoft/Phi-3.5-MoE-instruct",
    "microsoft/Phi-4-multimodal-instruct",
    "microsoft/Phi-4-mini-flash-reasoning",
    "deepseek-ai/DeepSeek-V3.2-Exp",
    "deepseek-ai/deepseek-vl-7b-chat",
    "ibm-granite/granite-4.0-h-tiny",
    "ibm-granite/granite-20b-code-base",
    "distilbert/distilbert-base-uncased",
    "vinai/bertweet-base",
    "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    "intfloat/multilingual-e5-large",
    "openai/gpt2",
    "facebook/wav2vec2-conformer-rope-large-960h-ft",
    "unsloth/",
    "",
)


def _plain(name: str, **facts: object) -> Family:
    return Family(**{"name": name, "model_types": (name,), "task": "causal", "blocks": (), "linears": {}} | facts)


@pytest.mark.parametrize(("name", "family"), CALLED.items())
def test_a_name_determines_the_family(name: str, family: str) -> None:
    assert resolve_family(name).name == family
    assert resolve_family(f"/models/{name}/").name == family
    assert resolve_family(name.rpartition("/")[2].upper()).name == family


@pytest.mark.parametrize("name", STRANGERS)
def test_similar_names_of_other_architectures_match_nothing(name: str) -> None:
    with pytest.raises(ModelError, match=r"the family of .* is unknown.*: its config.json is needed"):
        resolve_family(name)


def test_every_pattern_matches_a_name_of_this_list() -> None:
    for family in list_families():
        mine = [name.rpartition("/")[2] for name, called in CALLED.items() if called == family.name]
        for pattern in family.name_patterns:
            assert any(re.match(pattern, name, re.IGNORECASE) for name in mine), f"{family.name}: {pattern}"


def test_similar_families_are_suggested() -> None:
    with pytest.raises(ModelError, match=r"closest: .*qwen3"):
        resolve_family("Qwen/Qwen3-VL-8B-Instruct")


def test_a_name_that_matches_two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    from mowa.families import registry

    monkeypatch.setattr(
        registry, "_BY_TYPE", registry._BY_TYPE | {"other": _plain("other", name_patterns=("qwen3-8b",))}
    )
    with pytest.raises(ModelError, match=r"Qwen/Qwen3-8B is named like other and qwen3, and its config.json is needed"):
        resolve_family("Qwen/Qwen3-8B")
    assert resolve_family("Qwen/Qwen3-8B", {"model_type": "qwen3"}).name == "qwen3"


@pytest.mark.parametrize("family", list_families(), ids=list_family_names())
def test_a_config_determines_the_family(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    for model_type in family.model_types:
        assert resolve_family("some/thing", {"model_type": model_type}) is family
    for architecture in family.architectures:
        assert resolve_family("some/thing", {"architectures": [architecture]}) is family
    assert not caplog.records


def test_the_config_wins_over_the_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mowa"):
        for _ in range(2):  # logged once
            assert resolve_family("unsloth/phi-4", {"model_type": "llama"}).name == "llama"
    assert [record.getMessage() for record in caplog.records] == [
        "unsloth/phi-4 is named like a phi3 model, but its config is of llama: using the config"
    ]


def test_a_config_without_model_type_leaves_it_to_the_name() -> None:
    assert resolve_family("Qwen/Qwen3-8B", {}).name == "qwen3"
    with pytest.raises(ModelError, match=r"the family of 'x' is unknown: its config\.json has no model_type or arch"):
        resolve_family("x", {})


def test_an_unsupported_config_is_not_overruled_by_the_name() -> None:
    with pytest.raises(ModelError, match="unsupported model type 'qwen3_vl': did you mean"):
        resolve_family("Qwen/Qwen3-8B", {"model_type": "qwen3_vl"})
    with pytest.raises(ModelError, match=r"unsupported architecture Strange, and config\.json has no model_type"):
        resolve_family("Qwen/Qwen3-8B", {"architectures": ["Strange"]})


@pytest.mark.parametrize("model_type", ["whisper", "roberta", "", "Wav2Vec2"])
def test_an_unsupported_type_lists_the_supported(model_type: str) -> None:
    with pytest.raises(ModelError, match=rf"supported are {', '.join(list_model_types())}$"):
        get_family(model_type)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ModelError, match=r"'wav2vec': did you mean 'wav2vec2'\?"):
        get_family("wav2vec")


def test_a_model_type_belongs_to_one_family() -> None:
    with pytest.raises(ValueError, match="belongs to the family 'wav2vec2' already"):
        register(_plain("other", model_types=("fresh", "wav2vec2")))
    with pytest.raises(ValueError, match="there is a family 'llama' already"):
        register(_plain("llama", model_types=("fresh",)))
    with pytest.raises(ModelError):
        get_family("fresh")


def test_the_families_need_no_torch() -> None:
    code = "import sys, mowa.families as f; f.resolve_family('Qwen3-8B'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


HEAD = "from mowa.types import Family\n"
FAMILY = (
    "Family(name='{0}', model_types=('{0}',), task='causal', blocks=(), linears={{}}, name_patterns=('{0}-[0-9]+b',))"
)


def install_package(site: Path, distribution: str, module: str, source: str, point: str) -> None:
    """Install a package: its module, and a dist-info folder with an entry point."""
    (site / f"{module}.py").write_text(HEAD + source)
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mowa.families]\nmine = {module}:{point}\n")


def run_code(site: Path, code: str) -> tuple[str, list[str]]:
    """Return what `code` prints with the packages in `site`, and the logged lines."""
    before = "import logging, sys\nlogging.basicConfig(format='%(message)s')\nimport mowa.families as f\n"
    place = {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    done = subprocess.run([sys.executable, "-c", before + code], env=os.environ | place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.splitlines()


def test_another_package_brings_a_family(tmp_path: Path) -> None:
    install_package(tmp_path, "of-one", "of_one", f"ONE = {FAMILY.format('novel')}\n", "ONE")
    install_package(tmp_path, "of-two", "of_two", f"TWO = ({FAMILY.format('tale')}, {FAMILY.format('saga')})\n", "TWO")
    code = (
        "print('of_one' in sys.modules, f.get_family('novel').name, f.resolve_family('me/Saga-7B').name, "
        "'tale' in f.list_family_names())"
    )
    assert run_code(tmp_path, code) == ("False novel saga True", [])


def test_a_package_may_ask_for_our_families(tmp_path: Path) -> None:
    source = "from dataclasses import replace\nfrom mowa.families import get_family\n"
    source += f"ONE = replace({FAMILY.format('novel')}, "
    install_package(tmp_path, "of-one", "of_one", source + "linears=get_family('llama').linears)\n", "ONE")
    assert run_code(tmp_path, "print(*f.get_family('novel').linears)") == ("attention mlp", [])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('its wheel is flat')\n", "its wheel is flat"),
        ("ONE = 3\n", "expected a Family, found int"),
        (f"ONE = [{FAMILY.format('novel')}, 'llama']\n", "expected a Family, found str"),
        (f"ONE = [{FAMILY.format('novel')}, {FAMILY.format('llama')}]\n", "there is a family 'llama' already"),
        (
            f"ONE = [{FAMILY.format('novel')}, Family('mine', ('llama',), 'causal', (), {{}})]\n",
            "'llama' belongs to the family 'llama' already",
        ),
        ("ONE = Family('x', ('x',), 'causal', (), {}, name_patterns=('x(',))\n", "missing ), unterminated subpattern"),
    ],
)
def test_a_broken_package_is_skipped_with_a_warning(tmp_path: Path, source: str, reason: str) -> None:
    install_package(tmp_path, "of-one", "of_one", source, "ONE")
    install_package(tmp_path, "of-two", "of_two", f"TWO = {FAMILY.format('tale')}\n", "TWO")
    found, logged = run_code(
        tmp_path, "print(f.get_family('tale').name, 'novel' in f.list_family_names(), f.get_family('llama').blocks)"
    )
    assert found == "tale False ('LlamaDecoderLayer',)"
    assert len(logged) == 1
    assert logged[0].startswith(f"skipping the families of of-one (of_one:ONE): {reason}")
