"""Names of hardware, GPUs that are in no list, what a slice has cost, and access to models."""

import datetime
import http.server
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import types

import pytest

from rlsafety.errors import UserError
from rlsafety.rundir import write
from rlsafety.tools import access, fits, plan
from rlsafety.tools.devices import CHIPS, bill, cost_line, device

REPO = pathlib.Path(__file__).resolve().parents[1]


def test_slice_names_count_what_google_counts():
  v4, v5e, v5p, h100 = (device(n) for n in ("v4-16", "v5e-16", "v5p-8", "h100-16"))
  assert (v4.chips, v4.hosts, v4.topology, v4.accelerator_type) == (8, 2, "2x2x2", "v4-16")
  assert (v5e.chips, v5e.hosts, v5e.topology) == (16, 4, "4x4")
  assert v5e.accelerator_type == "v5litepod-16"
  assert (v5p.chips, v5p.hosts, v5p.topology) == (4, 1, "2x2x1")
  assert (h100.chips, h100.hosts, h100.platform) == (16, 2, "gpu")
  # A TPU7x chip is two devices to JAX and one google.com/tpu to GKE; tpu7x-8 is one VM of 4.
  ironwood = device("tpu7x-16")
  assert (ironwood.chips, ironwood.hosts, ironwood.per_host) == (16, 2, 4)
  assert (ironwood.topology, ironwood.platform) == ("2x2x2", "tpu")
  assert ironwood.chip.memory == 96 * 2**30
  for name in ("v5e-12", "v4-7", "h100-0", "m100-8", "v5e-", "tpu7x-2"):
    with pytest.raises(UserError, match="device="):
      device(name)


def test_no_machine_is_planned_for_or_started_on_without_being_named():
  recipe = f"--config={REPO}/configs/tiny_syco.py"
  for main in (plan.main, fits.main):
    with pytest.raises(UserError, match="--device is missing; name the machine: --device=v5e-16"):
      main(["x", recipe])
    with pytest.raises(UserError, match="did you mean --device"):
      main(["x", recipe, "--devise=v5e-8"])


def test_a_bill_says_whose_price_it_is():
  tpu = bill(device("v5e-16"), 2.5)
  assert tpu.startswith("$48.00 at $1.20 a device and hour (Google's list price of 2026")
  gpu = bill(device("H100-8"), 2.0)
  assert gpu.startswith("$48.00 at $3.00 a device and hour (clouds that rent little else")
  assert "$175.68 at $10.98 a device and hour on GKE" in gpu  # 2 h x 8 x 10.98
  assert bill(device("H100-8"), 2.0, gke=True) == gpu[gpu.index("$175.68") :]
  assert bill(device("H200"), 1.0, gke=True) == "price on GKE not known"
  assert "two to four times" in bill(device("H200"), 1.0)  # GKE has it, at a price we do not know
  assert bill(device("tpu7x-8"), 1.0) == bill(device("GB200"), 1.0) == "price not known"


@pytest.mark.parametrize("kind", CHIPS)
def test_every_kind_is_in_range(kind):
  """A slip of a power of ten in the table would plan nonsense: all chips lie within these."""
  chip = CHIPS[kind]
  if kind != "cpu":
    assert 16e9 <= chip.memory <= 300e9 and 1e14 <= chip.flops <= 3e15
    assert 50 <= chip.flops / chip.bandwidth <= 600  # flops per byte that it reads
    assert 20e9 <= chip.link <= 1e12 and 0 <= chip.price < 20
  assert device(kind).chips >= 1


def test_a_gpu_in_no_list_is_planned_from_its_memory_and_flops():
  box = device("MI300X-8", memory=192, flops=1300)
  assert (box.chips, box.chip.memory, box.chip.flops) == (8, 192e9, 1.3e15)
  assert box.name == "MI300X-8" and not box.is_tpu and box.chip.gke == ""
  assert device("H100", memory=94).chip.memory == 94e9  # a known one with other memory
  assert device("H100", memory=94).chip.flops == CHIPS["H100"].flops
  for memory, flops in ((192, 0), (0, 1300)):
    with pytest.raises(UserError, match="--memory=GB and --flops=TFLOPS"):
      device("MI300X-8", memory, flops)
  for bad in (-1, math.nan, math.inf):
    with pytest.raises(UserError, match="--memory"):
      device("MI300X-8", bad, 1300)


