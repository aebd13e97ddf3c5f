"""The HTTP server: routes, limits, streams. Content and arrays are the business of others.

Every answer to a request that fails is {"error": {"message", "type", "param", "code"}}, never a
stack trace. A client that goes away frees its rows.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import prometheus_client as prometheus
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rlsafety import files
from rlsafety.errors import UserError
from rlsafety.serve import protocol
from rlsafety.serve.adapters import Catalogue
from rlsafety.serve.engine import Engine, Job, Piece
from rlsafety.serve.protocol import Choice, Refusal, Wanted

LOG = logging.getLogger("rlsafety.serve")
MAX_BODY = 4 << 20  # bytes
BODY_SECONDS = 20.0  # in which a body must have come


class Server:
  """What the routes share. key: bearer token, "" = none is asked for. seconds: of a request."""

  def __init__(
    self, engine: Engine, catalogue: Catalogue, key: str = "", seconds: float = 600.0,
    max_body: int = MAX_BODY,
  ) -> None:  # fmt: skip
    self.engine, self.catalogue, self.key = engine, catalogue, key
    self.seconds, self.max_body, self.began = seconds, max_body, int(time.time())
    self.registry = prometheus.CollectorRegistry()
    counter = lambda name, text, *labels: prometheus.Counter(  # noqa: E731
      f"rlsafety_{name}", text, labels, registry=self.registry
    )
    self.requests = counter("requests", "Answers by path and status", "path", "status")
    self.left = counter("disconnects", "Clients that went away before their answer")
    self.latency = prometheus.Histogram(
      "rlsafety_request_seconds", "From body to last byte", ["path"], registry=self.registry
    )
    for name, text, value in (
      ("rows_live", "Replies being written", lambda: engine.live),
      ("jobs_waiting", "Prompts that wait for a row", lambda: engine.waiting),
      ("adapters_resident", "Adapters in memory", lambda: engine.resident),
      ("prompt_tokens", "Tokens of prompts so far", lambda: engine.prompt_tokens),
      ("drawn_tokens", "Tokens drawn so far", lambda: engine.tokens_drawn),
      ("begin_seconds", "Time spent on prompts", lambda: engine.begin_seconds),
      ("decode_seconds", "Time spent on drawing", lambda: engine.chunk_seconds),
      ("compilations", "Programs compiled since the start", lambda: engine.compilations),
    ):
      gauge = prometheus.Gauge(f"rlsafety_{name}", text, registry=self.registry)
      gauge.set_function(value)

  def routes(self) -> list[Route]:
    return [
      Route("/health", self.health),
      Route("/metrics", self.metrics),
      Route("/v1/models", self.models),
      Route("/v1/models/{name:path}", self.model),
      Route("/v1/chat/completions", self.asked(True), methods=["POST"]),
      Route("/v1/completions", self.asked(False), methods=["POST"]),
      Route("/tokenizer_info", self.tokenizer_info),
      Route("/tokenize", self.tokenize, methods=["POST"]),
      Route("/detokenize", self.detokenize, methods=["POST"]),
    ]

  # --- Small routes -----------------------------------------------------------------------

  async def health(self, request: Request) -> Response:
    if self.engine.failure:
      raise Refusal(f"the engine failed: {self.engine.failure}", status=503)
    return _json({"status": "ok"})

  async def metrics(self, request: Request) -> Response:
    text = prometheus.generate_latest(self.registry)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

  async def models(self, request: Request) -> Response:
    names = self.catalogue.names()
    return _json({"object": "list", "data": [self._described(n) for n in names]})

  async def model(self, request: Request) -> Response:
    name = request.path_params["name"]
    try:
      self.catalogue.find(name)
    except LookupError as error:
      raise Refusal(str(error.args[0]), "model", 404, "model_not_found") from None
    return _json(self._described(name))

  def _described(self, name: str) -> dict:
    about = {"id": name, "object": "model", "created": self.began, "owned_by": "rlsafety"}
    return about | {"max_model_len": self.engine.size.context}

  async def tokenizer_info(self, request: Request) -> Response:
    chat = self.engine.model.chat
    return _json({**chat.special, "chat_template": chat.template})

  async def tokenize(self, request: Request) -> Response:
    """Ids as the tokenizer alone gives them: a control token that is spelt out counts as one."""
    body, chat = await self.body(request), self.engine.model.chat
    text = body.get("prompt") if isinstance(body, dict) else None
    if not isinstance(text, str):
      raise Refusal("prompt must be a text", "prompt")
    added = body.get("add_special_tokens", True) is True
    ids = chat.full.encode(_whole(text), add_special_tokens=added).ids
    about = {"count": len(ids), "max_model_len": self.engine.size.context}
    return _json({"tokens": ids, **about})

  async def detokenize(self, request: Request) -> Response:
    body, chat = await self.body(request), self.engine.model.chat
    ids = body.get("tokens") if isinstance(body, dict) else None
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
      raise Refusal("tokens must be a list of token ids", "tokens")
    return _json({"prompt": chat.full.decode(ids, skip_special_tokens=False)})

  # --- Completions ------------------------------------------------------------------------

  async def body(self, request: Request) -> Any:
    """The JSON of a body, read under the limits of size and time."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
      # A page in a browser can post any other type to this machine without asking first.
      raise Refusal("the content-type must be application/json", status=415)
    data = bytearray()
    try:
      async with asyncio.timeout(BODY_SECONDS):
        async for chunk in request.stream():
          data += chunk
          if len(data) > self.max_body:
            raise Refusal(f"the body has more than {self.max_body} bytes", status=413)
    except TimeoutError:
      raise Refusal(f"the body did not come within {BODY_SECONDS:g} s", status=408) from None
    try:
      return files.parse_json(bytes(data), "the body")
    except UserError as error:
      raise Refusal(str(error)) from None

  def asked(self, is_chat: bool) -> Callable:
    async def answer(request: Request) -> Response:
      engine, chat = self.engine, self.engine.model.chat
      body = await self.body(request)
      wanted = await asyncio.to_thread(
        protocol.read, body, self.catalogue, chat, engine.size.context, is_chat
      )
      asking = Asking(self, wanted)
      if not engine.submit(asking.jobs):
        if engine.failure:
          raise Refusal("the engine failed", status=503)
        if engine.closing:
          raise _failed("closing")
        raise Refusal(
          "too many requests are waiting", status=429, code="queue_full", retry_after=2
        )
      if wanted.stream:
        return StreamingResponse(asking.events(), media_type="text/event-stream")
      async with asking.watched(request):
        return _json(await asking.whole())

    return answer


