"""Small chat templates that behave like those of well-known models, written by us.

Each entry names its control tokens and its end-of-text token; the first control token is BOS if the template writes
one.
"""

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A template, and what its tokenizer has to know."""

    specials: str
    eos: str
    template: str


_CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_QWEN_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if said or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
_QWEN_TOOL = (
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
)
_LLAMA = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_LLAMA_ASK = (
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

FAMILIES = {
    "qwen2.5": Family(
        "<|endoftext|> <|im_start|> <|im_end|>",
        "<|im_end|>",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}{% set said = m.content %}"
        "{{ '<|im_start|>assistant' }}{% if said %}{{ '\n' + said }}{% endif %}{{ '\n' }}"
        + _QWEN_CALLS.replace("said or not", "not")
        + "{{ '<|im_end|>\n' }}"
        + _QWEN_TOOL
        + "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + _CHATML_ASK,
    ),
    # Reasoning is written behind the last question alone, an empty thought where the last turn has none.
    "qwen3": Family(
        "<|endoftext|> <|im_start|> <|im_end|>",
        "<|im_end|>",
        "{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set said = m.content or '' %}{% set thought = '' %}"
        "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
        "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}"
        "{% endif %}{{ said }}" + _QWEN_CALLS + "{{ '<|im_end|>\n' }}" + _QWEN_TOOL + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + _CHATML_ASK,
    ),
    "llama3": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
        "<|eot_id|>",
        "{% for m in messages %}{{ (bos_token if loop.first else '') + "
        + _LLAMA
        + " + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}" + _LLAMA_ASK,
    ),
    # One call a turn, with its arguments as an object; a tool answers as ipython.
    "llama3.1": Family(
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
        "<|eot_id|>",
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nKnowledge: 2023\n\n' }}"
        "{{ messages[0].content if messages[0].role == 'system' }}{{ '<|eot_id|>' }}"
        "{% for m in messages %}{% if m.role in ('tool', 'ipython') %}"
        "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
        "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}"
        "{% endif %}{% set c = m.tool_calls[0].function %}{{ "
        + _LLAMA
        + " + '{\"name\": \"' + c.name + '\", ' }}"
        "{{ '\"parameters\": ' + (c.arguments | tojson) + '}<|eot_id|>' }}{% elif m.role != 'system' %}"
        "{{ " + _LLAMA + " + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}" + _LLAMA_ASK,
    ),
    "mistral-v1": Family(
        "<s> </s>",
        "</s>",
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + eos_token + ' ' }}{% endif %}{% endfor %}",
    ),
    "mistral-v3": Family(
        "<s> </s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
        "</s>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}"
        "{% elif m.tool_calls is defined and m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
        "{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}' }}"
        "{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    ),
    "mistral-v7": Family(
        "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CALLS] [TOOL_CONTENT]",
        "</s>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}{{ '[TOOL_CONTENT]' + m.content }}"
        "{% else %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ '[TOOL_CALLS]' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ eos_token }}"
        "{% endif %}{% endfor %}",
    ),
    "gemma": Family(
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        "<eos>",
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    # Cuts all reasoning, opens a thought in the generation prompt, expects arguments as text and null beside calls.
    "deepseek-r1": Family(
        "<|bos|> <|eos|> <|User|> <|Assistant|> <|call|> <|output|> <|outputs_end|>",
        "<|eos|>",
        "{{ bos_token }}{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}{{ '<|output|>' + m.content }}{% set ns.tool = true %}"
        "{% elif m.content is none %}{{ '<|Assistant|>' }}{% for c in m.tool_calls %}"
        "{{ '<|call|>' + c.type + ' ' + c.function.name + '\n' + c.function.arguments }}{% endfor %}{{ '<|eos|>' }}"
        "{% elif m.role == 'assistant' %}{{ '<|outputs_end|>' if ns.tool else '<|Assistant|>' }}"
        "{{ m.content.split('</think>')[-1] + '<|eos|>' }}{% set ns.tool = false %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and not ns.tool %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ),
    # The last turn is closed differently from earlier ones; reasoning has its own channel.
    "gpt-oss": Family(
        "<|start|> <|channel|> <|message|> <|end|> <|call|> <|return|>",
        "<|return|>",
        "{{ '<|start|>system<|message|>Be helpful.<|end|>' }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% elif m.role == 'tool' %}"
        "{{ '<|start|>functions.add<|channel|>commentary<|message|>' + (m.content | tojson) + '<|end|>' }}"
        "{% elif m.tool_calls %}{% set c = m.tool_calls[0].function %}"
        "{{ '<|start|>assistant to=functions.' + c.name + '<|channel|>commentary<|message|>' }}"
        "{{ (c.arguments | tojson) + '<|call|>' }}{% else %}{% if loop.last and 'thinking' in m %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ),
    "phi-4": Family(
        "<|endoftext|> <|im_start|> <|im_sep|> <|im_end|>",
        "<|im_end|>",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
    ),
    # Ends the text with its end token, which follows only the last turn.
    "phi-3": Family(
        "<|endoftext|> <|user|> <|assistant|> <|end|>",
        "<|endoftext|>",
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    # Closes no turn: the header of the next one does.
    "glm-4": Family(
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
        "<|endoftext|>",
        "{{ '[gMASK]<sop>' }}{% set ns = namespace(asked=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|observation|>\n' + m.content }}{% elif m.role == 'assistant' %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in (m.content or '') %}"
        "{{ '<|assistant|>\n' }}{% if thought and loop.index0 > ns.asked %}{{ '<think>' + thought + '</think>' }}"
        "{% endif %}{{ (m.content or '').split('</think>')[-1] | trim }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
        "{{ '\n<key>' + k + '</key>\n<value>' + (v | string) + '</value>' }}{% endfor %}{{ '\n</tool_call>' }}"
        "{% endfor %}{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and the control tokens of a family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = family.specials.split()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=specials[0], eos_token=family.eos, chat_template=family.template
    )
