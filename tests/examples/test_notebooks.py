"""The notebooks run from top to bottom on tiny models, each cell as it stands but for the parameters."""

from pathlib import Path

import pytest

from tests.checkpoints import corpus, tiny
from tests.training.causal import chats

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def run(name: str, folder: Path, parameters: dict[str, object]) -> list[str]:
    """Execute a notebook in `folder` with other parameters, and return what each code cell printed."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    names = [line.partition(" = ")[0] for line in cell.source.splitlines()]
    assert set(parameters) == set(names)
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        printed.append("".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout"))
    return printed


@pytest.mark.filterwarnings("default")  # the kernel's own
def test_transcribe_and_fine_tune(tmp_path):
    tiny(tmp_path / "model")
    manifest = corpus(tmp_path / "data", 10)
    printed = run(
        "transcribe-and-fine-tune.ipynb",
        tmp_path,
        {
            "MODEL": str(tmp_path / "model"),
            "RECORDING": str(tmp_path / "data" / "9.wav"),
            "MANIFEST": manifest,
            "OUT": "fine-tuned",
            "STEPS": 2,
        },
    )
    assert "wer" in printed[4]
    assert (tmp_path / "fine-tuned" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("default")
def test_chat_fine_tune(tmp_path):
    chats.model(tmp_path / "model")
    chats.conversations(tmp_path / "chats.jsonl")
    printed = run(
        "chat-fine-tune.ipynb",
        tmp_path,
        {
            "MODEL": str(tmp_path / "model"),
            "CONVERSATIONS": str(tmp_path / "chats.jsonl"),
            "OUT": "adapter",
            "STEPS": 2,
            "LENGTH": 128,
            "QUESTION": "how are you",
        },
    )
    assert "loss" in printed[2]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
