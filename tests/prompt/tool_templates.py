"""Short chat templates with tools. They are ours, and treat calls, results and thoughts as the hub's templates do."""

# Strings stand between equal marks and keys are bare; results stand in the turn of their calls, before its text.
GEMMA4 = r"""{%- macro value(it) -%}
  {%- if it is string -%}{{ '<|"|>' ~ it ~ '<|"|>' }}
  {%- elif it is mapping -%}{{ '{' }}{{ members(it) }}{{ '}' }}
  {%- elif it is boolean -%}{{ 'true' if it else 'false' }}
  {%- elif it is iterable -%}{{ '[' }}{% for one in it %}{{ value(one) }}{{ ',' if not loop.last }}{% endfor %}{{ ']' }}
  {%- else -%}{{ 'null' if it is none else it }}{%- endif -%}
{%- endmacro -%}
{%- macro members(it) -%}
  {%- for key in it | sort -%}{{ key ~ ':' ~ value(it[key]) ~ (',' if not loop.last else '') }}{%- endfor -%}
{%- endmacro -%}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- set at = namespace(first=0, last=-1, is_open=false) -%}
{{- bos_token -}}
{%- if thinks or tools or messages[0].role in ['system', 'developer'] -%}
  {{- '<|turn>system\n' ~ ('<|think|>\n' if thinks else '') -}}
  {%- if messages[0].role in ['system', 'developer'] -%}
    {%- set at.first = 1 -%}{{ messages[0].content | trim }}
  {%- endif -%}
  {%- for tool in tools or [] -%}
    {{- '<|tool>declaration:' ~ tool.function.name ~ '{description:' ~ value(tool.function.description) ~ ',parameters:'
        ~ value(tool.function.parameters) ~ '}<tool|>' -}}
  {%- endfor -%}
  {{- '<turn|>\n' -}}
{%- endif -%}
{%- for m in messages if m.role == 'user' -%}{%- set at.last = messages.index(m) -%}{%- endfor -%}
{%- for m in messages[at.first:] if m.role != 'tool' -%}
  {%- set index = messages.index(m) -%}
  {%- if not at.is_open -%}{{ '<|turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}{%- endif -%}
  {%- set at.is_open = false -%}
  {%- if m.tool_calls -%}
    {%- if m.reasoning_content and index > at.last -%}
      {{- '<|channel>thought\n' ~ m.reasoning_content ~ '\n<channel|>' -}}
    {%- endif -%}
    {%- for call in m.tool_calls -%}
      {{- '<|tool_call>call:' ~ call.function.name ~ '{' }}{{ members(call.function.arguments) }}{{ '}<tool_call|>' -}}
    {%- endfor -%}
    {%- for result in messages[index + 1:] -%}
      {%- if result.role != 'tool' -%}{%- break -%}{%- endif -%}
      {%- for call in m.tool_calls if call.id == result.tool_call_id -%}
        {{- '<|tool_response>response:' ~ call.function.name ~ '{value:' ~ value(result.content) -}}
        {{- '}<tool_response|>' -}}
      {%- endfor -%}
    {%- endfor -%}
    {%- set at.is_open = not m.content -%}
  {%- endif -%}
  {{- m.content | default('', true) | trim -}}
  {%- if not at.is_open -%}{{ '<turn|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not at.is_open -%}
  {{- '<|turn>model\n' ~ ('' if thinks else '<|channel>thought\n<channel|>') -}}
{%- endif -%}"""

