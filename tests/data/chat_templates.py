"""Chat templates in small, each with one habit of a family of models."""

_TURN = "{{ '<|header|>' + m.role + '<|end_header|>' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>' }}{% endif %}"

# As Qwen3: the last answer is written with its thoughts, earlier ones without.
THOUGHTS_OF_THE_LAST = (
    "{% for m in messages %}" + _TURN + "{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (parts[0].split('<think>')[-1] if parts | length > 1 else '') + '</think>' }}"
    "{% endif %}{{ parts[-1] + '<|eot|>' }}{% endfor %}" + _ASK
)
# As DeepSeek and Nemotron: thoughts are begun for the model, and gone once it has answered.
THOUGHTS_BEGUN = (
    "{% for m in messages %}" + _TURN + "{{ m.content.split('</think>')[-1] + '<|eot|>' }}"
    "{% endfor %}" + _ASK.replace("end_header|>'", "end_header|><think>'")
)
# As Phi-3.5: every rendering that asks for nothing ends in an end of text.
END_OF_TEXT = (
    "{% for m in messages %}" + _TURN + "{{ m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
# As gpt-oss: channels, and other ends for the last answer, for earlier ones and for tool calls.
CHANNELS = (
    "{% for m in messages %}{{ '<|header|>' + m.role }}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ ' to=' + f.name + '<|end_header|>' + (f.arguments | tojson) + '<|pad|>' }}"
    "{% elif m.role == 'assistant' %}"
    "{{ ' final<|end_header|>' + m.content + ('<|end|>' if loop.last else '<|eot|>') }}"
    "{% elif m.role == 'tool' %}"
    "{{ ' ' + messages[loop.index0 - 1].tool_calls[0].function.name + '<|end_header|>' }}"
    "{{ m.content + '<|eot|>' }}"
    "{% else %}{{ '<|end_header|>' + m.content + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant' }}{% endif %}"
)
# As GLM: nothing ends a turn but the next one's header.
NO_END = (
    "{% for m in messages %}" + _TURN + "{{ m.content }}{% endfor %}" + _ASK
)
# As Qwen2.5: tool calls as JSON, tools ahead of all.
TOOLS = (
    "{% if tools %}{{ 'tools: ' + (tools | tojson) }}{% endif %}"
    "{% for m in messages %}" + _TURN + "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<call>{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}"
    "{{ (call.function.arguments | tojson) + '}</call>' }}{% endfor %}"
    "{{ '<|eot|>' }}{% endfor %}" + _ASK
)
# As DeepSeek-V3: arguments are put between strings, which an object can't be.
ARGUMENTS_AS_TEXT = TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments")
# As the basic Llama 3: a turn is its content, whatever else it carries.
CONTENT_ALONE = (
    "{% for m in messages %}" + _TURN + "{{ m.content | default('') | trim }}{{ '<|eot|>' }}"
    "{% endfor %}" + _ASK
)
# As Idefics and LLaVA: only lists of parts are looked into.
PARTS = (
    "{% for m in messages %}" + _TURN + "{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}{{ '<image>' }}"
    "{% endif %}{% endfor %}{{ '<|eot|>' }}{% endfor %}" + _ASK
)
# One role as text, the others as parts.
MIXED_PARTS = PARTS.replace(
    "{% for part", "{% if m.role == 'system' %}{{ m.content + '.' }}{% endif %}{% for part"
)
# As Gemma 4: a tool's reply is written into the turn that asked for it.
REPLY_WITHIN = (
    "{% for m in messages %}{% if m.role != 'tool' %}" + _TURN + "{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}"
    "{{ messages[loop.index0 + 1].content if not loop.last else '' }}"
    "{% endif %}{{ m.content + '<|eot|>' }}{% endif %}{% endfor %}" + _ASK
)
# What the assistant generates is marked, for transformers' own mask.
MARKED = (
    "{% for m in messages %}{{ '<|header|>' + m.role + '<|end_header|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|eot|>' }}{% endif %}{% endfor %}" + _ASK
)
