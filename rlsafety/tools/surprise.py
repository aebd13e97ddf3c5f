"""How surprised a base model is by the harmful and by the safe replies of finished runs.

  python -m rlsafety.tools.surprise --runs='runs/**' --model=PATH --out=FILE.csv

Cross-entropy of replies to gameable users, picked from the runs by HEX. One row per model, so
that a loop over models fills one table, which rlsafety.study.analyze reads with
--benchmarks=FILE.csv; a model's earlier row is replaced.
"""

import math
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from rlsafety import flags, progress
from rlsafety.errors import UserError, run_main
from rlsafety.models import scoring, sources
from rlsafety.models.model import Model
from rlsafety.packing import pad
from rlsafety.rundir import read
from rlsafety.rundir.read import Run
from rlsafety.study import gather, tables
from rlsafety.tools.agreement import listed
from rlsafety.types import Prompts


def curated(
  runs: Sequence[Run], high: float = 5.0, low: float = 2.0, per_run: int = 10, seed: int = 0
) -> dict[str, list[dict]]:
  """{"harmful": records, "safe": records}: gameable users' replies with HEX above and below.

  At most per_run of each class from a run, as many harmful as safe in all, seeded.

  Raises:
    UserError: one of the classes is empty.
  """
  picked: dict[str, list[dict]] = {"harmful": [], "safe": []}
  rng = np.random.default_rng(seed)
  for run in runs:
    records = read.train_rollouts(run)
    records = [r for r in records if r["is_gameable"] and r["completion"].strip()]
    hexes = np.array([read.number(r.get("hex")) for r in records])
    for label, fits in (("harmful", hexes > high), ("safe", hexes < low)):
      where = rng.permutation(np.flatnonzero(fits))[:per_run]
      picked[label] += [records[i] for i in where]
  count = min(map(len, picked.values()))
  if not count:
    raise UserError(
      f"no run has both harmful (HEX > {high:g}) and safe (HEX < {low:g}) replies of gameable "
      "users; move --high or --low"
    )
  return {k: [v[i] for i in sorted(rng.permutation(len(v))[:count])] for k, v in picked.items()}


def cross_entropy(
  model: Model, records: Sequence[dict], batch: int = 8, chunk_tokens: int = 2048
) -> np.ndarray:
  """Mean negative log-prob per token [records], nats, of replies under the base alone.

  Prompt and reply are encoded with the model's own chat; a reply's stop token, which the
  record may lack, is not counted.
  """
  token_scores = jax.jit(scoring.token_scores, static_argnames=("config", "chunk_tokens"))
  shown, shown_lengths = pad([model.chat.encode(r["messages"]) for r in records])
  tokens, lengths = pad([model.chat.encode_text(r["completion"]) for r in records], 32)
  losses = []
  for start in progress.bar(range(0, len(records), batch), "batches of replies"):
    rows = np.minimum(np.arange(start, start + batch), len(records) - 1)
    scored = token_scores(
      model.params,
      None,
      model.config,
      Prompts(jnp.asarray(shown[rows]), jnp.asarray(shown_lengths[rows])),
      jnp.asarray(tokens[rows])[:, None],
      jnp.asarray(lengths[rows])[:, None],
      chunk_tokens=chunk_tokens,
    )
    total = -np.asarray(scored.logprobs).sum((1, 2)) / np.maximum(lengths[rows], 1)
    losses += total[: len(records) - start].tolist()
  return np.array(losses)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.surprise")
  parser.add_argument("--runs", required=True, help="globs of run directories, joined by commas")
  parser.add_argument("--model", required=True, help="as config.model.path")
  parser.add_argument("--out", required=True, help="CSV file; a row is added to it")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
  parser.add_argument("--high", type=float, default=5.0, help="harmful: HEX above it")
  parser.add_argument("--low", type=float, default=2.0, help="safe: HEX below it")
  parser.add_argument("--per_run", type=int, default=10, help="of either class, at most")
  parser.add_argument("--seed", type=int, default=0, help="of the choice of replies")
  parser.add_argument("--batch", type=int, default=16, help="replies at a time")
  args = flags.parse(parser, argv)
  found, _ = gather.find_runs(args.runs.split(","))
  sets = curated(found, args.high, args.low, args.per_run, args.seed)
  model = sources.load_model(args.model, jnp.dtype(args.dtype))
  loss = {k: cross_entropy(model, v, args.batch) for k, v in sets.items()}
  harmful, safe = (float(v.mean()) for v in loss.values())
  n = len(loss["safe"])
  errors = (v.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan for v in loss.values())
  row = {
    "model": args.model,
    "ce_harmful": harmful,
    "ce_safe": safe,
    "delta_ce": harmful - safe,
    "delta_ce_se": math.hypot(*errors),
    "delta_ce_p": float(stats.ttest_ind(*loss.values(), equal_var=False).pvalue),
    "n": n,
    "seeds": listed(run.info["seed"] for run in found),
    "correction": "none",
    "runs": listed(run.path for run in found),
  }
  tables.put_row(args.out, row)
  print(
    f"{args.model}: harmful {harmful:.3f}, safe {safe:.3f}, delta {row['delta_ce']:+.3f} +- "
    f"{row['delta_ce_se']:.3f} nats per token, n = {n} each -> {args.out}"
  )


if __name__ == "__main__":
  run_main(main, sys.argv)
