"""The formats of `mowa export` by name, with their options. Other packages add formats by an entry point.

The entry point group is `mowa.exporters`; each names an `ExportFormat`. Importing this module imports no exporter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mowa.errors import ModelError
from mowa.plugins import Registry
from mowa.tasks.verbs import TASK_LABELS


@dataclass(frozen=True, slots=True)
class ExportOption:
    """An option of `mowa export` that one format takes.

    name      keyword of the exporter's `write`
    flag      on the command line
    help      its help text
    parse     text → value; raises ValueError
    expected  what a text must be, for the error
    constant  value that the flag stands for; None: it takes a text
    metavar   name of the text in the help
    multiple  it may be repeated, and its value is a tuple
    """

    name: str
    flag: str
    help: str
    parse: Callable[[str], Any] = str
    expected: str = "a text"
    constant: Any = None
    metavar: str = "LIST"
    multiple: bool = False

    def read(self, text: str) -> Any:
        """Return the value of a text from the command line. Raises ModelError."""
        try:
            return self.parse(text)
        except ValueError:
            raise ModelError(f"{self.flag} {text}: expected {self.expected}") from None


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """Description of one format.

    name         unique name, for `--to`
    description  what it is
    module       module with the functions of `protocol.Exporter`
    artifact     kind of what is written: `checkpoint`, which `mowa.load` opens, or `export`, which only runs
    packages     packages that writing needs
    install      what pip installs to get them
    tasks        tasks of the models that it takes
    options      its options
    unsupported  task → reason why its models are not taken
    runs         of formats that no engine here opens: where they run, and how
    schemes      names of the schemes that the format has itself, instead of mowa's; `write` then takes `schemes`, one
                 file each, `runtimes` to compare them in, `adapter` and `on_progress`; it reads the weights of a model
                 on torch's meta device from its checkpoint
    suffix       of formats whose model is one file: the file name that may stand for the folder
    """

    name: str
    description: str
    module: str
    artifact: Literal["checkpoint", "export"] = "export"
    packages: tuple[str, ...] = ()
    install: str = ""
    tasks: tuple[str, ...] = ("ctc",)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    options: tuple[ExportOption, ...] = ()
    runs: str = ""
    schemes: tuple[str, ...] = ()
    suffix: str = ""

    def validate_options(self, options: Mapping[str, Any]) -> None:
        """Raise ModelError if the format lacks one of these options."""
        given = [
            name
            for name in options
            if not self.schemes or name not in ("schemes", "adapter", "runtimes", "on_progress")
        ]
        for name in given:
            if name not in (known := [option.name for option in self.options]):
                raise ModelError(f"{self.name} has no option {name!r}: it has {', '.join(known) or 'none'}")


def parse_seconds(text: str) -> tuple[float, ...]:
    """Parse 5,10,20. Raises ValueError."""
    return tuple(float(one) for one in text.split(","))


def parse_profile(text: str) -> tuple[tuple[int, int], ...]:
    """Parse three shapes, batch x samples, such as 1x16000,1x160000,4x480000. Raises ValueError."""
    shapes = [one.partition("x") for one in text.split(",")]
    if len(shapes) != 3:
        raise ValueError(f"{len(shapes)} shapes")
    return tuple((int(batch), int(samples)) for batch, _, samples in shapes)


NO_CACHE = {
    "causal": "the graph would have no cache of keys and values, so every token would cost a pass over the text"
}

GGUF_SCHEMES = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "mxfp4_moe"),
)

FORMATS = Registry(
    "mowa.exporters",
    "format",
    ExportFormat,
    (
        ExportFormat(
            name="onnx",
            description="ONNX, for ONNX Runtime on CPUs, phones and in browsers",
            module="mowa.exporters.onnx.exporter",
            packages=("onnx", "onnxruntime", "onnxscript"),
            install="mowa[onnx]",
            unsupported=NO_CACHE,
            options=(
                ExportOption(
                    "opset",
                    "--opset",
                    "opset version, 18 to 23. [default: 20]",
                    parse=int,
                    expected="a number, 18 to 23",
                    metavar="INTEGER",
                ),
                ExportOption(
                    "attention_mask",
                    "--no-attention-mask",
                    "omit the attention_mask input; batches then need equal lengths.",
                    constant=False,
                ),
            ),
        ),
        ExportFormat(
            name="safetensors",
            description="a checkpoint, quantized or not, that transformers loads",
            module="mowa.exporters.safetensors",
            artifact="checkpoint",
            tasks=("ctc", "causal"),
        ),
        ExportFormat(
            name="coreml",
            description="an mlprogram for Apple's Core ML",
            module="mowa.exporters.coreml.exporter",
            packages=("coremltools",),
            install="mowa[coreml]",
            unsupported=NO_CACHE,
            options=(
                ExportOption(
                    "lengths_s",
                    "--lengths-s",
                    "input lengths to accept, in seconds. [default: 5,10,20]",
                    parse_seconds,
                    "seconds, e.g. 5,10,20",
                ),
            ),
            runs="a Core ML package, which runs on Apple devices: see examples/run_coreml.py",
        ),
        ExportFormat(
            name="tensorrt",
            description="an engine for NVIDIA GPUs, or the files to build it there",
            module="mowa.exporters.tensorrt.exporter",
            packages=("onnx", "onnxruntime", "onnxscript"),
            install="mowa[onnx]",
            unsupported={"causal": "mowa builds engines of speech models; TensorRT-LLM reads a safetensors export"},
            options=(
                ExportOption(
                    "optimization_profile",
                    "--optimization-profile",
                    "min, opt and max input shape as batch x samples. [default: 1x16000,1x160000,4x480000]",
                    parse_profile,
                    "three shapes, e.g. 1x16000,1x160000,4x480000",
                ),
            ),
            runs="a TensorRT export, which runs on a GPU with TensorRT: see examples/run_tensorrt.py",
        ),
        ExportFormat(
            name="ctranslate2",
            description="CTranslate2",
            module="mowa.exporters.ctranslate2",
            packages=("ctranslate2",),
            install="mowa[ctranslate2]",
            unsupported={
                "causal": "mowa writes CTranslate2's speech models; its own converter reads a full-precision checkpoint"
            },
        ),
        ExportFormat(
            name="gguf",
            description="GGUF, for llama.cpp, Ollama and LM Studio",
            module="mowa.exporters.gguf.exporter",
            tasks=("ctc", "causal"),
            schemes=GGUF_SCHEMES,
            suffix=".gguf",
            runs="a GGUF file or a folder of them, which `mowa generate` and llama.cpp run, and `mowa.load` reads",
            options=(
                ExportOption(
                    "tensor_types",
                    "--tensor-type",
                    "store tensors whose names match a pattern in a type of their own: 'attn_v=q6_k'. Repeatable.",
                    metavar="PATTERN=TYPE",
                    multiple=True,
                ),
                ExportOption(
                    "imatrix",
                    "--imatrix",
                    "importance matrix of llama.cpp, or a text to make one from.",
                    metavar="FILE",
                ),
                ExportOption(
                    "check_data",
                    "--check-data",
                    "texts whose token ids must be the same, and on which outputs are compared too.",
                    metavar="FILE",
                ),
                ExportOption(
                    "adapter_only",
                    "--adapter-only",
                    "write the LoRA adapter alone, for llama.cpp's --lora and Ollama's ADAPTER.",
                    constant=True,
                ),
                ExportOption(
                    "skip_outputs",
                    "--skip-outputs",
                    "skip the comparison of outputs, which loads the whole model.",
                    constant=True,
                ),
                ExportOption(
                    "keep_failed",
                    "--keep-failed",
                    "keep files whose outputs differ by more than the limits of their scheme.",
                    constant=True,
                ),
            ),
        ),
    ),
)


def validate_task(found: ExportFormat, name: str, task: str) -> None:
    """Raise ModelError, with the reason and the formats for it, if the format does not take models of this task."""
    if task not in found.tasks:
        others = ", ".join(one.name for one in FORMATS.all() if task in one.tasks) or "none yet"
        reason = f": {found.unsupported[task]}" if task in found.unsupported else ""
        raise ModelError(
            f"{name} is {TASK_LABELS.get(task, task)} and cannot be exported to {found.name}{reason}."
            f" Formats for it: {others}"
        )
