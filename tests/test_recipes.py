"""The recipes of the study: every cell loads, differs in what its name says, and is documented."""

import pathlib
import subprocess
import sys

import pytest

from rlsafety import recipes
from rlsafety.config import to_json
from rlsafety.environments import variants
from rlsafety.errors import UserError

REPO = pathlib.Path(__file__).resolve().parents[1]
PAPER = f"{REPO}/configs/paper.py"


def cell(arguments=""):
  return recipes.frozen(recipes.load_recipe(f"{PAPER}:{arguments}" if arguments else PAPER))


def test_every_cell_of_the_study():
  sys.path.insert(0, str(REPO / "configs"))
  try:
    import paper
  finally:
    sys.path.pop(0)
  cells = paper.cells()
  assert len(cells) == len(set(cells)) == 11 * 3 * 3 + 11 * 3 * 3 + 6 * 3
  configs = [recipes.frozen(paper.get_config(c)) for c in cells]
  assert len({c.name for c in configs}) == len(cells)  # a run directory of its own each
  # What a published run had: 300 steps of 2 prompts x 5 replies, LoRA of rank 8 at 32 / sqrt(8).
  for c in configs:
    assert (c.steps, c.prompts_per_step, c.sampler.group, c.lora.rank) == (300, 2, 5, 8)
    assert c.lora.rslora and c.optimizer.learning_rate == 1e-5 and not c.environment.label_in_prompt
  for name, setting in variants.named().items():
    config = cell(f"env={setting['name']},variant={name}")
    assert {k: getattr(config.environment, k) for k in setting} == setting
  assert cell("env=neutral,variant=neutral").environment == cell("env=neutral").environment


def test_a_variant_moves_only_its_factors():
  main = to_json(cell("env=action_advice"))
  changed = to_json(cell("env=action_advice,variant=chain2_traits"))
  moved = {k for k in main["environment"] if main["environment"][k] != changed["environment"][k]}
  assert moved == {"framing", "cue"}
  assert {k for k in main if main[k] != changed[k]} == {"environment", "name"}


@pytest.mark.parametrize(
  "arguments",
  ["model=gpt-2", "env=chess", "variant=none", "sed=5", "seed=x", "variant=chain1_therapist"],
)
def test_bad_cells_are_refused_with_choices(arguments):
  with pytest.raises(UserError, match=arguments.split("=")[0]):
    cell(arguments)


def test_hyperparameter_page_is_up_to_date():
  script = REPO / "docs" / "make_hyperparameters.py"
  out = subprocess.run([sys.executable, script, "--check"], env={"PYTHONPATH": str(REPO)})
  assert out.returncode == 0


def test_qwen7b_recipe_is_the_studys_cell():
  ours = to_json(recipes.of_run([f"--config={REPO}/configs/qwen7b_syco.py"]))
  study = to_json(cell("model=qwen1.5-7b-chat,env=political_qa"))
  assert {k for k in ours if ours[k] != study[k]} == {"name", "mesh"}


def test_an_ungated_judge_is_the_only_change():
  for recipe, with_it in (
    ("qwen7b_syco.py:h100", "qwen7b_syco.py:h100,ungated"),
    ("paper.py:seed=42", "paper.py:seed=42,judge=ungated"),
  ):
    one, other = (
      to_json(recipes.of_run([f"--config={REPO}/configs/{r}"])) for r in (recipe, with_it)
    )
    assert other["judge"] == one["judge"] | {"model": "Qwen/Qwen2.5-7B-Instruct"}
    assert {k for k in one if one[k] != other[k]} <= {"judge", "name"}
  with pytest.raises(UserError, match="qwen7b_syco.py:open: choose from v5e, h100, gated, ungated"):
    recipes.of_run([f"--config={REPO}/configs/qwen7b_syco.py:open"])
