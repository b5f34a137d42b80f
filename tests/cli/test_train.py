"""`mowa train`: options and recipes, output, and which function trains."""

import re
from pathlib import Path

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
from mowa.errors import RecipeError
from mowa.families import get_family
from mowa.training.config import ctc, dispatch, schema
from mowa.training.config.causal import CausalRecipe
from mowa.training.distributed import launch as parallel
from mowa.types import Model
from tests.checkpoints import corpus, tiny
from tests.training.config.strategies import CAUSAL_ONLY, LEAVES, OWN, TEXT, another, trees

ROOT = Path(__file__).parents[2]
HELP = ["-h", "--help"]  # as under `mowa`: click keeps a command's first help option for good
LEAST = {"model": "m", "data": {"train": "a.jsonl"}}
STAGED = ROOT / "projects" / "pl_tiny" / "recipes" / "micro.yaml"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["train", *map(str, arguments)])
    return end.value.code, *capsys.readouterr()


def flags(leaf, value):
    """Return the command-line arguments that set an option."""
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


def flag_body(leaf):
    return recipe_options.flag_name(leaf).removeprefix("--")


def escaped(text, signs):
    return "".join(f"\\{c}" if c in f"\\{signs}" else c for c in text)


def overrides(arguments):
    context = train.make_context("train", list(arguments), help_option_names=HELP)  # click empties the list
    return recipe_options.collect_overrides(context)


# --- flags ⇄ YAML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in LEAVES if leaf.dotted not in ("task", *CAUSAL_ONLY)], ids=lambda leaf: leaf.dotted
)
def test_an_option_equals_the_key_in_yaml(leaf):
    chunked = leaf.path[0] == "streaming" and leaf.path[-1] != "chunk_s"
    least = LEAST | ({"streaming": {"chunk_s": [0.32, 0.64]}} if chunked else {})
    by_yaml = ctc.parse(schema.apply_overrides(least, {leaf.dotted: another(leaf)}), "yaml")
    by_flag = ctc.parse(schema.apply_overrides(least, overrides(flags(leaf, another(leaf)))), "flags")
    assert by_flag == by_yaml != ctc.parse(least, "neither")


@settings(max_examples=20, deadline=None)
@given(trees())
def test_a_whole_recipe_in_options(turns):
    for name in ("train", "dev", "test", "replay"):  # shares are YAML's, and a split with a dot or a slash is
        for part in turns[f"data.{name}"]:
            part |= {"share": 0.0, "split": part["split"].translate(dict.fromkeys(map(ord, "/.@")))}
    arguments = [flag for leaf in LEAVES for flag in flags(leaf, turns[leaf.dotted])]
    by_flags = ctc.parse(schema.apply_overrides({}, overrides(arguments)), "flags")
    assert by_flags == ctc.parse(schema.apply_overrides({}, turns), "yaml")


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(TEXT.filter(bool), TEXT, max_size=4))
def test_pairs_of_any_characters(pairs):
    (leaf,) = (leaf for leaf in LEAVES if leaf.dotted == "data.char_map")
    assert overrides(flags(leaf, pairs)) == {"data.char_map": pairs}


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
def test_pairs(given, pairs):
    assert overrides([f"--data.char-map={given}"]) == {"data.char_map": pairs}


def test_variables_of_the_chat_template_have_types():
    given = "enable_thinking=False,top=3,name=a b,no=true"
    expected = {"enable_thinking": False, "top": 3, "name": "a b", "no": True}
    assert overrides([f"--chat-template-kwargs={given}"]) == {"data.chat_template_kwargs": expected}


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
def test_data_sources(given, part):
    assert overrides(["--data", given]) == overrides(["--data.train", given]) == {"data.train": [part]}


def test_short_flags():
    leaf_of = {leaf.dotted: leaf for leaf in LEAVES}
    for name, dotted in recipe_options.KEY_BY_FLAG.items():
        if dotted == "task":  # its other value is for another kind of recipe
            continue
        full = flags(leaf_of[dotted], another(leaf_of[dotted]))
        short = [flag.replace(flag_body(leaf_of[dotted]), name, 1) for flag in full]
        assert overrides(short) == overrides(full)
        assert set(overrides(full)) == {dotted}


