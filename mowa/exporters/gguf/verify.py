"""Compare a GGUF file with the model that it was written from: probabilities of the next token, and perplexity.

The reference is the model in float32 as transformers computes it. The file is run twice: by transformers over its
dequantized weights, and by llama.cpp where it is installed, which also shows that llama.cpp agrees about names and
layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mowa.exporters.gguf.mixes import FLOAT_TYPES
from mowa.exporters.verify import SAMPLE_TEXTS
from mowa.models.diff import compare

T = TypeVar("T")

MAX_PROMPTS, MAX_PROMPT_TOKENS = 24, 256
PROSE = (
    "The lighthouse stood on a low rock about two miles from the harbour. Every evening, at half past six, the keeper "
    "climbed its ninety-four steps, cleaned the glass and lit the lamp. In winter the waves reached the second window, "
    "and he could not leave the tower for weeks.",
    "To make a simple soup, chop one onion, two carrots and a stick of celery. Fry them slowly in butter until they "
    "are soft. Add a litre of water, salt and a bay leaf, and let everything simmer for forty minutes. Serve it with "
    "bread and a little fresh parsley.",
    "Photosynthesis turns light into chemical energy. Plants take in carbon dioxide and water, and with the help of "
    "chlorophyll they produce sugar and oxygen. The reaction has two parts: the first needs light, and the second, "
    "which builds the sugar, does not.",
    "Question: A train leaves at 9:15 and arrives at 11:40. How long is the journey?\nAnswer: From 9:15 to 11:15 are "
    "two hours, and from 11:15 to 11:40 are twenty-five minutes, so the journey takes two hours and twenty-five "
    "minutes.",
    "The committee met on Tuesday, 14 March, to discuss the budget for the coming year. After two hours of debate the "
    "members agreed to spend more on the library and less on the new car park. The mayor said that she was satisfied "
    "with the result, although it was not what she had proposed.",
    '{"name": "Anna", "age": 31, "languages": ["Polish", "English"], "address": {"city": "Gdansk", "zip": "80-001"}}',
)
RUNTIME_PROMPTS, RUNTIME_TOKENS, RUNTIME_TOP = 4, 24, 200
MARGIN = 0.05  # logits: where the two most probable tokens are closer, either may be on top
PYTORCH = "pytorch"
ROUNDED_INPUTS = 4  # times the KL limit in runtimes that also round the inputs of quantized weights to 8 bits
FLIPS_FROM = 0.5  # of the KL limit: below, tokens that change are near ties, as in untrained models


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a scheme: mean KL divergence in nats per token, and agreement of the top token.

    The agreement may be lower by two standard deviations of its sample, and counts only where the KL divergence is more
    than `FLIPS_FROM` of its limit.
    """

    max_kl: float
    min_agreement: float


