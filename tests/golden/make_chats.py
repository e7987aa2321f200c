#!/usr/bin/env python3
"""Makes `crates/lowrank-text/assets/chats.json`: chat templates, chats, and what transformers' `apply_chat_template` makes of them.

The templates use what templates of published models use, each a few of these things. Run with transformers 5:
python tests/golden/make_chats.py
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

USER = {"role": "user", "content": "What is a <rank>?"}
ANSWER = {"role": "assistant", "content": "The number of\n  its singular values above 0."}
AGAIN = {"role": "user", "content": " And a width? äöü "}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "svd", "arguments": {"of": "W", "k": [1, 2], "ü": None}}}],
}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]}

CASES = {
    "instruction tags, alternating roles": (
        """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}""",
        [USER, ANSWER, AGAIN],
    ),
    "a default system turn": (
        """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
        [USER, ANSWER],
    ),
    "trimmed contents and headers": (
        """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}""",
        [SYSTEM, AGAIN, ANSWER],
    ),
    "thoughts, namespaces and reversed messages": (
        """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|a|>' + '<think>' + reasoning_content.strip('\\n') + '</think>' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|a|>' + content }}
        {%- endif %}
    {%- else %}
        {{- '<|u|>' + message.content }}
    {%- endif %}
{%- endfor %}""",
        [USER, THOUGHT, AGAIN, THOUGHT],
    ),
    "calls of tools as JSON": (
        """{% if tools is not none and tools %}{{ 'tools' }}{% endif %}{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls %}{% for call in m.tool_calls %}{{ call.function.name }}({{ call.function.arguments | tojson }}) {{ call | tojson(indent=2) }}{% endfor %}{% else %}{{ m.role | upper }}: {{ m.content }}{% endif %}{% if not loop.last %}{{ "\\n" }}{% endif %}{% endfor %}""",
        [USER, CALL, ANSWER],
    ),
    "macros and filters": (
        """{% macro turn(role, text) %}
<{{ role | title }}> {{ text | replace('\\n', ' ') }}
{% endmacro %}
{% for m in messages | rejectattr('role', 'equalto', 'system') %}{{ turn(m['role'], m['content']) }}{% endfor %}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}""",
        [SYSTEM, USER, ANSWER, AGAIN],
    ),
    "loops that skip and stop": (
        """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }}{{ m.content }}{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}""",
        [SYSTEM, USER, ANSWER, AGAIN],
    ),
    "contents in parts": (
        """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part['type'] == 'text' %}{{ part.text }}{% elif part.type in ['image', 'video'] %}<image>{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}""",
        [PARTS, ANSWER],
    ),
    "keys of a dictionary": (
        """{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value if value is not none else 'nothing' }};{% endfor %}{{ m.get('name', 'nobody') }}{{ ' ' ~ loop.index ~ '/' ~ loop.length }}
{% endfor %}""",
        [USER, SYSTEM],
    ),
}


def main():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), bos_token="<s>", eos_token="</s>"
    )
    cases = [
        {
            "name": name,
            "template": template,
            "config": {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}},
            "messages": messages,
            "expected": tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False),
        }
        for name, (template, messages) in CASES.items()
    ]
    place = Path(__file__).parents[2] / "crates/lowrank-text/assets/chats.json"
    place.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{place.name}: {len(cases)} chats")


if __name__ == "__main__":
    main()
