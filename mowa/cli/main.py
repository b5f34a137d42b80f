"""The `mowa` command. Verbs are imported when they are called, so `mowa --help` is quick."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

import click

from mowa import __version__
from mowa.errors import MowaError

# verb → (module:function, the line `mowa --help` shows)
COMMANDS = {
    "transcribe": ("mowa.cli.transcribe:transcribe", "Write down what is said in recordings."),
    "listen": ("mowa.cli.listen:listen", "Write down what is said, as it is said."),
    "journal": ("mowa.cli.results:journal", "Look into, merge and export what a corpus run wrote."),
    "models": ("mowa.cli.models:models", "List aliases, families and what is cached."),
    "doctor": ("mowa.cli.doctor:doctor", "Say what this machine has and whether mowa works on it."),
    "data": ("mowa.cli.data:data", "Check corpora; collect sentences and speak them."),
    "adapt": ("mowa.cli.adapter:adapt", "Look at an adapter, or merge it into its base."),
    "explain": ("mowa.cli.explain:explain", "Say how a model's layers would be computed here, and why."),
    "train": ("mowa.cli.train:train", "Train a model as a recipe says."),
    "shrink": ("mowa.cli.quantize:shrink", "Make a model smaller, and measure what it costs."),
    "export": ("mowa.cli.export:export", "Write a model as other programs run it."),
    "bench": ("mowa.cli.bench:bench", "Time models, engines and schemes on this machine."),
    "distill": ("mowa.cli.distill:distill", "Make a smaller model of a larger one."),
}

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")  # where torchao is installed, importing transformers makes them warn


class LazyGroup(click.Group):
    """A group whose commands live in modules that are imported only when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, function = COMMANDS[name][0].split(":")
        command = getattr(import_module(module), function)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mowa")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Take an open pretrained model, of speech or of text, and make it yours on the machine you have."""


def main(arguments: list[str] | None = None) -> None:
    """Run, and turn what can go wrong into one line and exit code 2 (130 after Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = cli.main(arguments, prog_name="mowa", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(2)
    except MowaError as wrong:
        if "--debug" in arguments:
            raise
        click.echo(f"mowa: {wrong}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("mowa: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
