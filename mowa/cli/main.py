"""The `mowa` command: a lazy group that imports a command's module only when the command is called.

Importing lazily keeps `mowa --help` fast.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from contextlib import suppress
from importlib import import_module

import click

from mowa import __version__
from mowa.errors import MowaError

# command → ("module:function", the line that `mowa --help` shows)
COMMANDS = {
    "transcribe": ("mowa.cli.transcribe:transcribe", "Transcribe audio files."),
    "listen": ("mowa.cli.listen:listen", "Transcribe live audio as it arrives."),
    "generate": ("mowa.cli.generate:generate", "Answer a prompt with a language model."),
    "evaluate": ("mowa.cli.evaluate:evaluate", "Measure a model on data with known answers."),
    "results": ("mowa.cli.results:results", "Inspect, merge and convert results logs."),
    "models": ("mowa.cli.models:models", "List, download and remove models."),
    "doctor": ("mowa.cli.doctor:doctor", "Show hardware and installed packages, and run a self-test."),
    "data": ("mowa.cli.data:data", "Check, split and synthesize speech corpora."),
    "adapter": ("mowa.cli.adapter:adapter", "Inspect adapters and merge them into their base model."),
    "explain": ("mowa.cli.explain:explain", "Show which implementation each layer would use, and why."),
    "train": ("mowa.cli.train:train", "Fine-tune a model from a recipe."),
    "quantize": ("mowa.cli.quantize:quantize", "Quantize a model and measure the loss in accuracy."),
    "export": ("mowa.cli.export:export", "Export a model to another runtime."),
    "gguf": ("mowa.cli.gguf:gguf", "Inspect GGUF files and compare them."),
    "bench": ("mowa.cli.bench:bench", "Benchmark models, engines and dtypes on this machine."),
    "distill": ("mowa.cli.distill:distill", "Distill a model into one with fewer layers."),
}

# Where torchao, bitsandbytes or DeepSpeed is installed, importing transformers or PEFT makes these warn; DeepSpeed on
# standard output.
NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes", "DeepSpeed")

# Values of OSError.errno whose cause the user can fix.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


class LazyGroup(click.Group):
    """A click group whose commands are imported on first use."""

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
    """Fine-tune, adapt, quantize and run open pretrained speech and language models on your own hardware."""


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    Exit codes: 0; 2 after an error, which is printed in one line unless --debug is given; 130 after Ctrl-C; 141 when
    standard output was closed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for name in NOISY_LOGGERS:
        logging.getLogger(name).addFilter(_is_error)  # DeepSpeed sets the level of its logger when it is imported
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8 are printed as they are
    try:
        code = cli.main(arguments, prog_name="mowa", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except MowaError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"mowa: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("mowa: stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if "--debug" in arguments or error.errno not in DISK_ERRORS:
            raise
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        click.echo(f"mowa: {name}cannot be written ({error.strerror}): free some space, or write elsewhere", err=True)
        _discard_output()
        sys.exit(2)


def _discard_output() -> None:
    """Send what is left in the buffer of standard output nowhere, so that the interpreter does not fail to flush it."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
