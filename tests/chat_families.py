"""Tokenizers of the families' kinds with the families' control tokens and chat formats.

Vocabularies are small (the real ones need a download); what matters for the frame is
real: which strings are control tokens, how text is split, whether a space is put in front
and what the format looks like. The formats are those that the models were trained on.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rlsafety.models import chat, gguf_tokenizer, templates

WORDS = "You are kind . Hello there user assistant model system INST SYS think".split()


def _merges(words: list[str]) -> list[tuple[str, str]]:
  """Left-to-right merges that build each word."""
  pairs = [(w[:i], w[i]) for w in words for i in range(1, len(w))]
  return list(dict.fromkeys(pairs))


def _vocab(first: list[str], alphabet: list[str], merges, last=()) -> dict[str, int]:
  tokens = [*first, *alphabet, *(a + b for a, b in merges), *last]
  return {t: i for i, t in enumerate(dict.fromkeys(tokens))}


def _add(tokenizer, control, plain=()):
  tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
  tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
  return tokenizer


def byte_level(split: str, control: list[str], plain=()) -> Tokenizer:
  """Like Qwen, Llama 3 and SmolLM2: control tokens are not in the model's vocabulary."""
  merges = _merges([*("Ġ" + w for w in WORDS), *WORDS, "ĊĊ"])
  vocab = _vocab([], sorted(pre_tokenizers.ByteLevel.alphabet()), merges)
  tokenizer = Tokenizer(models.BPE(vocab, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(split), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return _add(tokenizer, control, plain)


def sentencepiece(control: list[str], prefix: bool, plain=(), pieces=()) -> Tokenizer:
  """Like Llama 2, Yi and Gemma: control tokens are in the model's vocabulary."""
  merges = _merges(["▁" + w for w in WORDS] + WORDS + ["▁[", "▁<<", "▁[/", "<<", ">>", *pieces])
  letters = sorted(set("".join([*WORDS, *pieces]) + "▁[]<>/\n"))
  fallback = [f"<0x{b:02X}>" for b in range(256)]
  first = [*control, *fallback]
  if not pieces:  # Llama's vocabulary has no line break: it becomes a byte
    letters.remove("\n")
  vocab = _vocab(first, letters, merges, plain)
  unk = "<unk>"
  tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
  spaces = normalizers.Replace(" ", "▁")
  steps = [normalizers.Prepend("▁"), spaces]
  tokenizer.normalizer = normalizers.Sequence(steps) if prefix else spaces
  parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
  return _add(tokenizer, control, plain)


LLAMA2 = (
  "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
  "{% set top = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
  "{% else %}{% set rest = messages %}{% set top = '' %}{% endif %}"
  "{% for m in rest %}"
  "{% if m.role == 'user' %}"
  "{{ bos_token + '[INST] ' + ((top + m.content) if loop.first else m.content).strip() }}"
  "{{ ' [/INST]' }}"
  "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
  "{{ bos_token }}{% for m in messages %}"
  "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('user and assistant must alternate') }}{% endif %}"
  "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
  "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN25 = (
  "{% if messages[0].role != 'system' %}"
  "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + templates.CHATML
)
QWEN3 = (
  "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
  "{%- if enable_thinking is defined and enable_thinking is false %}"
  "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
_CHATML_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA3_MARKS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
_LLAMA3_MARKS += ["<|end_header_id|>", "<|eot_id|>"]
_GEMMA_MARKS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


# Written for these tests, in the manner of published templates: what they ask of the renderer
# (variables, filters, tests, scopes) is theirs, the text is not.
STYLES = {
  "llama2": LLAMA2,
  "mistral_v01": MISTRAL,
  "mistral_v03_tools": (
    "{%- if messages[0]['role'] == 'system' %}{%- set top = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}"
    "{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{%- if tools is not none and (m == rest[-1]) %}{{- '[AVAILABLE_TOOLS] [' }}"
    "{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '] [/AVAILABLE_TOOLS]' }}"
    "{%- endif %}{%- if loop.last and top is defined %}"
    "{{- '[INST] ' + top + '\n\n' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] | trim + eos_token }}{%- endif %}"
    "{%- endfor %}"
  ),
  "llama31_dated": (
    "{{- bos_token }}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}"
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if messages[0].role == 'system' %}{%- set top = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set top = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{%- if tools is not none %}{{- 'Environment: ipython\n' }}{%- endif %}"
    "{{- 'Today: ' + date_string + '\n\n' + top + '<|eot_id|>' }}"
    "{%- for m in messages %}{%- if not (m.role == 'ipython' or 'tool_calls' in m) %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
  ),
  "qwen25": QWEN25,
  "qwen25_tools": (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for t in tools %}{{- t | tojson }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- elif messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif %}" + templates.CHATML
  ),
  "qwen3_thinking": (
    "{%- set ns = namespace(open=true, last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set i = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.open and m.role == 'user' %}{%- set ns.open = false %}{%- set ns.last = i %}"
    "{%- endif %}{%- endfor %}" + QWEN3
  ),
  "gemma": templates.GEMMA,
  "gemma3_parts": (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}"
    "{%- set rest = messages -%}{%- endif -%}{%- for m in rest -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ first if loop.first else '' }}{%- if m['content'] is string -%}{{ m['content'] | trim }}"
    "{%- elif m['content'] is iterable -%}{%- for c in m['content'] -%}{{ c['text'] | trim }}"
    "{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
  ),
  "command_documents": (
    "{{ bos_token }}{% if documents is not none %}{{ '## Documents' }}{% for d in documents %}"
    "{{ d.text }}{% endfor %}{% endif %}{% if documents %}{{ 'cite' }}{% endif %}"
    "{% for m in messages %}{% set who = dict(user='USER', assistant='CHATBOT', system='SYSTEM') %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + who[m.role] + '_TOKEN|>' + m.content.strip() }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
  ),
  "granite_dated": (
    "{%- if messages[0]['role'] == 'system' %}{%- set top = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}"
    "{%- set top = 'Knowledge up to 2024.\nToday is ' + strftime_now('%B %d, %Y') + '.' %}"
    "{%- if tools and documents %}{%- set top = top + ' both' %}{%- elif tools is not none %}"
    "{%- set top = top + ' tools' %}{%- endif %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + top + '<|end_of_text|>\n' }}"
    "{%- for m in loop_messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' }}"
    "{{- m['content'] + '<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"
  ),
  "zephyr": (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + "
    "eos_token }}\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + "
    "eos_token }}\n{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + "
    "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
  ),
  "vicuna": (
    "{% set ns = namespace(top='A chat.') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.top = m.content %}{% continue %}{% endif %}{% if loop.index0 < 2 and not ns.done %}"
    "{{ ns.top + ' ' }}{% set ns.done = true %}{% endif %}"
    "{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
  ),
  "olmo_generation": (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}{% set end = '!' %}"
    "{% generation %}{% set end = eos_token %}{{ m.content + end }}{% endgeneration %}{{ end }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
  ),
  "smollm3": (
    "{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else "
    "'/think' -%}{%- set tool_list = xml_tools or python_tools or tools -%}"
    "{{- '<|im_start|>system\n## Metadata\n' + strftime_now('%d %B %Y') + '\n' + mode }}"
    "{%- if tool_list %}{{- 'tools' }}{%- endif %}{%- if tools is none %}{{- ' no tools' }}"
    "{%- endif %}{{- '<|im_end|>\n' }}" + templates.CHATML
  ),
  "phi_tojson": (
    "{{ dict.fromkeys(['a', 'é'], 1) | tojson }}{{ {'b': [1, 'ü']} | tojson(indent=2) }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% if loop.index0 > 9 %}{% break %}{% endif %}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}{{ unk_token }}"
  ),
}


