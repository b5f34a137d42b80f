"""Which recordings `mowa bench` measures."""

import pytest

from mowa.errors import ModelError
from mowa.evaluation import bench
from tests.checkpoints import corpus


@pytest.mark.parametrize(("max_samples", "count"), [(3, 3), (0, 5), (9, 5)])
def test_max_samples_limits_the_recordings_and_zero_takes_all(tmp_path, monkeypatch, max_samples, count):
    def measure(request):
        assert len(set(request.files)) == count
        raise ModelError("measured")

    monkeypatch.setattr(bench, "measure", measure)
    (result,) = bench.run_bench(
        bench.expand_cases(["net"], [], []), corpus(tmp_path / "c", 5), "", max_samples, (), lambda *_: None
    )
    assert result.error == "measured"
