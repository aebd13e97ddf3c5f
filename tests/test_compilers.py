"""The TPU's own compiler on a step of 7B shapes: what it copies, gathers and needs."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from rlsafety.models import presets
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
target = device("v5e-8")
layer = dataclasses.replace(policy, n_layers=1)
steps = [compilers.decode_step(config, layer, target, n) for n in (1, 4)]
print(json.dumps([compilers.measure(config, policy, target), *steps]))
"""


def test_a_tpu_reads_each_weight_where_it_lies():
  pytest.importorskip("libtpu", reason="pip install 'rlsafety[compilers-tpu]', 137 MB")
  env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]))
  del env["XLA_FLAGS"]  # fast, for the CPU
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  found, one, four = json.loads(done.stdout.splitlines()[-1])
  weight, vocabulary = 4096 * 4096 // 4, 151936
  assert found["sampler"]["copied"][1] < weight, found["sampler"]
  for name, program in found.items():  # no base weight, and no logits of [tokens, V]
    assert program["gathered"][1] < min(weight, 2 * 5 * vocabulary), (name, program["gathered"])
    assert program["temp"] < 1 << 30, (name, program["temp"])
  assert math.isclose(found["sampler"]["arguments"], found["update"]["arguments"], rel_tol=0.1)
  # Whatever the number of cells: each matrix of the base once per decode step.
  c = presets.preset("qwen1.5-7b-chat")
  layer = 4 * c.d_model**2 + 3 * c.d_model * c.d_ff
  once = 2 * (layer + c.d_model * c.vocab_size) / 4  # bfloat16, a quarter on each chip
  for step, cells in ((one, 1), (four, 4)):
    assert step["times"] == [1, 1]
    assert math.isclose(step["used"], once, rel_tol=1e-3)  # and the rows of the embedding
    slots = cells * (256 + 5 * 64)  # of one prompt a cell on each of two rows of chips
    assert step["cache"] <= 1.1 * slots * 2 * 2 * c.d_model / 4  # once, or it lies on the chip


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


STEP = """
HloModule m
%looked_up (p.0: bf16[96,8], p.1: s32[]) -> bf16[1,8] {
  %p.0 = bf16[96,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %d = bf16[1,8]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,8}
}
%in_place (p.0: bf16[64,8], p.1: bf16[1,8], p.2: s32[]) -> bf16[64,8] {
  %p.0 = bf16[64,8]{1,0} parameter(0)
  %p.1 = bf16[1,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  ROOT %u = bf16[64,8]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %p.2)
}
%product (p.0: bf16[1,8], p.1: bf16[8,8]) -> bf16[1,8] {
  %p.0 = bf16[1,8]{1,0} parameter(0)
  %p.1 = bf16[8,8]{1,0} parameter(1)
  ROOT %d = bf16[1,8]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (c: CARRY) -> CARRY {
  %c = CARRY parameter(0)
  %table = bf16[96,8]{1,0} get-tuple-element(%c), index=0
  %w = bf16[8,8]{1,0} get-tuple-element(%c), index=1
  %cache = bf16[64,8]{1,0} get-tuple-element(%c), index=2
  %n = s32[] get-tuple-element(%c), index=3
  %x = bf16[1,8]{1,0:S(1)} fusion(%table, %n), kind=kLoop, calls=%looked_up
  %b = bf16[8,8]{1,0} bitcast(%w)
  %s = (bf16[8,8]{1,0:S(1)}, bf16[8,8]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %e = bf16[8,8]{1,0:S(1)} copy-done(%s)
  %y = bf16[1,8]{1,0:S(1)} fusion(%x, %e), kind=kOutput, calls=%product
  %new = bf16[64,8]{1,0} fusion(%cache, %y, %n), kind=kLoop, calls=%in_place
  ROOT %t = CARRY tuple(%table, %w, %new, %n)
}
%cond (c: CARRY) -> pred[] {
  %c = CARRY parameter(0)
  ROOT %f = pred[] constant(false)
}
ENTRY %main (a: CARRY) -> CARRY {
  %a = CARRY parameter(0)
  ROOT %l = CARRY while(%a), condition=%cond, body=%body
}
""".replace("CARRY", "(bf16[96,8]{1,0}, bf16[8,8]{1,0}, bf16[64,8]{1,0}, s32[])")


def test_bytes_of_a_decode_step_by_hand():
  """A row is looked up, a matrix prefetched to the chip, a slot written in place: 16 bytes each
  but for the matrix, and the number of the slot."""
  moves = hlo.decode_moves(STEP)
  carried = [(m.carried, m.moved, m.used) for m in moves if m.carried is not None]
  assert carried == [(0, 16, 16), (3, 4, 4), (1, 128, 128), (2, 0, 0), (3, 4, 4)]
  made = [(m.shape[1], m.moved) for m in moves if m.carried is None and m.moved]
  assert made == [((64, 8), 16)]
