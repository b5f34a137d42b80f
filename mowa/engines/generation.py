"""Generate text with a language model: transformers' own `generate`, prompts as in training, batches and streams.

Start with `generate` (all prompts, finished) or `stream_text` (one prompt, as it is written). Chat prompts are encoded
with the model's chat template exactly as `mowa train` encodes conversations, so special tokens that a message spells
are text. Prompts of a batch are padded on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from mowa.data.chat.tokenize import encode_prompt
from mowa.errors import DataError, ModelError
from mowa.tasks.causal import eos_token_ids, pad_token_id
from mowa.types import CausalModel, Generation

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or messages with "role" and "content"


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How tokens are chosen and when to stop. None: as the model's generation_config.json says.

    max_new_tokens      most tokens of an answer
    temperature         0: the most probable token (greedy); else logits are divided by it and a token is drawn
    top_p               draw from the fewest tokens that have this probability together
    top_k               draw from this many tokens; 0: all
    repetition_penalty  1: none
    stop                strings that end an answer, and are not part of it
    seed                seed of the draws. One seed gives one answer per prompt, machine and batch
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


DEFAULT_SETTINGS = GenerationSettings()


def generate(
    model: CausalModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings = DEFAULT_SETTINGS,
    *,
    chat: bool | None = None,
    batch_size: int = 8,
) -> list[Generation]:
    """Return the answer to each prompt, in order.

    Args:
        model: the language model.
        prompts: texts, or conversations (lists of messages, with the roles system, user, assistant and tool).
        settings: how tokens are chosen.
        chat: put a text into the chat template, as a user's message; None: if the model has a template.
        batch_size: prompts generated together.

    Raises:
        DataError: a prompt is empty or longer than the model's context, or there is no chat template for messages.
        ModelError: a setting is out of range.
    """
    encoded = [encode(model, prompt, chat=chat) for prompt in prompts]
    answers: list[Generation] = []
    for start in range(0, len(encoded), batch_size):
        answers += _generate_batch(model, encoded[start : start + batch_size], settings)
    return answers


def stream_text(
    model: CausalModel, prompt: Prompt, settings: GenerationSettings = DEFAULT_SETTINGS, *, chat: bool | None = None
) -> Iterator[str]:
    """Yield the answer in pieces, as it is generated; together they are the text that `generate` returns.

    Closing the iterator ends the generation after the current token. Raises as `generate`, before the first piece.
    """
    ids = encode(model, prompt, chat=chat)
    config = _generation_config(model, [ids], settings)
    return _stream(model, ids, config, settings)


def encode(model: CausalModel, prompt: Prompt, *, chat: bool | None = None) -> list[int]:
    """Return the token ids of a prompt. Raises DataError as `generate`."""
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        if not prompt:
            raise DataError("the prompt is empty")
        if chat is False or (chat is None and not tokenizer.chat_template):
            ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
            eos = tokenizer.eos_token_id
            return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids
        prompt = [{"role": "user", "content": prompt}]
    return encode_prompt(tokenizer, prompt)


def _generate_batch(model: CausalModel, prompts: list[list[int]], settings: GenerationSettings) -> list[Generation]:
    config = _generation_config(model, prompts, settings)
    inputs = _pad_left(prompts, pad_token_id(model.tokenizer), model.net.device)
    with _seeded(settings.seed, model.net.device), torch.inference_mode():
        out = model.net.generate(**inputs, generation_config=config, **_stop_options(model, settings))
    width = inputs["input_ids"].shape[1]
    return [
        _finish(model, prompt, row[width:].tolist(), settings, config.max_new_tokens)
        for prompt, row in zip(prompts, out, strict=True)
    ]


def _finish(
    model: CausalModel, prompt: list[int], ids: list[int], settings: GenerationSettings, max_new_tokens: int
) -> Generation:
    ends = set(eos_token_ids(model))
    count = next((index for index, one in enumerate(ids) if one in ends), None)
    kept = ids if count is None else ids[:count]
    text = _decode(model.tokenizer, kept)
    cut = _first_stop(text, settings.stop)
    stopped = count is not None or cut is not None
    if cut is not None and count is None:  # the rest of a batch went on: padding follows
        kept = _trim_padding(kept, pad_token_id(model.tokenizer))
    return Generation(
        text=text if cut is None else text[:cut],
        prompt_tokens=len(prompt),
        completion_tokens=min(len(kept) + (count is not None), max_new_tokens),
        finish_reason="stop" if stopped else "length",
    )


def _trim_padding(ids: list[int], pad: int) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def _generation_config(model: CausalModel, prompts: list[list[int]], settings: GenerationSettings) -> Any:
    """Return transformers' config of a call. Raises DataError for a prompt without room for an answer."""
    _validate(settings)
    config = copy.deepcopy(model.net.generation_config)
    context = getattr(model.net.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    max_new_tokens = settings.max_new_tokens
    if context is not None:
        if longest >= context:
            raise DataError(
                f"the prompt has {longest:,} tokens, and {model.origin.name} reads at most {context:,} with its answer:"
                " shorten it"
            )
        max_new_tokens = min(max_new_tokens, context - longest)
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.eos_token_id = list(eos_token_ids(model)) or None
    config.pad_token_id = pad_token_id(model.tokenizer)
    for name in ("top_p", "top_k", "repetition_penalty"):
        if (value := getattr(settings, name)) is not None:
            setattr(config, name, value)
    if settings.temperature is not None:
        config.do_sample = settings.temperature > 0
        config.temperature = settings.temperature or None
    elif settings.top_p is not None or settings.top_k is not None:
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config


def _validate(settings: GenerationSettings) -> None:
    if settings.max_new_tokens < 1:
        raise ModelError(f"max_new_tokens is {settings.max_new_tokens}: it must be at least 1")
    if settings.temperature is not None and settings.temperature < 0:
        raise ModelError(f"temperature is {settings.temperature:g}: it must not be negative")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise ModelError(f"top_p is {settings.top_p:g}: it must be above 0 and at most 1")
    if settings.repetition_penalty is not None and settings.repetition_penalty <= 0:
        raise ModelError(f"repetition_penalty is {settings.repetition_penalty:g}: it must be above 0")
    if "" in settings.stop:
        raise ModelError("stop: an empty string would end every answer at once")


def _pad_left(prompts: list[list[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, int64 [B, N]."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _stop_options(model: CausalModel, settings: GenerationSettings) -> dict[str, Any]:
    return {"stop_strings": list(settings.stop), "tokenizer": model.tokenizer} if settings.stop else {}


@contextmanager
def _seeded(seed: int | None, device: Any) -> Iterator[None]:
    """Draw from generators that begin at `seed`, and leave the process's as they were; None: use the process's."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    found = [position for one in stop if (position := text.find(one)) >= 0]
    return min(found) if found else None


# --- streaming --------------------------------------------------------------------------------------------------------


def _stream(model: CausalModel, ids: list[int], config: Any, settings: GenerationSettings) -> Iterator[str]:
    tokens: Queue[int | BaseException | None] = Queue()
    cancelled = Event()

    def run() -> None:
        try:
            with _seeded(settings.seed, model.net.device), torch.inference_mode():
                model.net.generate(
                    **_pad_left([ids], 0, model.net.device),
                    generation_config=config,
                    streamer=_TokenQueue(tokens),
                    stopping_criteria=[lambda input_ids, scores, **_: _done(input_ids, cancelled.is_set())],
                    **_stop_options(model, settings),
                )
            tokens.put(None)
        except BaseException as error:  # raised by the thread that reads
            tokens.put(error)

    thread = Thread(target=run, name="mowa-generate", daemon=True)
    thread.start()
    text = _TextStream(model.tokenizer, settings.stop)
    ends = set(eos_token_ids(model))
    try:
        while isinstance(item := tokens.get(), int):
            if item not in ends and (piece := text.push(item)):
                yield piece
        if item is not None:
            raise item
        if piece := text.finish():
            yield piece
    finally:
        cancelled.set()
        thread.join()


def _done(input_ids: Tensor, value: bool) -> Tensor:
    return torch.full((len(input_ids),), value, device=input_ids.device)


class _TokenQueue:
    """A streamer of transformers' `generate`: puts every token after the prompt into a queue."""

    def __init__(self, queue: Queue[Any]) -> None:
        self._queue, self._prompt_seen = queue, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._queue.put(int(token))
        self._prompt_seen = True

    def end(self) -> None:
        pass


class _TextStream:
    """Turns tokens into text that will not change, and withholds what may be the beginning of a stop string.

    A token may be part of a character, and its text may depend on the tokens before it: the text of the last few tokens
    is decoded with and without the new one, and the difference is new text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held, self._stopped = "", False

    def push(self, token: int) -> str:
        """Return the text that is certain after one more token."""
        self._ids.append(token)
        text = _decode(self._tokenizer, self._ids[self._start :])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        return self._release(self._advance(text))

    def finish(self) -> str:
        """Return the rest of the text."""
        text = self._advance(_decode(self._tokenizer, self._ids[self._start :]))
        rest = self._release(text) + ("" if self._stopped else self._held)
        self._held = ""
        return rest

    def _advance(self, text: str) -> str:
        before = _decode(self._tokenizer, self._ids[self._start : self._read])
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _release(self, text: str) -> str:
        if self._stopped:
            return ""
        held = self._held + text
        if (cut := _first_stop(held, self._stop)) is not None:
            self._stopped, self._held = True, ""
            return held[:cut]
        longest = max(map(len, self._stop), default=1) - 1
        keep = next(
            (n for n in range(min(longest, len(held)), 0, -1) if any(one.startswith(held[-n:]) for one in self._stop)),
            0,
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]
