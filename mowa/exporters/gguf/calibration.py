"""Collect an importance matrix: run a language model on calibration text and record the inputs of its linear layers.

`calibration_batches` cuts text into chunks as llama-imatrix does, and `collect_importance` sums the squares of all
inputs. Hooks see what a layer gets; changes of layout in GGUF permute rows of weights and leave columns alone, and
tensors that come from one (fused projections) share its inputs. Two things are inside of modules, and are computed
again: the inputs of experts' down projections, and the two that llama.cpp has instead of DeepSeek's kv_b.

Source: tools/imatrix of llama.cpp (MIT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mowa.data.chat.conversations import read_conversations
from mowa.data.chat.samples import Conversation, Document
from mowa.data.chat.tokenize import tokenize_conversations
from mowa.errors import DataError, ModelError
from mowa.io.gguf.imatrix import ImportanceMatrix, mean_squares
from mowa.models.gguf.architecture import TensorRule
from mowa.models.gguf.convert import EMBEDDINGS_IN_GGUF, expand
from mowa.models.gguf.tables import find_architecture
from mowa.models.gguf.transforms import SPLIT_LATENT

CHUNK_SIZE = 512
HEAD_IN_GGUF = "output.weight"
_WEIGHT = ".weight"
_GATE_UP, _DOWN = ".gate_up_proj", ".down_proj"  # of stacked experts
_UNLIMITED = 2**31


def calibration_batches(
    tokenizer: Any, text: str | Path, *, chunk_size: int = CHUNK_SIZE, max_chunks: int | None = None
) -> list[Tensor]:
    """Tokenize text as one stream and cut it into chunks, as llama-imatrix does: what is left over is not used.

    The first token of each chunk is replaced by BOS if the tokenizer adds BOS. Special tokens that a text spells are
    tokenized as text; those that a chat template writes are special.

    Args:
        tokenizer: of transformers.
        text: the text itself, or as a `Path` a file that `mowa.data.chat` reads, such as .txt and .jsonl; conversations
            are rendered with the tokenizer's chat template.
        chunk_size: tokens per chunk.
        max_chunks: chunks that are used, from the start; None: all.

    Returns:
        int64 [chunk_size] each.

    Raises:
        DataError: the file cannot be read, or the text has fewer tokens than a chunk.
    """
    if chunk_size < 1 or (max_chunks is not None and max_chunks < 1):
        raise DataError(f"chunk_size is {chunk_size} and max_chunks {max_chunks}: both must be at least 1")
    samples = list(read_conversations(text)) if isinstance(text, Path) else [Document("text", text)]
    bos = _added_bos(tokenizer)
    ids = ([] if bos is None else [bos]) + _tokenize(tokenizer, samples)
    count = min(len(ids) // chunk_size, max_chunks or _UNLIMITED)
    if not count:
        source = f"{text}: " if isinstance(text, Path) else ""
        raise DataError(
            f"{source}the calibration text has {len(ids)} tokens, and a chunk takes {chunk_size}: give more text"
        )
    chunks = torch.tensor(ids[: count * chunk_size]).view(count, chunk_size)
    if bos is not None:
        chunks[:, 0] = bos
    return list(chunks)


def _tokenize(tokenizer: Any, samples: Sequence[Conversation | Document]) -> list[int]:
    documents = [sample.text for sample in samples if isinstance(sample, Document)]
    conversations = [sample for sample in samples if isinstance(sample, Conversation)]
    ids: list[int] = []
    if documents:
        options: Any = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids += tokenizer("\n".join(documents), **options)["input_ids"]
    if conversations:
        encoded, _ = tokenize_conversations(conversations, tokenizer, train_on="all", max_length=_UNLIMITED)
        ids += [token for sample in encoded for token in sample.input_ids.tolist()]
    return ids


def _added_bos(tokenizer: Any) -> int | None:
    """Return BOS if the tokenizer puts it before text."""
    with_bos, without = (tokenizer("x", add_special_tokens=add)["input_ids"] for add in (True, False))
    bos: int | None = tokenizer.bos_token_id
    return bos if with_bos[:1] == [bos] and without[:1] != [bos] else None


@torch.inference_mode()
def collect_importance(
    net: Any,
    config: Any,
    token_ids: Iterable[Tensor],
    *,
    process_output: bool = False,
    datasets: Sequence[str] = (),
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> ImportanceMatrix:
    """Run a causal language model and return the mean squares of the inputs of its weights, by names of GGUF.

    Args:
        net: of transformers, of an architecture that can be written as GGUF. Its hooks, mode and attention are as
            before afterwards, whatever happens.
        config: of the net.
        token_ids: chunks, int64 [T] or [B, T], on any device.
        process_output: also collect for the head, `output.weight`, or `token_embd.weight` where embeddings are the head
            (there, llama-imatrix collects nothing). False, as llama-imatrix has it: a head without importance is
            rounded as without a matrix.
        datasets: names of the texts, to be kept in the file.
        on_progress: called with the fraction that is done.

    Returns:
        The matrix. Experts that no token chose have count 0 and importance 1.

    Raises:
        ModelError: the architecture is not supported, a module is missing, or inputs are infinite or NaN.
        DataError: there are no tokens, or one is outside the vocabulary.
    """
    chunks = [chunk if chunk.ndim > 1 else chunk[None] for chunk in token_ids]
    if not sum(chunk.numel() for chunk in chunks):
        raise DataError("there are no calibration tokens")
    if (largest := max(int(chunk.max()) for chunk in chunks if chunk.numel())) >= config.vocab_size:
        raise DataError(f"token {largest} is outside the model's vocabulary of {config.vocab_size}: use its tokenizer")
    totals = _Totals()
    body = net.get_submodule("model")
    on_progress(0.0)
    with _observed(net, config, totals):
        for index, chunk in enumerate(chunks, 1):
            hidden = body(input_ids=chunk.to(net.device), use_cache=False).last_hidden_state
            if process_output:
                totals.add((_head_name(config),), hidden)
            on_progress(index / len(chunks))
    values = {name: mean_squares(squares, totals.counts[name]) for name, squares in totals.squares.items()}
    num_chunks, size = sum(len(chunk) for chunk in chunks), chunks[0].shape[-1]
    return ImportanceMatrix(values, totals.counts, tuple(datasets), num_chunks, size)


def _head_name(config: Any) -> str:
    tied = config.tie_word_embeddings and find_architecture(config).tied != "never"
    return EMBEDDINGS_IN_GGUF if tied else HEAD_IN_GGUF


class _Totals:
    """Sums of squares, float64 [K] or [E, K], and counts, int64 [] or [E], by name."""

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], x: Tensor) -> None:
        """Add inputs [..., K] to tensors that share them."""
        rows = x.flatten(0, -2)
        self._add(names, _square_sums(rows), torch.tensor(len(rows)))

    def add_heads(self, names: Sequence[str], x: Tensor) -> None:
        """Add inputs [..., heads, K]."""
        rows = x.flatten(0, -3)
        self._add(names, _square_sums(rows), torch.full((rows.shape[1],), len(rows)))

    def add_experts(self, names: Sequence[str], inputs: Iterable[Tensor]) -> None:
        """Add inputs [n, K] of each expert; n may be 0."""
        sums = [(_square_sums(rows), len(rows)) for rows in inputs]
        self._add(names, torch.stack([squares for squares, _ in sums]), torch.tensor([count for _, count in sums]))

    def _add(self, names: Sequence[str], squares: Tensor, counts: Tensor) -> None:
        if not squares.isfinite().all():
            raise ModelError(
                f"the inputs of {names[0]} are infinite or NaN on the calibration text: the model is damaged, or needs"
                " another dtype than float16"
            )
        for name in names:
            self.squares[name] = self.squares.get(name, 0) + squares
            self.counts[name] = self.counts.get(name, 0) + counts


def _square_sums(rows: Tensor) -> Tensor:
    """Return Σ x² over the first dimension: float32 within a call, which has no float64 on some devices."""
    return rows.float().square().sum(0).cpu().double()


@contextmanager
def _observed(net: Any, config: Any, totals: _Totals) -> Iterator[None]:
    """Add the inputs of all modules that have weights in GGUF to the totals, inside the context."""
    with ExitStack() as cleanup:
        cleanup.callback(net.train, net.training)
        net.eval()
        architecture = find_architecture(config)
        if any(rule.transform is SPLIT_LATENT for rule in architecture.tensors):
            cleanup.callback(net.set_attn_implementation, net.config._attn_implementation)
            net.set_attn_implementation("eager")
        experts: dict[str, dict[str, tuple[str, ...]]] = {}
        for rule in expand(architecture, config.num_hidden_layers):
            name, _, tensor = rule.source.rpartition(".")
            if tensor in (_GATE_UP[1:], _DOWN[1:]):
                experts.setdefault(name, {})[tensor] = rule.targets
            elif rule.source.endswith(_WEIGHT) and "blk." in rule.targets[0] and "norm" not in rule.targets[0]:
                _observe_linear(net, config, rule, totals, cleanup)
        for name, targets in experts.items():
            if (module := _find(net, name)) is not None:
                hook = partial(_add_experts, totals, targets)
                cleanup.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _find(net: Any, name: str) -> Any:
    try:
        return net.get_submodule(name)
    except AttributeError:
        return None


def _observe_linear(net: Any, config: Any, rule: TensorRule, totals: _Totals, cleanup: ExitStack) -> None:
    module = _find(net, name := rule.source.removesuffix(_WEIGHT))
    if module is None and rule.optional:
        return
    if module is None:
        raise ModelError(f"this {config.model_type} model has no module {name}, whose inputs are needed")
    if rule.transform is SPLIT_LATENT:
        _observe_latent(net, config, rule, totals, cleanup)
        return
    hook = module.register_forward_pre_hook(lambda _, args: totals.add(rule.targets, args[0]))
    cleanup.callback(hook.remove)


def _observe_latent(net: Any, config: Any, rule: TensorRule, totals: _Totals, cleanup: ExitStack) -> None:
    """Add what llama.cpp multiplies by the two parts of kv_b: queries [heads, K], and attended latents [heads, L].

    transformers expands the latents to keys and values instead. Softmax weights are returned by eager attention only.
    """
    attention = net.get_submodule(rule.source.removesuffix(".kv_b_proj" + _WEIGHT))
    query = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
    latents: list[Tensor] = []

    def add_queries(_: Any, args: Any, output: Tensor) -> None:
        heads = output.unflatten(-1, (config.num_attention_heads, -1))
        totals.add_heads(rule.targets[:1], heads[..., : config.qk_nope_head_dim])

    def add_attended(_: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1].float()  # [B, heads, T, T]
        latent = latents.pop().float().view(len(weights), 1, -1, config.kv_lora_rank)
        totals.add_heads(rule.targets[1:], (weights @ latent).transpose(1, 2))

    cleanup.callback(query.register_forward_hook(add_queries).remove)
    cleanup.callback(attention.kv_b_proj.register_forward_pre_hook(lambda _, args: latents.append(args[0])).remove)
    cleanup.callback(attention.register_forward_hook(add_attended).remove)


def _add_experts(totals: _Totals, targets: dict[str, tuple[str, ...]], module: Any, args: tuple[Any, ...]) -> None:
    """Add the inputs of stacked experts: of tokens [n, H], chosen experts [n, experts per token]."""
    if not hasattr(module, "_apply_gate"):
        raise ModelError(f"the experts of class {type(module).__name__} cannot be observed: load the model unquantized")
    tokens, chosen = args[0].flatten(0, -2), args[1].flatten(0, -2)
    inputs = [tokens[(chosen == expert).any(-1)] for expert in range(module.num_experts)]
    totals.add_experts(targets["gate_up_proj"], inputs)
    totals.add_experts(targets["down_proj"], (_intermediate(module, rows, index) for index, rows in enumerate(inputs)))


def _intermediate(module: Any, rows: Tensor, expert: int) -> Tensor:
    """Return the inputs of an expert's down projection, [n, F], for tokens [n, H]."""
    weight = module.gate_up_proj[expert]
    gate_up = rows @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        gate_up = gate_up + module.gate_up_proj_bias[expert]
    found: Tensor = module._apply_gate(gate_up)
    return found
