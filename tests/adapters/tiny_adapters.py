"""Adapters with random weights over tiny random checkpoints."""

from pathlib import Path

import torch

from mowa import loading
from mowa.adapters import bottleneck, checkpoint, head, lora
from mowa.types import CTCModel, Model, SpeechProcessor, Vocabulary
from tests.checkpoints import clip

OTHER_VOCABULARY = Vocabulary(
    ("<pad>", "<s>", "</s>", "<unk>", "|", *"абвгдежз"), blank=0, delimiter=4, specials=frozenset({1, 2, 3})
)


def tiny_adapter_model(
    base: Path, adapter_type: str, *, seed: int = 0, vocabulary: Vocabulary | None = None
) -> CTCModel:
    """Return the checkpoint in `base` with a random adapter and head, the head for `vocabulary` if it is given."""
    model = loading.load(str(base))
    net, vocabulary = model.net, vocabulary or model.vocabulary
    torch.manual_seed(seed)
    head.resize_head(net, model.family, model.vocabulary, vocabulary)
    if adapter_type == "lora":
        lora.add(net, model.family, rank=3, alpha=6, target_modules=tuple(model.family.linears))
    else:
        bottleneck.add(net, model.family, 5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if (".lora_B" if adapter_type == "lora" else ".adapter_layer.") in name or name.startswith("lm_head."):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    processor = SpeechProcessor(vocabulary, model.preprocessing)
    return Model(net.eval(), model.family, model.origin, processor)


def save_tiny_adapter(
    base: Path,
    adapter_type: str,
    folder: Path,
    *,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    **options: str,
) -> CTCModel:
    """Write the adapter of `tiny_adapter_model` to `folder`, and return the model that loading it must reproduce."""
    model = tiny_adapter_model(base, adapter_type, seed=seed, vocabulary=vocabulary)
    checkpoint.save_adapter(
        model.net,
        folder,
        adapter_type=adapter_type,
        base=model.origin,
        vocabulary=model.vocabulary,
        preprocessing=model.preprocessing,
        metrics={"dev": {"wer": 0.25, "cer": 0.125}},
        **options,
    )
    return model


def logits(net: torch.nn.Module, seed: int = 0, samples: int = 8_000) -> torch.Tensor:
    """Return the logits, float32 [1, T, V], of noise."""
    with torch.no_grad():
        return net(torch.from_numpy(clip(seed, samples))[None]).logits
