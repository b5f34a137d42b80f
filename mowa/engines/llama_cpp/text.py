"""Generate text in llama.cpp, with the prompts, settings and results of `engines.generation`.

Prompts are encoded here and given as token ids. Text comes from llama.cpp. What differs from PyTorch: sampling defaults
are those of the file (`general.sampling.*`), and llama.cpp ends an answer at every token that it knows as the end of a
turn, besides the model's own (`PromptTokenizer.end_ids`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import Queue
from threading import Event, Thread
from typing import Any

from mowa.data.chat.template import special_token_ids
from mowa.decode.detokenize import StopFilter
from mowa.engines.generation import DEFAULT_SETTINGS, Prompt, encode_with, validate_stop
from mowa.engines.llama_cpp.model import LlamaCppModel
from mowa.engines.llama_cpp.protocol import Completion, Sampling
from mowa.engines.settings import GenerationSettings, validate_generation
from mowa.errors import DataError
from mowa.types import Generation

SAMPLING_KEY = "general.sampling."
_FILE_KEYS = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "penalty_repeat"}


def generate(
    model: LlamaCppModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings = DEFAULT_SETTINGS,
    *,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Generation]:
    """Return the answer to each prompt, in order. Arguments and errors are those of `generation.generate`.

    Raises ModelError too if llama.cpp cannot load the file.
    """
    _validate(model, settings)
    encoded = [
        encode_with(model.tokenizer, one, chat=chat, chat_template_kwargs=chat_template_kwargs) for one in prompts
    ]
    limits = [_limit(model, ids, settings) for ids in encoded]
    room = max((len(ids) + limit for ids, limit in zip(encoded, limits, strict=True)), default=0)
    answers = []
    for ids, limit in zip(encoded, limits, strict=True):
        pieces: list[str] = []
        completion, stopped = _answer(model, ids, limit, room, settings, pieces.append, Event())
        reason = "length" if completion.reached_limit and not stopped else "stop"
        answers.append(Generation("".join(pieces), len(ids), completion.num_tokens, reason))
    return answers


def stream_text(
    model: LlamaCppModel,
    prompt: Prompt,
    settings: GenerationSettings = DEFAULT_SETTINGS,
    *,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Yield the answer in pieces, as it is generated; together they are the text that `generate` returns.

    Closing the iterator ends the generation after the current token. Raises as `generate`, before the first piece.
    """
    _validate(model, settings)
    ids = encode_with(model.tokenizer, prompt, chat=chat, chat_template_kwargs=chat_template_kwargs)
    return _stream(model, ids, _limit(model, ids, settings), settings)


def _stream(model: LlamaCppModel, ids: list[int], limit: int, settings: GenerationSettings) -> Iterator[str]:
    pieces: Queue[str | BaseException | None] = Queue()
    cancelled = Event()

    def run() -> None:
        try:
            _answer(model, ids, limit, len(ids) + limit, settings, pieces.put, cancelled)
            pieces.put(None)
        except BaseException as error:  # raised by the thread that reads
            pieces.put(error)

    thread = Thread(target=run, name="mowa-llama-cpp", daemon=True)
    thread.start()
    try:
        while isinstance(item := pieces.get(), str):
            yield item
        if item is not None:
            raise item
    finally:
        cancelled.set()
        thread.join()


def _answer(
    model: LlamaCppModel,
    ids: list[int],
    limit: int,
    room: int,
    settings: GenerationSettings,
    emit: Callable[[str], object],
    cancelled: Event,
) -> tuple[Completion, bool]:
    """Generate one answer and pass its text to `emit`; return how it ended, and whether a stop string or token did it.

    `room` is the number of tokens that the context must hold.
    """
    specials = special_token_ids(model.tokenizer)
    ends = {specials[one] for one in settings.stop if one in specials}
    text, is_first, ended = StopFilter([one for one in settings.stop if one not in specials]), True, False

    def on_piece(token: int | None, piece: str) -> bool:
        nonlocal is_first, ended
        ended = ended or token in ends
        if ended:
            return True
        if is_first and piece and model.tokenizer.gguf.add_space_prefix:
            piece = piece.removeprefix(" ")  # of SentencePiece
        is_first = is_first and not piece
        if certain := text.push(piece):
            emit(certain)
        return text.stopped or cancelled.is_set()

    with model.lock:
        completion = model.open(room).complete(ids, _sampling(model, settings), limit, on_piece)
    if rest := text.finish():
        emit(rest)
    return completion, ended or text.stopped


def _sampling(model: LlamaCppModel, settings: GenerationSettings) -> Sampling:
    """Return how tokens are drawn: greedy, unless the settings or the file say how to sample."""
    found = {name: model.metadata.get(SAMPLING_KEY + key) for name, key in _FILE_KEYS.items()}
    found |= {name: value for name in _FILE_KEYS if (value := getattr(settings, name)) is not None}
    given: dict[str, Any] = {
        name: int(one) if name == "top_k" else float(one) for name, one in found.items() if one is not None
    }
    if given.keys() & {"top_p", "top_k"}:
        given.setdefault("temperature", 1.0)
    return Sampling(**given, seed=None if settings.seed is None else int(settings.seed))


def _limit(model: LlamaCppModel, ids: list[int], settings: GenerationSettings) -> int:
    """Return how many tokens the answer may have. Raises DataError for a prompt without room for an answer."""
    context = model.context_length
    if context is None:
        return int(settings.max_new_tokens)
    if len(ids) >= context:
        raise DataError(
            f"the prompt has {len(ids):,} tokens, and {model.path} reads at most {context:,} with its answer:"
            " shorten it"
        )
    return min(int(settings.max_new_tokens), context - len(ids))


def _validate(model: LlamaCppModel, settings: GenerationSettings) -> None:
    """Raise ModelError for the first setting that is out of range."""
    validate_generation(settings)
    validate_stop(settings, special_token_ids(model.tokenizer))
