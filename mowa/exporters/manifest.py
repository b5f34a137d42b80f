"""Write the manifest of an exported folder, `mowa.json`, and read it as an `Artifact`.

transformers' config is written beside it, whatever the format, and vocabulary and audio settings of speech models or
tokenizer and generation config of language models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mowa.errors import ModelError
from mowa.hardware import cache_folder
from mowa.io.atomic import read_json_cache, update_json_cache
from mowa.io.hashing import hash_weights, sha256_file, sha256_files
from mowa.io.hub import silence_transformers
from mowa.io.manifest import MANIFEST_FILE, REMEDIES, Manifest, damaged, find_manifest, package_versions, write_manifest
from mowa.io.processor import vocabulary_from_dict, vocabulary_to_dict, write_processor
from mowa.io.tokenizer import align_generation_config, with_padding
from mowa.loading.checkpoint import read_family
from mowa.loading.languages import adapter_files
from mowa.types import AnyModel, Artifact, Origin, Preprocessing, Scheme, SpeechProcessor

CACHE_FILE = "model_sha256.json"  # in the cache folder: checksum of the files of a model → its `model_sha256`
ADAPTER_SUFFIXES = (".json", ".safetensors")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an exporter wrote.

    config             transformers config of the net that was written, which is saved beside it
    files              files that hold the model, relative to the folder
    details            settings that a runtime of this format needs
    max_abs_diff       largest difference of a log-probability from the net's, in nats; None if not compared
    agreement          fraction of frames with the same top token as the net; None if not compared
    unverified_reason  what could not be compared, and why
    packages           packages whose versions the manifest records
    """

    config: Any
    files: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    max_abs_diff: float | None = None
    agreement: float | None = None
    unverified_reason: str = ""
    packages: tuple[str, ...] = ()


def write_export_manifest(
    model: AnyModel,
    export_format: str,
    folder: Path,
    result: ExportResult,
    *,
    artifact: Literal["checkpoint", "export"] = "export",
) -> None:
    """Write the manifest, config and processor files into `folder`."""
    result.config.save_pretrained(folder)
    write = _write_tokenizer if model.task == "causal" else _write_speech_processor
    write_manifest(
        folder,
        artifact,
        task=model.task,
        family=model.family.name,
        origin=model.origin,
        files=result.files,
        packages=result.packages,
        format=export_format,
        scheme=asdict(model.scheme),
        model_sha256=model_sha256(model),
        details=dict(result.details),
        verification={
            "max_abs_diff": result.max_abs_diff,
            "agreement": result.agreement,
            "unverified_reason": result.unverified_reason,
        },
        **write(model, folder),
    )


def _write_speech_processor(model: AnyModel, folder: Path) -> dict[str, Any]:
    """Write vocabulary and audio settings, and return them for the manifest."""
    vocabulary = model.vocabulary
    write_processor(vocabulary, model.preprocessing, folder)
    return {
        "vocabulary": {
            "tokens": vocabulary.tokens,
            "texts": vocabulary.texts,
            **vocabulary_to_dict(vocabulary),
        },
        "preprocessing": asdict(model.preprocessing),
    }


def _write_tokenizer(model: AnyModel, folder: Path) -> dict[str, Any]:
    """Write the tokenizer, with its chat template, and the generation config, ready to be padded."""
    tokenizer = with_padding(model.tokenizer)
    with silence_transformers():
        tokenizer.save_pretrained(folder)
        align_generation_config(model.net.generation_config, tokenizer).save_pretrained(folder)
    return {}


