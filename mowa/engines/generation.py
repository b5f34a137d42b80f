"""Generate text with a language model: transformers' own `generate`, prompts as in training, batches and streams.

Start with `generate` (all prompts, finished) or `stream_text` (one prompt, as it is written). Chat prompts are encoded
with the model's chat template exactly as `mowa train` encodes conversations, so special tokens that a message spells
are text. Prompts of a batch are padded on the left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from mowa.data.chat.encode import encode_prompt
from mowa.data.chat.template import special_token_ids
from mowa.decode.detokenize import TextStream, decode_tokens, find_stop
from mowa.engines.settings import GenerationSettings, is_int, validate_generation
from mowa.errors import DataError, ModelError
from mowa.families import is_registered
from mowa.tasks.causal import context_length, eos_token_ids, pad_token_id
from mowa.types import CausalModel, Generation

DEFAULT_SETTINGS = GenerationSettings()
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or messages with "role" and "content"
ONE_SEQUENCE = {  # what a model's generation_config.json must not change: one answer per prompt, our stop strings
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
UNSET = ("stop_strings", "prompt_lookup_num_tokens")  # as above, but transformers takes None of a config for unset


def generate(
    model: CausalModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings = DEFAULT_SETTINGS,
    *,
    chat: bool | None = None,
    batch_size: int = 8,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Generation]:
    """Return the answer to each prompt, in order: the one that it gets alone.

    Args:
        model: the language model.
        prompts: texts, or conversations (lists of messages, with the roles system, user, assistant and tool).
        settings: how tokens are chosen.
        chat: put a text into the chat template, as a user's message; None: if the model has a template.
        batch_size: prompts generated together. Those whose context has no room for `max_new_tokens` are alone.
        chat_template_kwargs: variables that the chat template reads, such as enable_thinking.

    Raises:
        DataError: a prompt is empty or longer than the model's context, or there is no chat template for messages, or
            it does not read one of `chat_template_kwargs`.
        ModelError: a setting is out of range.
    """
    _validate(model, settings)
    if not is_int(batch_size) or batch_size < 1:
        raise ModelError(f"batch_size is {batch_size!r}: it must be a whole number, at least 1")
    encoded = [encode(model, prompt, chat=chat, chat_template_kwargs=chat_template_kwargs) for prompt in prompts]
    limits = [_limit(model, prompt, settings) for prompt in encoded]
    full = [index for index, limit in enumerate(limits) if limit == settings.max_new_tokens]
    groups = [
        same[start : start + batch_size]
        for same in _split_by_length(model, encoded, full)
        for start in range(0, len(same), batch_size)
    ]
    groups += [[index] for index, limit in enumerate(limits) if limit != settings.max_new_tokens]
    answers: dict[int, Generation] = {}
    for group in sorted(groups):
        found = _generate_batch(model, [encoded[index] for index in group], limits[group[0]], settings)
        answers |= zip(group, found, strict=True)
    return [answers[index] for index in range(len(encoded))]


def _split_by_length(model: CausalModel, prompts: list[list[int]], indices: list[int]) -> list[list[int]]:
    """Return the prompts that may share a batch: all, or of one length where padding may change a net's answers."""
    if is_registered(model.family):
        return [indices]
    by_length: dict[int, list[int]] = {}
    for index in indices:
        by_length.setdefault(len(prompts[index]), []).append(index)
    return list(by_length.values())


