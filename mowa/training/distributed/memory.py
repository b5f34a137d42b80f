"""How much memory a fine-tuning run needs on each device, by the way its weights are shared out; and which way to take.

Formulas over counts of parameters and the net's widths; nothing is run. P parameters, L of them learn, B in one block
(the size of every bucket), n devices. Bytes on one device, AdamW with two float32 moments, float32 or bf16:

                   weights   gradients   moments   master    live
    ddp            4 P       8 L ¹       8 L                 2 P ²
    zero2          4 P       4 L / n     8 L / n   4 L / n   8 B + 2 P ²
    zero3          4 P / n   4 L / n     8 L / n             20 B + 2 P ²
    zero3-offload                                            20 B + 2 P ²   (4 P + 16 L on all hosts together)
    fsdp           4 P / n   4 L / n     8 L / n             12 B + 2 B ²

¹ DDP's buckets hold them a second time; 4 L on one device. ² bf16 only: weights stay float32 (autocast); each product
keeps its weight in half precision for the backward pass; with checkpointing, those of one block. fp16 under ZeRO is
DeepSpeed's own: weights 2 P, master 4 L / n, nothing kept. Sources: arXiv:1910.02054, DeepSpeed's and torch's code.

For activations see `activations`. What the allocator wastes, CUDA's own and the optimiser's passing copies are not
counted; `choose` leaves a fifth of the device for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mowa.families import get_family
from mowa.training.config.causal import CausalRecipe

USABLE_SHARE = 0.8  # of a device's memory: what a run may be expected to fill
STRATEGIES = ("ddp", "zero2", "zero3", "zero3-offload", "fsdp")
RATE_HZ = 16_000
HALF_PRECISION = ("bf16", "fp16")
FUSED_LOGITS_BYTES = 2 * 64 * 2**20  # bytes: what the fused head has of them at once


@dataclass(frozen=True, slots=True)
class MemoryBreakdown:
    """Bytes on one device, and on one machine's host."""

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
    """What each strategy needs, beside what there is: bytes of one device, bytes of one machine, devices in all."""

    breakdowns: dict[str, MemoryBreakdown]
    gpu_bytes: float
    host_bytes: float
    num_devices: int
    parameters: int
    trainable_parameters: int

    def fits(self, strategy: str) -> bool:
        need = self.breakdowns[strategy]
        return need.device_total <= USABLE_SHARE * self.gpu_bytes and need.host <= USABLE_SHARE * self.host_bytes


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """A strategy, and one line that says why."""

    strategy: str
    reason: str


