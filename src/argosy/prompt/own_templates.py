"""Chat templates of models whose repositories have none: DeepSeek-V4 has code instead, DeepSeek-OCR nothing.

Elsewhere: `tokenizer.py` prefers the template of a checkpoint; `formats/` reads what these models write.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

# What llama.cpp's converter writes for DeepSeek-OCR. It prints the text of messages, and cannot print pictures; nor
# does it begin with BOS, as DeepSeek's own code.
CONVERTERS_OCR = "{% for m in messages %}{{m['content']}}{% endfor %}"
OCR = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}{{ '<image>\\n' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
_OCR_TOKENS = {"<image>", "<|grounding|>"}

_TOOLS = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_END = """
You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_MAX_EFFORT = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""

# The prompts that the code in DeepSeek-V4's repository writes. Thoughts of earlier turns stay only if there are tools.
# Consecutive messages of users and tools are one turn.
DEEPSEEK_V4 = f"""\
{{%- set thinks = thinking if thinking is defined else (enable_thinking | default(false)) -%}}
{{%- set results = messages | selectattr('role', 'equalto', 'tool') | list -%}}
{{%- set is_tooled = (tools | default([]) | length) + (results | length) > 0 -%}}
{{%- set ns = namespace(system=[], last=-1, is_user=false) -%}}
{{%- for m in messages -%}}
  {{%- if m.role == 'system' -%}}{{%- set ns.system = ns.system + [m.content or ''] -%}}
  {{%- elif m.role in ('user', 'developer', 'tool') -%}}{{%- set ns.last = loop.index0 -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- set system = ns.system | join('\\n\\n') -%}}
{{{{- bos_token -}}}}
{{%- if messages and thinks and reasoning_effort | default('') == 'max' -%}}{{{{- {_MAX_EFFORT!r} -}}}}{{%- endif -%}}
{{{{- system -}}}}
{{%- if tools | default([]) -%}}
  {{{{- '\\n\\n' if system else '' -}}}}{{{{- {_TOOLS!r} -}}}}
  {{%- for tool in tools if tool.type == 'function' -%}}{{{{- (tool.function | tojson) + '\\n' -}}}}{{%- endfor -%}}
  {{{{- {_TOOLS_END!r} -}}}}
{{%- endif -%}}
{{%- for m in messages -%}}
  {{%- if m.role in ('user', 'developer', 'tool') -%}}
    {{{{- '\\n\\n' if ns.is_user else '<｜User｜>' -}}}}
    {{%- set ns.is_user = true -%}}
    {{{{- '<tool_result>' if m.role == 'tool' else '' -}}}}{{{{- m.content or '' -}}}}
    {{{{- '</tool_result>' if m.role == 'tool' else '' -}}}}
  {{%- elif m.role == 'assistant' -%}}
    {{%- set ns.is_user = false -%}}
    {{{{- '<｜Assistant｜>' -}}}}
    {{%- if thinks and (is_tooled or loop.index0 > ns.last or not drop_thinking | default(true)) -%}}
      {{{{- '<think>' + (m.reasoning_content | default('', true)) -}}}}
    {{%- endif -%}}
    {{{{- '</think>' -}}}}{{{{- m.content | default('', true) -}}}}
    {{%- if m.tool_calls -%}}
      {{{{- '\\n\\n<｜DSML｜tool_calls>\\n' -}}}}
      {{%- for call in m.tool_calls -%}}
        {{{{- '<｜DSML｜invoke name="' + call.function.name + '">\\n' -}}}}
        {{%- for key, value in call.function.arguments | items -%}}
          {{{{- '<｜DSML｜parameter name="' + key + '" string="' -}}}}
          {{{{- 'true">' + value if value is string else 'false">' + (value | tojson) -}}}}
          {{{{- '</｜DSML｜parameter>\\n' -}}}}
        {{%- else -%}}{{{{- '\\n' -}}}}
        {{%- endfor -%}}
        {{{{- '</｜DSML｜invoke>\\n' -}}}}
      {{%- endfor -%}}
      {{{{- '</｜DSML｜tool_calls>' -}}}}
    {{%- endif -%}}
    {{{{- '<｜end▁of▁sentence｜>' -}}}}
  {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt | default(false) -%}}
  {{{{- '<｜Assistant｜>' + ('<think>' if thinks else '</think>') -}}}}
{{%- endif -%}}
"""


def own_template(model_type: object, added_tokens: AbstractSet[str]) -> str | None:
    """Return the template of a checkpoint without one, by the `model_type` of its config or its tokenizer's tokens."""
    if model_type == "deepseek_v4":
        return DEEPSEEK_V4
    return OCR if added_tokens >= _OCR_TOKENS else None