def test_only_given_options_are_overrides():
    assert overrides([]) == overrides(["recipe.yaml", "--threads", "2"]) == {}
    assert overrides(["--dev", "a", "--dev", "b@x"]) == {"data.dev": [{"path": "a"}, {"path": "b", "split": "x"}]}
    assert overrides(["--dev="]) == {"data.dev": []}


def test_the_last_part_of_a_key_is_a_flag_where_it_is_unique():
    full = {leaf.dotted: leaf for leaf in recipe_options.LEAVES}
    assert overrides(["--mask-time-prob", "0.1"]) == {"spec_augment.mask_time_prob": 0.1}
    assert overrides(["--no-check-frozen"]) == {"monitors.check_frozen": False}
    assert recipe_options.leaf_flag_name(full["data.train"]) == ""  # it would read like a switch
    with pytest.raises(click.NoSuchOption):
        overrides(["--train", "a.jsonl"])
    names = [leaf.path[-1] for leaf in recipe_options.LEAVES]
    for leaf in recipe_options.LEAVES:
        if leaf.dotted != "data.train":
            assert bool(recipe_options.leaf_flag_name(leaf)) == (names.count(leaf.path[-1]) == 1)


def test_the_last_part_of_a_key_overrides_a_recipe_in_python(recipe):
    found = dispatch.read_recipe(recipe, {"mask_time_prob": 0.1, "seed": 3, "optimizer.max_steps": 9})
    assert (found.spec_augment.mask_time_prob, found.optimizer.seed, found.optimizer.max_steps) == (0.1, 3, 9)
    with pytest.raises(RecipeError, match="train"):
        dispatch.read_recipe(recipe, {"train": "a.jsonl"})


