"""The tokenizer of a GGUF file with the methods of transformers' tokenizers that encoding a prompt needs.

Token ids are made by `GGUFTokenizer` and not by llama.cpp, so that special tokens which a message spells stay text
while those of the chat template are tokens; templates are rendered by transformers. The ids are those of llama.cpp's
own tokenizer with `parse_special` as here (tests/parity/test_llama_cpp_engine.py), also where transformers tokenizes
otherwise, which `mowa export` reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mowa.exporters.gguf.chat_template import KEY as TEMPLATE_KEY
from mowa.exporters.gguf.tokenizer import GGUFTokenizer
from mowa.exporters.gguf.tokenizer.special_tokens import END_TOKENS, KEY

_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


class PromptTokenizer:
    """A `GGUFTokenizer` behind the interface of transformers that `data.chat` uses.

    chat_template  Jinja text, or several by name; empty if the file has none
    end_ids        tokens at which llama.cpp ends an answer
    """

    is_fast = False

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Read the metadata of a file. Raises DataError and ModelError as `GGUFTokenizer`."""
        self.gguf = GGUFTokenizer(metadata)
        self.chat_template = _read_templates(metadata)
        self.all_special_ids = sorted(self.gguf.special.hidden)
        self.all_special_tokens = [self.gguf.tokens[index] for index in self.all_special_ids]
        self.added_tokens_decoder: dict[int, Any] = {}
        self.eos_token_id = self.gguf.eos
        named = {metadata.get(f"{KEY}{name}_token_id") for name in _END_KEYS}
        known = (self.gguf.ids[token] for token in END_TOKENS & self.gguf.ids.keys())
        self.end_ids = frozenset(int(index) for index in (*named, *known, self.gguf.eos) if index is not None)
        self._names = {"bos_token": self.gguf.bos, "eos_token": self.gguf.eos, "unk_token": self.gguf.unknown}

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Return {"input_ids": ids}, or lists of ids for several texts; `verbose` is ignored."""
        if not isinstance(text, str):
            return {"input_ids": [self.gguf.encode(one, add_special_tokens, not split_special_tokens) for one in text]}
        return {"input_ids": self.gguf.encode(text, add_special_tokens, not split_special_tokens)}

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **arguments: Any,
    ) -> str:
        """Return the text of messages, by `chat_template` or the default one, in the sandbox of transformers."""
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {name: self.gguf.tokens[index] for name, index in self._names.items() if index is not None}
        texts: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=chat_template or self._default_template(bool(tools)),
            add_generation_prompt=add_generation_prompt,
            **(names | arguments),
        )
        return str(texts[0][0])

    def _default_template(self, has_tools: bool) -> str:
        if isinstance(self.chat_template, str):
            return self.chat_template
        name = "tool_use" if has_tools and "tool_use" in self.chat_template else "default"
        return self.chat_template[name]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary spells them."""
        return [self.gguf.tokens[index] for index in ids]

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a token of the vocabulary."""
        return self.gguf.ids[token]


def _read_templates(metadata: Mapping[str, Any]) -> str | dict[str, str]:
    """Return the chat template; where the file has several, all of them, the one without a name as `default`."""
    default = str(metadata.get(TEMPLATE_KEY, ""))
    prefix = f"{TEMPLATE_KEY}."
    named = {key.removeprefix(prefix): str(text) for key, text in metadata.items() if key.startswith(prefix)}
    return {"default": default} | named if named and default else default