def _turns(system: str, user: str, assistant: str, end: str = "") -> str:
  """A template whose turns are ordinary text. end: after a reply."""
  return (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    f"{{{{ {system!r} + m.content }}}}{{% elif m.role == 'user' %}}"
    f"{{{{ {user!r} + m.content }}}}{{% else %}}{{{{ {assistant!r} + m.content + {end!r} }}}}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ {assistant.rstrip(' ')!r} }}}}{{% endif %}}"
  )


# Templates without control tokens, and the words by which a content could open a turn.
IN_WORDS = {
  "vicuna": (_turns("", " USER: ", " ASSISTANT: "), ("USER:", "ASSISTANT:")),
  "alpaca": (_turns("", "\n\n### Instruction:\n", "\n\n### Response:\n"),
             ("### Instruction:", "### Response:")),
  "vigogne": (_turns("", "\n\n### Instruction:\n", "\n\n### Réponse :\n"), ("### Réponse",)),
  "guanaco": (_turns("", "### Human: ", "### Assistant: "), ("### Human:", "### Assistant:")),
  "openchat": (_turns("", "GPT4 Correct User: ", "GPT4 Correct Assistant: "),
               ("GPT4 Correct User:", "GPT4 Correct Assistant:")),
  "falcon": (_turns("System: ", "\nUser: ", "\nFalcon: "), ("System:", "User:", "Falcon:")),
  "phi2": (_turns("", "\nInstruct: ", "\nOutput: "), ("Instruct:", "Output:")),
  "chatglm": (_turns("", "\n[Round 1]\n\n问：", "\n\n答："), ("[Round 1]", "问：", "答：")),
  "deepseek_llm": (_turns("", "\n\nUser: ", "\n\nAssistant: "), ("User:", "Assistant:")),
  "baize": (_turns("", "\n[|Human|]", "\n[|AI|]"), ("[|Human|]", "[|AI|]")),
  "redpajama": (_turns("", "\n<human>: ", "\n<bot>: "), ("<human>", "<bot>")),
  "persimmon": (_turns("", "human: ", "\n\nadept: "), ("human:", "adept:")),
  "questions": (_turns("", "\nQuestion: ", "\nAnswer: "), ("Question:", "Answer:")),
}  # fmt: skip


