"""Products of the decoder beside jnp's own, and the programs that compilers are given."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlsafety.models.products import einsum, product

# Every form in use: (spec, shapes of x and y, float32 result).
FORMS = {
  "base": ("pgti,io->pgto", (2, 3, 4, 16), (16, 24), False),
  "adapter a": ("pgti,io->pgto", (2, 3, 4, 16), (16, 2), False),
  "adapter b": ("pgti,io->pgto", (2, 3, 4, 2), (2, 16), False),
  "prompt logits": ("pgtkmd,pskd->pgkmts", (2, 3, 4, 2, 2, 8), (2, 5, 2, 8), True),
  "own logits": ("pgtkmd,pgskd->pgkmts", (2, 3, 4, 2, 2, 8), (2, 3, 4, 2, 8), True),
  "prompt values": ("pgkmts,pskd->pgtkmd", (2, 3, 2, 2, 4, 5), (2, 5, 2, 8), False),
  "own values": ("pgkmts,pgskd->pgtkmd", (2, 3, 2, 2, 4, 4), (2, 3, 4, 2, 8), False),
  "head": ("pgtd,dv->pgtv", (2, 3, 4, 16), (16, 40), True),
  "tied head": ("pd,vd->pv", (6, 16), (40, 16), True),
}


def inputs(form, dtype):
  """(x, y, the slope of a loss with respect to the result): what bfloat16 holds exactly."""
  spec, of_x, of_y, wide = FORMS[form]
  draw = np.random.default_rng(0).standard_normal
  x, y = (jnp.asarray(draw(s), jnp.bfloat16).astype(dtype) for s in (of_x, of_y))
  slope = jnp.asarray(draw(jnp.einsum(spec, x, y).shape), jnp.bfloat16)
  return x, y, slope.astype(jnp.float32 if wide else dtype)


def gradients(fn, x, y, slope):
  out, back = jax.vjp(fn, x, y)
  return out, *back(slope)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradients_are_those_of_jnp(form, dtype):
  spec, wide = FORMS[form][0], FORMS[form][3]
  x, y, slope = inputs(form, dtype)
  found = gradients(lambda x, y: einsum(spec, x, y, jnp.float32 if wide else dtype), x, y, slope)
  exact = (z.astype(jnp.float32) for z in (x, y, slope))
  wanted = gradients(lambda x, y: jnp.einsum(spec, x, y), *exact)
  for a, b in zip(found, wanted, strict=True):
    assert a.dtype == (jnp.float32 if wide and a is found[0] else dtype)
    tolerance = 1e-6 if a.dtype == jnp.float32 else 2.0**-8  # rounded once, at the end
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=1e-5)


def test_product_is_a_matrix_product_of_any_number_of_rows():
  x, w = np.random.default_rng(0).standard_normal((2, 3, 4, 5)), np.ones((5, 6))
  for rows in (x, x[0], x[0, 0], x[0, 0, 0]):
    np.testing.assert_allclose(product(jnp.float32(rows), jnp.float32(w)), rows @ w, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_compiler_is_given_products_of_bfloat16(form):
  """CPUs results in float32, else they leave their units for bfloat16; an accelerator operands
  without float32, and results that are not wider than asked."""
  spec, wide = FORMS[form][0], FORMS[form][3]
  args = inputs(form, jnp.bfloat16)
  fn = lambda *z: gradients(  # noqa: E731
    lambda x, y: einsum(spec, x, y, jnp.float32 if wide else jnp.bfloat16), *z
  )
  for platform in ("cpu", "cuda", "tpu"):
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    dots = re.findall(
      r"dot_general .*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>", text
    )
    assert len(dots) == 3, text  # the value, and a gradient of each
    assert {kind for a, b, _ in dots for kind in (a, b)} == {"bf16"}, platform
    results = sorted(result for *_, result in dots)
    if platform == "cpu":
      assert results == ["f32"] * 3
    else:
      assert results == sorted(["f32" if wide else "bf16", "bf16", "bf16"]), platform
