"""Chat templates in the shapes that the families of models have, and tokenizers of several kinds to read them with."""

from __future__ import annotations

from pathlib import Path

SPECIAL = (
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|head|>", "<|tail|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|return|>", "<|start|>",
    "<|message|>", "<|channel|>", "<|User|>", "<|Assistant|>",
)  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA = (
    "<s>{% set date = strftime_now('%d %b %Y') %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content|trim %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|head|>system<|tail|>\n\nToday: {{ date }}\n\n{{ system }}<|eot|>"
    "{% for m in messages %}{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)

QWEN = """{%- if tools %}
{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for m in messages[::-1] %}{%- if not ns.found and m.role == 'user' %}
{%- set ns.found = true %}{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}{%- set thought = '' %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in m.content %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>' + m.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content }}{%- endif %}
{%- for call in m.tool_calls or [] %}{%- set call = call.function or call %}
{{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}{{- call.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}<s>{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last or loop.index0 == rest|length - 2 %}{% if system %}{{ system + '\n\n' }}{% endif %}{% endif %}"
    "{{ m.content }} [/INST]{% else %}{{ ' ' + m.content|trim + '</s>' }}{% endif %}{% endfor %}"
)

PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '</s>' }}{% endif %}"
)

DEEPSEEK = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% endif %}{% endfor %}<s>{{ ns.system }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' ~ m.content }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>') | last %}{% endif %}{{ '<|Assistant|>' + content + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

CHANNELS = (
    "<|start|>system<|message|>You are a model.{% for m in messages if m.role in ('system', 'developer') %}\n{{ m.content }}"
    "{% endfor %}<|end|>{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

MACROS = (
    "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ALWAYS_OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
NEVER_OPEN = ALWAYS_OPEN.removesuffix("<|im_start|>assistant\n")
HEADERS_ALONE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HEADERS_ALWAYS = HEADERS_ALONE.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
TEXT_ALONE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PARTS_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"), "llama": (LLAMA, "<|eot|>"), "qwen": (QWEN, "<|im_end|>"),
    "gemma": (GEMMA, "<end_of_turn>"), "mistral": (MISTRAL, "</s>"), "phi": (PHI, "<|end|>"), "deepseek": (DEEPSEEK, "</s>"),
    "channels": (CHANNELS, "<|end|>"), "zephyr": (ZEPHYR, "</s>"), "macros": (MACROS, "<|im_end|>"),
    "always open": (ALWAYS_OPEN, "<|im_end|>"), "never open": (NEVER_OPEN, "<|im_end|>"), "parts": (PARTS_ALONE, "<|im_end|>"),
    "headers": (HEADERS_ALONE, ""), "text": (TEXT_ALONE, ""),
}  # fmt: skip
"""Name -> (template, the token that ends an assistant's turn)."""


def write_tokenizer(folder: Path, kind: str, template: str = CHATML) -> str:
    """A tokenizer of a kind, in a folder: `bytes` (byte-level BPE with merges), `pieces` (Metaspace, as SentencePiece writes
    them, with byte fallback), or `words` (a word each; white space is dropped)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["you are the one who said what he said\n\nassistant user system tool\n think yes and no " * 3]
    added = [AddedToken(token, special=True, rstrip=token == "<|end|>" and kind == "pieces") for token in SPECIAL]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=400, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
        )
    elif kind == "pieces":
        bytes_ = [f"<0x{n:02X}>" for n in range(256)]
        parts = ("\u2581", "\u2581y", "\u2581s", "id", "\u2581said", "\u2581sa", "\u2581a")
        letters = [*sorted(set("".join(texts)) - {" "}), *parts]
        vocab = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *bytes_, *letters]))}
        merges = [("\u2581", "y"), ("\u2581", "s"), ("i", "d"), ("\u2581s", "a"), ("\u2581sa", "id"), ("\u2581", "a")]
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        names = [*SPECIAL, *sorted(set(" ".join(texts).split()))]
        made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(names)}, unk_token="<unk>"))
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(added)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>" if "im_start" in template else "</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)
