"""The values that travel between rooms. They hold facts and know nothing of how they were made.

Times are seconds from the start of the recording (`_s`); confidences are probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORE_INDEX = -100  # the label of what is not learnt, as torch and transformers have it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each output of a CTC head means. `tokens[i]` is the text of id `i`.

    `blank` is the id CTC calls blank (the pad token of the checkpoint); `delimiter` the id that parts words, if any;
    `specials` the ids (without blank and delimiter) that are never text: <s>, </s>, <unk> and the like.
    """

    tokens: tuple[str, ...]
    blank: int
    delimiter: int | None
    specials: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What the checkpoint asks of its audio: rate, normalisation and whether padding is masked in the net."""

    rate_hz: int = 16_000
    normalize: bool = True
    attention_mask: bool = True
    padding_value: float = 0.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model came from: the name the user gave, the resolved id, its revision and licence where known."""

    name: str
    source: str
    folder: Path
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, as data. `model_types` are the `model_type`s of transformers configs it answers to.

    name           what it is called here, unlike any other family
    task           ctc, causal, vision-language or embedding
    blocks         class names of its blocks, the layers that are alike
    linears        group → names of the linear layers of a block; a suffix with dots where the last part says too little
    frozen         parts that stay as they are when all the rest learns, below the net's base model
    head           the module that gives outputs; empty where there is none
    architectures  class names of transformers nets it answers to, for configs that name no model type
    aliases        regular expressions: how repositories of it are called, from the beginning of the last part of a name
    swaps          operation → class names of modules that compute it: `rms_norm` x·r·w, `rms_norm_plus_one` x·r·(1+w)
                   with r = (mean x² + eps)^-½, rounded before or after the weight; `swiglu` down(silu(gate)·up) and
                   `geglu` down(gelu(gate)·up), where the config leaves the activation that the family is known by
    tensors        part → where it lies in safetensors: `block` a prefix with `{i}`; embeddings, norm, head tensors
    template       what its chat templates put before and after an assistant's turn, where they agree
    widths         part below the base model, or head → in what its matrices are kept where the blocks' `linears` are in
                   integers: float16, or int8 (by row or output channel, computed wide); vectors stay float32
    limits         operation → why it does not apply: those of `swaps`, `packing`,
                   `packing_unaccelerated` (with transformers' own attention), `attention`, `fused_head`, `experts`
    """

    name: str
    model_types: tuple[str, ...]
    task: str
    blocks: tuple[str, ...]
    linears: Mapping[str, tuple[str, ...]]
    frozen: tuple[str, ...] = ()
    head: str = "lm_head"
    architectures: tuple[str, ...] = ()
    name_patterns: tuple[str, ...] = ()
    fused_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    template: tuple[str, str] | None = None
    non_block_weights: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scheme:
    """In how few bits weights are kept, and what their products are made of. `shrink.schemes` knows them by name.

    name         int8-dynamic, int4-weight, …
    weights      of the blocks' linears: float32, float16, bfloat16, int8, int4, nf4, or mixed (a choice for each)
    activations  what meets them: wide (as it is), dynamic (int8 by its own range), static (int8 by a range seen before)
    group        so many weights of a row share a step; 0: the whole row
    symmetric    steps to both sides of 0 alike; else each group has a zero of its own
    compensated  the error of a column is made good by the others (GPTQ), for which recordings are needed
    budget       of mixed: the share of the size in float32 that may be used
    """

    name: str
    weights: str
    activations: str = "none"
    group_size: int = 0
    symmetric: bool = True
    gptq: bool = False
    size_budget: float = 0.0


FLOAT32 = Scheme("float32", "float32")


@dataclass(frozen=True, slots=True)
class Model:
    """A model in memory: the stock transformers module and what is needed to feed it and read it.

    Of a shrunk one, linears are `kernels.narrow.NarrowLinear`s, and other weights are rounded to what `scheme`
    and the family say.
    """

    net: Any  # a transformers PreTrainedModel
    family: Family
    origin: Origin
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    scheme: Scheme = FLOAT32


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model on disk as another program runs it: a folder with a manifest.

    `kind` is its format, `config` the transformers config of the net, `details` what a runner must know beside,
    `agreeing` the share of frames with the net's likeliest output, and `unchecked` what could not be measured, and why.
    """

    folder: Path
    format: str
    family: str
    scheme: Scheme
    origin: Origin
    config: Any
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    files: tuple[str, ...]
    details: Mapping[str, Any]
    agreement: float | None
    unverified_reason: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that hold the model."""
        return sum((self.folder / name).stat().st_size for name in self.files)


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model in memory: the stock transformers module, and the tokenizer that it was trained with."""

    net: Any  # a transformers PreTrainedModel
    family: Family
    origin: Origin
    tokenizer: Any  # a transformers PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Character:
    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    start_s: float
    end_s: float
    confidence: float
    characters: tuple[Character, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech. `channel` is None where the channels of the recording were heard as one.

    Of a live stream: `final` is false for a hypothesis that may still change, and `stability` is the share of its
    letters that will not; `ends` is false where a final one will be gone on with.
    """

    text: str
    start_s: float
    end_s: float
    words: tuple[Word, ...] = ()
    confidence: float = 0.0
    is_final: bool = True
    channel: int | None = None
    stability: float = 1.0
    is_endpoint: bool = True


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said in one recording, by which model, under which settings."""

    file: str
    text: str
    duration_s: float
    segments: tuple[Segment, ...] = ()
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> tuple[Word, ...]:
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def confidence(self) -> float:
        words = self.words
        return sum(word.confidence for word in words) / len(words) if words else 0.0


@dataclass(frozen=True, slots=True)
class Example:
    """One datum before collation: a recording and its text.

    `duration_s` is 0 where nobody has said it. `sound` is the encoded recording where it is no file of its own (`audio`
    is then what it is called); it is a part of it, from `begin_s` on, where `part`.
    """

    id: str
    audio: str
    text: str
    duration_s: float
    tags: Mapping[str, Any] = field(default_factory=dict)
    offset_s: float = 0.0
    is_excerpt: bool = False
    audio_bytes: bytes | None = field(default=None, repr=False)