@pytest.mark.parametrize("other", ["--optimizer.max-steps", "--mask-time-prob"])
def test_one_option_under_two_flags_is_refused(other):
    first = {"--optimizer.max-steps": "--max-steps", "--mask-time-prob": "--spec-augment.mask-time-prob"}[other]
    with pytest.raises(click.UsageError, match=f"{first}|{other} are the same option"):
        overrides([first, "1", other, "0.5" if "prob" in other else "4"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--optimizer.learning-rat=1", "--optimizer.learning-rate"),
        ("--optimiser.max-steps=1", "--optimizer.max-steps"),
        ("--max-step=1", "--max-steps"),
        ("--no-optimizer.gradient-checkpoint", "--no-optimizer.gradient-checkpointing"),
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
    path.write_text("model: m\ndata: {train: a.jsonl}\noptimizer: {max_steps: 7, max_grad_norm: 2.0}\n")
    return path


def test_dry_run_prints_the_recipe_with_overrides(capsys, recipe):
    code, out, err = run(
        capsys, recipe, "--dry-run", "--max-steps", 9, "--method", "top-2", "--no-monitors.check-frozen"
    )
    assert (code, err) == (0, "")
    expected = {"optimizer.max_steps": 9, "method": "top-2", "monitors.check_frozen": False}
    assert ctc.parse(yaml.safe_load(out), "printed") == ctc.read_recipe(recipe, expected)
    assert ctc.read_recipe(recipe, expected).optimizer.max_grad_norm == 2.0


def test_dry_run_without_a_recipe(capsys):
    code, out, _ = run(capsys, "--dry-run", "--model", "m", "--data", "a.jsonl")
    assert code == 0
    assert ctc.parse(yaml.safe_load(out), "printed") == ctc.parse(LEAST, "least")


def listed(text):
    """The rows of a table of options: key → (flag, default)."""
    rows = [line.split() for line in text.splitlines() if line]
    return {row[0]: tuple(row[1:3]) for row in rows if row[0] not in ("key", "task:")}


CAUSAL_KEYS = {leaf.dotted for leaf in schema.iter_options(CausalRecipe)}


def test_list_options_lists_each_task_under_its_title(capsys):
    code, out, _ = run(capsys, "--list-options")
    assert code == 0
    speech, text = out.split("task: causal (language models)\n")
    assert speech.startswith("task: ctc (speech recognition, the default)\n")
    assert list(listed(speech)) == [leaf.dotted for leaf in LEAVES]
    assert set(listed(text)) == CAUSAL_KEYS
    assert listed(speech)["optimizer.epochs"] == ("--epochs", "10.0")
    assert listed(text)["optimizer.epochs"] == ("--epochs", "2.0")


@pytest.mark.parametrize(
    ("arguments", "keys", "epochs"),
    [
        (["--task", "causal"], CAUSAL_KEYS, "2.0"),
        (["--task=ctc"], {leaf.dotted for leaf in LEAVES}, "10.0"),
        (["CAUSAL"], CAUSAL_KEYS, "2.0"),
        (["SPEECH"], {leaf.dotted for leaf in LEAVES}, "10.0"),
        (["SPEECH", "--task", "causal"], CAUSAL_KEYS, "2.0"),
    ],
)
def test_list_options_and_help_are_those_of_the_task_at_hand(capsys, recipe, tmp_path, arguments, keys, epochs):
    (tmp_path / "causal.yaml").write_text("task: causal\nmodel: m\n")
    files = {"SPEECH": recipe, "CAUSAL": tmp_path / "causal.yaml"}
    arguments = [files.get(argument, argument) for argument in arguments]
    _, out, _ = run(capsys, *arguments, "--list-options")
    assert set(listed(out)) == keys
    assert listed(out)["optimizer.epochs"] == ("--epochs", epochs)
    for asked in ([*arguments, "--help"], ["--help", *arguments]):
        words = " ".join(run(capsys, *asked)[1].split())
        assert f"[optimizer.epochs; default: {epochs}]" in words
        assert ("--vocabulary" in words) == ("vocabulary" in keys)
        assert "--task causal" not in words


def test_list_options_of_a_missing_recipe_is_an_error(capsys):
    assert run(capsys, "lost.yaml", "--list-options")[2] == "mowa: lost.yaml: no such recipe file\n"
    assert run(capsys, "lost.yaml", "--help")[0] == 0


def test_help_shows_only_the_short_flags_and_the_defaults_of_both_tasks():
    text = CliRunner().invoke(train, ["--help"], help_option_names=HELP).output
    assert all(re.search(rf"--{name}\b", text) for name in recipe_options.KEY_BY_FLAG)
    assert "--optimizer." not in text.split("Options:")[1]
    words = " ".join(text.split())
    assert "[optimizer.seed; default: 0]" in words
    assert "[optimizer.epochs; default: 10.0; with --task causal: 2.0]" in words
    assert "[--task ctc only; default: keep]" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mowa: name a recipe, or give --model and --data; `mowa train --list-options` lists all options"),
        (["--model", "m"], "mowa: name a recipe, or give --data; `mowa train --list-options` lists all options"),
        (["lost.yaml"], "mowa: lost.yaml: no such recipe"),
        ([STAGED], f"mowa: {STAGED}: stages are not supported by mowa train; run `python -m projects.pl_tiny train"),
        (["--model", "m", "--data", "a", "--batch.seconds", 0], "mowa: train: batch: seconds is 0.0; it must"),
        (
            ["RECIPE", "--epochs", 3],
            "mowa: RECIPE sets max_steps, so epochs would have no effect: set max_steps to 0 as well",
        ),
        (["RECIPE", "--method", "top-x"], "mowa: RECIPE: method: 'top-x'"),
    ],
)
def test_errors_are_one_line(capsys, recipe, arguments, message):
    arguments = [recipe if argument == "RECIPE" else argument for argument in arguments]
    code, out, err = run(capsys, *arguments, "-o", "never")
    assert (code, out) == (2, "")
    assert err.startswith(message.replace("RECIPE", str(recipe)))
    assert len(err.splitlines()) == 1
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m\ndata: {train: a}\n", "unknown key modle; did you mean model?"),
        ("model: m\nstages: []\n", "unknown key stages"),
        ("- model: m\n", "expected keys and values"),
    ],
)
def test_errors_in_recipes(capsys, tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    code, _, err = run(capsys, tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"mowa: {tmp_path / 'r.yaml'}: {message}")


def test_an_output_folder_is_required(capsys, recipe):
    code, _, err = run(capsys, recipe)
    assert code == 2
    assert err.splitlines()[-1] == "Error: Missing option '-o' / '--out'."


@pytest.fixture
def calls(monkeypatch):
    """Record calls of the functions that train, in order, instead of training."""
    seen = []
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    train = lambda task, recipe, model, out, threads: seen.append(("train", recipe, model, out, threads))  # noqa: E731
    monkeypatch.setattr("mowa.training.loop.train", train)
    monkeypatch.setattr("mowa.loading.read_task", lambda name: "ctc")
    monkeypatch.setattr(
        "mowa.loading.ctc.load", lambda name, **options: Model(name, get_family("wav2vec2"), None, options)
    )
    launch = lambda recipe, out, *, threads: seen.append(("launch", recipe, out, threads))  # noqa: E731
    monkeypatch.setattr(parallel, "launch_workers", launch)
    return seen


@pytest.mark.parametrize(("vocabulary", "head"), [("keep", True), ("extend", True), ("new", False)])
def test_one_process_loads_and_trains(capsys, recipe, calls, tmp_path, vocabulary, head):
    out = tmp_path / "out"
    code, printed, _ = run(capsys, recipe, "-o", out, "--vocabulary", vocabulary, "--threads", 3)
    expected = ctc.read_recipe(recipe, {"vocabulary": vocabulary})
    assert calls == [
        (
            "train",
            expected,
            Model("m", get_family("wav2vec2"), None, {"require_head": head, "target_lang": None}),
            out,
            3,
        )
    ]
    assert (code, printed) == (0, f"{out}\n")


def test_several_processes_are_launched_and_only_the_launcher_prints_the_folder(
    capsys, monkeypatch, recipe, calls, tmp_path
):
    out = tmp_path / "out"
    expected = ctc.read_recipe(recipe, {"distributed.devices": 2})
    assert run(capsys, recipe, "-o", out, "--devices", 2)[:2] == (0, f"{out}\n")
    assert calls == [("launch", expected, out, None)]
    calls.clear()
    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(capsys, recipe, "-o", out, "--devices", 2)[:2] == (0, "")
    assert [name for name, *_ in calls] == ["train", "train"]


def test_training_from_options(capsys, tmp_path):
    base = tiny(tmp_path / "base", conv_dim=(8,) * 7, intermediate_size=32)
    manifest = corpus(tmp_path / "corpus", 8)
    code, out, err = run(
        capsys,
        *("-o", tmp_path / "out", "--model", base, "--data", manifest, "--dev", manifest, "--method", "head"),
        *("--max-steps", 2, "--batch.seconds", 4, "--precision", "float32", "--threads", 1),
    )
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "out")  # deepspeed prints before it, where it is installed
    assert ctc.read_recipe(tmp_path / "out" / "recipe.yaml").optimizer.max_steps == 2
    assert len(loading.load(str(tmp_path / "out")).vocabulary) > 0


# --- docs -------------------------------------------------------------------------------------------------------------


def test_docs_are_generated_from_the_recipe_classes():
    assert (ROOT / "docs" / "recipes.md").read_text() == docs_pages.render_recipes_page(), "run `make docs`"


def test_docs_show_every_option_with_its_default():
    rows = [line.split(" | ") for line in docs_pages.render_recipes_page().splitlines() if line.startswith("| `")]
    found = {(row[0][3:-1], row[2].strip("`| ")) for row in rows}
    assert {(leaf.path[-1], recipe_options.format_default(leaf)) for leaf in LEAVES} <= found


def test_an_outdated_page_is_named(tmp_path):
    docs_pages.main([str(tmp_path)])
    docs_pages.main([str(tmp_path), "--check"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cli.md", "recipes.md"]
    (tmp_path / "recipes.md").write_text("old")
    with pytest.raises(SystemExit, match=r"recipes\.md out of date: run `make docs`$"):
        docs_pages.main([str(tmp_path), "--check"])
    docs_pages.main(["--check", str(tmp_path / "cli.md")])


def test_strategies_name_existing_options():
    assert set(OWN) <= {leaf.dotted for leaf in LEAVES}
