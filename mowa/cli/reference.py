"""docs/cli.md, written from the commands themselves: `python -m mowa.cli.reference docs/cli.md [--check]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mowa.cli.main import cli


def page() -> str:
    parts = [
        "# The command line\n\nWritten by `make docs` from the commands themselves; `make check` holds it to them.\n"
    ]
    root = cli.make_context("mowa", [], resilient_parsing=True, terminal_width=80)
    for name, text in _commands(root):
        parts.append(f"## `{name}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _commands(context: click.Context) -> Iterator[tuple[str, str]]:
    command = context.command
    yield context.command_path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _commands(click.Context(child, parent=context, info_name=name))


if __name__ == "__main__":
    target = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("-")))
    if "--check" not in sys.argv:
        target.write_text(page())
    elif target.read_text() != page():
        sys.exit(f"{target} is out of date: run `make docs`")
