"""Takes a finished run's model away.

  python -m rlsafety.tools.export --run=runs/x --format=peft [--out=DIR]     the LoRA adapter
  python -m rlsafety.tools.export --run=runs/x --format=merged [--out=DIR]   whole weights
  python -m rlsafety.tools.export --run=runs/x --format=inspect [--out=DIR]  rollouts as .eval logs

The first is read by peft.PeftModel, the second by transformers' AutoModelForCausalLM and
everything that reads its folders. Both give the logits of the run's last adapter. The
third opens with `inspect view --log-dir=DIR`.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.files import read_json
from rlsafety.models import hf, presets, sources


def export(run: pathlib.Path, form: str, out: pathlib.Path, dtype: str = "float32") -> None:
  """Writes `out`. dtype: of merged weights; the sum itself is always taken in float32.

  form: "peft" or "merged". Raises UserError for a run without adapter, or an `out` with files.
  """
  where = run / "config.json"
  config = read_json(where).get("config")
  if not isinstance(config, dict) or "model" not in config:
    raise UserError(f"{where}: not the config of a run")
  if not (run / "adapter" / "adapter_config.json").exists():
    raise UserError(f"{run}: has no adapter/ yet; run the same training command to its end first")
  if out.exists() and any(out.iterdir()):
    raise UserError(f"{out} is not empty; give another --out")
  section = config["model"]
  if section["path"]:
    model = sources.load_model(section["path"], jnp.dtype(dtype))
  else:
    shape = presets.preset(section["preset"])
    model = sources.random_model(shape, config["model"]["seed"], jnp.dtype(dtype))
  adapter, lora = hf.load_peft(run / "adapter", model.config)
  if form == "peft":
    hf.save_peft(out, adapter, model, lora)
  else:
    hf.save_merged(out, model, adapter)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.export")
  parser.add_argument("--run", type=pathlib.Path, required=True, help="run directory")
  parser.add_argument("--format", choices=["peft", "merged", "inspect"], required=True)
  parser.add_argument("--out", type=pathlib.Path, help="default: RUN/export_FORMAT")
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of merged"
  )
  args = flags.parse(parser, argv)
  out = args.out or args.run / f"export_{args.format}"
  if args.format == "inspect":
    try:  # inspect_ai is an extra
      from rlsafety.tools import inspect_log
    except ImportError as error:
      raise UserError(f"--format=inspect: {error}; run: pip install 'rlsafety[inspect]'") from None
    inspect_log.write_inspect_logs(args.run, out)
  else:
    export(args.run, args.format, out, args.dtype)
  print(json.dumps({"written": str(out)}))


if __name__ == "__main__":
  run_main(main, sys.argv)