LIMITS: Mapping[str, Limits] = {
    **dict.fromkeys(("f32", "f16"), Limits(1e-4, 0.99)),
    **{"bf16": Limits(5e-3, 0.97), "q8_0": Limits(5e-3, 0.98), "q6_k": Limits(0.03, 0.94)},
    **dict.fromkeys(("q5_k_m", "q5_k_s", "q5_1", "q5_0"), Limits(0.15, 0.85)),
    **dict.fromkeys(("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "mxfp4_moe"), Limits(0.5, 0.7)),
    **dict.fromkeys(("q3_k_l", "q3_k_m", "q3_k_s"), Limits(1.0, 0.55)),
    **{"q2_k": Limits(2.5, 0.35)},
}
"""From SmolLM2-135M and Gemma-3-270M, small models, which quantization harms most: about twice what they lose."""


@dataclass(frozen=True, slots=True)
class OutputReport:
    """How a runtime's outputs for a file differ from those of the model.

    runtime               `PYTORCH` or another that runs GGUF files
    kl                    mean KL divergence of the next token, nats
    agreement             share of positions with the same top token, of those where the model's two most probable ones
                          are `MARGIN` apart
    positions             that were compared
    perplexity            of the prompts, by the file; None if it was not computed
    reference_perplexity  by the model
    """

    runtime: str
    kl: float
    agreement: float
    positions: int
    perplexity: float | None = None
    reference_perplexity: float | None = None

    def max_kl(self, scheme: str) -> float:
        """Return the limit of the KL divergence, nats: larger where the runtime rounds inputs too."""
        is_rounded = self.runtime != PYTORCH and scheme not in FLOAT_TYPES
        return LIMITS[scheme].max_kl * (ROUNDED_INPUTS if is_rounded else 1)

    def problem(self, scheme: str) -> str:
        """Return which limit of a scheme is exceeded; empty if none is."""
        limits, max_kl = LIMITS[scheme], self.max_kl(scheme)
        is_rounded = max_kl > limits.max_kl
        if not self.kl <= max_kl:
            return f"the KL divergence is {self.kl:.2g} nats in {self.runtime} (limit {max_kl:g})"
        deviation = math.sqrt(limits.min_agreement * (1 - limits.min_agreement) / self.positions)
        flips = not is_rounded and self.kl > FLIPS_FROM * limits.max_kl
        if flips and self.agreement < limits.min_agreement - 2 * deviation:
            return (
                f"the top token is the same at {self.agreement:.1%} of the positions in {self.runtime}"
                f" (limit {limits.min_agreement:.0%})"
            )
        return ""


def load_prompts(tokenizer: Any, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
    """Return token ids of the built-in prompts and of `texts`, at most `MAX_PROMPTS` of `MAX_PROMPT_TOKENS` each.

    `max_tokens` is the model's context.
    """
    length = min(MAX_PROMPT_TOKENS, max_tokens or MAX_PROMPT_TOKENS)
    step = max(1, -(-len(texts) // (MAX_PROMPTS - len(SAMPLE_TEXTS) - len(PROSE))))
    chosen = (*SAMPLE_TEXTS, *PROSE, *texts[::step])
    ids = [tokenizer(text, verbose=False)["input_ids"][:length] for text in chosen]
    return [one for one in ids if len(one) > 1]


def compute_logits(net: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits of each prompt, float32 [T, V]."""
    with torch.inference_mode():
        return [net(torch.tensor([list(ids)], device=net.device)).logits[0].float().cpu() for ids in prompts]


def compare_outputs(
    runtime: str, reference: Sequence[Tensor], found: Sequence[Tensor], prompts: Sequence[Sequence[int]]
) -> OutputReport:
    """Compare logits or log-probabilities, float32 [T, V] per prompt."""
    diff = compare(reference, found)
    return OutputReport(
        runtime,
        float(diff.kl),
        _agreement(reference, found),
        diff.num_frames,
        _perplexity(found, prompts),
        _perplexity(reference, prompts),
    )


def _agreement(reference: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the share of positions with the same top token, where the two most probable ones are `MARGIN` apart."""
    same = decided = 0
    for ours, theirs in zip(reference, found, strict=True):
        best = ours.topk(2).values
        clear = best[:, 0] - best[:, 1] >= MARGIN
        same += int((ours.argmax(-1) == theirs.argmax(-1))[clear].sum())
        decided += int(clear.sum())
    return same / decided if decided else 1.0


def _perplexity(logits: Sequence[Tensor], prompts: Sequence[Sequence[int]]) -> float:
    losses = [
        functional.cross_entropy(one[:-1], torch.tensor(list(ids[1:])), reduction="none")
        for one, ids in zip(logits, prompts, strict=True)
    ]
    mean = float(torch.cat(losses).double().mean())
    return float(np.exp(mean)) if mean < 700 else math.inf


def spread(items: Sequence[T]) -> Sequence[T]:
    """Return `RUNTIME_PROMPTS` of the prompts, or of what belongs to them, for runtimes that are slow to score."""
    return items[:: max(1, len(items) // RUNTIME_PROMPTS)][:RUNTIME_PROMPTS]


def compare_top(runtime: str, reference: Sequence[Tensor], found: Sequence[Tensor]) -> OutputReport:
    """Compare log-probabilities of the tokens that a runtime found most probable, the others being −inf.

    The others count as one token, so the KL divergence is at most that of the whole distributions.
    """
    cut = [logits[: len(top)] for logits, top in zip(reference, found, strict=True)]
    total, count = 0.0, 0
    for logits, top in zip(cut, found, strict=True):
        known = top.isfinite()
        p, q = (_with_rest(one.double().exp(), known) for one in (logits.double().log_softmax(-1), top))
        total += float((p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log())).sum())
        count += len(top)
    return OutputReport(runtime, max(0.0, total / count), _agreement(cut, found), count)


def _with_rest(probabilities: Tensor, known: Tensor) -> Tensor:
    """Return [T, V + 1]: probabilities of known tokens, zeros for others, and the sum of those."""
    kept = torch.where(known, probabilities, 0)
    return torch.cat([kept, (1 - kept.sum(-1, keepdim=True)).clamp_min(0)], -1)
