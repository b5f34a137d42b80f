"""LoRA adapters of tiny nets with random weights, saved by PEFT."""

import copy
import json
import warnings

import peft
import torch
from safetensors.torch import load_file, save_file


def linear_layers(net):
    """Return the full names of the linear layers in the blocks, without MLPs where PEFT takes them for experts."""
    inside = ".self_attn." if any("experts" in name for name, _ in net.named_modules()) else ".layers."
    linears = (name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in linears if inside in name]


def add_lora(net, **settings):
    """Return a copy of a net with LoRA of all linear layers in its blocks, with random A and B."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": linear_layers(net)} | settings
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def save(model, folder):
    """Save an adapter as PEFT does, and return its folder."""
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def change_settings(folder, **changes):
    """Change adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder, change):
    """Rewrite the weights of an adapter with `change`, a function of its state dict."""
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