def read_artifact(folder: Path, formats: Iterable[str] = ()) -> Artifact:
    """Read the export in `folder`, of one of `formats` if any are given, and check its files.

    Raises ModelError if there is no export, it has another format or format version, or files are missing or changed.
    """
    from transformers import AutoConfig

    manifest, formats = find_manifest(folder), tuple(formats)
    if manifest is None or not _is_of_export(manifest):
        raise ModelError(f"{folder} is not an export: use a folder that `mowa export` wrote")
    found = manifest.sections["format"]
    if formats and found not in formats:
        raise ModelError(f"{folder} is an export in the format {found}, expected {' or '.join(formats)}")
    manifest.verify_files()
    _validate_family(manifest)
    try:
        sections, verification = manifest.sections, manifest.sections["verification"]
        return Artifact(
            folder=folder,
            format=found,
            family=manifest.family,
            scheme=Scheme(**sections["scheme"]),
            origin=Origin(**manifest.origin, folder=folder),
            config=AutoConfig.from_pretrained(folder),
            processor=None if manifest.task == "causal" else _read_speech_processor(sections),
            files=tuple(manifest.files),
            details=sections["details"],
            agreement=verification["agreement"],
            unverified_reason=verification["unverified_reason"],
        )
    except (KeyError, TypeError) as error:
        raise damaged(folder / MANIFEST_FILE, error) from None


def _validate_family(manifest: Manifest) -> None:
    """Raise ModelError if the manifest names another family or task than the config beside it, where mowa knows it."""
    try:
        family = read_family(manifest.folder, str(manifest.folder))
    except ModelError:
        return
    if (family.name, family.task) != (manifest.family, manifest.task):
        raise ModelError(
            f"{manifest.folder / MANIFEST_FILE} is damaged (it says {manifest.family}, {manifest.task}, and config.json"
            f" {family.name}, {family.task}): {REMEDIES[manifest.artifact]}"
        )


def _read_speech_processor(manifest: Mapping[str, Any]) -> SpeechProcessor:
    vocabulary = manifest["vocabulary"]
    return SpeechProcessor(
        vocabulary_from_dict(vocabulary["tokens"], vocabulary), Preprocessing(**manifest["preprocessing"])
    )


def is_export(folder: Path) -> bool:
    """Return whether `folder` holds what `mowa export` wrote, in any format."""
    try:
        manifest = find_manifest(folder)
    except ModelError:
        return False
    return manifest is not None and _is_of_export(manifest)


def _is_of_export(manifest: Manifest) -> bool:
    return "format" in manifest.sections


def model_sha256(model: AnyModel) -> str:
    """Return the SHA-256 (hex) of everything that determines the outputs: weights with adapters, config and scheme.

    Of a model on torch's meta device, the files of its checkpoint are hashed.
    """
    import torch

    digest = hashlib.sha256(model.net.config.to_json_string().encode())
    digest.update(repr(model.scheme).encode())
    if any(value.is_meta for value in model.net.parameters()):
        digest.update(hash_weights(model.origin.folder).encode())
        return digest.hexdigest()
    for name, value in sorted(model.net.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def loaded_model_sha256(model: AnyModel, adapter: str | Path | None = None) -> str:
    """Return `model_sha256` of a model that was loaded by name, with this adapter, and has not changed since.

    It is cached under the checksums of the checkpoint's and the adapter's files, which are cached themselves: weights
    are read again only if a file changed.
    """
    folder = model.origin.folder
    parts = [hash_weights(folder), sha256_file(folder / "config.json"), repr(model.scheme), str(_dtypes(model))]
    if (language := model.origin.target_lang) is not None:
        parts += [
            language,
            *(sha256_file(folder / name) for name in adapter_files(language) if (folder / name).is_file()),
        ]
    if adapter is not None:
        parts.append(sha256_files(sorted(path for path in Path(adapter).iterdir() if path.suffix in ADAPTER_SUFFIXES)))
    parts += [f"{name} {version}" for name, version in package_versions().items()]
    key, cache = hashlib.sha256("\n".join(parts).encode()).hexdigest(), cache_folder() / CACHE_FILE
    known = read_json_cache(cache).get(key)
    if isinstance(known, str):
        return known
    found = model_sha256(model)
    update_json_cache(cache, {key: found})
    return found


def _dtypes(model: AnyModel) -> list[str]:
    return sorted({str(value.dtype) for value in model.net.parameters()})
