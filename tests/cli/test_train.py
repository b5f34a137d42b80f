"""`mowa train`: what flags do to a recipe, what is printed, and who is called to train."""

import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mowa import loading
from mowa.cli import docs_pages, recipe_options
from mowa.cli.main import main
from mowa.cli.train import train
from mowa.training.config import ctc, schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.distributed import launch as parallel
from mowa.types import Model
from tests.checkpoints import corpus, tiny
from tests.data.chat.templates import LEAVES, OWN, TEXT, another, trees

ROOT = Path(__file__).parents[2]
LEAST = {"model": "m", "data": {"train": "a.jsonl"}}
FRESH = ROOT / "recipes" / "micro.yaml"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def flags(leaf, value):
    """A knob as one would write it on the command line."""
    flag = recipe_options.flag_name(leaf)
    if leaf.hint is bool:
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        pairs = (f"{escaped(key, ',= ')}={escaped(item, ',')}" for key, item in value.items())
        return [f"{flag}={','.join(pairs)}"]
    if leaf.hint == tuple[ctc.DataSource, ...]:
        written = (
            part["path"] + ("@" + part["split"] if part["split"] or "@" in part["path"] else "") for part in value
        )
        return [f"{flag}={part}" for part in written] or [f"{flag}="]
    if isinstance(value, list):
        return [f"{flag}={','.join(map(str, value))}"]
    return [f"{flag}={value}"]


def escaped(text, signs):
    return "".join(f"\\{c}" if c in f"\\{signs}" else c for c in text)


def turned(arguments):
    return recipe_options.collect_overrides(train.make_context("train", list(arguments)))  # click empties the list


# --- flags ⇄ YAML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.dotted != "task"], ids=lambda leaf: leaf.dotted)
def test_a_flag_turns_the_knob_that_yaml_turns_and_no_other(leaf):
    by_yaml = ctc.parse(schema.apply_overrides(LEAST, {leaf.dotted: another(leaf)}), "yaml")
    by_flag = ctc.parse(schema.apply_overrides(LEAST, turned(flags(leaf, another(leaf)))), "flags")
    assert by_flag == by_yaml != ctc.parse(LEAST, "neither")


@settings(max_examples=20, deadline=None)
@given(trees())
def test_a_whole_recipe_in_flags(turns):
    for name in ("train", "dev", "test", "replay"):  # shares are YAML's, and a split with a dot or a slash is
        for part in turns[f"data.{name}"]:
            part |= {"share": 0.0, "split": part["split"].translate(dict.fromkeys(map(ord, "/.@")))}
    arguments = [flag for leaf in LEAVES for flag in flags(leaf, turns[leaf.dotted])]
    by_flags = ctc.parse(schema.apply_overrides({}, turned(arguments)), "flags")
    assert by_flags == ctc.parse(schema.apply_overrides({}, turns), "yaml")


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXT.filter(bool), TEXT, max_size=4))
def test_pairs_of_any_letters(pairs):
    (leaf,) = (leaf for leaf in LEAVES if leaf.dotted == "data.letters")
    assert turned(flags(leaf, pairs)) == {"data.letters": pairs}


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ("ё=е, й=и", {"ё": "е", "й": "и"}),
        ("", {}),
        ("-=", {"-": ""}),
        (r"\,=x,a=b=c", {",": "x", "a": "b=c"}),
        (r"\ =_", {" ": "_"}),
        (" =_", {" ": "_"}),
    ],
)
def test_pairs_as_people_write_them(given, pairs):
    assert turned([f"--data.letters={given}"]) == {"data.letters": pairs}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("a/b.jsonl", {"path": "a/b.jsonl"}),
        ("cv/pl@test", {"path": "cv/pl", "split": "test"}),
        ("me@home/a.jsonl", {"path": "me@home/a.jsonl"}),
        ("take@2.jsonl", {"path": "take@2.jsonl"}),
        ("hub:a/b@main@dev", {"path": "hub:a/b@main", "split": "dev"}),
        ("hub:a/b@main@", {"path": "hub:a/b@main", "split": ""}),
        ("@odd", {"path": "@odd"}),
    ],
)
def test_recordings_as_people_write_them(given, part):
    assert turned(["--data", given]) == turned(["--data.train", given]) == {"data.train": [part]}


def test_everyday_flags_stand_for_their_knobs():
    leaf_of = {leaf.dotted: leaf for leaf in LEAVES}
    for name, dotted in recipe_options.KEY_BY_FLAG.items():
        if dotted == "task":  # which has one word here, and another for texts
            continue
        said = flags(leaf_of[dotted], another(leaf_of[dotted]))
        short = [flag.replace(recipe_options.flag_name(leaf_of[dotted]), f"--{name}", 1) for flag in said]
        assert turned(short) == turned(said)
        assert set(turned(said)) == {dotted}


