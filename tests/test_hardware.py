import json
import subprocess
import sys

import pytest
import torch

from mowa import hardware


def timing(highest_s=4.0, medium_s=2.0, medium_error=1e-7, bfloat16_s=1.0):
    return hardware.MatmulTiming(highest_s, medium_s, medium_error, bfloat16_s)


@pytest.mark.parametrize(
    ("features", "measured", "expected"),
    [
        (("bf16",), timing(), hardware.Precision("bfloat16")),
        ((), timing(), hardware.Precision("float32", "medium")),
        (("bf16",), timing(bfloat16_s=1.9), hardware.Precision("float32", "medium")),
        ((), timing(medium_error=1e-3), hardware.Precision("float32", "highest")),
        ((), timing(medium_s=5.0), hardware.Precision("float32", "highest")),
    ],
)
def test_precision_depends_on_features_and_timings(monkeypatch, features, measured, expected):
    monkeypatch.setattr(hardware, "cpu_features", lambda: features)
    monkeypatch.setattr(hardware, "_cached_timing", lambda *_: measured)
    assert hardware.select_precision(64, 64) == expected
    assert hardware.select_float32_precision(64, 64).dtype == "float32"


def test_timings_are_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("MOWA_CACHE", str(tmp_path))
    first = hardware._cached_timing(63, 65)
    monkeypatch.setattr(hardware, "benchmark_matmul", lambda *_: pytest.fail("measured again"))
    assert hardware._cached_timing(63, 65) == first
    assert len(json.loads((tmp_path / "hardware.json").read_text())) == 1


def test_matmul_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    with hardware.matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before


def test_of_several_contexts_the_most_exact_precision_applies():
    before = torch.get_float32_matmul_precision()
    one, other = hardware.matmul_precision("medium"), hardware.matmul_precision("highest")
    one.__enter__()
    other.__enter__()
    assert torch.get_float32_matmul_precision() == "highest"
    one.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "highest"
    other.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == before


def test_machine_properties():
    assert hardware.cpu_count() >= 1
    assert hardware.total_memory_bytes() > 1e8
    assert hardware.cpu_name()
    assert hardware.optional_package_versions()["torch"]


def test_peak_memory_excludes_the_parent():
    """getrusage of a small child includes the memory of its parent at the fork."""
    code = "from mowa import hardware; print(hardware.peak_rss_bytes())"
    parent = (
        f"import subprocess, sys; x = bytearray(b'1') * 400_000_000; subprocess.run([sys.executable, '-c', {code!r}])"
    )
    completed = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 1_000_000 < int(completed.stdout) < 300_000_000
