"""Restore the objects of tables with a schema: parquet files, and data sets of `datasets`.

There, objects of one column have the same keys, and those that an object lacks are null; JSON columns are strings in
parquet. A null in JSON is one of the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mowa.data.manifests.tables import import_optional


def read_parquet_features(path: Path) -> Mapping[str, Any]:
    """Return the `datasets.Features` of a parquet file; nothing if it cannot be read or has types that they lack."""
    datasets, parquet = import_optional("datasets"), import_optional("pyarrow.parquet")
    try:
        features: Mapping[str, Any] = datasets.Features.from_arrow_schema(parquet.read_schema(path))
    except (import_optional("pyarrow").ArrowException, OSError, ValueError, TypeError):
        return {}
    return features


def read_saved_features(folder: Path) -> Mapping[str, Any]:
    """Return the `datasets.Features` of a data set that `datasets` saved; nothing if it names none."""
    try:
        described = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8")).get("features")
        features: Mapping[str, Any] = import_optional("datasets").Features.from_dict(described or {})
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return features


def restore_row(fields: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the keys that its objects lack. Of columns without a feature, no object keeps a null."""
    return {name: _restore(value, features.get(name)) for name, value in fields.items()}


def _restore(value: Any, feature: Any) -> Any:
    if type(feature).__name__ == "Json":
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        features = feature if isinstance(feature, Mapping) else {}
        return {key: _restore(one, features.get(key)) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_restore(one, inner) for one in value]
    return value