class Asking:
  """One request that is being answered: its jobs, and what has come of them."""

  def __init__(self, server: Server, wanted: Wanted) -> None:
    self.server, self.wanted, self.chat = server, wanted, server.engine.model.chat
    self.n = len(wanted.seeds[0])
    self.id = f"{'chatcmpl' if wanted.chat else 'cmpl'}-{uuid.uuid4().hex}"
    self.created = int(time.time())
    self.choices = [
      Choice(wanted, self.chat, ids) for ids in wanted.prompts for _ in range(self.n)
    ]
    self.pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    loop, deadline = asyncio.get_running_loop(), time.monotonic() + server.seconds

    def deliver(p: int) -> Callable[[Piece], None]:
      def put(piece: Piece) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
          loop.call_soon_threadsafe(self.pieces.put_nowait, (p, piece))

      return put

    self.jobs = [
      Job(
        policy=wanted.policy, ids=ids, seeds=wanted.seeds[p], max_tokens=wanted.max_tokens,
        temperature=wanted.temperature, top_p=wanted.top_p, tops=bool(wanted.tops),
        scored=wanted.echo and wanted.tops is not None, deliver=deliver(p), deadline=deadline,
      )
      for p, ids in enumerate(wanted.prompts)
    ]  # fmt: skip

  def cancel(self) -> None:
    for job in self.jobs:
      job.cancel()

  @contextlib.asynccontextmanager
  async def watched(self, request: Request) -> AsyncIterator[None]:
    """Cancels the jobs and the task that waits for them when the client goes away."""
    task = asyncio.current_task()
    gone = False

    async def watch() -> None:
      nonlocal gone
      while (await request.receive())["type"] != "http.disconnect":
        pass
      gone = True
      assert task is not None
      task.cancel()

    watcher = asyncio.create_task(watch())
    try:
      yield
    except asyncio.CancelledError:
      if not gone:
        raise
      self.server.left.inc()
      raise ClientDisconnect from None
    finally:
      watcher.cancel()
      self.cancel()

  async def changes(self) -> AsyncIterator[tuple[int, str]]:
    """(number of the choice, its new text) until all have ended. Raises Refusal for a failure."""
    if self.wanted.echo and not self.wanted.max_tokens and self.wanted.tops is None:
      for choice in self.choices:
        choice.finish = "length"  # nothing but the prompt comes back
      return
    left = len(self.choices)
    while left:
      p, piece = await self.pieces.get()
      if piece.error:
        raise _failed(piece.error)
      if piece.index < 0:
        for i in range(self.n):
          self.choices[p * self.n + i].scored(piece)
        left -= self.n if not self.wanted.max_tokens else 0
        continue
      at = p * self.n + piece.index
      choice = self.choices[at]
      if choice.finish:
        continue
      text = choice.push(piece)
      if choice.finish:
        left -= 1
        self.jobs[p].cancel(piece.index)
      yield at, text

  # --- Forms ------------------------------------------------------------------------------

  def usage(self) -> dict:
    prompt = sum(len(ids) for ids in self.wanted.prompts)
    drawn = sum(choice.drawn for choice in self.choices)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

  def head(self, kind: str) -> dict:
    return {
      "id": self.id, "object": kind, "created": self.created, "model": self.wanted.policy.name,
    }  # fmt: skip

  async def whole(self) -> dict:
    async for _ in self.changes():
      pass
    chat, out = self.wanted.chat, []
    for i, choice in enumerate(self.choices):
      text = choice.front + choice.writer.text
      said = {"message": {"role": "assistant", "content": text, "refusal": None}}
      shown = said if chat else {"text": text}
      out.append(
        {"index": i, **shown, "logprobs": choice.logprobs(), "finish_reason": choice.finish}
      )
    kind = "chat.completion" if chat else "text_completion"
    return {**self.head(kind), "choices": out, "usage": self.usage()}

  async def events(self) -> AsyncIterator[bytes]:
    """The lines of a stream: one event for every change, at last the usage and [DONE]."""
    chat = self.wanted.chat
    head = self.head("chat.completion.chunk" if chat else "text_completion")
    more = {"usage": None} if self.wanted.usage else {}

    def event(i: int, text: str, first: bool = False) -> bytes:
      choice = self.choices[i]
      if chat:
        shown = {"delta": {"role": "assistant", "content": ""} if first else {"content": text}}
      else:
        shown = {"text": text}
      logprobs = None if first else choice.logprobs(new=True)
      ended = (choice.finish or None) if not first else None
      shown |= {"index": i, "logprobs": logprobs, "finish_reason": ended}
      return _line({**head, "choices": [shown], **more})

    done = False
    try:
      if chat:
        for i in range(len(self.choices)):
          yield event(i, "", first=True)
      begun = set()
      async for i, text in self.changes():
        choice = self.choices[i]
        text = text if i in begun else choice.front + text
        if text or choice.finish:
          begun.add(i)
          yield event(i, text)
      for i, choice in enumerate(self.choices):  # scored alone: the prompt came back
        if not self.wanted.max_tokens:
          yield event(i, choice.front)
      if self.wanted.usage:
        yield _line({**head, "choices": [], "usage": self.usage()})
      yield b"data: [DONE]\n\n"
      done = True
    except Refusal as refusal:
      yield _line(refusal.body())
      done = True
    finally:
      if not done:
        self.server.left.inc()
      self.cancel()