def test_nothing_given_turns_nothing():
    assert turned([]) == turned(["recipe.yaml", "--threads", "2"]) == {}
    assert turned(["--dev", "a", "--dev", "b@x"]) == {"data.dev": [{"path": "a"}, {"path": "b", "split": "x"}]}
    assert turned(["--dev="]) == {"data.dev": []}


def test_one_knob_under_two_names():
    with pytest.raises(click.UsageError, match=r"--steps and --optimise\.steps are one knob"):
        turned(["--steps", "3", "--optimise.steps", "4"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--optimise.learning-rat=1", "--optimise.learning-rate"),
        ("--optimize.steps=1", "--optimise.steps"),
        ("--step=1", "--steps"),
        ("--no-optimise.checkpoint", "--no-optimise.checkpointing"),
    ],
)
def test_wrong_flags_get_the_nearest_right_one(capsys, wrong, right):
    code, _, err = run(capsys, wrong)
    assert code == 2
    assert right in err.splitlines()[-1]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {train: a.jsonl}\noptimise: {steps: 7, clip: 2.0}\n")
    return path


def test_dry_run_prints_the_recipe_that_the_flags_made(capsys, recipe):
    code, out, err = run(capsys, recipe, "--dry-run", "--steps", 9, "--train", "top-2", "--no-watch.frozen")
    assert (code, err) == (0, "")
    expected = {"optimise.steps": 9, "train": "top-2", "watch.frozen": False}
    assert ctc.parse(yaml.safe_load(out), "printed") == ctc.read_recipe(recipe, expected)
    assert ctc.read_recipe(recipe, expected).optimizer.max_grad_norm == 2.0


def test_dry_run_without_a_recipe_and_of_one_from_nothing(capsys):
    code, out, _ = run(capsys, "--dry-run", "--model", "m", "--data", "a.jsonl")
    assert code == 0
    assert ctc.parse(yaml.safe_load(out), "printed") == ctc.parse(LEAST, "least")
    code, out, _ = run(capsys, FRESH, "--dry-run")
    assert code == 0
    assert yaml.safe_load(out)["stages"][0]["name"] == "letters"


def test_knobs_lists_them_all(capsys):
    code, out, _ = run(capsys, "--knobs")
    assert code == 0
    listed = [line.split()[0] for line in out.splitlines()[1:]]
    assert listed[: len(LEAVES)] == [leaf.dotted for leaf in LEAVES]
    of_texts = {leaf.dotted for leaf in schema.iter_options(CausalRecipe)}
    assert set(listed) == {leaf.dotted for leaf in LEAVES} | of_texts
    assert "  --learning-rate  0.0 " in next(line for line in out.splitlines() if "optimise.learning_rate" in line)


def test_help_shows_the_everyday_ones_alone():
    text = CliRunner().invoke(train, ["--help"]).output
    assert all(f"--{name} " in text for name in recipe_options.KEY_BY_FLAG)
    assert "--optimise." not in text.split("Options:")[1]
    assert "[optimise.seed; default: 0]" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "mowa: name a recipe, or give --model and --data; `mowa train --knobs` lists every knob"),
        (["--model", "m"], "mowa: name a recipe, or give --data; `mowa train --knobs` lists every knob"),
        (["lost.yaml"], "mowa: lost.yaml: no such recipe"),
        ([FRESH, "--steps", 3, "--lora.rank", 4], f"mowa: {FRESH} trains from nothing, and --lora.rank, --steps are"),
        (["--model", "m", "--data", "a", "--batch.seconds", 0], "mowa: command line: batch: seconds is 0.0; it must"),
        (
            ["RECIPE", "--epochs", 3],
            "mowa: RECIPE says how many steps, so --epochs would change nothing: add --steps 0",
        ),
        (["RECIPE", "--train", "top-x"], "mowa: RECIPE: train: 'top-x' is none of head, adapters"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, recipe, arguments, says):
    arguments = [recipe if argument == "RECIPE" else argument for argument in arguments]
    code, out, err = run(capsys, *arguments, "-o", "never")
    assert (code, out) == (2, "")
    assert err.startswith(says.replace("RECIPE", str(recipe)))
    assert len(err.splitlines()) == 1
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle: m\ndata: {train: a}\n", "modle is no key here; did you mean model?"),
        ("name: x\nstagse: []\n", "stagse is no key here; did you mean stages?"),
        ("model: m\nstages: []\n", "model is no key here"),
        ("- model: m\n", "expected keys and values"),
    ],
)
def test_whose_recipe_it_is(capsys, tmp_path, text, says):
    (tmp_path / "r.yaml").write_text(text)
    code, _, err = run(capsys, tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"mowa: {tmp_path / 'r.yaml'}: {says}")


