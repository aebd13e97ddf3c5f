"""Trains the cells of a study together: `python -m rlsafety.study.run --study=FILE`.

The study file is Python with get_study() -> design.Study: cells by name and the questions that they
are to answer, which are written into every run directory, WORKDIR/<cell>/, before the first update.
All cells of one base train in one program (`train.run_together`): each weight of the base is read
once for the replies of all of them. Cells that cannot share a batch, as those of another base, come
after the others. WORKDIR/index.html shows them while they train. Started again, the same command
goes on, or says what is complete.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax

from rlsafety import flags, runtime, train
from rlsafety.cells import shared
from rlsafety.config import Config
from rlsafety.errors import UserError, run_main
from rlsafety.study import confirm, design, page


def run(study: design.Study, workdir: str, cells: Sequence[str]) -> dict[str, dict]:
  """Trains the named cells in workdir/<cell>/; returns their summaries by name.

  Raises UserError for what the user can mend; cells of other groups than the failed one are
  trained before it is raised.
  """
  folder = pathlib.Path(workdir)
  folders = {name: str(folder / name) for name in cells}
  writes = jax.process_index() == 0
  for name, path in folders.items() if writes else ():
    design.write(study, name, pathlib.Path(path))
  show = functools.partial(page.render_page, study, folder) if writes else lambda: None
  summaries: dict[str, dict] = {}
  failed: list[str] = []
  batches = groups({name: study.cells[name] for name in cells})
  for i, group in enumerate(batches, 1):
    if writes and len(batches) > 1:
      print(f"batch {i} of {len(batches)}: {', '.join(group)}", flush=True)
    try:
      summaries |= train.run_together(group, {name: folders[name] for name in group}, show)
    except UserError as error:
      failed.append(str(error))
  if failed:
    raise UserError("; ".join(failed))
  return summaries


def groups(configs: Mapping[str, Config]) -> list[dict[str, Config]]:
  """The cells by what those in one batch must share, in the order in which they come."""
  found: list[tuple[dict, dict[str, Config]]] = []
  for name, config in configs.items():
    mates = next((own for key, own in found if key == shared(config)), None)
    if mates is None:
      found.append((shared(config), {name: config}))
    else:
      mates[name] = config
  return [own for _, own in found]


def main(argv: list[str]) -> None:
  parser = flags.parser(__doc__, "study.run")
  parser.add_argument("--study", required=True, metavar="FILE.py[:ARGUMENT]", help="study file")
  parser.add_argument("--workdir", default="", help="folder of all cells; default runs/<study>")
  parser.add_argument("--cells", default="", help="only these, comma-separated names")
  parser.add_argument("--platform", default="", help="tpu, gpu or cpu: stop if JAX found another")
  runtime.add_arguments(parser)
  args = flags.parse(parser, argv)
  study = design.load(args.study)
  if args.cells:
    chosen = args.cells.split(",")
    if unknown := [name for name in chosen if name not in study.cells]:
      hint = flags.did_you_mean(unknown[0], study.cells)
      raise UserError(f"--cells={unknown[0]}: no such cell{hint} Cells: {', '.join(study.cells)}")
  if args.platform:
    placed = {n: dataclasses.replace(c, platform=args.platform) for n, c in study.cells.items()}
    study = dataclasses.replace(study, cells=placed)
  runtime.start(args)  # on pods, under SLURM, or where a coordinator is named
  runtime.compilation_cache()
  workdir = args.workdir or f"runs/{study.name}"
  run(study, workdir, args.cells.split(",") if args.cells else list(study.cells))
  if jax.process_index() == 0:
    print(confirm.table(study, pathlib.Path(workdir)))
    print(f"page: {workdir}/index.html")
    print(f"held-out replies: {page.write_replies(study, pathlib.Path(workdir))}")


if __name__ == "__main__":
  run_main(main, sys.argv)
