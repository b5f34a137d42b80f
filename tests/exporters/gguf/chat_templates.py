"""Chat templates of known families, shortened to what they do with chats without tools."""

from transformers.utils.chat_template_utils import render_jinja_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are \"kind\".<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' +"
    " message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% set start = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set start = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (start if loop.first else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
ODD = (  # characters that a Go template or a Modelfile would read in another way
    "{{ '{' }}{% for message in messages %}{{ '\"\"\"{{\u00a0' + message['role'] + '|' }}{{ message['content'] }}"
    "{{ '{' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '▁assistant\"\"\"\n' }}{% endif %}"
)
ALL = {
    "chatml": CHATML,
    "chatml with a default": CHATML_WITH_DEFAULT,
    "llama 3": LLAMA_3,
    "gemma": GEMMA,
    "gemma 3": GEMMA_3,
    "mistral": MISTRAL,
    "phi 3": PHI_3,
    "thinking": THINKING,
    "odd": ODD,
}
LAST_SYSTEM = (  # as newer Mistral models
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + (system + '\n\n' if loop.last and system else '') +"
    " message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
    "{% endif %}{% endfor %}"
)
REWRITTEN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | upper }}{% endfor %}"
TOKENS = ["<s>", "</s>", "<unk>", "<|im_end|>", "<|eot_id|>", "a"]
METADATA = {
    **{"general.architecture": "llama", "llama.context_length": 131_072, "tokenizer.ggml.model": "gpt2"},
    **{"tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [3, 3, 2, 3, 3, 1]},
    **{"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True},
}


def render(template, messages):
    """Render with transformers, without the beginning of sequence that the tokenizer adds."""
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    return rendered[0].removeprefix("<s>")
