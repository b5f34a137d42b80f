"""What `mowa explain` says of a net without weights is what `accelerate` does with it, and what speech engines do."""

import pytest
from click.testing import CliRunner

import mowa
from mowa.cli.main import cli
from mowa.families import get_family
from mowa.models import explain
from mowa.models.causal.accelerate import accelerate
from mowa.models.ctc_encoder import chunk_mask, cpu_plan, packing
from tests.checkpoints import KINDS
from tests.checkpoints import tiny as tiny_speech
from tests.families.tiny import CAUSAL, tiny


@pytest.mark.parametrize("name", CAUSAL)
def test_language_models_are_accelerated_as_explained(name):
    net, family = tiny(name), get_family(name)
    bare = explain.build_on_meta(net.config, family)
    assert all(weight.is_meta for weight in bare.parameters())
    rows = {row.layer_type: row for row in explain.explain_modules(bare, family, device="cpu", dtype="float32")}
    changes = accelerate(net)
    done = {change.operation: change.count for change in changes if change.count}
    norms = [row for label, row in rows.items() if label.startswith("RMS norm") and row.implementation == "mowa"]
    assert sum(row.count for row in norms) == done.get("rms norm", 0)
    assert (rows["loss"].implementation == "mowa") == ("loss" in done)
    assert not {"swiglu", "geglu"} & done.keys()
    assert all(row.implementation == "transformers" for label, row in rows.items() if label.startswith("MLP"))
    assert ("experts" in rows) == ("experts" in family.unsupported)
    assert rows["linears with LoRA"].count > 0


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_speech_models_are_explained_as_they_run(tmp_path, kind):
    model = mowa.load(str(tiny_speech(tmp_path, *kind)))
    bare = explain.build_on_meta(model.net.config, model.family)
    rows = explain.explain_modules(bare, model.family, device="cpu", dtype="float32")
    reasons = (
        cpu_plan.unsupported_reason(model.net, "float32"),
        *(module.unsupported_reason(model.net) for module in (packing, chunk_mask)),
    )
    stock = ("transformers", "padded", "sliding window")
    assert [row.implementation == name for row, name in zip(rows, stock, strict=True)] == [bool(one) for one in reasons]
    assert [row.reason for row, reason in zip(rows, reasons, strict=True) if reason] == [one for one in reasons if one]


def test_a_gpu_is_explained_without_one(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    done = CliRunner().invoke(cli, ["explain", str(tmp_path), "--device", "cuda:9.0"])
    assert done.exit_code == 0, done.output
    assert "not measured to be faster on cuda" in done.output
