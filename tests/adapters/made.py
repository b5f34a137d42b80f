"""Adapters that have learnt something, if only noise, over tiny random checkpoints."""

from pathlib import Path

import torch

from mowa import loading
from mowa.adapters import bottleneck, checkpoint, head, lora
from mowa.types import Model, Vocabulary
from tests.checkpoints import clip

OTHER = Vocabulary(
    ("<pad>", "<s>", "</s>", "<unk>", "|", *"абвгдежз"), blank=0, delimiter=4, specials=frozenset({1, 2, 3})
)


def adapted(base: Path, kind: str, *, seed: int = 0, words: Vocabulary | None = None) -> Model:
    """The checkpoint in `base` with an adapter of `kind` put in for training, its weights stirred; another head too."""
    model = loading.load(str(base))
    net, words = model.net, words or model.vocabulary
    torch.manual_seed(seed)
    head.resize_head(net, model.family, model.vocabulary, words)
    if kind == "lora":
        lora.add(net, model.family, rank=3, alpha=6, target_modules=tuple(model.family.linears))
    else:
        bottleneck.add(net, model.family, 5)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if (".lora_B" if kind == "lora" else ".adapter_layer.") in name or name.startswith("lm_head."):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return Model(net.eval(), model.family, model.origin, words, model.preprocessing)


def saved(base: Path, kind: str, folder: Path, *, seed: int = 0, words: Vocabulary | None = None, **more: str) -> Model:
    """`adapted`, written to `folder`; gives the model whose logits the folder must give."""
    model = adapted(base, kind, seed=seed, words=words)
    checkpoint.save_adapter(
        model.net,
        folder,
        adapter_type=kind,
        base=model.origin,
        vocabulary=model.vocabulary,
        preprocessing=model.preprocessing,
        metrics={"dev": {"wer": 0.25, "cer": 0.125}},
        **more,
    )
    return model


def logits(net: torch.nn.Module, seed: int = 0, samples: int = 8_000) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.from_numpy(clip(seed, samples))[None]).logits