# Arguments as an object; results of one turn share a turn.
QWEN2_5 = r"""{%- macro turn(role, text) %}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>\n' }}{% endmacro -%}
{%- set first = messages[0].content if messages[0].role == 'system' else 'Be helpful.' -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' + first + '\n\n<tools>' -}}
  {%- for tool in tools -%}{{ '\n' ~ tool | tojson }}{%- endfor -%}
  {{- '\n</tools>\nA call looks like this:\n<tool_call>\n{"name": <name>, "arguments": <object>}\n'
      ~ '</tool_call><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}{{- turn('system', first) -}}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls -%}
    {{- '<|im_start|>assistant' -}}
    {%- if m.content -%}{{ '\n' + m.content }}{%- endif -%}
    {%- for call in m.tool_calls -%}
      {%- set f = call.function if call.function is defined else call -%}
      {{- '\n<tool_call>\n{"name": "' + f.name + '", "arguments": ' + f.arguments | tojson + '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{- '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
  {%- elif m.role != 'system' or not loop.first -%}{{- turn(m.role, m.content) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# Thoughts are shown only after the last question, and are removed from the content of earlier turns.
QWEN3 = r"""{%- set seen = namespace(question=-1) -%}
{%- for m in messages[::-1] if seen.question < 0 and m.role == 'user' and m.content is string
    and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) -%}
  {%- set seen.question = messages.index(m) -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if messages[0].role == 'system' else '') ~ '<tools>' -}}
  {%- for tool in tools -%}{{ '\n' }}{{ tool | tojson }}{%- endfor -%}
  {{- '\n</tools>\nA call looks like this:\n<tool_call>\n{"name": <name>, "arguments": <object>}\n'
      ~ '</tool_call><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- set text = m.content if m.content is string else '' -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
    {%- if not thought and '</think>' in text -%}
      {%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set text = text.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > seen.question and thought -%}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') -}}
    {%- else -%}{{ text }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{- ('\n' if text or not loop.first else '') ~ '<tool_call>\n{"name": "' -}}
      {{- call.function.name ~ '", "arguments": ' -}}
      {%- if call.function.arguments is string -%}{{ call.function.arguments }}
      {%- else -%}{{ call.function.arguments | tojson }}{%- endif -%}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
    {{- '\n<tool_response>\n' }}{{ text }}{{ '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
  {%- elif m.role == 'user' or not loop.first -%}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""

# Schemas taken apart key by key; values as Python writes them, unless they are lists or objects.
QWEN3_CODER = r"""{%- macro others(thing, done) -%}
  {%- if thing is mapping -%}{%- for key in thing if key not in done -%}
    {%- set value = thing[key] -%}
    {{- '\n<' ~ key ~ '>' -}}
    {%- if value is mapping or (value is sequence and value is not string) -%}{{ value | tojson | safe }}
    {%- else -%}{{ value | string }}{%- endif -%}
    {{- '</' ~ key ~ '>' -}}
  {%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set start = '<|im_start|>system\n' ~ (messages[0].content if messages[0].role == 'system' else 'You code.') -%}
{%- if tools is defined and tools is iterable and tools | length > 0 -%}
  {{- start ~ '\n\n<tools>' -}}
  {%- for tool in tools -%}
    {%- set f = tool.function -%}
    {{- '\n<function>\n<name>' ~ f.name ~ '</name>\n<description>' ~ (f.description | trim) -}}
    {{- '</description>\n<parameters>' -}}
    {%- for name, fields in f.parameters.properties | items -%}
      {{- '\n<parameter>\n<name>' ~ name ~ '</name>\n<type>' ~ (fields.type | string) ~ '</type>' -}}
      {{- others(fields, ['name', 'type']) ~ '\n</parameter>' -}}
    {%- endfor -%}
    {{- others(f.parameters, ['type', 'properties']) ~ '\n</parameters>\n</function>' -}}
  {%- endfor -%}
  {{- '\n</tools>\n<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n' -}}
  {{- '</function>\n</tool_call><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}{{- start ~ '<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' and m.tool_calls is defined and m.tool_calls | length > 0 -%}
    {{- '<|im_start|>assistant' -}}
    {%- if m.content is string and m.content | trim | length > 0 -%}{{ '\n' + m.content | trim + '\n' }}{%- endif -%}
    {%- for call in m.tool_calls -%}
      {{- '\n<tool_call>\n<function=' + call.function.name + '>\n' -}}
      {%- for key, value in call.function.arguments | items -%}
        {%- set value = value | tojson | safe if value is mapping or (value is sequence and value is not string)
            else value | string -%}
        {{- '<parameter=' + key + '>\n' }}{{ value }}{{ '\n</parameter>\n' -}}
      {%- endfor -%}
      {{- '</function>\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.previtem and loop.previtem.role != 'tool' -%}{{ '<|im_start|>user\n' }}{%- endif -%}
    {{- '<tool_response>\n' }}{{ m.content }}{{ '\n</tool_response>\n' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
  {%- elif not (loop.first and m.role == 'system') -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# Calls are printed only without content; arguments are text that is joined to more text.
DEEPSEEK_R1 = r"""{%- set ns = namespace(results=false, system='') -%}
{%- for m in messages if m.role == 'system' -%}{%- set ns.system = m['content'] -%}{%- endfor -%}
{{- bos_token ~ ns.system -}}
{%- if tools -%}{{ '\n\n' ~ tools | tojson }}{%- endif -%}
{%- for m in messages -%}
  {%- if ns.results and m['role'] != 'tool' -%}{{ '<｜tool▁outputs▁end｜>' }}{%- endif -%}
  {%- if m['role'] == 'user' -%}{{ '<｜User｜>' + m['content'] }}{%- endif -%}
  {%- if m['role'] == 'assistant' and m['content'] is none -%}
    {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' -}}
    {%- for call in m['tool_calls'] -%}
      {{- ('' if loop.first else '\n') ~ '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' -}}
      {{- call['function']['name'] + '\n```json\n' + call['function']['arguments'] + '\n```<｜tool▁call▁end｜>' -}}
    {%- endfor -%}
    {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
  {%- elif m['role'] == 'assistant' -%}
    {%- set text = m['content'] -%}
    {%- if '</think>' in text -%}{%- set text = text.split('</think>')[-1] -%}{%- endif -%}
    {{- ('' if ns.results else '<｜Assistant｜>') ~ text ~ '<｜end▁of▁sentence｜>' -}}
  {%- elif m['role'] == 'tool' -%}
    {{- '\n' if ns.results else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
  {%- set ns.results = m['role'] == 'tool' -%}
{%- endfor -%}
{%- if ns.results -%}{{ '<｜tool▁outputs▁end｜>' }}
{%- elif add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"""

# No turn starts after results; the prompt opens or closes the model's thoughts.
DEEPSEEK_V31 = r"""{%- if not thinking is defined -%}{%- set thinking = false -%}{%- endif -%}
{%- set ns = namespace(asked=false, system='', several=false) -%}
{%- for m in messages if m.role == 'system' -%}
  {%- set ns.system = ns.system + ('\n\n' if ns.several else '') + m['content'] -%}{%- set ns.several = true -%}
{%- endfor -%}
{%- if tools is defined and tools is not none -%}
  {%- set said = namespace(text='## Tools\n') -%}
  {%- for tool in tools -%}
    {%- set said.text = said.text + '\n### ' + tool.function.name + '\nDescription: ' + tool.function.description -%}
    {%- set said.text = said.text + '\n\nParameters: ' + (tool.function.parameters | tojson) + '\n' -%}
  {%- endfor -%}
  {%- set ns.system = ns.system + '\n\n' + said.text -%}
{%- endif -%}
{{- bos_token }}{{ ns.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{{ '<｜User｜>' + m['content'] }}
  {%- elif m['role'] == 'assistant' -%}
    {%- if ns.asked -%}{{ '<｜Assistant｜></think>' }}{%- endif -%}
    {%- set text = m['content'] or '' -%}
    {%- if '</think>' in text -%}{%- set text = text.split('</think>', 1)[1] -%}{%- endif -%}
    {{- text -}}
    {%- if m['tool_calls'] is defined and m['tool_calls'] is not none -%}
      {%- for call in m['tool_calls'] -%}
        {{- '<｜tool▁calls▁begin｜>' if loop.first else '' -}}
        {{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] -}}
        {{- '<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- '<｜end▁of▁sentence｜>' -}}
  {%- elif m['role'] == 'tool' -%}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{%- endif -%}
  {%- set ns.asked = m['role'] == 'user' -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.asked -%}
  {{- '<｜Assistant｜>' ~ ('<think>' if thinking else '</think>') -}}
{%- endif -%}"""

# The model's own ids are printed with calls and with results; a speaker with a name is called by it.
KIMI_K2 = r"""{%- macro speaker(m) -%}
  {%- set name = m.get('name') or m['role'] -%}
  {%- if m['role'] == 'user' -%}<|im_user|>{%- elif m['role'] == 'assistant' -%}<|im_assistant|>
  {%- else -%}<|im_system|>{%- endif -%}
  {{- name -}}<|im_middle|>
{%- endmacro -%}
{%- macro calls_of(m) -%}
  <|tool_calls_section_begin|>
  {%- for call in m['tool_calls'] -%}
    {%- set given = call['function']['arguments'] -%}
    <|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>
    {{- given if given is string else given | tojson -}}
    <|tool_call_end|>
  {%- endfor -%}
  <|tool_calls_section_end|>
{%- endmacro -%}
{%- set ns = namespace(last_answer=-1) -%}
{%- for at in range(messages | length - 1, -1, -1) -%}
  {%- if messages[at]['role'] == 'assistant' and not messages[at].get('tool_calls') -%}
    {%- set ns.last_answer = at -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- if messages[0]['role'] != 'system' -%}<|im_system|>system<|im_middle|>Be helpful.<|im_end|>{%- endif -%}
{%- for m in messages -%}
  {{- speaker(m) -}}
  {%- if m['role'] == 'assistant' -%}
    <think>{{ m.get('reasoning_content', '') if loop.index0 > ns.last_answer else '' }}</think>
    {{- m.get('content') or '' -}}
    {%- if m.get('tool_calls') -%}{{ calls_of(m) }}{%- endif -%}
  {%- elif m['role'] == 'tool' -%}{{ '## Return of ' ~ m.tool_call_id ~ '\n' ~ m.content }}
  {%- elif m['content'] is not none -%}{{ m.content }}{%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""

# Turns have no end token; each key and each value stands between two tokens.
GLM_4_6 = r"""{%- macro visible(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is iterable and content is not mapping -%}
    {%- for item in content if item is mapping and item.type == 'text' -%}{{ item.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
[gMASK]<sop>
{%- if tools -%}
<|system|>
<tools>
{% for tool in tools -%}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor -%}
</tools>
<tool_call>{name}
<arg_key>{key}</arg_key>
<arg_value>{value}</arg_value>
</tool_call>
{%- endif -%}
{%- set ns = namespace(question=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set ns.question = messages.index(m) -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<|user|>\n' ~ visible(m.content) -}}
    {%- if enable_thinking is defined and not enable_thinking and not visible(m.content).endswith('/nothink') -%}
      /nothink
    {%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {%- set text = visible(m.content) -%}
    {%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
    {{- '<|assistant|>\n<think>' ~ (thought.strip() if loop.index0 > ns.question else '') ~ '</think>' -}}
    {%- if text.strip() -%}{{ '\n' + text.strip() }}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {%- set f = call.function or call -%}
      {{- '\n<tool_call>' + f.name -}}
      {%- for key, value in (f.arguments or {}).items() -%}
        {{- '\n<arg_key>' ~ key ~ '</arg_key>\n<arg_value>' -}}
        {{- value if value is string else value | tojson(ensure_ascii=False) }}{{ '</arg_value>' -}}
      {%- endfor -%}
      {{- '\n</tool_call>' -}}
    {%- endfor -%}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{ '<|observation|>' }}{%- endif -%}
    {{- '\n<tool_response>\n' }}{{ m.content }}{{ '\n</tool_response>' -}}
  {%- elif m.role == 'system' -%}{{ '<|system|>\n' ~ visible(m.content) }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' ~ ('\n<think></think>' if enable_thinking is defined and not enable_thinking else '') -}}
{%- endif -%}"""

# As GLM-4.6, without line breaks inside calls.
GLM_4_7 = (
    GLM_4_6.replace("{name}\n<arg", "{name}<arg")
    .replace("</arg_key>\n<arg_value>{value}</arg_value>\n", "</arg_key><arg_value>{value}</arg_value>")
    .replace(
        r"'\n<arg_key>' ~ key ~ '</arg_key>\n<arg_value>'", "'<arg_key>' ~ key ~ '</arg_key><arg_value>'"
    )
    .replace(r"'\n</tool_call>'", "'</tool_call>'")
)

# A recursive macro writes types; only a turn's first call is printed, and either its content or its thoughts.
GPT_OSS = r"""{%- macro type_of(spec) -%}
  {%- if spec.type == 'array' -%}
    {%- set inner = type_of(spec['items']) if spec['items'] else 'any' -%}
    {{- 'any[]' if inner | length > 50 else inner + '[]' -}}
  {%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}{{ spec.type | join(' | ') }}
  {%- elif spec.type == 'string' and spec.enum -%}{{ '"' + spec.enum | join('" | "') + '"' }}
  {%- elif spec.type == 'object' and spec.properties -%}
    {{- '{\n' -}}
    {%- for name, inner in spec.properties.items() -%}
      {{- name ~ ('' if name in (spec.required or []) else '?') ~ ': ' ~ type_of(inner) ~ ', ' -}}
    {%- endfor -%}
    {{- '}' -}}
  {%- else -%}{{ spec.type if spec.type in ['string', 'number', 'boolean', 'object'] else 'any' }}{%- endif -%}
{%- endmacro -%}
{%- macro header() -%}
  {%- if model_identity is not defined -%}{%- set model_identity = 'You are a model.' -%}{%- endif -%}
  {%- if reasoning_effort is not defined -%}{%- set reasoning_effort = 'medium' -%}{%- endif -%}
  {{- model_identity + '\nCurrent date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' + reasoning_effort -}}
{%- endmacro -%}
{{- '<|start|>system<|message|>' }}{{ header() }}{{ '<|end|>' -}}
{%- set said = messages[0].content if messages[0].role in ['developer', 'system'] else '' -%}
{%- set rest = messages[1:] if messages[0].role in ['developer', 'system'] else messages -%}
{%- if said or tools -%}
  {{- '<|start|>developer<|message|>' -}}
  {%- if said -%}{{ '# Instructions\n\n' + said + '\n\n' }}{%- endif -%}
  {%- if tools -%}
    {{- 'namespace functions {\n\n' -}}
    {%- for tool in tools -%}
      {%- set f = tool.function -%}
      {{- '// ' + f.description + '\ntype ' + f.name + ' = (_: {\n' -}}
      {%- for name, spec in f.parameters.properties.items() -%}
        {%- if spec.description -%}{{ '// ' + spec.description + '\n' }}{%- endif -%}
        {{- name ~ ('' if name in (f.parameters.required or []) else '?') ~ ': ' ~ type_of(spec) -}}
        {%- if spec.default is defined -%}{{ ', // default: ' + spec.default | tojson }}{%- endif -%}
        {{- ',\n' -}}
      {%- endfor -%}
      {{- '}) => any;\n\n' -}}
    {%- endfor -%}
    {{- '} // namespace functions' -}}
  {%- endif -%}
  {{- '<|end|>' -}}
{%- endif -%}
{%- set last = namespace(name=none) -%}
{%- for m in rest -%}
  {%- if m.role == 'assistant' and 'tool_calls' in m -%}
    {%- set later = namespace(answer=false) -%}
    {%- for other in rest[loop.index:] if other.role == 'assistant' and 'tool_calls' not in other -%}
      {%- set later.answer = true -%}
    {%- endfor -%}
    {%- if m.content and m.thinking -%}{{ raise_exception('content or thinking, not both') }}{%- endif -%}
    {%- if (m.content or m.thinking) and not later.answer -%}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' -}}
    {%- endif -%}
    {%- set f = m.tool_calls[0].function -%}
    {{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' -}}
    {{- f.arguments | tojson }}{{ '<|call|>' -}}
    {%- set last.name = f.name -%}
  {%- elif m.role == 'assistant' -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' -}}
    {%- set last.name = none -%}
  {%- elif m.role == 'tool' -%}
    {%- if last.name is none -%}{{ raise_exception('a result without a call') }}{%- endif -%}
    {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' -}}
    {{- m.content | tojson }}{{ '<|end|>' -}}
  {%- elif m.role == 'user' -%}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"""

# Tools come before the last question; a call is a slice of JSON; ids have nine characters.
MISTRAL = r"""{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- set questions = rest | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(index=0) -%}
{%- for m in rest if m.role != 'tool' and (m.tool_calls is not defined or m.tool_calls is none) -%}
  {%- if (m['role'] == 'user') != (ns.index % 2 == 0) -%}
    {{- raise_exception('user and assistant must take turns') -}}
  {%- endif -%}
  {%- set ns.index = ns.index + 1 -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in rest -%}
  {%- if m['role'] == 'user' -%}
    {%- if tools is not none and m == questions[-1] -%}
      {{- '[AVAILABLE_TOOLS] [' -}}
      {%- for tool in tools -%}
        {{- '{"type": "function", "function": {' -}}
        {%- for key, value in tool.function.items() if key != 'return' -%}
          {{- '"' + key + '": ' -}}
          {%- if value is string -%}{{ '"' + value + '"' }}{%- else -%}{{ value | tojson }}{%- endif -%}
          {{- '' if loop.last else ', ' -}}
        {%- endfor -%}
        {{- '}}' ~ ('' if loop.last else ', ') -}}
      {%- endfor -%}
      {{- '][/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {%- set before = messages[0]['content'] + '\n\n' if loop.last and messages[0]['role'] == 'system' else '' -%}
    {{- '[INST] ' + before + m['content'] + '[/INST]' -}}
  {%- elif m.tool_calls is defined and m.tool_calls is not none -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m.tool_calls -%}
      {%- if call.id | length != 9 -%}{{ raise_exception('an id has nine letters and digits') }}{%- endif -%}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' ~ ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- ']' + eos_token -}}
  {%- elif m['role'] == 'assistant' -%}{{ ' ' + m['content'] | trim + eos_token }}
  {%- elif m['role'] == 'tool' -%}
    {%- if m.tool_call_id | length != 9 -%}{{ raise_exception('an id has nine letters and digits') }}{%- endif -%}
    {{- '[TOOL_RESULTS] {"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' -}}
  {%- else -%}{{ raise_exception('only user and assistant') }}{%- endif -%}
{%- endfor -%}"""

MISTRAL_ARGS = r"""{{- bos_token -}}
{%- if tools -%}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif -%}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}{{ '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' }}
  {%- elif m['role'] == 'user' -%}{{ '[INST]' + m['content'] + '[/INST]' }}
  {%- elif m['role'] == 'assistant' -%}
    {%- if m.reasoning_content -%}{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{%- endif -%}
    {{- m['content'] or '' -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call['function']['arguments'] | tojson -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- else -%}
    {{- '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content | string + '[/TOOL_RESULTS]' -}}
  {%- endif -%}
{%- endfor -%}"""

# The prompt opens the thoughts; a result needs the call before it.
MINIMAX_M2 = r"""{%- set open, close = '<minimax:tool_call>', '</minimax:tool_call>' -%}
{%- macro visible(content) -%}{%- if content is string -%}{{ content }}{%- endif -%}{%- endmacro -%}
{%- set system = messages[0] if messages[0].role == 'system' else none -%}
{%- set rest = messages[1:] if system else messages -%}
{%- set ns = namespace(question=-1, call=none) -%}
{%- for m in rest if m.role == 'user' -%}{%- set ns.question = rest.index(m) -%}{%- endfor -%}
{{- ']~!b[' ~ ']~b]system' ~ '\n' ~ (visible(system.content) if system else 'Be helpful.') -}}
{%- if tools -%}
  {{- '\n\n<tools>\n' -}}
  {%- for tool in tools -%}
    {{- '<tool>' ~ (tool.function | tojson(ensure_ascii=False) | string) ~ '</tool>\n' -}}
  {%- endfor -%}
  {{- '</tools>\n' ~ open ~ '\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n' ~ close -}}
{%- endif -%}
{{- '[e~[\n' -}}
{%- for m in rest -%}
  {%- if m.role == 'assistant' -%}
    {{- ']~b]ai\n' -}}
    {%- if m.reasoning_content is string and loop.index0 > ns.question -%}
      {{- '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' -}}
    {%- endif -%}
    {{- visible(m.content) -}}
    {%- set ns.call = none -%}
    {%- if m.tool_calls -%}
      {{- '\n' ~ open ~ '\n' -}}
      {%- for call in m.tool_calls -%}
        {%- set f = call.function if call.function else call -%}
        {{- '<invoke name="' + f.name + '">\n' -}}
        {%- if f.arguments is mapping -%}
          {%- for key, value in f.arguments | items -%}
            {{- '<parameter name="' + key + '">' -}}
            {{- value if value is string else value | tojson(ensure_ascii=False) | string }}{{ '</parameter>\n' -}}
          {%- endfor -%}
        {%- endif -%}
        {{- '</invoke>\n' -}}
        {%- set ns.call = f.name -%}
      {%- endfor -%}
      {{- close -}}
    {%- endif -%}
    {{- '[e~[\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if ns.call is none -%}{{ raise_exception('a result without a call') }}{%- endif -%}
    {%- if loop.first or rest[loop.index0 - 1].role != 'tool' -%}{{ ']~b]tool' }}{%- endif -%}
    {{- '\n<response>' }}{{ m.content }}{{ '</response>' -}}
    {%- if loop.last or rest[loop.index0 + 1].role != 'tool' -%}{{ '[e~[\n' }}{%- endif -%}
  {%- elif m.role == 'user' -%}{{ ']~b]user\n' ~ visible(m.content) ~ '[e~[\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ']~b]ai\n<think>\n' }}{%- endif -%}"""

# Turns as in ChatML. Calls, thoughts and the marks around text are each family's; capitals stand for them.
_SHORT = r"""{%- if tools -%}{{ '<|im_start|>system\n' ~ tools | tojson ~ '<|im_end|>\n' }}{%- endif -%}
{%- for m in messages -%}
  {{- '<|im_start|>' ~ m.role ~ '\n' -}}
  {%- if m.reasoning_content -%}{{ 'THINK' ~ m.reasoning_content ~ 'DONE' }}{%- endif -%}
  {%- if m.content and m.role == 'assistant' -%}{{ 'OPEN' ~ m.content ~ 'CLOSE' }}
  {%- else -%}{{ m.content or '' }}{%- endif -%}
  {%- for call in m.tool_calls or [] -%}
    {%- set f = call.function -%}
    {{- 'FIRST' if loop.first else 'BETWEEN' -}}
    CALL
    {{- 'LAST' if loop.last else '' -}}
  {%- endfor -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


def _short(call: str, first: str, between: str, last: str, think: str, done: str, *around: str) -> str:
    opened, closed = around or ("", "")
    parts = {
        "THINK": think,
        "DONE": done,
        "OPEN": opened,
        "CLOSE": closed,
        "FIRST": first,
        "BETWEEN": between,
    }
    made = _SHORT
    for name, text in {**parts, "LAST": last}.items():
        made = made.replace(name, text)
    return made.replace("CALL", call)


_OBJECT = """{{- '{"name": "' ~ f.name ~ '", "arguments": ' ~ f.arguments | tojson ~ '}' -}}"""
HUNYUAN_A13B = _short(
    _OBJECT,
    "<tool_calls>[",
    ", ",
    "]</tool_calls>",
    r"<think>\n",
    r"\n</think>\n",
    r"<answer>\n",
    r"\n</answer>",
)
GRANITE_3 = _short(_OBJECT, "<|tool_call|>[", ", ", "]", "", "")
GRANITE_4 = _short(_OBJECT, r"<tool_call>\n", r"\n</tool_call>\n<tool_call>\n", r"\n</tool_call>", "", "")
YOUTU = (
    _short(_OBJECT, "<tool_call>", "</tool_call><tool_call>", "</tool_call>", "<think>", "</think>")
    + """{# asks for <tool_call>{"name": "function-name", "arguments": {"param1": "value1"}}</tool_call> #}"""
)
K_EXAONE = YOUTU.replace("</tool_call><tool_call>'", r"</tool_call>\n<tool_call>'")
NEMOTRON_3 = _short(
    r"""{{- '<function=' ~ f.name ~ '>\n' -}}
    {%- for key, value in f.arguments.items() -%}
      {{- '<parameter=' ~ key ~ '>\n' ~ (value if value is string else value | string if value is not iterable
          else value | tojson) ~ '\n</parameter>\n' -}}
    {%- endfor -%}
    {{- '</function>' -}}""",
    r"<tool_call>\n", r"\n</tool_call>\n<tool_call>\n", r"\n</tool_call>\n", r"<think>\n", r"\n</think>\n",
)  # fmt: skip
# Step-3.5 writes calls without a line between them, and thinks from the first token.
STEP_35 = NEMOTRON_3.replace(r"</tool_call>\n<tool_call>", "</tool_call><tool_call>")
# Laguna opens or closes the thoughts itself, and breaks the line after each value only.
LAGUNA = _short(
    r"""{{- '<tool_call>' ~ f.name ~ '\n' -}}
    {%- for key, value in f.arguments.items() -%}
      {{- '<arg_key>' ~ key ~ '</arg_key>\n<arg_value>' ~ (value if value is string else value | tojson)
          ~ '</arg_value>\n' -}}
    {%- endfor -%}
    {{- '</tool_call>' -}}""",
    "", r"\n", r"\n", r"<think>\n", r"\n</think>\n",
)  # fmt: skip
# Laguna-S breaks no lines.
LAGUNA_S = _short(
    r"""{{- '<tool_call>' ~ f.name -}}
    {%- for key, value in f.arguments.items() -%}
      {{- '<arg_key>' ~ key ~ '</arg_key>' -}}
      {{- '<arg_value>' ~ (value if value is string else value | tojson) ~ '</arg_value>' -}}
    {%- endfor -%}
    {{- '</tool_call>' -}}""",
    "", "", "", "<think>", "</think>",
)  # fmt: skip


def _of_ling(template: str) -> str:
    """The template with the roles of Ling."""
    made = template.replace(r"'<|im_start|>assistant\n'", "'<role>ASSISTANT</role>'")
    return made.replace(r"'<|im_start|>' ~ m.role ~ '\n'", "'<role>' ~ m.role | upper ~ '</role>'")


LING_2 = _of_ling(
    _short(
        _OBJECT,
        r"<tool_call>\n",
        r"\n</tool_call>\n<tool_call>\n",
        r"\n</tool_call>",
        r"\n<think>\n",
        r"\n</think>\n\n",
    )
)
# Ling-3 breaks the line behind the last value only.
LING_3 = _of_ling(
    _short(
        r"""{{- '<tool_call>' ~ f.name ~ '\n' -}}
        {%- for key, value in f.arguments.items() -%}
          {{- '<arg_key>' ~ key ~ '</arg_key>\n<arg_value>' ~ (value if value is string else value | tojson)
              ~ '</arg_value>' -}}
        {%- endfor -%}
        {{- '\n</tool_call>' -}}""",
        "", r"\n", "", r"\n<think>", "</think>",
    )
)  # fmt: skip
MINIMAX_M1 = _short(_OBJECT, r"<tool_calls>\n", r"\n", r"\n</tool_calls>", "", "").replace(
    "<|im_start|>", "<beginning_of_sentence>"
)
MINIMAX_M3 = r"""{%- set mark = ']<]minimax[>[' -%}
{%- macro written(value) -%}
  {%- if value is mapping -%}
    {%- for key, one in value.items() if one is not none -%}
      {{ mark }}<{{ key }}>{{ written(one) }}{{ mark }}</{{ key }}>
    {%- endfor -%}
  {%- elif value is iterable and value is not string -%}
    {%- for one in value -%}{{ mark }}<item>{{ written(one) }}{{ mark }}</item>{%- endfor -%}
  {%- elif value is boolean -%}{{ value | tojson }}{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}""" + _short(
    r"""{{- mark ~ '<invoke name="' ~ f.name ~ '">' ~ written(f.arguments) ~ mark ~ '</invoke>\n' -}}""",
    r"]<]minimax[>[<tool_call>\n", "", "]<]minimax[>[</tool_call>", "<mm:think>", "</mm:think>",
)  # fmt: skip
COHERE2_MOE = _short(
    """{{- '{"tool_call_id": "' ~ call.id ~ '", "tool_name": "' ~ f.name ~ '", "parameters": ' ~ f.arguments | tojson
        ~ '}' -}}""",
    r"<|START_ACTION|>[\n    ", r",\n    ", r"\n]<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>",
    "<|START_TEXT|>", "<|END_TEXT|>",
)  # fmt: skip
_PYTHON = """{{- f.name ~ '(' -}}
    {%- for key, value in f.arguments.items() -%}
      {{- key ~ '=' ~ (value | string if value is boolean or value is number or value is none
          else "'" ~ value ~ "'" if value is string else value | tojson) ~ ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- ')' -}}"""
LFM2 = _short(_PYTHON, "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", "<think>", "</think>")
LLAMA_4 = _short(_PYTHON, "<|python_start|>[", ", ", "]<|python_end|>", "", "")
_TAGS = r"""{{- '<｜DSML｜invoke name="' ~ f.name ~ '">\n' -}}
    {%- for key, value in f.arguments.items() -%}
      {{- '<｜DSML｜parameter name="' ~ key ~ '" string="' ~ ('true' if value is string else 'false') ~ '">'
          ~ (value if value is string else value | tojson) ~ '</｜DSML｜parameter>\n' -}}
    {%- endfor -%}
    {{- '</｜DSML｜invoke>\n' -}}"""
DEEPSEEK_V32 = _short(
    _TAGS, r"\n\n<｜DSML｜function_calls>\n", "", "</｜DSML｜function_calls>", "<think>", "</think>"
)
DEEPSEEK_V4 = DEEPSEEK_V32.replace("function_calls>", "tool_calls>")
DEEPSEEK_V41 = DEEPSEEK_V32.replace("function_calls>", "calls>").replace("｜DSML｜", "｜DSML｜ ")
HY_3 = _short(
    r"""{{- '<tool_call:opensource>' ~ f.name ~ '<tool_sep:opensource>\n' -}}
    {%- for key, value in f.arguments.items() -%}
      {{- '<arg_key:opensource>' ~ key ~ '</arg_key:opensource>\n<arg_value:opensource>'
          ~ (value if value is string else value | tojson) ~ '</arg_value:opensource>\n' -}}
    {%- endfor -%}
    {{- '</tool_call:opensource>\n' -}}""",
    r"<tool_calls:opensource>\n", "", "</tool_calls:opensource>", "<think:opensource>", "</think:opensource>",
)  # fmt: skip
HY_4 = _short(
    """{{- '<tool_call:6124c78e>' ~ f.name -}}
    {%- for key, value in f.arguments.items() -%}
      {{- '<arg_key:6124c78e>' ~ key ~ '</arg_key:6124c78e><arg_value:6124c78e>'
          ~ (value if value is string else value | tojson) ~ '</arg_value:6124c78e>' -}}
    {%- endfor -%}
    {{- '</tool_call:6124c78e>' -}}""",
    "<tool_calls:6124c78e>", "", "</tool_calls:6124c78e>", "<think:6124c78e>", "</think:6124c78e>",
)  # fmt: skip
SOLAR_OPEN = (
    _short(
        """{{- '<|tool_call:begin|>' ~ call.id ~ '<|tool_call:name|>' ~ f.name ~ '<|tool_call:args|>' -}}
        {{- f.arguments | tojson ~ '<|tool_call:end|>' -}}""",
        "<|tool_calls|>", "", "<|calls|>", "<|think|>", "<|end|><|begin|>assistant", "<|content|>", "<|end|>",
    )
    .replace(r"'<|im_start|>' ~ m.role ~ '\n'", "'<|begin|>' ~ m.role")
    .replace(r"'<|im_start|>assistant\n'", "'<|begin|>assistant'")
)  # fmt: skip
GIGACHAT_31 = _short(_OBJECT, "<|function_call|>", "<|function_call|>", "", "", "")
LLAMA_3 = (
    _short(
        """{{- '{"name": "' ~ f.name ~ '", "parameters": ' ~ f.arguments | tojson ~ '}' -}}""",
        "",
        "",
        "",
        "",
        "",
    )
    + """{# asks for {"name": function name, "parameters": dictionary of argument name and its value} #}"""
)
ERNIE_45 = _short(
    _OBJECT, r"<tool_call>\n", r"\n</tool_call>\n<tool_call>\n", r"\n</tool_call>", "", r"\n</think>\n\n",
    r"<response>\n", r"\n</response>",
)  # fmt: skip
