"""Tokenizers of the families' kinds with the families' control tokens and chat formats.

Vocabularies are small (the real ones need a download); what matters for the frame is
real: which strings are control tokens, how text is split, whether a space is put in front
and what the format looks like. The formats are those that the models were trained on.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rlsafety.models import chat, gguf

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
  letters = sorted(set("".join(WORDS) + "▁[]<>/\n"))
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
  "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}" + chat._CHATML
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


def make(name: str) -> chat.Chat:
  if name in ("llama2", "mistral"):
    full = sentencepiece(["<unk>", "<s>", "</s>"], prefix=True)
    template = LLAMA2 if name == "llama2" else MISTRAL
    return chat.make_chat(full, template=template, bos="<s>", eos="</s>", source=name)
  if name == "yi":
    full = sentencepiece(["<unk>", "<|startoftext|>", *_CHATML_MARKS], prefix=False)
    return chat.make_chat(full, template=chat._CHATML, eos="<|im_end|>", source=name)
  if name == "gemma":
    full = sentencepiece(_GEMMA_MARKS, False, plain=["\n", "\n\n", "▁▁", "<h1>"], pieces=["\n\n"])
    return chat.make_chat(full, bos="<bos>", eos="<eos>", pad="<pad>", source=name)
  if name == "llama3":
    full = byte_level(gguf._LLAMA3, _LLAMA3_MARKS)
    return chat.make_chat(full, bos="<|begin_of_text|>", eos="<|end_of_text|>", source=name)
  template = {"qwen2.5": QWEN25, "qwen3": QWEN3, "chatml": chat._CHATML}[name]
  plain = ["<think>", "</think>", "<tool_call>"] if name == "qwen3" else []
  full = byte_level(gguf._QWEN2, _CHATML_MARKS, plain)
  ends = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
  return chat.make_chat(full, template=template, source=name, **ends)


NAMES = ("llama2", "mistral", "yi", "gemma", "llama3", "qwen2.5", "qwen3", "chatml")
