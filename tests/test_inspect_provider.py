"""Inspect questions the base and the steps of a run in process: replies are those of the server."""

import asyncio
import time

import pytest
from test_serve import runs  # noqa: F401  two runs on disk

pytest.importorskip("inspect_ai", reason="pip install 'rlsafety[inspect]'")

from inspect_ai import Task, eval  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model  # noqa: E402
from inspect_ai.scorer import includes  # noqa: E402

from rlsafety.errors import UserError  # noqa: E402
from rlsafety.serve import inspect_provider, protocol  # noqa: E402
from rlsafety.serve.app import Asking  # noqa: E402
from rlsafety.serve.engine import open_engine  # noqa: E402

SIZES = {"rows": 2, "context": 64}
GREEDY = {"max_tokens": 12, "temperature": 0.0, "logprobs": True, "top_logprobs": 2}


@pytest.fixture(scope="module")
def models(runs):  # noqa: F811
  """Three models over one engine: the base, a checkpoint and the end of run a."""
  where = f"{runs.folder}/a"
  names = ["base", f"{where}@step0", where]
  yield [get_model(f"rlsafety/{n}", runs=where, memoize=False, **SIZES) for n in names]
  inspect_provider.opened.cache_clear()


def test_an_evaluation_of_three_models_has_the_servers_replies(models, tmp_path):
  task = Task([Sample("Hm?", target="e"), Sample("Sell", target="e")],
              scorer=includes(), config=GenerateConfig(**GREEDY))  # fmt: skip
  logs = eval(task, models, log_dir=str(tmp_path), display="none", log_samples=True)
  assert [log.status for log in logs] == ["success"] * 3
  assert inspect_provider.opened.cache_info().currsize == 1  # the second opening by name: none
  server = models[0].api.server
  assert all(model.api.server is server for model in models)  # one base in memory

  async def asked(name, content):
    body = {"model": name, "messages": [{"role": "user", "content": content}], **GREEDY}
    engine = server.engine
    wanted = protocol.read(body, server.catalogue, engine.model.chat, engine.size.context, True)
    asking = Asking(server, wanted)
    assert engine.submit(asking.jobs)
    return await asking.whole()

  seen = []
  for model, log in zip(models, logs, strict=True):
    for sample in log.samples:
      expected = asyncio.run(asked(model.name, sample.input))
      choice = expected["choices"][0]
      seen.append(choice["message"]["content"])
      assert sample.output.completion == seen[-1]
      told = sample.output.choices[0].logprobs.content
      assert [x.token for x in told] == [x["token"] for x in choice["logprobs"]["content"]]
      assert len(told[0].top_logprobs) == 2
      assert sample.output.usage.output_tokens == expected["usage"]["completion_tokens"]
  assert len(set(seen)) > 2  # the three are different policies


def test_a_model_is_opened_once_and_beside_the_loop(runs, monkeypatch):  # noqa: F811
  """Two samples come together while it opens; Inspect's loop goes on meanwhile."""
  opened, ticks = [], []

  def open_slowly(*arguments, **settings):
    opened.append(1)
    time.sleep(0.3)
    return open_engine(*arguments, **settings)

  monkeypatch.setattr(inspect_provider, "open_engine", open_slowly)
  inspect_provider.opened.cache_clear()
  model = get_model("rlsafety/base", runs=f"{runs.folder}/a", memoize=False, rows=2, context=64)

  async def tick():
    while True:
      await asyncio.sleep(0.01)
      ticks.append(1)

  async def both():
    ticking = asyncio.create_task(tick())
    said = [ChatMessageUser(content="Hi")], [], "none", GenerateConfig(max_tokens=2)
    await asyncio.gather(*(model.api.generate(*said) for _ in range(2)))
    ticking.cancel()

  asyncio.run(both())
  inspect_provider.opened.cache_clear()
  assert opened == [1] and len(ticks) > 20


def test_what_cannot_be_done_is_said(models):
  ask = lambda text, **more: asyncio.run(  # noqa: E731
    models[0].api.generate([ChatMessageUser(content=text)], [], "none", GenerateConfig(**more))
  )
  assert ask("word " * 500).stop_reason == "model_length"
  assert ask("Hi", max_tokens=2).stop_reason in ("max_tokens", "stop")
  with pytest.raises(UserError, match="top_k"):
    ask("Hi", top_k=5)
  lost = get_model("rlsafety/base@7", runs=models[2].name, memoize=False, **SIZES)
  with pytest.raises(UserError, match="base@7.* does not exist"):
    asyncio.run(lost.api.generate([ChatMessageUser(content="Hi")], [], "none", GenerateConfig()))
  with pytest.raises(UserError, match="rwos"):
    get_model("rlsafety/base", runs=models[2].name, memoize=False, rwos=3)
