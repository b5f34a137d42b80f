"""Chat templates in GGUF: their keys, what they render, and a check of what other programs refuse or what is unsafe.

llama.cpp renders templates with an interpreter of its own that has a part of Jinja's filters, tests and functions. A
template that needs more fails there at the first chat. A template is also a program that somebody else wrote and that
runs wherever the file is opened, so attempts to leave a sandbox are reported too.

Source: common/jinja of llama.cpp (MIT), build 11549; jinja2.sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes

from mowa.errors import DataError

KEY = "tokenizer.chat_template"
MAX_RANGE = 10_000
MAX_ITERATIONS = 1_000_000  # of nested loops over ranges
MAX_TEMPLATE_CHARS = 1_000_000
FILTERS = frozenset(
    "default abs float int tojson string upper lower strip trim lstrip rstrip title capitalize length startswith "
    "endswith split rsplit replace slice safe indent list first last selectattr select rejectattr reject join map "
    "append pop sort reverse get keys values items dictsort".split()
)
"""Filters and methods of llama.cpp's Jinja."""
TESTS = frozenset(
    "boolean callable odd even false true divisibleby string integer float number iterable sequence mapping lower "
    "upper none defined undefined eq equalto ge gt greaterthan lt lessthan ne in test".split()
)
FUNCTIONS = frozenset(("raise_exception", "namespace", "strftime_now", "range", "tojson", "caller"))
LOOP_FIELDS = frozenset("index index0 revindex revindex0 first last length previtem nextitem".split())
_STATEMENTS: dict[type[nodes.Node], str] = {
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from … import",
    nodes.Extends: "extends",
    nodes.Block: "block",
    nodes.With: "with",
    nodes.ScopedEvalContextModifier: "autoescape",
    nodes.Pow: "** (power)",
    nodes.FloorDiv: "// (floor division)",
}  # and operators that llama.cpp does not have
_LOADERS = ("include", "import", "from … import", "extends")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # of transformers; llama.cpp ignores it
_INTERNAL = re.compile(
    "__(?:class|mro|bases?|subclasses|globals|builtins|import|init|dict|code|func|self|getattribute|reduce|reduce_ex|"
    "module|loader|spec|call|new|closure|wrapped)__"
)
_INTERNAL_NAMES = frozenset("mro gi_frame gi_code cr_frame cr_code f_globals f_locals f_builtins func_globals".split())

CHATS: Mapping[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "Hello, Zoë! 2 < 3"}],
    "system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " two\nlines "}],
    "several turns": [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
        },
    }
]
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", generation prompt": {"add_generation_prompt": True},
    ", tools": {"tools": TOOLS},
}


