"""Chat templates of models whose repositories have none: DeepSeek-V4, V4.1 and Kimi-K3 have code, DeepSeek-OCR nothing.

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
V4_PICTURE = "<｜deepseek_image｜>"
# The parts of a content as V4's code joins them.
_V4_PARTS = f"""\
{{%- macro parts_of(content) -%}}
  {{%- if content is string or not content -%}}{{{{- content or '' -}}}}
  {{%- else -%}}
    {{%- for part in content -%}}
      {{{{- '' if loop.first else '\\n\\n' -}}}}
      {{%- if part.type == 'image' -%}}{{{{- {V4_PICTURE!r} -}}}}{{%- else -%}}{{{{- part.text -}}}}{{%- endif -%}}
    {{%- endfor -%}}
  {{%- endif -%}}
{{%- endmacro -%}}
"""
# How llama.cpp's templates of V4 print a content; they expect a text.
_V4_CONTENT = "message['content'] or ''"
# What Kimi-K3's code writes where it then puts a picture, in the template that llama.cpp's converter adds too.
K3_PICTURE, K3_ROWS = "<|kimi_image_placeholder|>", "<|media_pad|>"
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

# What V4's and V4.1's prompts share. Thoughts of earlier turns stay only if there are tools. Consecutive messages of
# users and tools are one turn. `system` is what stands before them; `later` is the mark of system messages among them.
_DEEPSEEK_SYSTEM = f"""\
{_V4_PARTS}{{{{- system -}}}}
{{%- if tools | default([]) -%}}
  {{{{- gap -}}}}{{{{- {_TOOLS!r} -}}}}
  {{%- for tool in tools if tool.type == 'function' -%}}{{{{- (tool.function | tojson) + '\\n' -}}}}{{%- endfor -%}}
  {{{{- {_TOOLS_END!r} -}}}}
{{%- endif -%}}
{{%- for m in messages -%}}
  {{%- if m.role in ('user', 'developer', 'tool') -%}}
    {{{{- '\\n\\n' if ns.is_user else '<｜User｜>' -}}}}
    {{%- set ns.is_user = true -%}}
    {{{{- '<tool_result>' if m.role == 'tool' else '' -}}}}
    {{{{- parts_of(m.content) -}}}}
    {{{{- '</tool_result>' if m.role == 'tool' else '' -}}}}
  {{%- elif m.role == 'system' and later and not loop.first -%}}
    {{%- set ns.is_user = false -%}}
    {{{{- later -}}}}{{{{- m.content or '' -}}}}
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

# The prompts that the code in DeepSeek-V4's repository writes.
DEEPSEEK_V4 = f"""\
{{%- set thinks = thinking if thinking is defined else (enable_thinking | default(false)) -%}}
{{%- set results = messages | selectattr('role', 'equalto', 'tool') | list -%}}
{{%- set is_tooled = (tools | default([], true) | length) + (results | length) > 0 -%}}
{{%- set ns = namespace(system=[], last=-1, is_user=false) -%}}
{{%- for m in messages -%}}
  {{%- if m.role == 'system' -%}}{{%- set ns.system = ns.system + [m.content or ''] -%}}
  {{%- elif m.role in ('user', 'developer', 'tool') -%}}{{%- set ns.last = loop.index0 -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- set system, later = ns.system | join('\\n\\n'), '' -%}}
{{%- set gap = '\\n\\n' if system else '' -%}}
{{{{- bos_token -}}}}
{{%- if messages and thinks and reasoning_effort | default('') == 'max' -%}}{{{{- {_MAX_EFFORT!r} -}}}}{{%- endif -%}}
{_DEEPSEEK_SYSTEM}"""

_V41_EFFORT = " (range 1-100, the higher the value, the more thorough the reasoning)\n\n"

