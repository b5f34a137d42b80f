"""Estimate the memory of a fine-tuning run per device for each sharding strategy, and choose one.

Formulas over parameter counts and layer sizes; nothing is run. P parameters, L of them trainable, B in one block (the
size of every bucket), n devices. Bytes on one device, AdamW with two float32 moments, float32 or bf16:

                   weights   gradients   moments   master    transient
    ddp            4 P       8 L ¹       8 L                 2 P ²
    zero2          4 P       4 L / n     8 L / n   4 L / n   8 B + 2 P ²
    zero3          4 P / n   4 L / n     8 L / n             20 B + 2 P ²
    zero3-offload                                            20 B + 2 P ²   (4 P + 16 L on all hosts together)
    fsdp           4 P / n   4 L / n     8 L / n             12 B + 2 B ²

¹ DDP's buckets hold a second copy; 4 L on one device. ² bf16 only: weights stay float32 (autocast), and each matrix
product saves its weight in half precision for the backward pass; with gradient checkpointing, those of one block. fp16
under ZeRO is DeepSpeed's own: weights 2 P, master 4 L / n, no saved copies. Sources: arXiv:1910.02054, the code of
DeepSpeed and torch.

For activations see `ctc_activation_bytes` and `causal_activation_bytes`. Allocator fragmentation, CUDA's context and
temporary copies of the optimizer are not counted; `choose_strategy` leaves a fifth of the device for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mowa.families import family_of
from mowa.models.ctc_encoder.anatomy import read_anatomy
from mowa.models.ctc_encoder.geometry import frame_geometry
from mowa.training.config.ctc import CTCRecipe

USABLE_SHARE = 0.8  # of a device's memory
STRATEGIES = ("ddp", "zero2", "zero3", "zero3-offload", "fsdp")
RATE_HZ = 16_000
HALF_PRECISION = ("bf16", "fp16")
FUSED_LOGITS_BYTES = 2 * 64 * 2**20  # logits and their gradients, which the fused loss computes in tiles


@dataclass(frozen=True, slots=True)
class MemoryBreakdown:
    """Bytes on one device, and (`host`) in the RAM of one machine."""

    weights: float
    gradients: float
    optimizer_states: float
    master_weights: float
    transient: float
    activations: float
    host: float

    @property
    def device_total(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer_states
            + self.master_weights
            + self.transient
            + self.activations
        )


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that each strategy needs, and the memory of one device and one machine; devices over all machines."""

    breakdowns: dict[str, MemoryBreakdown]
    gpu_bytes: float
    host_bytes: float
    num_devices: int
    parameters: int
    trainable_parameters: int

    def fits(self, strategy: str) -> bool:
        """Return whether a strategy needs at most USABLE_SHARE of a device and of its host."""
        need = self.breakdowns[strategy]
        return need.device_total <= USABLE_SHARE * self.gpu_bytes and need.host <= USABLE_SHARE * self.host_bytes


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """A strategy, and the reason for it in one line."""

    strategy: str
    reason: str


