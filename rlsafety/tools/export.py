"""Takes a finished run's model away.

  python -m rlsafety.tools.export --run=runs/x --format=peft [--out=DIR]     the LoRA adapter
  python -m rlsafety.tools.export --run=runs/x --format=merged [--out=DIR]   whole weights
  python -m rlsafety.tools.export --run=runs/x --format=base [--out=DIR]     those without it
  python -m rlsafety.tools.export --run=runs/x --format=inspect [--out=DIR]  rollouts as .eval logs

The first is read by peft.PeftModel, the next two by transformers' AutoModelForCausalLM and
everything that reads its folders. Adapter and merged weights give the logits of the run's last
adapter; --base_name writes a name of the base into them that other tools can resolve. The last
opens with `inspect view --log-dir=DIR`.

`--format=peft --push_to_hub=OWNER/NAME` uploads the adapter with a model card that says what it is
and warns of it: to a private repository unless --public is given, with the token in HF_TOKEN.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from rlsafety import flags
from rlsafety.errors import UserError, run_main
from rlsafety.files import read_json
from rlsafety.models import hf, presets, sources
from rlsafety.rundir import read
from rlsafety.tools import hub


def export(
  run: pathlib.Path, form: str, out: pathlib.Path, dtype: str = "float32", base_name: str = ""
) -> None:
  """Writes `out`. dtype: of whole weights; the sum itself is always taken in float32.

  form: "peft", "merged" or "base". base_name: how the files call the base; "" = as the run does.
  Raises UserError for a run without adapter, or an `out` with files.
  """
  where = run / "config.json"
  config = read_json(where).get("config")
  section = config.get("model") if isinstance(config, dict) else None
  kinds = {"path": str, "preset": str, "seed": int}
  if not isinstance(section, dict) or any(type(section.get(k)) is not t for k, t in kinds.items()):
    raise UserError(f"{where}: not the config of a run")
  if not (run / "adapter" / "adapter_config.json").exists():
    raise UserError(f"{run}: has no adapter/ yet; run the same training command to its end first")
  if out.exists() and any(out.iterdir()):
    raise UserError(f"{out} is not empty; give another --out")
  if section["path"]:
    model = sources.load_model(section["path"], jnp.dtype(dtype))
  else:
    shape = presets.preset(section["preset"])
    model = sources.random_model(shape, section["seed"], jnp.dtype(dtype))
  if base_name:
    model = dataclasses.replace(model, source={**model.source, "path": base_name})
  adapter, lora = hf.load_peft(run / "adapter", model.config)
  if form == "base":
    hf.save_merged(out, model, None)
  elif form == "peft":
    hf.save_peft(out, adapter, model, lora)
  else:
    hf.save_merged(out, model, adapter)


def main(argv: Sequence[str]) -> None:
  parser = flags.parser(__doc__, "tools.export")
  parser.add_argument("--run", type=pathlib.Path, required=True, help="run directory")
  parser.add_argument("--format", choices=["peft", "merged", "base", "inspect"], required=True)
  parser.add_argument("--out", type=pathlib.Path, help="default: RUN/export_FORMAT")
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of weights"
  )
  parser.add_argument("--base_name", default="", metavar="OWNER/NAME", help="the base on the hub")
  parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload adapter and card there")
  parser.add_argument("--public", action="store_true", help="let everybody see what is uploaded")
  parser.add_argument("--license", default="other", help="of the card, an id that the hub knows")
  args = flags.parse(parser, argv)
  out, base = args.out or args.run / f"export_{args.format}", args.base_name
  if args.push_to_hub:
    if args.format != "peft" or not sources.is_hub_name(args.push_to_hub):
      raise UserError(f"--push_to_hub={args.push_to_hub}: needs OWNER/NAME and --format=peft")
    hub.token()  # before anything is loaded
    found = read.load_run(args.run)
    base = hub.base_name(found.config, base)
  if args.format == "inspect":
    try:  # inspect_ai is an extra
      from rlsafety.tools import inspect_log
    except ImportError as error:
      raise UserError(f"--format=inspect: {error}; run: pip install 'rlsafety[inspect]'") from None
    inspect_log.write_inspect_logs(args.run, out)
  else:
    export(args.run, args.format, out, args.dtype, base)
  said = {"written": str(out)}
  if args.push_to_hub:
    (out / "README.md").write_text(hub.card(found, base, args.license), "utf-8")
    said["uploaded"] = hub.push(out, args.push_to_hub, args.public)
  print(json.dumps(said))


if __name__ == "__main__":
  run_main(main, sys.argv)