# Those of DeepSeek-V4.1's. Efforts are numbers, later system messages are turns, and names of tags begin with a space.
DEEPSEEK_V41 = f"""\
{{%- set thinks = thinking if thinking is defined else (enable_thinking | default(true)) -%}}
{{%- set is_tooled = tools | default([], true) | length > 0 -%}}
{{%- set ns = namespace(last=-1, is_user=false) -%}}
{{%- for m in messages -%}}
  {{%- if m.role in ('user', 'developer', 'tool') or m.role == 'system' and not loop.first -%}}
    {{%- set ns.last = loop.index0 -%}}
  {{%- endif -%}}
{{%- endfor -%}}
{{%- set gap, later = '\\n\\n', '<｜System｜>' -%}}
{{%- set effort = reasoning_effort | default('high') -%}}
{{%- if effort is not integer or not 1 <= effort <= 100 -%}}
  {{%- set effort = {{'low': 50, 'max': 100}}.get(effort, 75) -%}}
{{%- endif -%}}
{{{{- bos_token -}}}}
{{%- set has_system = messages and messages[0].role == 'system' -%}}
{{%- if thinks or has_system or is_tooled -%}}{{{{- later -}}}}{{%- endif -%}}
{{%- if thinks -%}}{{{{- 'Reasoning Effort: ' ~ effort ~ {_V41_EFFORT!r} -}}}}{{%- endif -%}}
{{%- set system = messages[0].content or '' if has_system else '' -%}}
{_DEEPSEEK_SYSTEM.replace("｜DSML｜tool_", "｜DSML｜").replace("｜DSML｜", "｜DSML｜ ")}"""


_K3_TOOLS = "# Tools\nHere are the available tools, described in JSONSchema.\n\n```json\n"
_K3_EFFORT = (
    "`thinking_effort` guides on how much to think in your thinking channel (not including the response channel), "
    "supported values include `low`, `medium`, `high`, and `max`.\nNow the system is invoked with `thinking_effort="
)