def estimate_memory(
    net: Any, recipe: Any, *, gpu_bytes: float, host_bytes: float, num_devices: int, precision: str = "float32"
) -> MemoryEstimate:
    """Estimate the memory that fine-tuning needs under each strategy.

    Args:
        net: the net, with requires_grad set; may be on the "meta" device.
        recipe: a recipe for the net's task.
        gpu_bytes: memory of one device.
        host_bytes: memory of one machine.
        num_devices: devices over all machines.
        precision: float32, bf16 or fp16.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters())
    trainable = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    shard, block = trainable / num_devices, max_block_parameters(net)
    checkpointing = recipe.optimizer.gradient_checkpointing
    options = {"precision": precision, "gradient_checkpointing": checkpointing}
    if recipe.task == "causal":
        activations = causal_activation_bytes(net, recipe.batch.tokens, **options)
    else:
        options["frame_ratio"] = streaming_frame_ratio(recipe)
        activations = ctc_activation_bytes(net, recipe.batch.seconds, **options)
    cast = 2 * (block if checkpointing else parameters) if precision in HALF_PRECISION else 0
    own = precision == "fp16"  # DeepSpeed's fp16 has no autocast, so only the weights are in half precision
    element, zero_cast, master = (2, 0, 4 * shard) if own else (4, cast, 0.0)
    loaded = 4.0 * parameters * recipe.distributed.devices  # each process loads the full net before it is sharded
    offloaded = (4 * parameters + 16 * trainable) / num_devices * recipe.distributed.devices
    shares = {
        "ddp": (4 * parameters, (8 if num_devices > 1 else 4) * trainable, 8 * trainable, 0, cast),
        "zero2": (element * parameters, 4 * shard, 8 * shard, 4 * shard, 8 * block + zero_cast),
        "zero3": (element * parameters / num_devices, 4 * shard, 8 * shard, master, 20 * block + zero_cast),
        "zero3-offload": (0, 0, 0, 0, 20 * block + zero_cast),
        "fsdp": (4 * parameters / num_devices, 4 * shard, 8 * shard, 0, 12 * block + (2 * block if cast else 0)),
    }
    breakdowns = {
        name: MemoryBreakdown(*share, activations, max(loaded, offloaded) if name == "zero3-offload" else loaded)
        for name, share in shares.items()
    }
    return MemoryEstimate(breakdowns, gpu_bytes, host_bytes, num_devices, parameters, trainable)


def streaming_frame_ratio(recipe: CTCRecipe) -> float:
    """Return how many frames the blocks compute per frame of audio: 1 + look-ahead / chunk where chunks are trained."""
    finite = [chunk for chunk in recipe.streaming.chunk_s if math.isfinite(chunk)]
    return 1 + max(recipe.streaming.lookahead_s) / min(finite) if finite else 1.0


def max_block_parameters(net: Any) -> int:
    """Return the number of parameters of the largest block, which is the size of communication buckets."""
    kinds = family_of(net).blocks
    blocks = [module for module in net.modules() if type(module).__name__ in kinds]
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def causal_activation_bytes(net: Any, tokens: float, *, precision: str, gradient_checkpointing: bool) -> float:
    """Estimate the bytes that a language model's forward pass over `tokens` saves, with the logits of the fused loss.

    Per token, with e bytes an element, hidden size H, Q and K elements of queries and keys, intermediate size F: a
    block saves e (6 H + 2 Q + 2 K + 3 F) (inputs and outputs of norms, inputs of attention and linear layers, the
    gate), a recomputed block e H. Of experts, only those that a token is routed to count. No test compares this with
    autograd.
    """
    config = net.config.get_text_config()
    element, width, depth = _element(precision), config.hidden_size, config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", None) or 1  # Mamba has none
    size = getattr(config, "head_dim", None) or width // heads
    queries = size * heads
    keys = size * (getattr(config, "num_key_value_heads", None) or heads)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or 4 * width
    inner *= experts
    block = element * (6 * width + 2 * queries + 2 * keys + 3 * inner)
    blocks = depth * element * width + block if gradient_checkpointing else depth * block
    return tokens * (blocks + element * width) + FUSED_LOGITS_BYTES


def ctc_activation_bytes(
    net: Any, seconds: float, *, precision: str, gradient_checkpointing: bool, frame_ratio: float = 1.0
) -> float:
    """Estimate the bytes of one batch of `seconds` of audio: saved activations, and the largest temporary tensors."""
    config, rates = net.config, _conv_rates(net.config)
    front = max(seconds * rate * width * 12 for rate, width in zip(rates, config.conv_dim, strict=True))
    saved = saved_activation_bytes(
        net, seconds, precision=precision, gradient_checkpointing=gradient_checkpointing, frame_ratio=frame_ratio
    )
    return saved + max(front, seconds * frame_ratio * _block_bytes(config, precision))


def saved_activation_bytes(
    net: Any, seconds: float, *, precision: str, gradient_checkpointing: bool, frame_ratio: float = 1.0
) -> float:
    """Estimate the bytes that a forward pass over `seconds` of audio saves for the backward pass.

    Over T frames, e bytes an element (2 under bf16 and fp16, else 4), hidden size H, intermediate size F, M bytes of
    dropout masks, C channels of the front end, V tokens:

        a block             T · (8 H + e (5 H + 2 F) + q + M)   inputs of both norms, of attention and linear layers
        a recomputed block  T · 4 H                             its input; and once a whole block more
        the front end       Σ T_l · C · (8 + e)                 2 e in layers without a norm; 0 where it is frozen
        between, and head   T · (4 C + e C + 2 e H + 4 H),      T · (e H + 4 V)

    q is 4 H, and 6 H under autocast, where queries, keys and values each save a copy of their input. As on a GPU, norms
    run in float32. Blocks below the lowest trainable parameter save nothing, and attention saves no score matrix. With
    look-ahead (`frame_ratio` > 1) blocks process that many times T frames.
    tests/training/distributed/test_launch.py compares this with the tensors that autograd saves.
    """
    config, rates = net.config, _conv_rates(net.config)
    anatomy, element = read_anatomy(net), _element(precision)
    width, frames = config.hidden_size, seconds * rates[-1]
    block = seconds * frame_ratio * _block_bytes(config, precision)
    depth, front, fed = _backward_extent(net)
    inputs = depth * frame_ratio * frames * 4 * width
    size = inputs + (block if depth else 0) if gradient_checkpointing else depth * block
    size += frames * (element * width + 4 * config.vocab_size)
    if fed or (depth and anatomy.stable):
        size += frames * 4 * width  # the encoder's layer norm, before or after the blocks
    if fed:
        size += frames * ((4 + element) * config.conv_dim[-1] + 2 * element * width)
    if front:
        normed = 1 if anatomy.normalizes_over_time else len(rates)
        each = [8 + element if index < normed else 2 * element for index in range(len(rates))]
        size += sum(seconds * r * c * bytes_ for r, c, bytes_ in zip(rates, config.conv_dim, each, strict=True))
    return size


def _block_bytes(config: Any, precision: str) -> float:
    """Bytes that one block saves per second of audio."""
    width, inner, element = config.hidden_size, config.intermediate_size, _element(precision)
    masks = 2 * width * (config.hidden_dropout > 0) + inner * (config.activation_dropout > 0)
    copies = (4 if element == 4 else 6) * width
    return _conv_rates(config)[-1] * (8 * width + element * (5 * width + 2 * inner) + copies + masks)


def _element(precision: str) -> int:
    return 2 if precision in HALF_PRECISION else 4


def _conv_rates(config: Any) -> list[float]:
    """Frames per second after each convolution of the front end."""
    return [RATE_HZ / hop for hop in frame_geometry(config).conv_hops]


def _backward_extent(net: Any) -> tuple[int, bool, bool]:
    """Return how many blocks gradients pass through, and whether they reach the front end and what lies between."""
    anatomy = read_anatomy(net)
    front, blocks = _is_trainable(anatomy.front_end.parameters()), list(anatomy.blocks)
    inside = {id(parameter) for part in (anatomy.front_end, *blocks) for parameter in part.parameters()}
    between = (parameter for parameter in net.base_model.parameters() if id(parameter) not in inside)
    after = {id(parameter) for parameter in anatomy.norm.parameters()} if anatomy.stable else set()
    fed = front or _is_trainable(parameter for parameter in between if id(parameter) not in after)
    if fed:
        return len(blocks), front, True
    lowest = next((index for index, block in enumerate(blocks) if _is_trainable(block.parameters())), len(blocks))
    return len(blocks) - lowest, False, False


def _is_trainable(parameters: Iterable[Any]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def choose_strategy(
    estimate: MemoryEstimate, strategies: Iterable[str] = ("ddp", "zero2", "zero3", "zero3-offload")
) -> StrategyChoice:
    """Return the fastest of `strategies` that fits in 80 % of device and host, else the smallest; with a reason."""
    candidates = [name for name in STRATEGIES if name in set(strategies)]
    limit = f"of {_gb(USABLE_SHARE * estimate.gpu_bytes)} (80 % of a device)"
    rejected: list[str] = []
    for name in candidates:
        need = estimate.breakdowns[name]
        if estimate.fits(name):
            others = f"; {', '.join(rejected)}" if rejected else ""
            return StrategyChoice(name, f"{name} needs {_gb(need.device_total)} {limit}{others}")
        if need.device_total > USABLE_SHARE * estimate.gpu_bytes:
            rejected.append(f"{name} would need {_gb(need.device_total)}")
        else:
            host = _gb(USABLE_SHARE * estimate.host_bytes)
            rejected.append(f"{name} would need {_gb(need.host)} of {host} of the host")
    smallest = min(candidates, key=lambda name: (estimate.breakdowns[name].device_total, STRATEGIES.index(name)))
    need = estimate.breakdowns[smallest]
    return StrategyChoice(
        smallest,
        f"nothing fits: {smallest} needs {_gb(need.device_total)} {limit} and {_gb(need.host)} of the host; reduce "
        "batch: seconds (tokens), or set optimizer: gradient_checkpointing: true",
    )


def format_table(estimate: MemoryEstimate) -> str:
    """Format the estimate, one strategy per line, in GB (10⁹ bytes); a star marks those that fit."""
    columns = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer_states": "moments",
        "master_weights": "master",
        "transient": "transient",
        "activations": "activations",
        "device_total": "device",
        "host": "host",
    }
    lines = [
        f"{estimate.parameters / 1e6:.1f} M parameters, {estimate.trainable_parameters / 1e6:.1f} M trainable; "
        f"{estimate.num_devices} × {_gb(estimate.gpu_bytes)}, host {_gb(estimate.host_bytes)}",
        f"{'GB':<15}" + "".join(f"{title:>12}" for title in columns.values()),
    ]
    for name, need in estimate.breakdowns.items():
        values = "".join(f"{getattr(need, field) / 1e9:>12.2f}" for field in columns)
        lines.append(f"{name + ('*' if estimate.fits(name) else ''):<15}{values}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
