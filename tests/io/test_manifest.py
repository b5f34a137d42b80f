"""Format versions of mowa.json."""

import json

import pytest

from mowa.errors import ModelError
from mowa.io import manifest
from mowa.io.manifest import MANIFEST_FILE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"format": 1, "kind": "lora"},
            r"older version of mowa \(format version 1, this one reads 2\): train again",
        ),
        ({"format_version": 1}, r"older version of mowa \(format version 1, this one reads 2\): train again"),
        ({"format_version": 3}, "has format version 3, this version of mowa reads 2: update mowa"),
        ({}, r"older version of mowa \(format version None"),
    ],
)
def test_other_format_versions_are_rejected(tmp_path, content, message):
    with pytest.raises(ModelError, match=message):
        manifest.validate_format_version(tmp_path, content, 2, "train again")


def test_the_expected_format_version_is_accepted(tmp_path):
    manifest.validate_format_version(tmp_path, {"format_version": 2}, 2, "train again")


def test_exports_are_recognized_in_any_version():
    assert manifest.is_export_manifest({"format_version": 3, "format": "onnx", "files": {}})
    assert manifest.is_export_manifest({"format": 2, "kind": "onnx", "files": {}})
    assert not manifest.is_export_manifest({"format_version": 2, "adapter_type": "lora"})
    assert not manifest.is_export_manifest({})


def test_a_folder_without_a_manifest_has_an_empty_one(tmp_path):
    assert manifest.read_manifest(tmp_path) == {}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"format_version": 2}))
    assert manifest.read_manifest(tmp_path) == {"format_version": 2}
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(ModelError, match=r"mowa\.json cannot be read"):
        manifest.read_manifest(tmp_path)
