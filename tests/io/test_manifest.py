"""mowa.json: one header for runs, adapters, checkpoints and exports."""

import json

import pytest

from mowa.errors import ModelError
from mowa.io import manifest
from mowa.io.manifest import FORMAT_VERSION, MANIFEST_FILE
from mowa.types import Origin

ORIGIN = {"name": "base", "source": "owner/base", "revision": None, "license": "mit", "target_lang": None}
HEADER = {
    "format_version": FORMAT_VERSION,
    "artifact": "run",
    "task": "ctc",
    "family": "wav2vec2",
    "origin": ORIGIN,
    "files": {},
    "package_versions": {},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").write_bytes(b"0123")
    manifest.write_manifest(
        tmp_path,
        "checkpoint",
        task="ctc",
        family="wav2vec2",
        origin=Origin(**ORIGIN, folder=tmp_path),
        files=["weights"],
        packages=["pytest", "nothing-of-that-name"],
        details={"a": 1},
    )
    return tmp_path


def test_what_was_written_is_read(folder):
    found = manifest.find_manifest(folder)
    assert (found.artifact, found.task, found.family, found.origin) == ("checkpoint", "ctc", "wav2vec2", ORIGIN)
    assert found.files == {"weights": "1be2e452b46d7a0d9656bbb1f768e8248eba1b75baed65f5d99eafa948899a6a"}
    assert found.sections == {"details": {"a": 1}}
    assert found.package_versions["pytest"]
    assert found.package_versions["nothing-of-that-name"] is None
    found.verify_files()
    manifest.update_manifest(folder, details={}, metrics=[1])
    assert manifest.find_manifest(folder).sections == {"details": {}, "metrics": [1]}


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"012"), lambda file: file.unlink()])
def test_missing_and_changed_files_are_rejected(folder, damage):
    damage(folder / "weights")
    with pytest.raises(ModelError, match="weights is missing or damaged: export the model again"):
        manifest.find_manifest(folder).verify_files()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"format": 1, "kind": "lora"},
            r"older version of mowa \(format version 1, this one reads 4\)",
        ),
        ({"format_version": 2, "adapter_type": "lora"}, r"older version .*version 2, .*: train the adapter again"),
        (
            {"format_version": 3, "format": "onnx", "files": {}},
            r"older version .*version 3, .*: export the model",
        ),
        ({"format_version": 5}, "has format version 5, this version of mowa reads 4: update mowa"),
        ({}, r"older version of mowa \(format version None"),
        (HEADER | {"artifact": "song"}, "unknown artifact 'song'"),
        (HEADER | {"artifact": []}, "is damaged .'artifact' is a JSON list, expected a string"),
        (HEADER | {"files": None}, "is damaged .'files' is a JSON NoneType, expected an object"),
        (HEADER | {"files": ["weights"]}, "is damaged .'files' is a JSON list, expected an object"),
        (HEADER | {"files": {"weights": 1}}, "is damaged .the checksum of 'weights' is no string"),
        (HEADER | {"origin": "base"}, "is damaged .'origin' is a JSON str, expected an object"),
        (HEADER | {"artifact": "export"}, "is damaged .its format is missing"),
        (HEADER | {"format": 3}, "is damaged .its format is missing or no string"),
        ({"format_version": 1, "artifact": []}, "older version .*: write it again"),
        ({"format_version": 4, "artifact": "run"}, r"is damaged \('task' is missing\)"),
    ],
)
def test_other_manifests_are_rejected(tmp_path, content, message):
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    assert FORMAT_VERSION == 4
    with pytest.raises(ModelError, match=message):
        manifest.find_manifest(tmp_path)


def test_a_folder_without_a_manifest(tmp_path):
    assert manifest.find_manifest(tmp_path) is None
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(ModelError, match=r"mowa\.json cannot be read"):
        manifest.find_manifest(tmp_path)
