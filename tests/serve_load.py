"""Load, faults and speed of rlsafety.serve, seen from outside.

  python tests/serve_load.py --runs runs/tiny                # everything, about 5 minutes
  python tests/serve_load.py --runs runs/tiny --do=fuzz --bodies=500
  python tests/serve_load.py --do=speed --ask base=http://127.0.0.1:8123/v1

load: clients ask for all kinds of things at once, and some of them go away in the middle.
fuzz: bodies and bytes that are no requests. kill: kill -9 while streams run, a new start at the
same port. term: SIGTERM under load. These four start servers of --runs by themselves, and all that
is not as promised is printed at the end, with exit code 1. speed: chats at once and one after the
other, interleaved, at servers that are running: --ask MODEL=URL for each.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx2

from rlsafety import config, environments, flags
from rlsafety.errors import run_main

ALLOWED = (200, 400, 404, 408, 413, 415, 429)  # as answers to what is no request


class Report:
  """What was counted, and what was not as promised."""

  def __init__(self) -> None:
    self.counts: collections.Counter[str] = collections.Counter()
    self.faults: list[str] = []

  def fault(self, text: str) -> None:
    self.counts["faults"] += 1
    if len(self.faults) < 20:
      self.faults.append(text)


# --- A server -----------------------------------------------------------------------------


class Started:
  """A server of its own: python -m rlsafety.serve with `arguments`, ready when this returns."""

  def __init__(self, arguments: Sequence[str], port: int = 0) -> None:
    command = [sys.executable, "-m", "rlsafety.serve", *arguments, f"--port={port}"]
    self.process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    self.said: list[str] = []
    assert self.process.stdout is not None
    for line in self.process.stdout:
      self.said.append(line)
      if found := re.search(r"ready: (http://\S+)/v1 answers (.*)", line):
        self.url, self.names = found[1], found[2].split(", ")
        break
    else:
      raise RuntimeError("the server did not start:\n" + "".join(self.said))
    said, lines = self.said, self.process.stdout
    self.reader = threading.Thread(target=lambda: said.extend(lines), daemon=True)
    self.reader.start()  # nobody else empties the pipe

  @property
  def port(self) -> int:
    return int(self.url.rpartition(":")[2])

  def memory(self) -> float:
    """MiB that the process holds in memory; NaN where there is no /proc."""
    status = pathlib.Path(f"/proc/{self.process.pid}/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")

  def end(self, how: int) -> int:
    self.process.send_signal(how)
    code = self.process.wait(60)
    self.reader.join()
    return code

  def traces(self) -> int:
    return "".join(self.said).count("Traceback")


async def metrics(http: httpx2.AsyncClient) -> dict[str, float]:
  text = (await http.get("/metrics")).text
  return {k: float(v) for k, v in re.findall(r"^(rlsafety_\S+) (\S+)$", text, re.M)}


def opened(url: str) -> httpx2.AsyncClient:
  limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
  return httpx2.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False)


async def post(http: httpx2.AsyncClient, path: str, body: dict) -> Any:
  answer = await http.post(path, json=body)
  if answer.status_code != 200:
    raise Refused(answer.status_code, answer.text)
  return answer.json()


class Refused(Exception):
  """status, text"""


# --- Load ---------------------------------------------------------------------------------


def chat(name: str, text: str, **more: Any) -> dict:
  return {"model": name, "messages": [{"role": "user", "content": text}], **more}


CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


async def streamed(http: httpx2.AsyncClient, path: str, body: dict) -> list[dict]:
  """The events of a stream that ended as it must. Raises Refused, or ValueError if it did not."""
  events, done = [], False
  async with http.stream("POST", path, json=body | {"stream": True}) as answer:
    if answer.status_code != 200:
      raise Refused(answer.status_code, (await answer.aread()).decode())
    async for line in answer.aiter_lines():
      done = line == "data: [DONE]" or done
      if line.startswith("data: {"):
        events.append(json.loads(line[6:]))
  if not done:
    said = events[-1].get("error") if events else None
    raise Refused(503, json.dumps({"error": said})) if said else ValueError("a stream broke off")
  return events


async def one_request(http: httpx2.AsyncClient, rng: random.Random, known: dict) -> str:
  """Asks for something, and raises ValueError if the answer is not what it must be."""
  name, text = rng.choice([*known])
  kind = rng.choice(["known", "stream", "many", "score", "long"])
  if kind == "known":  # greedy: who else is in the batch changes nothing
    answer = await post(http, CHAT, chat(name, text, max_tokens=24, temperature=0))
    if answer["choices"][0]["message"]["content"] != known[name, text]:
      raise ValueError(f"{name} gave {text!r} another reply than it gave when it was alone")
  elif kind == "stream":
    events = await streamed(http, CHAT, chat(name, text, max_tokens=40, n=2, top_p=0.9))
    ends = [c["index"] for e in events for c in e["choices"] if c["finish_reason"]]
    if sorted(ends) != [0, 1]:
      raise ValueError(f"a stream of two replies ended {ends}")
  elif kind == "many":
    body = chat(name, text, max_tokens=16, n=5, stop=["e", "zz"], logprobs=True, top_logprobs=3)
    choices = (await post(http, CHAT, body))["choices"]
    if len(choices) != 5 or any("e" in choice["message"]["content"] for choice in choices):
      raise ValueError("five replies without an e were wanted")
  elif kind == "score":
    body = {"model": name, "prompt": [text, text[::-1]], "logprobs": 1}
    answer = await post(http, PLAIN, body | {"echo": True, "max_tokens": 0})
    told = [c["logprobs"]["token_logprobs"] for c in answer["choices"]]
    if answer["usage"]["prompt_tokens"] != sum(map(len, told)) or any(None in t[1:] for t in told):
      raise ValueError("log-probs are missing")
  else:
    await post(http, CHAT, chat(name, text, seed=rng.getrandbits(32)))
  return kind


async def reference(http: httpx2.AsyncClient, names: Sequence[str]) -> dict:
  """{(name, text): greedy reply} of requests that are alone."""
  texts = ["Is it safe?", "Taxes are too high, and I am right. " * 2]
  out = {}
  for name in names:
    for text in texts:
      answer = await post(http, CHAT, chat(name, text, max_tokens=24, temperature=0))
      out[name, text] = answer["choices"][0]["message"]["content"]
  return out


async def at_rest(http: httpx2.AsyncClient, report: Report, seconds: float = 60) -> None:
  """Waits until no row is in use. A fault if one stays."""
  until = time.monotonic() + seconds
  while (found := await metrics(http))["rlsafety_rows_live"] or found["rlsafety_jobs_waiting"]:
    if time.monotonic() > until:
      report.fault(f"rows or prompts are left though nobody waits: {found}")
      return
    await asyncio.sleep(0.1)


async def load(
  url: str, names: Sequence[str], clients: int, seconds: float, memory: Callable[[], float],
  leave: float = 0.3,
) -> Report:  # fmt: skip
  """Clients that ask one thing after another; of their requests the part `leave` is given up
  somewhere within its first half second. memory: of the server, MiB."""
  report = Report()
  async with opened(url) as http:
    known, began = await reference(http, names), time.monotonic()
    before = await metrics(http)

    async def client(number: int) -> None:
      rng = random.Random(number)
      while time.monotonic() - began < seconds:
        patience = rng.uniform(0, 0.5) if rng.random() < leave else None
        try:
          async with asyncio.timeout(patience):
            report.counts[await one_request(http, rng, known)] += 1
        except TimeoutError:
          report.counts["left"] += 1
        except Refused as refused:
          report.counts[f"status {refused.args[0]}"] += 1
          if refused.args[0] != 429:
            report.fault(f"status {refused.args[0]}: {refused.args[1]:.300}")
          await asyncio.sleep(0.5)
        except (ValueError, KeyError, httpx2.HTTPError) as error:
          report.fault(f"{type(error).__name__}: {error}")

    async def watch() -> list[float]:
      seen = []
      for part in range(1, 5):
        await asyncio.sleep(max(0.0, began + seconds * part / 4 - time.monotonic()))
        seen.append(memory())
      return seen

    seen, *_ = await asyncio.gather(watch(), *(client(i) for i in range(clients)))
    await at_rest(http, report)
    if await reference(http, names) != known:
      report.fault("greedy replies after the load are not those before it")
    after = await metrics(http)
    spent = time.monotonic() - began
  drawn, compiled = (
    after[name] - before[name] for name in ("rlsafety_drawn_tokens", "rlsafety_compilations")
  )
  if compiled:
    report.fault(f"{compiled:g} programs were compiled under load")
  if seen[3] > seen[0] + 64:
    report.fault(f"memory grew from {seen[0]:.0f} to {seen[3]:.0f} MiB after the first quarter")
  print(f"load: {clients} clients, {spent:.0f} s, {drawn:g} tokens drawn: "
        f"{_listed(report.counts)}")  # fmt: skip
  print(f"  memory at each quarter, MiB: {' '.join(f'{m:.0f}' for m in seen)}, "
        f"at rest {memory():.0f}")  # fmt: skip
  return report


def _listed(counts: collections.Counter) -> str:
  return ", ".join(f"{n} {name}" for name, n in counts.most_common())


# --- What is no request -------------------------------------------------------------------

WEIRD: list[Any] = [
  None, True, False, -1, 0, 1, 2, 3.5, 1e308, -1e-308, float("nan"), float("inf"), 2**31, 2**63,
  10**39, "", " ", "x" * 20_000, "\ud800", "\0", "<|im_end|>\n<|im_start|>system\n", "🙂" * 50, [],
  {}, [[]], [{}], [None], ["a", 1], [0, 1, 2], [-1], [10**9], [1.0], [True], {"role": "user"},
  [{"role": "user", "content": None}], [{"role": "tool", "content": "x"}], {"type": "text"},
  [{"role": "user", "content": [{"type": "text", "text": "\ud800<|endoftext|>"}]}],
  [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], {"a": {"b": [0]}},
  [{"role": "system", "content": "x"}] * 40, ["p"] * 300, {"include_usage": True}, {"5": -100},
]  # fmt: skip
FIELDS = [
  "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n",
  "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "best_of", "user",
  "tools", "response_format", "logit_bias", "presence_penalty", "suffix", "metadata", "what", "",
]  # fmt: skip
RAW = [
  b"\0\1\2\3\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions\r\n\r\n",
  b"POST /v1/completions HTTP/1.1\r\n\r\n", b"GET /%ff%00/../.. HTTP/1.1\r\nhost: x\r\n\r\n",
  b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
  b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n1234",
  b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
  b"transfer-encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n",
  b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
  b"content-length: 50\r\n\r\n{\"model\":",
  b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
  b"GET /metrics HTTP/1.1\r\nhost: x\r\nx: \xff\xfe\r\nauthorization: \xe9\r\n\r\n",
  b"GET /v1/models/" + b"a/" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
]  # fmt: skip


def fuzzed(rng: random.Random, names: Sequence[str]) -> tuple[str, bytes, dict]:
  """(path, body, headers) of something that looks more or less like a request."""
  path = rng.choice([CHAT, PLAIN, CHAT, PLAIN, "/tokenize", "/detokenize"])
  body: Any = {"model": rng.choice(names), "max_tokens": 2, "temperature": 0}
  body |= {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
  for _ in range(rng.choice([1, 1, 2, 4])):
    body[rng.choice(FIELDS)] = rng.choice(WEIRD)
  if rng.random() < 0.1:
    body = rng.choice([rng.choice(WEIRD), [body]])
  data = json.dumps(body).encode()
  how = rng.random()
  if how < 0.1:  # bytes changed
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
      data[rng.randrange(len(data))] = rng.randrange(256)
  elif how < 0.15:
    data = data[: rng.randrange(len(data))]
  elif how < 0.2:  # nested, wide, long, twice
    n = rng.choice([100, 10_000])
    data = rng.choice([
      b'{"model":' * n, b"[" * n + b"]" * n, b'{"seed": ' + b"9" * n + b"}",
      b"{" + b",".join(b'"%d":0' % i for i in range(n)) + b"}", data[:-1] + b', "model": "b"}',
      b'{"model": "' + b"\xc3\x28" * n + b'"}', b"\xef\xbb\xbf" + data, data + b" " * n, data * 2,
    ])  # fmt: skip
  elif how < 0.205:
    data = b'{"prompt": "' + b"a" * (5 << 20) + b'"}'
  kind = "application/json" if rng.random() < 0.98 else rng.choice(["", "text/plain", "a/b; c=d"])
  return path, bytes(data), {"content-type": kind}


async def fuzz(
  url: str, names: Sequence[str], bodies: int, seed: int = 0, at_once: int = 16
) -> Report:  # fmt: skip
  """Sends bodies that are mostly no requests, and bytes that are no HTTP."""
  report, rng, began = Report(), random.Random(seed), time.monotonic()
  async with opened(url) as http:
    known = await reference(http, names)
    left = iter(range(bodies))

    async def sender() -> None:
      for _ in left:
        path, data, headers = fuzzed(rng, names)
        try:
          answer = await http.post(path, content=data, headers=headers)
        except httpx2.HTTPError as error:
          # Of a body that is too large the server need not read the rest.
          if len(data) < 1 << 20:
            report.fault(f"{type(error).__name__} {error} for {path} {data[:200]!r}")
          continue
        report.counts[f"status {answer.status_code}"] += 1
        wrong = answer.status_code not in ALLOWED
        if answer.status_code != 200:
          message = (await _json(answer)).get("error", {}).get("message")
          wrong |= not isinstance(message, str) or "\n" in message or "Traceback" in message
        if wrong:
          report.fault(f"{answer.status_code} {answer.text[:200]} for {path} {data[:300]!r}")

    await asyncio.gather(*(sender() for _ in range(at_once)))
    host, port = url.removeprefix("http://").split(":")
    for data in RAW:
      said = await asyncio.wait_for(_raw(host, int(port), data), 30)
      report.counts["raw"] += 1
      if re.match(rb"HTTP/1.1 5", said):
        report.fault(f"{said[:80]!r} for {data[:80]!r}")
    await at_rest(http, report)
    if await reference(http, names) != known:
      report.fault("greedy replies after the bad bodies are not those before them")
  print(f"fuzz: {bodies} bodies, {time.monotonic() - began:.0f} s: {_listed(report.counts)}")
  return report


async def _json(answer: httpx2.Response) -> dict:
  try:
    return answer.json()
  except ValueError:
    return {}


async def _raw(host: str, port: int, data: bytes) -> bytes:
  """What comes back for some bytes, after which nothing follows."""
  reader, writer = await asyncio.open_connection(host, port)
  try:
    writer.write(data)
    writer.write_eof()
    return await reader.read()
  except ConnectionError:
    return b""
  finally:
    writer.close()


# --- Ends ---------------------------------------------------------------------------------


async def _asked(
  http: httpx2.AsyncClient, names: Sequence[str], clients: int
) -> AsyncIterator[list[asyncio.Task]]:
  """Tasks of that many long requests, half of them streams, when all of them have arrived."""

  async def ask(i: int) -> str:
    body = chat(names[i % len(names)], "Tell me.", seed=i)
    try:
      if i % 2:
        await streamed(http, CHAT, body)
      else:
        await post(http, CHAT, body)
      return "answered"
    except Refused as refused:
      return f"status {refused.args[0]}"
    except (httpx2.HTTPError, ValueError) as error:
      return type(error).__name__

  tasks = [asyncio.create_task(ask(i)) for i in range(clients)]
  arrived, until = 0, time.monotonic() + 20
  while arrived < clients and time.monotonic() < until and not any(t.done() for t in tasks):
    found = await metrics(http)
    arrived = found["rlsafety_rows_live"] + found["rlsafety_jobs_waiting"]
  yield tasks
  for task in tasks:
    task.cancel()


async def kill(start: Callable[[int], Started], clients: int) -> Report:
  """kill -9 while replies are written; a new server at the same port gives the same replies."""
  report, server = Report(), start(0)
  async with opened(server.url) as http:
    known = await reference(http, server.names)
    async for tasks in _asked(http, server.names, clients):
      server.end(signal.SIGKILL)
      _, waiting = await asyncio.wait(tasks, timeout=10)
      report.counts.update(task.result() for task in tasks if task.done())
      if waiting:
        report.fault(f"{len(waiting)} clients still wait 10 s after the server was killed")
  began, again = time.monotonic(), start(server.port)
  async with opened(again.url) as http:
    if await reference(http, again.names) != known:
      report.fault("the new server's greedy replies are not those of the one before")
  print(f"kill: {_listed(report.counts)}; a new server answered at port {again.port} after "
        f"{time.monotonic() - began:.1f} s")  # fmt: skip
  if code := again.end(signal.SIGTERM):
    report.fault(f"an idle server ended with code {code} after SIGTERM")
  return report


async def term(start: Callable[[int], Started], clients: int) -> Report:
  """SIGTERM under load: everybody is answered, or told that the server is closing."""
  report, server = Report(), start(0)
  async with opened(server.url) as http:
    async for tasks in _asked(http, server.names, clients):
      began = time.monotonic()
      code = await asyncio.to_thread(server.end, signal.SIGTERM)
      spent = time.monotonic() - began
      _, waiting = await asyncio.wait(tasks, timeout=10)
      report.counts.update(task.result() for task in tasks if task.done())
      if waiting or code:
        report.fault(f"SIGTERM: exit code {code}, {len(waiting)} clients still wait")
  # Who had no connection yet finds none; nobody is cut off in the middle.
  if lost := set(report.counts) - {"answered", "status 503", "ConnectError"}:
    report.fault(f"SIGTERM: clients saw {lost}")
  if server.traces():
    report.fault("SIGTERM: stack traces:\n" + "".join(server.said)[-3000:])
  print(f"term: {_listed(report.counts)}; the server ended after {spent:.1f} s")
  return report


# --- Speed --------------------------------------------------------------------------------


async def speed(asked: Sequence[tuple[str, str]], chats: int, tokens: int, rounds: int) -> None:
  """asked: (model, URL) each. Prints tokens per second of `chats` users of political_qa, greedy,
  at once and one after the other; medians of rounds in which the servers take turns."""
  users = environments.load(config.Environment.of({"name": "political_qa"}))[:chats]
  rates: dict[tuple, list] = collections.defaultdict(list)
  waits: dict[tuple, list] = collections.defaultdict(list)
  for turn in range(rounds):
    for model, url in asked:
      async with opened(url) as http:

        async def ask(text: str, model: str = model, http: Any = http) -> tuple[float, int]:
          began, body = time.monotonic(), chat(model, text, max_tokens=tokens, temperature=0)
          answer = await post(http, "chat/completions", body)
          return time.monotonic() - began, answer["usage"]["completion_tokens"]

        if not turn:
          await ask(users[0].message)  # some servers load or compile at their first request
        for at_once in (chats, 1):
          gate, began = asyncio.Semaphore(at_once), time.monotonic()

          async def one(user: Any, gate: Any = gate, ask: Any = ask) -> tuple[float, int]:
            async with gate:
              return await ask(user.message)

          found, key = await asyncio.gather(*(one(user) for user in users)), (model, url, at_once)
          drawn = sum(n for _, n in found)
          rates[key].append((drawn / (time.monotonic() - began), drawn))
          waits[key] += [wait for wait, _ in found]
  print(f"speed: {chats} chats of up to {tokens} tokens, median (least, most) of {rounds} rounds")
  for (model, url, at_once), found in rates.items():
    own = [rate for rate, _ in found]
    late = statistics.quantiles(waits[model, url, at_once], n=20)[18]
    print(f"  {model:24} {url:28} {at_once:3} at once: {statistics.median(own):6.1f} tokens/s "
          f"({min(own):.1f}, {max(own):.1f}), {found[0][1]} tokens, a chat waits "
          f"{statistics.median(waits[model, url, at_once]):.2f} s, 95% {late:.2f} s")  # fmt: skip


# --- The program --------------------------------------------------------------------------

PARTS = ("load", "fuzz", "kill", "term")


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tests/serve_load.py")
  parser.prog = "tests/serve_load.py"
  parser.add_argument("--do", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; or speed")
  parser.add_argument("--runs", nargs="*", default=[], help="run directories to serve")
  parser.add_argument("--model", default="", help="or a base alone")
  parser.add_argument("--rows", type=int, default=16, help="of the server")
  parser.add_argument("--context", type=int, default=256, help="of the server")
  parser.add_argument("--clients", type=int, default=64, help="at once")
  parser.add_argument("--seconds", type=float, default=120.0, help="of load")
  parser.add_argument("--bodies", type=int, default=10_000, help="that fuzz sends")
  parser.add_argument("--ask", nargs="*", default=[], help="speed: MODEL=URL of running servers")
  parser.add_argument("--chats", type=int, default=16, help="speed: at once")
  parser.add_argument("--tokens", type=int, default=64, help="speed: of a reply, at most")
  parser.add_argument("--rounds", type=int, default=3, help="speed: in which servers take turns")
  args = flags.parse(parser, argv)
  parts = args.do.split(",")
  if args.do == "speed":
    asked = [(model, url) for model, _, url in (a.rpartition("=") for a in args.ask)]
    if not asked or not all(model and url.startswith("http") for model, url in asked):
      parser.error("--do=speed needs --ask MODEL=URL, as base=http://127.0.0.1:8000/v1")
    asyncio.run(speed(asked, args.chats, args.tokens, args.rounds))
    return
  if unknown := set(parts) - set(PARTS):
    parser.error(f"--do={unknown.pop()} is none of {', '.join(PARTS)}, speed")
  faults = measure(args, parts)
  for text in faults:
    print(f"FAULT {text}")
  sys.exit(1 if faults else 0)


def measure(args: argparse.Namespace, parts: Sequence[str]) -> list[str]:
  """Runs the parts against servers of our own; returns the faults."""
  arguments = [f"--rows={args.rows}", f"--context={args.context}", f"--model={args.model}"]
  arguments += ["--runs", *args.runs] if args.runs else []
  start, faults = lambda port: Started(arguments, port), []  # noqa: E731
  together = [part for part in parts if part in ("load", "fuzz")]
  if together:
    server = start(0)
    for part in together:
      print(f"{part}: {server.memory():.0f} MiB before")
      found = (
        load(server.url, server.names, args.clients, args.seconds, server.memory)
        if part == "load"
        else fuzz(server.url, server.names, args.bodies)
      )
      faults += asyncio.run(found).faults
      print(f"{part}: {server.memory():.0f} MiB after")
    if code := server.end(signal.SIGTERM):
      faults.append(f"the server ended with code {code} after SIGTERM")
    if server.traces():
      faults.append("stack traces:\n" + "".join(server.said)[-3000:])
  for name, part in (("kill", kill), ("term", term)):
    if name in parts:
      faults += asyncio.run(part(start, args.clients)).faults
  return faults


if __name__ == "__main__":
  run_main(main, sys.argv)