def estimate_memory(
    net: Any, recipe: Any, *, gpu_bytes: float, host_bytes: float, num_devices: int, precision: str = "float32"
) -> MemoryEstimate:
    """What `net` (with its learning parameters marked; may lie on "meta") needs under `plan`, which is for its kind.

    gpu_bytes: memory of one device, host_bytes: of one machine; devices: over all machines; precision: float32, bf16 or
    fp16.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters())
    learning = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    part, block = learning / num_devices, max_block_parameters(net)
    how = {"precision": precision, "checkpointing": recipe.optimise.checkpointing}
    reads = isinstance(recipe, CausalRecipe)
    held = (
        causal_activation_bytes(net, recipe.batch.tokens, **how)
        if reads
        else ctc_activation_bytes(net, recipe.batch.seconds, **how)
    )
    cast = 2 * (block if recipe.optimise.checkpointing else parameters) if precision in HALF_PRECISION else 0
    own = precision == "fp16"  # DeepSpeed's: no autocast, so nothing is kept in half precision besides the weights
    wide, zero_cast, copy = (2, 0, 4 * part) if own else (4, cast, 0.0)
    loaded = 4.0 * parameters * recipe.parallel.devices  # each process reads the whole net before it is shared out
    below = (4 * parameters + 16 * learning) / num_devices * recipe.parallel.devices
    shares = {
        "ddp": (4 * parameters, (8 if num_devices > 1 else 4) * learning, 8 * learning, 0, cast),
        "zero2": (wide * parameters, 4 * part, 8 * part, 4 * part, 8 * block + zero_cast),
        "zero3": (wide * parameters / num_devices, 4 * part, 8 * part, copy, 20 * block + zero_cast),
        "zero3-offload": (0, 0, 0, 0, 20 * block + zero_cast),
        "fsdp": (4 * parameters / num_devices, 4 * part, 8 * part, 0, 12 * block + (2 * block if cast else 0)),
    }
    needs = {
        name: MemoryBreakdown(*share, held, max(loaded, below) if name == "zero3-offload" else loaded)
        for name, share in shares.items()
    }
    return MemoryEstimate(needs, gpu_bytes, host_bytes, num_devices, parameters, learning)


def max_block_parameters(net: Any) -> int:
    """Parameters of the largest block: the size of buckets, and what is fetched ahead."""
    kinds = get_family(net.config.model_type).blocks
    blocks = [module for module in net.modules() if type(module).__name__ in kinds]
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def causal_activation_bytes(net: Any, tokens: float, *, precision: str, gradient_checkpointing: bool) -> float:
    """Bytes that a language model's pass over `tokens` keeps, with the fused head's passing logits.

    Of a token, with e bytes an element, width H, heads of Q and K elements in all, inner width F: a block keeps
    e (6 H + 2 Q + 2 K + 3 F) (norms' inputs and outputs, what attention and linears are given, the gate), a recomputed
    one e H. Of experts, those that a token is sent to count. An estimate: nothing holds it against autograd.
    """
    config = net.config.get_text_config()
    element, width, depth = _element(precision), config.hidden_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries = size * config.num_attention_heads
    keys = size * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    sent = getattr(config, "num_experts_per_tok", None) or 1
    inner = (getattr(config, "moe_intermediate_size", None) or config.intermediate_size) * sent
    block = element * (6 * width + 2 * queries + 2 * keys + 3 * inner)
    each = depth * element * width + block if gradient_checkpointing else depth * block
    return tokens * (each + element * width) + FUSED_LOGITS_BYTES


def ctc_activation_bytes(net: Any, seconds: float, *, precision: str, gradient_checkpointing: bool) -> float:
    """Bytes of one batch of `seconds` of sound: what is `kept`, and what passes through the largest part of the net."""
    config, rates = net.config, _rates(net.config)
    front = max(seconds * rate * width * 12 for rate, width in zip(rates, config.conv_dim, strict=True))
    return saved_activation_bytes(
        net, seconds, precision=precision, gradient_checkpointing=gradient_checkpointing
    ) + max(front, seconds * _block(config, precision))


def saved_activation_bytes(net: Any, seconds: float, *, precision: str, gradient_checkpointing: bool) -> float:
    """Bytes that a forward pass over `seconds` of sound keeps for the backward pass.

    Over T frames, e bytes an element (2 under bf16 and fp16, else 4), width H, inner width F, M bytes of dropout masks,
    C channels of the front end, V tokens:

        a block             T · (8 H + e (5 H + 2 F) + q + M)   both norms' inputs; what attention and linears keep
        a recomputed block  T · 4 H                             its input; and once a whole block more
        the front end       Σ T_l · C · (8 + e)                 2 e in layers without a norm; nothing if it is frozen
        between, and head   T · (4 C + e C + 2 e H + 4 H),      T · (e H + 4 V)

    q: 4 H, and 6 H under autocast, where queries, keys and values each keep a copy of their input. As on a GPU, norms
    are taken in float32. Blocks below the lowest parameter that learns keep nothing; attention never holds its scores
    whole. tests/train/test_parallel.py holds this against the tensors that autograd saves.
    """
    config, rates = net.config, _rates(net.config)
    element, width, frames = _element(precision), config.hidden_size, seconds * rates[-1]
    block = seconds * _block(config, precision)
    depth, front, fed = _backward_extent(net)
    size = depth * frames * 4 * width + (block if depth else 0) if gradient_checkpointing else depth * block
    size += frames * (element * width + 4 * config.vocab_size)
    if fed or (depth and getattr(config, "do_stable_layer_norm", False)):
        size += frames * 4 * width  # the encoder's own norm, before or after the blocks
    if fed:
        size += frames * ((4 + element) * config.conv_dim[-1] + 2 * element * width)
    if front:
        normed = len(rates) if config.feat_extract_norm == "layer" else 1
        each = [8 + element if index < normed else 2 * element for index in range(len(rates))]
        size += sum(seconds * r * c * bytes_ for r, c, bytes_ in zip(rates, config.conv_dim, each, strict=True))
    return size


def _block(config: Any, precision: str) -> float:
    """What one block keeps of a second."""
    width, inner, element = config.hidden_size, config.intermediate_size, _element(precision)
    masks = 2 * width * (config.hidden_dropout > 0) + inner * (config.activation_dropout > 0)
    copies = (4 if element == 4 else 6) * width
    return _rates(config)[-1] * (8 * width + element * (5 * width + 2 * inner) + copies + masks)


def _element(precision: str) -> int:
    return 2 if precision in HALF_PRECISION else 4


def _rates(config: Any) -> list[float]:
    """Frames a second after each convolution of the front end."""
    rates, rate = [], float(RATE_HZ)
    for stride in config.conv_stride:
        rate /= stride
        rates.append(rate)
    return rates


def _backward_extent(net: Any) -> tuple[int, bool, bool]:
    """How many blocks gradients go through, and whether they reach the front end, and what lies between."""
    core = net.base_model
    front = _learns(core.feature_extractor.parameters())
    blocks = list(core.encoder.layers)
    inside = {id(parameter) for part in (core.feature_extractor, *blocks) for parameter in part.parameters()}
    between = (parameter for parameter in core.parameters() if id(parameter) not in inside)
    tail = {id(parameter) for parameter in core.encoder.layer_norm.parameters()}
    stable = getattr(net.config, "do_stable_layer_norm", False)
    fed = front or _learns(p for p in between if not (stable and id(p) in tail))  # a stable net's norm is its last
    if fed:
        return len(blocks), front, True
    lowest = next((index for index, block in enumerate(blocks) if _learns(block.parameters())), len(blocks))
    return len(blocks) - lowest, False, False


def _learns(parameters: Iterable[Any]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def choose_strategy(
    estimate: MemoryEstimate, strategies: Iterable[str] = ("ddp", "zero2", "zero3", "zero3-offload")
) -> StrategyChoice:
    """The fastest strategy whose need fits in 80 % of a device and of its host; else the leanest. And why."""
    among = [name for name in STRATEGIES if name in set(strategies)]
    room = f"of {_gb(USABLE_SHARE * estimate.gpu_bytes)} (80 % of a device)"
    before: list[str] = []
    for name in among:
        need = estimate.breakdowns[name]
        if estimate.fits(name):
            passed = f"; {', '.join(before)}" if before else ""
            return StrategyChoice(name, f"{name} needs {_gb(need.device_total)} {room}{passed}")
        if need.device_total > USABLE_SHARE * estimate.gpu_bytes:
            before.append(f"{name} would need {_gb(need.device_total)}")
        else:
            before.append(
                f"{name} would need {_gb(need.host)} of {_gb(USABLE_SHARE * estimate.host_bytes)} of the host"
            )
    least = min(among, key=lambda name: (estimate.breakdowns[name].device_total, STRATEGIES.index(name)))
    return StrategyChoice(
        least,
        f"nothing fits: {least} needs {_gb(estimate.breakdowns[least].device_total)} {room} and "
        f"{_gb(estimate.breakdowns[least].host)} of the host; less batch: seconds, or optimise: checkpointing, would help",
    )


def format_table(estimate: MemoryEstimate) -> str:
    """The estimate as lines of text, a strategy each, in GB (10⁹ bytes); a star where it fits."""
    columns = ("weights", "gradients", "moments", "master", "live", "activations", "device", "host")
    lines = [
        f"{estimate.parameters / 1e6:.1f} M parameters, {estimate.trainable_parameters / 1e6:.1f} M learn; {estimate.num_devices} × "
        f"{_gb(estimate.gpu_bytes)}, host {_gb(estimate.host_bytes)}",
        f"{'GB':<15}" + "".join(f"{column:>12}" for column in columns),
    ]
    for name, need in estimate.breakdowns.items():
        values = "".join(f"{getattr(need, column) / 1e9:>12.2f}" for column in columns)
        lines.append(f"{name + ('*' if estimate.fits(name) else ''):<15}{values}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