def stream_text(
    model: CausalModel,
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
    ids = encode(model, prompt, chat=chat, chat_template_kwargs=chat_template_kwargs)
    config = _generation_config(model, _limit(model, ids, settings), settings)
    return _stream(model, ids, config, settings)


def encode(
    model: CausalModel,
    prompt: Prompt,
    *,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a prompt. Raises DataError as `generate`."""
    return encode_with(model.tokenizer, prompt, chat=chat, chat_template_kwargs=chat_template_kwargs)


def encode_with(
    tokenizer: Any,
    prompt: Prompt,
    *,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """As `encode`, with a tokenizer of transformers or one that has its methods."""
    if isinstance(prompt, str):
        if not prompt:
            raise DataError("the prompt is empty")
        if chat is False or (chat is None and not tokenizer.chat_template):
            if chat_template_kwargs:
                raise DataError(
                    "chat_template_kwargs need a chat template, and this prompt is not put into one: omit them"
                )
            ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
            eos = tokenizer.eos_token_id
            return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids
        prompt = [{"role": "user", "content": prompt}]
    _validate_messages(prompt)
    return encode_prompt(tokenizer, prompt, (), chat_template_kwargs)


def _validate_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, bytes | bytearray):
        raise DataError(f"a prompt is a text or a list of messages, not {type(messages).__name__}")
    if not messages:
        raise DataError("the prompt has no messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"message {number} is a {type(message).__name__}: a message has a role and a content")
        if not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no role: system, user, assistant or tool")
        content = message.get("content")
        if not isinstance(content, str | list | tuple) and not (content is None and message.get("tool_calls")):
            found = "no content" if content is None else f"a content of type {type(content).__name__}"
            raise DataError(f"message {number} ({message['role']}) has {found}: it must be a text")


def _generate_batch(
    model: CausalModel, prompts: list[list[int]], max_new_tokens: int, settings: GenerationSettings
) -> list[Generation]:
    config = _generation_config(model, max_new_tokens, settings)
    inputs = _pad_left(prompts, pad_token_id(model.tokenizer), model.net.device)
    stopping = _Stopping(model, settings)
    with _seeded(settings.seed, model.net.device), torch.inference_mode():
        options = _unset(model) | {"stopping_criteria": stopping.criteria()}
        out = model.net.generate(**inputs, generation_config=config, **options)
    width = inputs["input_ids"].shape[1]
    return [
        _finish(model, prompt, row[width:].tolist(), stopping.lengths.get(index), settings)
        for index, (prompt, row) in enumerate(zip(prompts, out, strict=True))
    ]


def _finish(
    model: CausalModel, prompt: list[int], ids: list[int], stopped_at: int | None, settings: GenerationSettings
) -> Generation:
    """Return the answer of a row, which may be followed by padding after an end token or after `stopped_at` tokens."""
    ids, ends = ids[:stopped_at], _end_ids(model, settings)
    count = next((index for index, one in enumerate(ids) if one in ends), None)
    kept = ids if count is None else ids[:count]
    text = decode_tokens(model.tokenizer, kept)
    cut = find_stop(text, settings.stop)
    return Generation(
        text=text if cut is None else text[:cut],
        prompt_tokens=len(prompt),
        completion_tokens=len(kept) + (count is not None),
        finish_reason="length" if count is None and cut is None else "stop",
    )


def _limit(model: CausalModel, prompt: list[int], settings: GenerationSettings) -> int:
    """Return how many tokens the answer may have. Raises DataError for a prompt without room for an answer."""
    context = context_length(model.net.config)
    if context is None:
        return settings.max_new_tokens
    if len(prompt) >= context:
        raise DataError(
            f"the prompt has {len(prompt):,} tokens, and {model.origin.name} reads at most {context:,} with its answer:"
            " shorten it"
        )
    return min(settings.max_new_tokens, context - len(prompt))


def _generation_config(model: CausalModel, max_new_tokens: int, settings: GenerationSettings) -> Any:
    """Return transformers' config of a call."""
    config = copy.deepcopy(model.net.generation_config)
    for name, value in ONE_SEQUENCE.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.max_new_tokens, config.max_length = int(max_new_tokens), None
    config.eos_token_id = sorted(_end_ids(model, settings)) or None
    config.pad_token_id = pad_token_id(model.tokenizer)
    for name, kind in (("top_p", float), ("top_k", int), ("repetition_penalty", float)):
        if (value := getattr(settings, name)) is not None:
            setattr(config, name, kind(value))
    if settings.temperature is not None:
        config.do_sample = settings.temperature > 0
        config.temperature = float(settings.temperature) or None
    elif settings.top_p is not None or settings.top_k is not None:
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config


def _unset(model: CausalModel) -> dict[str, Any]:
    """Return arguments of transformers' `generate` that override what its own config of the model says."""
    return {name: None for name in UNSET if getattr(model.net.generation_config, name, None) is not None}


def _validate(model: CausalModel, settings: GenerationSettings) -> None:
    """Raise ModelError for the first setting that is out of range."""
    validate_generation(settings)
    validate_stop(settings, special_token_ids(model.tokenizer))


def validate_stop(settings: GenerationSettings, specials: Mapping[str, int]) -> None:
    """Raise ModelError for a stop string that is no text, or has one of the special tokens in it."""
    for one in settings.stop:
        if not isinstance(one, str):
            raise ModelError(f"stop: {one!r} is not a text")
        if not one:
            raise ModelError("stop: an empty string would end every answer at once")
        if one not in specials and (special := next((word for word in specials if word in one), None)):
            raise ModelError(f"stop: {one!r} has the special token {special!r} in it, which is no text: give it alone")


def _end_ids(model: CausalModel, settings: GenerationSettings) -> set[int]:
    """Return the tokens that end an answer: the model's, and special tokens among the stop strings."""
    specials = special_token_ids(model.tokenizer)
    return {*eos_token_ids(model), *(specials[one] for one in settings.stop if one in specials)}


def _pad_left(prompts: list[list[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, int64 [B, N]."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def _text_stream(model: CausalModel, settings: GenerationSettings) -> TextStream:
    return TextStream(model.tokenizer, special_token_ids(model.tokenizer).values(), settings.stop)


class _Stopping:
    """A stopping criterion of transformers' `generate`: ends each row whose answer has a stop string in its text.

    `lengths` are the numbers of tokens of the answers that it ended, by row.
    """

    def __init__(self, model: CausalModel, settings: GenerationSettings) -> None:
        self.lengths: dict[int, int] = {}
        self._model, self._settings = model, settings
        self._ends = _end_ids(model, settings)
        self._texts: list[TextStream] = []
        self._ended: set[int] = set()
        self._length = 0

    def criteria(self) -> list[Callable[..., Tensor]]:
        """Return the criterion, if there are stop strings."""
        return [self] if self._settings.stop else []

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self._texts = self._texts or [_text_stream(self._model, self._settings) for _ in input_ids]
        self._length += 1
        for index, token in enumerate(input_ids[:, -1].tolist()):
            if index in self._ended:
                continue
            if token not in self._ends:
                self._texts[index].push(token)
            if self._texts[index].stopped:
                self.lengths[index] = self._length
            if token in self._ends or index in self.lengths:
                self._ended.add(index)
        return torch.tensor([index in self.lengths for index in range(len(input_ids))], device=input_ids.device)


@contextmanager
def _seeded(seed: int | None, device: Any) -> Iterator[None]:
    """Seed torch's global generators within the context and restore them; None: use them as they are."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
                    **_unset(model),
                    streamer=_TokenQueue(tokens),
                    stopping_criteria=[_cancellation(cancelled), *_Stopping(model, settings).criteria()],
                )
            tokens.put(None)
        except BaseException as error:  # raised by the thread that reads
            tokens.put(error)

    thread = Thread(target=run, name="mowa-generate", daemon=True)
    thread.start()
    text = _text_stream(model, settings)
    ends = _end_ids(model, settings)
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


def _cancellation(cancelled: Event) -> Callable[..., Tensor]:
    """Return a stopping criterion that ends every row once the event is set."""
    return lambda input_ids, scores, **_: torch.full((len(input_ids),), cancelled.is_set(), device=input_ids.device)


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
