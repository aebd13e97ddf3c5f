"""The TPU's own compiler on a step of 7B shapes: what it copies, gathers and needs."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from rlsafety.tools import hlo

REPO = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
import json, os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import dataclasses
from rlsafety.config import Config, Mesh, Model, Sampler
from rlsafety.models import presets
from rlsafety.tools import compilers
from rlsafety.tools.devices import device
policy = dataclasses.replace(presets.preset("qwen1.5-7b-chat"), n_layers=2)
config = Config(
  model=Model(preset="qwen1.5-7b-chat"), prompts_per_step=2, max_prompt_tokens=256,
  mesh=Mesh(data=2, fsdp=1, tensor=4), sampler=Sampler(group=5, max_tokens=64),
)
print(json.dumps(compilers.measure(config, policy, device("v5e-8"))))
"""


def test_a_tpu_reads_each_weight_where_it_lies():
  pytest.importorskip("libtpu", reason="pip install 'rlsafety[compilers-tpu]', 137 MB")
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
  del env["XLA_FLAGS"]  # fast, for the CPU
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  weight, vocabulary = 4096 * 4096 // 4, 151936
  assert found["sampler"]["copied"][1] < weight, found["sampler"]
  for name, program in found.items():  # no base weight, and no logits of [tokens, V]
    assert program["gathered"][1] < min(weight, 2 * 5 * vocabulary), (name, program["gathered"])
    assert program["temp"] < 1 << 30, (name, program["temp"])
  assert math.isclose(found["sampler"]["arguments"], found["update"]["arguments"], rel_tol=0.1)


LOOP = """
HloModule m
%body (p: (f32[8,8])) -> (f32[8,8]) {
  %p = (f32[8,8]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=0
  %y = f32[8,8]{0,1} copy(%x)
  %z = f32[4,8]{1,0:S(1)} slice(%y), slice={[0:4], [0:8]}
  ROOT %t = (f32[8,8]) tuple(%y)
}
%cond (p: (f32[8,8])) -> pred[] {
  %p = (f32[8,8]) parameter(0)
  ROOT %c = pred[] constant(false)
}
ENTRY %main (a: f32[16,8]) -> (f32[8,8]) {
  %a = f32[16,8]{1,0} parameter(0)
  %s = f32[8,8]{1,0} slice(%a), slice={[0:8], [0:8]}
  %g = f32[32,8]{1,0} all-gather(%s), dimensions={0}
  %i = (f32[8,8]) tuple(%s)
  ROOT %w = (f32[8,8]) while(%i), condition=%cond, body=%body
}
"""


def test_copies_are_found_in_loops_of_unknown_length_alone():
  assert hlo.largest_copy_in_decode(LOOP) == ("copy f32[8,8]{0,1}", 64)
  known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
  assert hlo.largest_copy_in_decode(known) == hlo.NOTHING
  assert hlo.largest_gather(LOOP) == ("f32[32,8]{1,0}", 256)