def _json(value: Any, status: int = 200, headers: dict | None = None) -> Response:
  """ASCII throughout: what a client sent and is told again may hold half a character."""
  data = json.dumps(value, allow_nan=False).encode()
  return Response(data, status, headers, media_type="application/json")


def _line(value: dict) -> bytes:
  return b"data: " + json.dumps(value).encode() + b"\n\n"


def _whole(text: str) -> str:
  return text.encode("utf-8", "replace").decode()


def _failed(error: str) -> Refusal:
  if error == "timeout":
    return Refusal("the request took too long and was given up", status=504, code="timeout")
  if error == "closing":
    return Refusal("the server is closing", status=503, code="closing")
  return Refusal(f"the reply could not be made ({error})", status=500)


# --- Around the routes ------------------------------------------------------------------------


def make_app(server: Server) -> Any:
  """The ASGI application: routes inside of authorisation, counting and the form of errors."""

  async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
      headers["www-authenticate"] = "Bearer"
    return _json(error.body(), error.status, headers)

  async def no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "no such path" if status == 404 else getattr(error, "detail", "refused")
    return _json(Refusal(f"{request.url.path}: {what}", status=status).body(), status)

  async def gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it

  async def fault(request: Request, error: Exception) -> Response:
    LOG.error("a fault of ours", exc_info=error)
    return _json(Refusal("the server failed", status=500).body(), 500)

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(server.engine.close)

  app = Starlette(
    routes=server.routes(),
    lifespan=lifespan,
    exception_handlers={
      Refusal: refused, 404: no_route, 405: no_route, ClientDisconnect: gone, Exception: fault,
    },
  )  # fmt: skip
  paths = {route.path.partition("{")[0] for route in server.routes()}
  return Guard(app, server, paths)


class Guard:
  """Asks for the bearer token, and counts answers by path and status."""

  def __init__(self, app: Any, server: Server, paths: set[str]) -> None:
    self.app, self.server, self.paths = app, server, paths

  async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
    if scope["type"] != "http":
      return await self.app(scope, receive, send)
    path = scope["path"]
    known = path if path in self.paths else "/v1/models/" if "/v1/models/" in path else "other"
    began = time.monotonic()

    async def counted(message: Any) -> None:
      if message["type"] == "http.response.start":
        self.server.requests.labels(known, str(message["status"])).inc()
      await send(message)

    if self.server.key and path != "/health" and not self._allowed(scope["headers"]):
      refusal = Refusal("a bearer token is needed", status=401, code="invalid_api_key")
      headers = {"www-authenticate": "Bearer"}
      await _json(refusal.body(), 401, headers)(scope, receive, counted)
      return
    try:
      await self.app(scope, receive, counted)
    finally:
      self.server.latency.labels(known).observe(time.monotonic() - began)

  def _allowed(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    given = dict(headers).get(b"authorization", b"")
    return hmac.compare_digest(given, b"Bearer " + self.server.key.encode())