def chat_template_metadata(template: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Return the keys of a template, or of several by name, of which `default` is the one that is used.

    Characters of names other than ASCII letters and digits become underscores.

    Raises DataError if two names become the same.
    """
    if not template:
        return {}
    if isinstance(template, str):
        return {KEY: template}
    names = {name: re.sub(r"[^0-9A-Za-z]", "_", name) for name in template if name != "default"}
    if len(set(names.values())) != len(names):
        raise DataError(f"two chat templates have the same name in GGUF: {', '.join(template)}; rename one")
    found: dict[str, Any] = {f"{KEY}.{names[name]}": template[name] for name in names}
    if names:
        found["tokenizer.chat_templates"] = sorted(names.values())
    return found | ({KEY: template["default"]} if "default" in template else {})


def render_chats(tokenizer: Any, template: str) -> dict[str, str]:
    """Return what a template makes of a few chats, with and without generation prompt, and with tools.

    A chat that the template rejects, such as one with a system prompt, has the error as its text.
    """
    rendered = {}
    for name, messages in CHATS.items():
        for variant, options in _VARIANTS.items():
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
            except Exception as error:  # templates raise errors of any kind
                text = f"{type(error).__name__}: {error}"
            rendered[name + variant] = str(text)
    return rendered


def compare_chats(tokenizer: Any, metadata: Mapping[str, Any]) -> list[str]:
    """Return the chats that the templates in the metadata render in another way than the tokenizer's, in words."""
    own = tokenizer.chat_template or {}
    own = {"default": own} if isinstance(own, str) else own
    different = []
    for name, template in own.items():
        key = KEY if name == "default" else f"{KEY}.{re.sub(r'[^0-9A-Za-z]', '_', name)}"
        if key not in metadata:
            different.append(f"the chat template {name!r} is missing")
            continue
        before, after = render_chats(tokenizer, template), render_chats(tokenizer, str(metadata[key]))
        different += [
            f"the chat template {name!r} renders {chat!r} differently" for chat in before if before[chat] != after[chat]
        ]
    return different


def check_template(template: str) -> list[str]:
    """Return what llama.cpp refuses in a template, and what is unsafe to run; empty if nothing was found.

    The template is parsed and not run.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        return [f"unsafe: the template has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}"]
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])  # not run
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except (TemplateSyntaxError, RecursionError) as error:
        return [f"line {getattr(error, 'lineno', 1)}: the template cannot be parsed: {error}"]
    defined = {node.name for node in tree.find_all((nodes.Macro,))}
    defined |= {node.name for node in tree.find_all(nodes.Name) if node.ctx in ("store", "param")}
    found = [(node.lineno, problem) for node in _walk(tree) for problem in _problems(node, defined)]
    found += [(line, problem) for line, problem in _long_loops(tree, 1)]
    return [f"line {line}: {problem}" for line, problem in dict.fromkeys(sorted(found))]


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _problems(node: nodes.Node, defined: set[str]) -> Iterator[str]:
    if (statement := _STATEMENTS.get(type(node))) is not None:
        yield f"{'unsafe: it loads other files: ' if statement in _LOADERS else 'llama.cpp has no '}{statement}"
    elif isinstance(node, nodes.For) and node.recursive:
        yield "llama.cpp has no recursive loops"
    elif isinstance(node, nodes.Filter):
        yield from _filter_problems(node)
    elif isinstance(node, nodes.Test) and node.name not in TESTS:
        yield f"llama.cpp has no test {node.name!r}"
    elif isinstance(node, nodes.Call):
        yield from _call_problems(node, defined)
    elif isinstance(node, nodes.Getattr):
        yield from _attribute_problems(node)
    elif isinstance(node, nodes.Const | nodes.TemplateData):
        text = node.value if isinstance(node, nodes.Const) else ""
        if isinstance(text, str) and (internal := _INTERNAL.search(text)):
            yield f"unsafe: the name {internal[0]} of Python's internals"
    elif isinstance(node, nodes.Mul) and any(_constant(side) > MAX_RANGE for side in (node.left, node.right)):
        yield f"unsafe: multiplication by more than {MAX_RANGE}"


def _filter_problems(node: nodes.Filter) -> Iterator[str]:
    if node.name == "attr":
        yield "unsafe: the filter 'attr' reads attributes by name"
    elif node.name not in FILTERS:
        yield f"llama.cpp has no filter {node.name!r}"
    elif node.name == "map" and node.args:
        yield "llama.cpp has the filter 'map' with attribute= only"


def _call_problems(node: nodes.Call, defined: set[str]) -> Iterator[str]:
    if isinstance(node.node, nodes.Name) and node.node.name not in FUNCTIONS | defined:
        yield f"llama.cpp has no function {node.node.name!r}"
    elif isinstance(node.node, nodes.Name) and node.node.name == "range":
        if any(abs(_constant(argument)) > MAX_RANGE for argument in node.args):
            yield f"unsafe: a range of more than {MAX_RANGE}"
    elif isinstance(node.node, nodes.Getattr):
        name = node.node.attr
        if name in ("format", "format_map"):
            yield f"unsafe: the method {name!r} reads attributes by name"
        elif name not in FILTERS and not (isinstance(node.node.node, nodes.Name) and node.node.node.name in defined):
            yield f"llama.cpp has no method {name!r}"
        elif name == "join":
            yield "llama.cpp has no method 'join' of strings; use the filter"


def _attribute_problems(node: nodes.Getattr) -> Iterator[str]:
    if node.attr.startswith("__") or node.attr in _INTERNAL_NAMES:
        yield f"unsafe: the attribute {node.attr!r} of Python's internals"
    elif isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr not in LOOP_FIELDS:
        yield f"llama.cpp has no loop.{node.attr}"


def _constant(node: nodes.Node) -> float:
    """Return the value of a number that the template spells out, or of arithmetic on such; 0 for anything else."""
    if isinstance(node, nodes.Const):
        return node.value if isinstance(node.value, int | float) else 0
    if isinstance(node, nodes.Neg):
        return -_constant(node.node)
    if isinstance(node, nodes.Mul):
        return _constant(node.left) * _constant(node.right)
    if isinstance(node, nodes.Add):
        return _constant(node.left) + _constant(node.right)
    if isinstance(node, nodes.Pow):
        base, exponent = _constant(node.left), _constant(node.right)
        return base**exponent if abs(base) <= MAX_RANGE and 0 <= exponent <= 64 else float(2**63)
    return 0


def _long_loops(node: nodes.Node, iterations: float) -> Iterator[tuple[int, str]]:
    """Return nested loops over ranges that together run more often than `MAX_ITERATIONS`."""
    call = node.iter if isinstance(node, nodes.For) and isinstance(node.iter, nodes.Call) else None
    if call is not None and isinstance(call.node, nodes.Name) and call.node.name == "range":
        iterations *= max((abs(_constant(argument)) for argument in call.args), default=1) or 1
        if iterations > MAX_ITERATIONS:
            yield node.lineno, f"unsafe: nested loops that run {iterations:.0f} times"
            return
    for child in node.iter_child_nodes():
        yield from _long_loops(child, iterations)
