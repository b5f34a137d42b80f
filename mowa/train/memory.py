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

from mowa.families import find
from mowa.train.instruct import Instruction

ROOM = 0.8  # of a device's memory: what a run may be expected to fill
ORDER = ("ddp", "zero2", "zero3", "zero3-offload", "fsdp")
RATE_HZ = 16_000
HALF = ("bf16", "fp16")
LOGITS = 2 * 64 * 2**20  # bytes: what the fused head has of them at once


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on one device, and on one machine's host."""

    weights: float
    gradients: float
    moments: float
    master: float
    live: float
    activations: float
    host: float

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.moments + self.master + self.live + self.activations


@dataclass(frozen=True, slots=True)
class Estimate:
    """What each strategy needs, beside what there is: bytes of one device, bytes of one machine, devices in all."""

    needs: dict[str, Need]
    gpu_bytes: float
    host_bytes: float
    devices: int
    parameters: int
    learning: int

    def fits(self, strategy: str) -> bool:
        need = self.needs[strategy]
        return need.device <= ROOM * self.gpu_bytes and need.host <= ROOM * self.host_bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy, and one line that says why."""

    strategy: str
    reason: str


def estimate(
    net: Any, plan: Any, *, gpu_bytes: float, host_bytes: float, devices: int, precision: str = "float32"
) -> Estimate:
    """What `net` (with its learning parameters marked; may lie on "meta") needs under `plan`, which is for its kind.

    gpu_bytes: memory of one device, host_bytes: of one machine; devices: over all machines; precision: float32, bf16 or
    fp16.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters())
    learning = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    part, block = learning / devices, block_parameters(net)
    how = {"precision": precision, "checkpointing": plan.optimise.checkpointing}
    reads = isinstance(plan, Instruction)
    held = of_text(net, plan.batch.tokens, **how) if reads else activations(net, plan.batch.seconds, **how)
    cast = 2 * (block if plan.optimise.checkpointing else parameters) if precision in HALF else 0
    own = precision == "fp16"  # DeepSpeed's: no autocast, so nothing is kept in half precision besides the weights
    wide, zero_cast, copy = (2, 0, 4 * part) if own else (4, cast, 0.0)
    loaded = 4.0 * parameters * plan.parallel.devices  # each process reads the whole net before it is shared out
    below = (4 * parameters + 16 * learning) / devices * plan.parallel.devices
    shares = {
        "ddp": (4 * parameters, (8 if devices > 1 else 4) * learning, 8 * learning, 0, cast),
        "zero2": (wide * parameters, 4 * part, 8 * part, 4 * part, 8 * block + zero_cast),
        "zero3": (wide * parameters / devices, 4 * part, 8 * part, copy, 20 * block + zero_cast),
        "zero3-offload": (0, 0, 0, 0, 20 * block + zero_cast),
        "fsdp": (4 * parameters / devices, 4 * part, 8 * part, 0, 12 * block + (2 * block if cast else 0)),
    }
    needs = {
        name: Need(*share, held, max(loaded, below) if name == "zero3-offload" else loaded)
        for name, share in shares.items()
    }
    return Estimate(needs, gpu_bytes, host_bytes, devices, parameters, learning)


def block_parameters(net: Any) -> int:
    """Parameters of the largest block: the size of buckets, and what is fetched ahead."""
    kinds = find(net.config.model_type).blocks
    blocks = [module for module in net.modules() if type(module).__name__ in kinds]
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)


def of_text(net: Any, tokens: float, *, precision: str, checkpointing: bool) -> float:
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
    each = depth * element * width + block if checkpointing else depth * block
    return tokens * (each + element * width) + LOGITS


def activations(net: Any, seconds: float, *, precision: str, checkpointing: bool) -> float:
    """Bytes of one batch of `seconds` of sound: what is `kept`, and what passes through the largest part of the net."""
    config, rates = net.config, _rates(net.config)
    front = max(seconds * rate * width * 12 for rate, width in zip(rates, config.conv_dim, strict=True))
    return kept(net, seconds, precision=precision, checkpointing=checkpointing) + max(
        front, seconds * _block(config, precision)
    )


def kept(net: Any, seconds: float, *, precision: str, checkpointing: bool) -> float:
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
    depth, front, fed = _reached(net)
    size = depth * frames * 4 * width + (block if depth else 0) if checkpointing else depth * block
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
    return 2 if precision in HALF else 4


def _rates(config: Any) -> list[float]:
    """Frames a second after each convolution of the front end."""
    rates, rate = [], float(RATE_HZ)
    for stride in config.conv_stride:
        rate /= stride
        rates.append(rate)
    return rates


def _reached(net: Any) -> tuple[int, bool, bool]:
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


def choose(estimate: Estimate, allowed: Iterable[str] = ("ddp", "zero2", "zero3", "zero3-offload")) -> Choice:
    """The fastest strategy whose need fits in 80 % of a device and of its host; else the leanest. And why."""
    among = [name for name in ORDER if name in set(allowed)]
    room = f"of {_gb(ROOM * estimate.gpu_bytes)} (80 % of a device)"
    before: list[str] = []
    for name in among:
        need = estimate.needs[name]
        if estimate.fits(name):
            passed = f"; {', '.join(before)}" if before else ""
            return Choice(name, f"{name} needs {_gb(need.device)} {room}{passed}")
        if need.device > ROOM * estimate.gpu_bytes:
            before.append(f"{name} would need {_gb(need.device)}")
        else:
            before.append(f"{name} would need {_gb(need.host)} of {_gb(ROOM * estimate.host_bytes)} of the host")
    least = min(among, key=lambda name: (estimate.needs[name].device, ORDER.index(name)))
    return Choice(
        least,
        f"nothing fits: {least} needs {_gb(estimate.needs[least].device)} {room} and "
        f"{_gb(estimate.needs[least].host)} of the host; less batch: seconds, or optimise: checkpointing, would help",
    )


def table(estimate: Estimate) -> str:
    """The estimate as lines of text, a strategy each, in GB (10⁹ bytes); a star where it fits."""
    columns = ("weights", "gradients", "moments", "master", "live", "activations", "device", "host")
    lines = [
        f"{estimate.parameters / 1e6:.1f} M parameters, {estimate.learning / 1e6:.1f} M learn; {estimate.devices} × "
        f"{_gb(estimate.gpu_bytes)}, host {_gb(estimate.host_bytes)}",
        f"{'GB':<15}" + "".join(f"{column:>12}" for column in columns),
    ]
    for name, need in estimate.needs.items():
        values = "".join(f"{getattr(need, column) / 1e9:>12.2f}" for column in columns)
        lines.append(f"{name + ('*' if estimate.fits(name) else ''):<15}{values}")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
