"""Generate text with a language model: `mowa.generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack, overload

import torch

from mowa.api.models import Run, resolve_model
from mowa.api.options import GenerateOptions, read_settings
from mowa.engines import generation
from mowa.engines.generation import Prompt
from mowa.engines.settings import GenerationSettings
from mowa.errors import DataError, ModelError
from mowa.tasks.verbs import require_causal
from mowa.types import CausalModel, Generation

__all__ = ["GenerationSettings", "Prompt", "TextModel", "generate"]

TextModel: TypeAlias = str | Path | Run | CausalModel


@overload
def generate(
    model: TextModel, prompt: str, *, stream: Literal[False] = ..., **options: Unpack[GenerateOptions]
) -> Generation: ...
@overload
def generate(
    model: TextModel, prompt: list[str], *, stream: Literal[False] = ..., **options: Any
) -> list[Generation]: ...
@overload
def generate(
    model: TextModel, prompt: Sequence[dict[str, Any]], *, stream: Literal[False] = ..., **options: Any
) -> Generation: ...
@overload
def generate(
    model: TextModel, prompt: Prompt, *, stream: Literal[True], **options: Unpack[GenerateOptions]
) -> Iterator[str]: ...
def generate(
    model: TextModel,
    prompt: Prompt | Sequence[Prompt],
    *,
    stream: bool = False,
    system: str = "",
    chat: bool | None = None,
    threads: int | None = None,
    batch_size: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Generation | list[Generation] | Iterator[str]:
    """Generate an answer with a language model.

    Args:
        model: a language model, its name or folder as in `mowa.load`, or a `Run`.
        prompt: a text, a conversation (a list of messages {"role", "content"}), or a list of either.
        stream: return an iterator of pieces of text instead; one prompt only.
        system: system message before a text.
        chat: put a text into the chat template; None: if the model has one.
        threads: CPU threads; None: as torch is set.
        batch_size: prompts generated together.
        chat_template_kwargs: variables that the chat template reads, such as enable_thinking.
        settings: fields of `GenerationSettings`, such as max_new_tokens, temperature, top_p, stop and seed.

    Returns:
        A Generation (`.text`) for one prompt; a list of them for a list of prompts; an iterator of str with `stream`.

    Raises:
        ModelError: the model is no language model, or a setting is out of range.
        DataError: a prompt is empty or longer than the model's context, its messages do not fit the template, the
            template does not read one of `chat_template_kwargs`, or `system` is given with chat=False.
    """
    options = _to_settings(settings)
    single, prompts = _list_prompts(prompt)
    prompts = [_with_system(one, system) for one in prompts]
    set_threads(threads)
    loaded = require_causal(resolve_model(model), "generate")
    if system and chat is False:
        raise DataError("a system message needs the chat template: omit chat=False, or system")
    if stream:
        if not single:
            raise DataError(f"stream=True takes one prompt, not {len(prompts)}")
        return generation.stream_text(loaded, prompts[0], options, chat=chat, chat_template_kwargs=chat_template_kwargs)
    answers = generation.generate(
        loaded, prompts, options, chat=chat, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
    )
    return answers[0] if single else answers


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads; None: leave them. Raises ModelError if it is no number of threads."""
    if threads is None:
        return
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ModelError(f"threads is {threads!r}: it must be a whole number, at least 1")
    torch.set_num_threads(threads)


def _to_settings(given: dict[str, Any]) -> GenerationSettings:
    stop = given.get("stop")
    if stop is not None and not isinstance(stop, str | Iterable):
        raise ModelError(f"stop is {stop!r}: it must be a text or a list of texts")
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    return read_settings("generate", GenerationSettings, given | {"stop": texts})


def _list_prompts(prompt: Any) -> tuple[bool, list[Any]]:
    """Return whether there is one prompt, and the list of prompts."""
    if isinstance(prompt, str):
        return True, [str(prompt)]
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray | Mapping):
        raise DataError(
            f"the prompt is of type {type(prompt).__name__}: give a text, a list of messages, or a list of either"
        )
    given = list(prompt)
    if given and isinstance(given[0], Mapping):
        return True, [given]
    for one in given:
        if not isinstance(one, str | Sequence) or isinstance(one, bytes | bytearray):
            raise DataError(f"a prompt is a text or a list of messages, not {type(one).__name__}")
    return False, [str(one) if isinstance(one, str) else one for one in given]


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if not system:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [{"role": "system", "content": system}, *messages]