def named(**tokens: str) -> dict[str, str]:
  """bos="<s>" and so on, as files name them."""
  return {f"{name}_token": token for name, token in tokens.items()}


def make(name: str) -> chat.Chat:
  if name in ("llama2", "mistral"):
    full = sentencepiece(["<unk>", "<s>", "</s>"], prefix=True)
    template, special = (LLAMA2 if name == "llama2" else MISTRAL), named(bos="<s>", eos="</s>")
    return chat.make_chat(full, template=template, special=special, source=name)
  if name == "yi":
    full = sentencepiece(["<unk>", "<|startoftext|>", *_CHATML_MARKS], prefix=False)
    special = named(eos="<|im_end|>")
    return chat.make_chat(full, template=templates.CHATML, special=special, source=name)
  if name == "gemma":
    full = sentencepiece(_GEMMA_MARKS, False, plain=["\n", "\n\n", "▁▁", "<h1>"], pieces=["\n\n"])
    return chat.make_chat(full, special=named(bos="<bos>", eos="<eos>", pad="<pad>"), source=name)
  if name == "llama3":
    full = byte_level(gguf_tokenizer.LLAMA3, _LLAMA3_MARKS)
    special = named(bos="<|begin_of_text|>", eos="<|end_of_text|>")
    return chat.make_chat(full, special=special, source=name)
  template = {"qwen2.5": QWEN25, "qwen3": QWEN3, "chatml": templates.CHATML}[name]
  plain = ["<think>", "</think>", "<tool_call>"] if name == "qwen3" else []
  full = byte_level(gguf_tokenizer.QWEN2, _CHATML_MARKS, plain)
  special = named(eos="<|im_end|>", pad="<|endoftext|>")
  return chat.make_chat(full, template=template, special=special, source=name)


NAMES = ("llama2", "mistral", "yi", "gemma", "llama3", "qwen2.5", "qwen3", "chatml")