def test_a_folder_is_needed_to_train(capsys, recipe):
    code, _, err = run(capsys, recipe)
    assert code == 2
    assert err.splitlines()[-1] == "Error: Missing option '-o' / '--out'."


@pytest.fixture
def calls(monkeypatch):
    """Who is called to train, in order, and with what; nobody does."""
    seen = []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    tune = SimpleNamespace(tune=lambda plan, model, out, *, threads: seen.append(("tune", plan, model, out, threads)))
    monkeypatch.setitem(sys.modules, "mowa.training.ctc.trainer", tune)
    monkeypatch.setattr("mowa.training.ctc.trainer", tune, raising=False)
    monkeypatch.setattr("mowa.loading.ctc.load", lambda name, **how: Model(name, None, None, None, how))
    launch = lambda plan, out, *, threads: seen.append(("launch", plan, out, threads))  # noqa: E731
    monkeypatch.setattr(parallel, "launch_workers", launch)
    return seen


@pytest.mark.parametrize(("vocabulary", "head"), [("keep", True), ("extend", True), ("new", False)])
def test_one_process_loads_and_tunes(capsys, recipe, calls, tmp_path, vocabulary, head):
    out = tmp_path / "out"
    code, said, _ = run(capsys, recipe, "-o", out, "--vocabulary", vocabulary, "--threads", 3)
    plan = ctc.read_recipe(recipe, {"vocabulary": vocabulary})
    assert calls == [("tune", plan, Model("m", None, None, None, {"head": head}), out, 3)]
    assert (code, said) == (0, f"{out}\n")


def test_several_are_launched_and_the_first_of_them_says_where(capsys, monkeypatch, recipe, calls, tmp_path):
    out = tmp_path / "out"
    plan = ctc.read_recipe(recipe, {"parallel.devices": 2})
    assert run(capsys, recipe, "-o", out, "--devices", 2)[:2] == (0, "")
    assert calls == [("launch", plan, out, None)]
    calls.clear()
    for rank, said in (("0", f"{out}\n"), ("1", "")):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(capsys, recipe, "-o", out, "--devices", 2)[:2] == (0, said)
    assert [name for name, *_ in calls] == ["tune", "tune"]


def test_from_flags_to_a_checkpoint(capsys, tmp_path):
    base = tiny(tmp_path / "base", conv_dim=(8,) * 7, intermediate_size=32)
    manifest = corpus(tmp_path / "corpus", 8)
    code, out, err = run(
        capsys,
        *("-o", tmp_path / "out", "--model", base, "--data", manifest, "--dev", manifest, "--train", "head"),
        *("--steps", 2, "--batch.seconds", 4, "--optimise.precision", "float32", "--threads", 1),
    )
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "out")  # behind what deepspeed says, where it is installed
    assert ctc.read_recipe(tmp_path / "out" / "recipe.yaml").optimizer.max_steps == 2
    assert len(loading.load(str(tmp_path / "out")).vocabulary) > 0


# --- the page ---------------------------------------------------------------------------------------------------------


def test_docs_are_what_the_classes_say():
    assert (ROOT / "docs" / "recipes.md").read_text() == docs_pages.render_recipes_page(), "run `make docs`"


def test_docs_show_every_knob_with_its_default():
    rows = [line.split(" | ") for line in docs_pages.render_recipes_page().splitlines() if line.startswith("| `")]
    found = {(row[0][3:-1], row[2].strip("`| ")) for row in rows}
    assert {(leaf.path[-1], recipe_options.format_default(leaf)) for leaf in LEAVES} <= found


def test_the_page_that_is_out_of_date_is_named(tmp_path):
    docs_pages.main([str(tmp_path)])
    docs_pages.main([str(tmp_path), "--check"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cli.md", "recipes.md"]
    (tmp_path / "recipes.md").write_text("old")
    with pytest.raises(SystemExit, match=r"recipes\.md out of date: run `make docs`$"):
        docs_pages.main([str(tmp_path), "--check"])
    docs_pages.main(["--check", str(tmp_path / "cli.md")])


def test_what_is_drawn_reaches_every_knob():
    assert set(OWN) <= {leaf.dotted for leaf in LEAVES}  # a knob that was renamed is not left to chance
