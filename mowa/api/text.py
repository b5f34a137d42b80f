"""Generate text with a language model: `mowa.generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, Unpack, overload

import torch

from mowa.api.models import Run, load, resolve_model
from mowa.api.options import GenerateOptions, LoadOptions, read_settings
from mowa.engines import generation, llama_cpp
from mowa.engines.generation import Prompt
from mowa.engines.llama_cpp import LlamaCppModel
from mowa.engines.settings import GenerationSettings
from mowa.errors import DataError, ModelError
from mowa.io.weights import weight_files
from mowa.loading.gguf import is_gguf, read_task
from mowa.tasks.verbs import require_causal
from mowa.types import CausalModel, Generation

__all__ = ["GenerationSettings", "LlamaCppModel", "Prompt", "TextModel", "generate", "open_text_model"]

TextModel: TypeAlias = str | Path | Run | CausalModel | LlamaCppModel
ENGINES = ("auto", "pytorch", "llama_cpp")


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
    engine: str = "auto",
    **settings: Any,
) -> Generation | list[Generation] | Iterator[str]:
    """Generate an answer with a language model.

    Args:
        model: a language model, its name or folder as in `mowa.load`, a `Run`, a GGUF file or a folder with one, or
            what `open_text_model` returned.
        prompt: a text, a conversation (a list of messages {"role", "content"}), or a list of either.
        stream: return an iterator of pieces of text instead; one prompt only.
        system: system message before a text.
        chat: put a text into the chat template; None: if the model has one.
        threads: CPU threads; None: as torch is set.
        batch_size: prompts generated together.
        chat_template_kwargs: variables that the chat template reads, such as enable_thinking.
        engine: pytorch, llama_cpp, which runs GGUF files, or auto: llama_cpp for them, and otherwise pytorch.
        settings: fields of `GenerationSettings`, such as max_new_tokens, temperature, top_p, stop and seed.

    Returns:
        A Generation (`.text`) for one prompt; a list of them for a list of prompts; an iterator of str with `stream`.

    Raises:
        ModelError: the model is no language model, or a setting is out of range.
        DataError: a prompt is empty or longer than the model's context, its messages do not fit the template, the
            template does not read one of `chat_template_kwargs`, or `system` is given with chat=False.
        MissingDependency: a GGUF file needs a package.
    """
    options = _to_settings(settings)
    single, prompts = _list_prompts(prompt)
    prompts = [_with_system(one, system) for one in prompts]
    set_threads(threads)
    if system and chat is False:
        raise DataError("a system message needs the chat template: omit chat=False, or system")
    if stream and not single:
        raise DataError(f"stream=True takes one prompt, not {len(prompts)}")
    loaded = model if isinstance(model, LlamaCppModel) else _open(model, engine, threads)
    of_prompt: dict[str, Any] = {"chat": chat, "chat_template_kwargs": chat_template_kwargs}
    if isinstance(loaded, LlamaCppModel):
        if stream:
            return llama_cpp.stream_text(loaded, prompts[0], options, **of_prompt)
        answers = llama_cpp.generate(loaded, prompts, options, **of_prompt)
    elif stream:
        return generation.stream_text(loaded, prompts[0], options, **of_prompt)
    else:
        answers = generation.generate(loaded, prompts, options, batch_size=batch_size, **of_prompt)
    return answers[0] if single else answers


def open_text_model(
    name: str | Path, *, engine: str = "auto", threads: int | None = None, **options: Unpack[LoadOptions]
) -> CausalModel | LlamaCppModel:
    """Load a language model for `generate`: in PyTorch as `mowa.load`, or a GGUF file in llama.cpp.

    Args:
        name: as in `mowa.load`; a GGUF file, or a folder with one.
        engine: as in `generate`.
        threads: CPU threads of llama.cpp; None: all cores.
        options: as in `mowa.load`. llama.cpp takes `device` (auto, cpu, cuda) only.

    Raises:
        ModelError: as `mowa.load`, or an option does not apply to the engine.
        MissingDependency: no package with llama.cpp is installed.
    """
    if engine not in ENGINES:
        raise ModelError(f"engine is {engine!r}: it must be one of {', '.join(ENGINES)}")
    path = find_gguf(name)
    if path is None and engine == "llama_cpp":
        raise ModelError(f"{name} is no GGUF file, which llama.cpp needs: `mowa export {name} --to gguf` writes one")
    if path is None or engine == "pytorch" or read_task(path) != "causal":
        return load(path or name, task="causal", **options)
    applies = {"device", "offline", "accelerate"}  # a file is always offline
    given = {key: value for key, value in options.items() if key not in applies and value not in (None, "auto")}
    if given:
        raise ModelError(
            f"{path} runs in llama.cpp, which takes no {next(iter(given))}: omit it, or use engine pytorch"
        )
    return llama_cpp.open_model(path, device=options.get("device", "auto"), threads=threads)


def find_gguf(name: str | Path) -> Path | None:
    """Return the GGUF file that `name` is, or the only one in a folder without other weights; None if there is none.

    Raises ModelError for a folder with several.
    """
    path = Path(name)
    if is_gguf(path):
        return path
    if not path.is_dir() or weight_files(path):
        return None
    found = sorted(file for file in path.iterdir() if is_gguf(file))
    if len(found) > 1:
        raise ModelError(f"{path} has {len(found)} GGUF files: name one of {', '.join(map(str, found))}")
    return found[0] if found else None


def _open(model: str | Path | Run | CausalModel, engine: str, threads: int | None) -> CausalModel | LlamaCppModel:
    if isinstance(model, str | Path) and (engine != "auto" or find_gguf(model)):
        return open_text_model(model, engine=engine, threads=threads)
    if engine not in ENGINES[:2]:
        raise ModelError(f"a model that is loaded, or a run, is not run by the engine {engine!r}: name a GGUF file")
    return require_causal(resolve_model(model), "generate")


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