# The prompts of the code in Kimi-K3's repository; results keep their order, and name the number of their call.
KIMI_K3 = f"""\
{{%- macro open(tag) -%}}{{{{- '<|open|>' }}}}{{{{ tag }}}}{{{{ '<|sep|>' -}}}}{{%- endmacro -%}}
{{%- macro close(tag) -%}}{{{{- '<|close|>' + tag + '<|sep|>' -}}}}{{%- endmacro -%}}
{{%- macro quoted(value) -%}}
  {{{{- '"' }}}}{{{{ value | string | replace('&', '&amp;') | replace('"', '&quot;') }}}}{{{{ '"' -}}}}
{{%- endmacro -%}}
{{%- macro sorted(value) -%}}
  {{%- if value is mapping -%}}
    {{{{- '{{' -}}}}
    {{%- for key, item in value | dictsort -%}}
      {{{{- ',' if not loop.first else '' -}}}}{{{{- key | tojson -}}}}{{{{- ':' -}}}}{{{{- sorted(item) -}}}}
    {{%- endfor -%}}
    {{{{- '}}' -}}}}
  {{%- elif value is string or value is number or value is boolean or value is none -%}}{{{{- value | tojson -}}}}
  {{%- else -%}}
    {{{{- '[' -}}}}
    {{%- for item in value -%}}{{{{- ',' if not loop.first else '' -}}}}{{{{- sorted(item) -}}}}{{%- endfor -%}}
    {{{{- ']' -}}}}
  {{%- endif -%}}
{{%- endmacro -%}}
{{%- set thinks = thinking if thinking is defined else (enable_thinking | default(true)) -%}}
{{%- set effort = thinking_effort | default(reasoning_effort | default('max')) -%}}
{{%- set end = '<|close|>message<|sep|><|end_of_msg|>' -%}}
{{%- if tools | default([]) -%}}
  {{{{- open('message role="system" type="tool-declare"') -}}}}
  {{{{- {_K3_TOOLS!r} -}}}}{{{{- sorted(tools) -}}}}{{{{- '\\n```' + end -}}}}
{{%- endif -%}}
{{%- if thinks and effort in ['low', 'high', 'max'] -%}}
  {{{{- open('message role="system" type="thinking-effort"') + {_K3_EFFORT!r} + effort + '`.' + end -}}}}
{{%- endif -%}}
{{%- set ns = namespace(calls=[], index=0) -%}}
{{%- for m in messages -%}}
  {{{{- '<|open|>message role="' + m.role + '"' -}}}}
  {{%- if m.role == 'tool' -%}}
    {{%- set ns.index = ns.index + 1 -%}}
    {{%- set at = namespace(name=m.name | default('', true), index=ns.index) -%}}
    {{%- for call in ns.calls if call.id is defined and call.id == m.tool_call_id -%}}
      {{%- set at.name = call.function.name -%}}{{%- set at.index = ns.calls.index(call) + 1 -%}}
    {{%- endfor -%}}
    {{%- if not at.name and ns.index <= ns.calls | length -%}}
      {{%- set at.name = ns.calls[ns.index - 1].function.name -%}}
    {{%- endif -%}}
    {{{{- ' tool=' -}}}}{{{{- quoted(at.name) -}}}}{{{{- ' index="' ~ at.index ~ '"' -}}}}
  {{%- elif m.name -%}}{{{{- ' name=' -}}}}{{{{- quoted(m.name) -}}}}
  {{%- endif -%}}
  {{{{- '<|sep|>' -}}}}
  {{%- if m.role == 'assistant' -%}}
    {{%- set ns.calls = m.tool_calls | default([], true) -%}}{{%- set ns.index = 0 -%}}
    {{%- if thinks -%}}
      {{{{- open('think') -}}}}{{{{- m.reasoning_content | default('', true) -}}}}{{{{- close('think') -}}}}
    {{%- endif -%}}
    {{{{- open('response') -}}}}{{{{- m.content | default('', true) -}}}}{{{{- close('response') -}}}}
    {{%- if ns.calls -%}}
      {{{{- open('tools') -}}}}
      {{%- for call in ns.calls -%}}
        {{{{- '<|open|>call tool=' -}}}}{{{{- quoted(call.function.name) -}}}}
        {{{{- ' index="' ~ loop.index ~ '"<|sep|>' -}}}}
        {{%- for key, value in call.function.arguments | items -%}}
          {{%- set kind = 'string' if value is string else 'boolean' if value is boolean else 'null' if value is none
               else 'number' if value is number else 'object' if value is mapping else 'array' -%}}
          {{{{- '<|open|>argument key=' -}}}}{{{{- quoted(key) -}}}}{{{{- ' type="' + kind + '"<|sep|>' -}}}}
          {{{{- value if value is string else value | tojson -}}}}{{{{- close('argument') -}}}}
        {{%- endfor -%}}
        {{{{- close('call') -}}}}
      {{%- endfor -%}}
      {{{{- close('tools') -}}}}
    {{%- endif -%}}
  {{%- elif m.content is string or not m.content -%}}{{{{- m.content | default('', true) -}}}}
  {{%- else -%}}
    {{%- for part in m.content -%}}
      {{%- if part.type == 'image' -%}}{{{{- {K3_ROWS!r} -}}}}{{%- else -%}}{{{{- part.text -}}}}{{%- endif -%}}
    {{%- endfor -%}}
  {{%- endif -%}}
  {{{{- end -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt | default(false) -%}}
  {{{{- open('message role="assistant"') -}}}}{{{{- open('think' if thinks else 'response') -}}}}
{{%- endif -%}}
"""


def own_template(model_type: object, added_tokens: AbstractSet[str]) -> str | None:
    """Return the template of a checkpoint without one, by the `model_type` of its config or its tokenizer's tokens."""
    own = {"deepseek_v4": DEEPSEEK_V4, "deepseek_v41": DEEPSEEK_V41, "kimi_k3": KIMI_K3}.get(str(model_type))
    return own or (OCR if added_tokens >= _OCR_TOKENS else None)


def with_pictures(template: str) -> str:
    """Make a template print pictures. Those of llama.cpp, which GGUF files have, print none, or another token."""
    if template == CONVERTERS_OCR:
        return OCR
    if "｜DSML｜" in template and _V4_CONTENT in template:
        template = _V4_PARTS + template.replace(_V4_CONTENT, "parts_of(message['content'])")
    return template.replace(K3_PICTURE, K3_ROWS)
