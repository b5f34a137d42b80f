"""Values shared by all packages: models, vocabularies, quantization schemes, transcripts and training examples.

Times are seconds from the start of the recording (suffix `_s`); confidences are probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from mowa.errors import ModelError, MowaError

MAX_REPR_CHARS = 60  # of a text in a repr
IGNORE_INDEX = -100  # label of positions without loss, as in torch and transformers


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Meaning of each output of a CTC head: `tokens[i]` is the text of id `i`.

    `blank` is the id of the CTC blank (the pad token of the checkpoint), `delimiter` the id that separates words, if
    any, and `specials` the other ids that are never text, such as <s>, </s> and <unk>. `separator` is written between
    tokens: a space in phoneme vocabularies. With `lower_case`, texts are written in lower case whatever the tokens are.
    """

    tokens: tuple[str, ...]
    blank: int
    delimiter: int | None
    specials: frozenset[int] = frozenset()
    separator: str = ""
    lower_case: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def text(self, token: int) -> str:
        """Return what a token writes: a space for the delimiter and for ▁, the separator before any other."""
        return " " if token == self.delimiter else self.separator + self.tokens[token].replace("▁", " ")

    @property
    def texts(self) -> tuple[str, ...]:
        """What each token writes, in lower case with `lower_case`."""
        texts = map(self.text, range(len(self)))
        return tuple(text.lower() for text in texts) if self.lower_case else tuple(texts)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Audio settings of a checkpoint: sample rate, zero-mean unit-variance normalization, and padding."""

    rate_hz: int = 16_000
    normalize: bool = True
    attention_mask: bool = True
    padding_value: float = 0.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model came from: the given name, the resolved Hub id or folder, and its commit and license if known.

    `target_lang` is the language that was selected of an MMS checkpoint.
    """

    name: str
    source: str
    folder: Path
    revision: str | None = None
    license: str | None = None
    target_lang: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Description of one architecture.

    name              unique name
    model_types       values of `model_type` in transformers configs
    task              ctc, causal, vision-language or embedding
    blocks            class names of its blocks, the repeated layers
    linears           group → names of the linear layers of a block, with dots where the last component is ambiguous
    frozen            modules, relative to the base model, that stay frozen when the rest of the encoder is trained
    head              module that computes the outputs; empty if there is none
    architectures     class names of transformers models, for configs without a model type
    name_patterns     regular expressions that match the beginning of the last part of a repository's name
    fused_modules     operation → class names of modules that compute it: `rms_norm` x·r·w and `rms_norm_plus_one`
                      x·r·(1+w) with r = (mean x² + eps)^-½, rounded before or after the weight; `swiglu`
                      down(silu(gate)·up) and `geglu` down(gelu(gate)·up), for the activation that the config names
    tensor_names      part → its name in safetensors files: `block` is a prefix with `{i}`; embeddings, norm, head
    non_block_weights module outside the blocks → dtype of its matrices in integer schemes: float16, or int8 (per row or
                      output channel, dequantized for the product); vectors stay float32
    unsupported       operation → reason why it does not apply: keys of `fused_modules`, `packing`,
                      `packing_unaccelerated` (with transformers' own attention), `attention`, `fused_loss`, `experts`;
                      and for speech, reasons why a capability is not in `supports`
    supports          of speech families, what was tested to give the outputs of transformers, because mowa or a format
                      computes the net by itself: `cpu_plan` (faster inference on CPUs, int8), `packing` (training
                      without padding), `chunked` (chunked attention and cached streaming), `coreml`, `ctranslate2`
                      (exports), `tensorrt_mask` (TensorRT exports whose batches may be padded)
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
    non_block_weights: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    supports: frozenset[str] = frozenset()

    def find_linear(self, path: str) -> str:
        """Return the entry of `linears` that names the module at `path`; empty if none does."""
        names = (name for group in self.linears.values() for name in group)
        return next((name for name in names if f".{path}".endswith(f".{name}")), "")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored and what they are multiplied by. `quantization.schemes` lists them by name.

    name         int8-dynamic, int4-weight, …
    weights      of the blocks' linear layers: float32, float16, bfloat16, int8, int4, nf4, or mixed (chosen per layer)
    activations  inputs of quantized layers: none (not quantized), dynamic (int8, range of each input) or static (int8,
                 calibrated range)
    group_size   weights of a row that share a scale; 0: the whole row
    symmetric    without zero points
    gptq         propagate rounding errors to the columns that follow, which needs calibration data
    size_budget  for mixed: fraction of the float32 size that may be used
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
class SpeechProcessor:
    """What turns audio into inputs of a CTC net, and its outputs into text."""

    vocabulary: Vocabulary
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True)
class TextProcessor:
    """What turns text into inputs of a language model, and its outputs into text."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase


ProcessorT = TypeVar("ProcessorT", bound=SpeechProcessor | TextProcessor, covariant=True)


@dataclass(frozen=True, slots=True, repr=False)
class Model(Generic[ProcessorT]):
    """A model in memory: a stock transformers module and what it needs to be used.

    net        the module; in a quantized model, linear layers are `kernels.quant.linear.QuantizedLinear` modules, and
               other weights are rounded as `scheme` and `Family.non_block_weights` say
    family     its architecture, and so its `task`
    origin     where it came from
    processor  vocabulary and audio settings (`CTCModel`), or a tokenizer (`CausalModel`)
    scheme     how its weights are stored
    """

    net: Any  # transformers.PreTrainedModel
    family: Family
    origin: Origin
    processor: ProcessorT
    scheme: Scheme = FLOAT32

    def __repr__(self) -> str:
        parameters = sum(weight.numel() for weight in self.net.parameters()) if hasattr(self.net, "parameters") else 0
        return (
            f"Model({self.origin.name!r}, task={self.task}, family={self.family.name}, scheme={self.scheme.name}, "
            f"{parameters:,} parameters)"
        )

    @property
    def task(self) -> str:
        """ctc or causal."""
        return self.family.task

    @property
    def vocabulary(self: Model[SpeechProcessor]) -> Vocabulary:
        """Meaning of the outputs of a CTC model."""
        return self.processor.vocabulary

    @property
    def preprocessing(self: Model[SpeechProcessor]) -> Preprocessing:
        """Audio settings of a CTC model."""
        return self.processor.preprocessing

    @property
    def tokenizer(self: Model[TextProcessor]) -> Any:
        """The tokenizer of a language model, a transformers.PreTrainedTokenizerBase."""
        return self.processor.tokenizer


CTCModel = Model[SpeechProcessor]
CausalModel = Model[TextProcessor]
AnyModel = Model[Any]


@dataclass(frozen=True, slots=True)
class Artifact:
    """An exported model on disk: a folder with a manifest.

    `processor` is None for language models, whose tokenizer is in the folder.
    `config` is the transformers config of the net, `details` holds the settings that a runtime of this `format` needs,
    `agreement` is the fraction of frames with the same top token as the net, and `unverified_reason` says what could
    not be compared, and why.
    """

    folder: Path
    format: str
    family: str
    scheme: Scheme
    origin: Origin
    config: Any
    processor: SpeechProcessor | None
    files: tuple[str, ...]
    details: Mapping[str, Any]
    agreement: float | None
    unverified_reason: str = ""

    @property
    def vocabulary(self) -> Vocabulary:
        """Meaning of the outputs of a speech model. Raises ModelError for a language model."""
        return self._speech_processor.vocabulary

    @property
    def preprocessing(self) -> Preprocessing:
        """Audio settings of a speech model. Raises ModelError for a language model."""
        return self._speech_processor.preprocessing

    @property
    def _speech_processor(self) -> SpeechProcessor:
        if self.processor is None:
            raise ModelError(f"{self.folder} holds a language model, which has no audio settings")
        return self.processor

    @property
    def size_bytes(self) -> int:
        """Total size of the model files."""
        return sum((self.folder / name).stat().st_size for name in self.files)


@dataclass(frozen=True, slots=True)
class Character:
    """A recognized character with its times."""

    text: str
    start_s: float
    end_s: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Word:
    """A recognized word with its times, and its characters if they were requested.

    `space_before` is false where the text has no space between this word and the one before it, as in Chinese.
    """

    text: str
    start_s: float
    end_s: float
    confidence: float
    characters: tuple[Character, ...] = ()
    space_before: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech. `channel` is None if the channels of the recording were averaged.

    In a live stream, `is_final` is false for a partial result that may still change, `stability` is the fraction of its
    tokens that will not, and `is_endpoint` is false for a final result that the next segment continues.
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


@dataclass(frozen=True, slots=True, repr=False)
class Transcript:
    """The transcript of one recording, with the model and settings that produced it."""

    file: str
    text: str
    duration_s: float
    segments: tuple[Segment, ...] = ()
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= MAX_REPR_CHARS else f"{self.text[:MAX_REPR_CHARS]}…"
        return (
            f"Transcript(file={self.file!r}, text={text!r}, duration_s={self.duration_s:.2f}, "
            f"{len(self.segments)} segments, {len(self.words)} words, model={self.model!r})"
        )

    @property
    def words(self) -> tuple[Word, ...]:
        """Words of all segments, in order."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def confidence(self) -> float:
        """Mean confidence of the words; 0 if there are none."""
        words = self.words
        return sum(word.confidence for word in words) / len(words) if words else 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A recording that could not be transcribed, and why."""

    file: str
    error: MowaError


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer of a language model. `finish_reason` is stop (it ended by itself, or at a stop string) or length."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Example:
    """A training or test sample: a recording and its text.

    `duration_s` is 0 if unknown. `audio` is the path of the recording, or its label if the encoded recording is in
    `audio_bytes`. With `is_excerpt`, the sample is the part of the recording that begins at `offset_s`. If `error` is
    not empty, the line of the corpus cannot be used for that reason, and `audio` is its position.
    """

    id: str
    audio: str
    text: str
    duration_s: float
    tags: Mapping[str, Any] = field(default_factory=dict)
    offset_s: float = 0.0
    is_excerpt: bool = False
    audio_bytes: bytes | None = field(default=None, repr=False)
    error: str = ""
