"""Kill a short run at its n-th file operation, resume it, and compare the weights with those of an undisturbed run.

    python -m tests.training.kill_points ctc|causal|pl_tiny FOLDER all|FRACTION…

Prints a JSON object: the number of points, and what went wrong at which. Every run is a forked process of its own that
ends by `os._exit`, so nothing is cleaned up, as after SIGKILL. A file that Python opens has a point before it exists
and one at which it is empty; a file that safetensors or torch writes has a point at which half of it is there; renaming
and deleting have a point before.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import safetensors.torch
import torch
from safetensors.torch import load_file

from mowa.training.config import dispatch, schema
from mowa.training.config.ctc import parse
from projects.pl_tiny import pretrain
from projects.pl_tiny.recipe import AugmentSchedule, DevSet, OptimizerConfig, Source, Stage, StagedRecipe
from projects.pl_tiny.text import POLISH_ALPHABET
from tests.checkpoints import corpus, tiny
from tests.training.causal import chats

KILLED = 9
SMALL_NET = {
    "conv_dim": [8] * 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "conv_bias": True,
    "do_stable_layer_norm": True, "layerdrop": 0.0,
}  # fmt: skip


class Killer:
    """Count file operations under `root`, and end the process at number `kill_at` (0: never)."""

    def __init__(self, root: Path, kill_at: int) -> None:
        self.root, self.kill_at, self.count, self.inside = str(root), kill_at, 0, False
        self.names: list[str] = []
        sys.addaudithook(self.on_event)
        self.wrap(safetensors.torch, "serialize_file", 1)
        self.wrap(torch, "save", 1)

    def point(self, name: str) -> bool:
        self.count += 1
        self.names.append(name)
        return self.count == self.kill_at

    def on_event(self, event: str, args: tuple) -> None:
        if self.inside:
            return
        if event == "open" and isinstance(args[0], str) and args[0].startswith(self.root):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                if self.point(f"before {args[0]}"):
                    os._exit(KILLED)
                if self.point(f"empty {args[0]}"):
                    self.inside = True
                    Path(args[0]).write_bytes(b"")
                    os._exit(KILLED)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            path, relative = str(args[0]), event in ("os.remove", "os.rmdir") and args[1] != -1
            if (relative or path.startswith(self.root)) and self.point(f"{event} {path}"):
                os._exit(KILLED)

    def wrap(self, module: object, name: str, place: int) -> None:
        """Let a function that writes a file without Python's `open` have a point at which half of it is written."""
        write = getattr(module, name)

        def halved(*args, **kwargs):
            path = args[place] if len(args) > place else kwargs.get("filename", kwargs.get("f"))
            found = write(*args, **kwargs)
            if isinstance(path, str | Path) and str(path).startswith(self.root) and self.point(f"half {path}"):
                os.truncate(path, Path(path).stat().st_size // 2)
                os._exit(KILLED)
            return found

        setattr(module, name, halved)


def make_run(kind: str, folder: Path):
    """Return a function of an output folder that trains three steps, with a checkpoint after each."""
    if kind == "causal":
        tree = chats.recipe(folder, optimizer__max_steps=3, evaluation__eval_steps=1)
        recipe = dispatch.parse(schema.apply_overrides(tree, {"data.max_eval_samples": 4}), "test")
        return lambda out: dispatch.train(recipe, out, threads=1)
    manifest = corpus(folder / "corpus", 8)
    if kind == "ctc":
        base = tiny(folder / "base", conv_dim=(8,) * 7, intermediate_size=32, num_hidden_layers=1)
        tree = {
            "model": str(base),
            "data": {"train": manifest, "dev": manifest, "max_eval_samples": 2},
            "batch": {"seconds": 1.0},
            "optimizer": {"max_steps": 3, "precision": "float32", "learning_rate": 1e-3},
            "evaluation": {"eval_steps": 1, "log_examples": 0},
        }
        recipe = parse(tree, "test")
        return lambda out: dispatch.train(recipe, out, threads=1)
    how = OptimizerConfig(
        max_steps=3, batch_s=1.0, shortest_first=1, warmup_steps=1, bf16=False, eval_steps=1, average_checkpoints=2
    )
    sets = (Source(manifest),), (DevSet("dev", manifest, 2),)
    stages = tuple(Stage(name, *sets, augment=AugmentSchedule(0, 4), optimizer=how) for name in ("one", "two"))
    staged = StagedRecipe("test", "pl", POLISH_ALPHABET, stages, model_config=SMALL_NET)
    return lambda out: pretrain.train(staged, out, threads=1)


def run_forked(run, out: Path, kill_at: int, log: Path) -> tuple[int, list[str]]:
    """Run in a forked process and return its exit code and the names of its file operations."""
    names = log.with_suffix(".json")
    pid = os.fork()
    if pid == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            killer = Killer(out, kill_at)
            run(out)
            names.write_text(json.dumps(killer.names))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, json.loads(names.read_text()) if code == 0 else []


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(out.glob("*.safetensors")) for name, value in load_file(file).items()}


def check_point(run, folder: Path, number: int, expected: dict[str, torch.Tensor]) -> str:
    """Kill at one point, resume, and return what is wrong; empty if nothing is."""
    out, log = folder / f"killed-{number}", folder / "log.txt"
    code, _ = run_forked(run, out, number, log)
    if code != KILLED:
        return f"exit code {code}, not killed: {log.read_text()[-1500:]}"
    code, _ = run_forked(run, out, 0, log)
    if code != 0:
        return f"does not resume: {log.read_text()[-1500:]}"
    found = weights(out)
    if found.keys() != expected.keys() or not all(torch.equal(value, expected[name]) for name, value in found.items()):
        return "other weights"
    left = [str(path.relative_to(out)) for path in [*out.rglob("checkpoint-*"), *out.rglob("*.partial")]]
    shutil.rmtree(out)
    return f"left over: {left}" if left else ""


def main(kind: str, folder: Path, points: list[str]) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    run = make_run(kind, folder)
    code, names = run_forked(run, folder / "whole", 0, folder / "log.txt")
    if code != 0:
        return {"points": 0, "wrong": {"undisturbed": (folder / "log.txt").read_text()[-3000:]}}
    count, expected = len(names), weights(folder / "whole")
    numbers = range(1, count + 1) if points == ["all"] else [round(float(point) * count) for point in points]
    found = {number: check_point(run, folder, number, expected) for number in numbers}
    return {"points": count, "wrong": {f"{n} ({names[n - 1]})": text for n, text in found.items() if text}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]).absolute(), sys.argv[3:]), indent=1))