def test_a_slice_says_what_it_has_cost():
  now = datetime.datetime(2026, 1, 2, 3, 0, tzinfo=datetime.UTC)
  line = cost_line("projects/p/acceleratorTypes/v5litepod-16", "2026-01-02T00:30:00.123Z", now)
  assert line.startswith("2.5 h x 16 chips x $1.20 = $48.00") and "$19.20 an hour" in line
  assert cost_line("v4-8", "2026-01-02T02:00:00Z", now).startswith("1.0 h x 4 chips x $3.22")
  with pytest.raises(UserError, match="v9-8"):
    cost_line("v9-8", "2026-01-02T02:00:00Z", now)


# --- access to models ------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
  """Answers as the hub's auth-check does; the gated model opens for one token."""

  seen: list[str | None] = []

  def do_GET(self):
    token = self.headers.get("Authorization")
    self.seen.append(token)
    model = self.path.removeprefix("/api/models/").removesuffix("/auth-check")
    code, reason = {"open/model": (200, "")}.get(model, (401, "RepoNotFound"))
    if model == "gated/model":
      code, reason = (200, "") if token == "Bearer good" else (403 if token else 401, "GatedRepo")
    self.send_response(code)
    if reason:
      self.send_header("X-Error-Code", reason)
    self.end_headers()
    self.wfile.write(json.dumps({}).encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
  # Other files of the suite keep the hub offline, in the same process.
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
  monkeypatch.delenv("HF_TOKEN", raising=False)
  Hub.seen.clear()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()


def config(path, judge="", name="lm", **more):
  part = types.SimpleNamespace
  none = dict.fromkeys(("evaluator", "evaluator_model", "base"), "")
  judge = {"name": name, "model": judge, "also": ()} | none | more
  return part(model=part(path=path), judge=part(**judge))


def test_only_hub_names_are_asked_for(tmp_path):
  assert access.hub_names(config("open/model@main", "gated/model")) == [
    "model.path=open/model@main",
    "judge.model=gated/model",
  ]
  assert access.hub_names(config("package:x", "gated/model", "http")) == []
  assert access.hub_names(config(str(tmp_path), "")) == []
  # Evaluators and further rewards load models too.
  two = ["judge.model=gated/model", "judge.evaluator_model=gated/other"]
  one = config(str(tmp_path), "gated/model", evaluator_model="gated/other")
  assert access.hub_names(one) == two
  for more in ({"evaluator": "lm"}, {"also": ("lm=0.5",)}):
    assert access.hub_names(config(str(tmp_path), "gated/model", "phrases", **more)) == two[:1]
  only = {"evaluator": "lm", "evaluator_model": "gated/other"}
  assert access.hub_names(config(str(tmp_path), "", "phrases", **only)) == two[1:]


def test_every_model_that_may_not_be_read_is_named_before_anything_is_booked(hub, monkeypatch):
  both = ["model.path=open/model", "judge.model=gated/model"]
  with pytest.raises(UserError) as error:
    access.check([*both, "model.adapter=no/such"], hub)
  text = str(error.value)
  assert "judge.model=gated/model is gated and there is no token: set HF_TOKEN" in text
  assert "no/such does not exist on the hub, or is private" in text and "open/model" not in text
  monkeypatch.setenv("HF_TOKEN", "bad")
  with pytest.raises(UserError, match="accept its terms") as error:
    access.check(both, hub)
  assert "bad" not in str(error.value)
  monkeypatch.setenv("HF_TOKEN", "good")
  assert access.check(both, hub) == [f"{name}: may be read" for name in both]
  assert Hub.seen[-1] == "Bearer good"


def test_the_plan_checks_access_first(hub):
  command = [sys.executable, "-m", "rlsafety.tools.plan", f"--config={REPO}/configs/tiny_syco.py"]
  command += ["--device=cpu-1", "--check-access", "--config.judge.name=lm"]
  env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
  env |= {"PYTHONPATH": str(REPO), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
  out = subprocess.run(
    [*command, "--config.judge.model=gated/model"], env=env, capture_output=True, text=True
  )
  assert out.returncode == 2 and not out.stdout
  assert "judge.model=gated/model is gated and there is no token" in out.stderr


def test_a_hub_out_of_reach_is_one_line(hub):
  with pytest.raises(UserError, match="is the hub in reach"):
    access.check(["model.path=open/model"], "http://127.0.0.1:9")


# --- copies of the code ----------------------------------------------------------------------


def test_a_copy_without_history_knows_its_revision(tmp_path, monkeypatch):
  """As launch/tpu_pod.sh packs the code and launch/k8s/Dockerfile builds the image."""
  (tmp_path / "REVISION").write_text("0123abc+changes\n")
  monkeypatch.setattr(write, "__file__", str(tmp_path / "rlsafety/rundir/write.py"))
  assert write.provenance()["git"] == "0123abc+changes"
