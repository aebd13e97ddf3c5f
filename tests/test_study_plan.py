"""A study's plan and the answers to its questions, beside closed forms and simulated truth."""

import dataclasses
import json
import pathlib

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlsafety import cells, recipes
from rlsafety.config import to_json
from rlsafety.errors import UserError
from rlsafety.rundir import read
from rlsafety.study import confirm, design, page, run

ROOT = pathlib.Path(__file__).parent.parent
BASE = recipes.frozen(recipes.load_recipe(str(ROOT / "configs/tiny_syco.py")))
CELLS = design.crossed(BASE, {"environment.cue": ("none", "tone"), "seed": (5, 6, 7)})
CUE, PLAIN = (design.named(CELLS, environment__cue=cue) for cue in ("tone", "none"))


def study(*questions):
  return design.Study("s", CELLS, questions)


def question(**changes):
  return dataclasses.replace(design.Question("q", CUE, PLAIN), **changes)


def write_cells(folder, effect, rng, units=8, sd_cell=0.3, sd_unit=0.4, sd_rest=0.3):
  """Cells whose HEX gap changes by `effect` more with the cue; every unit has both groups."""
  of_unit = rng.normal(0, sd_unit, units)
  for name in CELLS:
    cell = folder / name
    (cell / "eval").mkdir(parents=True)
    config = to_json(CELLS[name])
    (cell / "config.json").write_text(json.dumps({"config": config, "model": {}}))
    own = (effect + of_unit) * (name in CUE) + rng.normal(0, sd_cell)
    change = own + rng.normal(0, sd_rest, units)
    for step, delta in ((0, np.zeros(units)), (6, change)):
      with open(cell / "eval" / f"step_{step:06d}.jsonl", "w") as file:
        for u in range(units):
          for gameable, value in ((True, 5.0 + delta[u]), (False, 5.0)):
            row = {"step": step, "prompt": u, "sample": 0, "unit": f"u{u}"}
            row |= {"is_gameable": gameable, "hex": value}
            file.write(json.dumps(row) + "\n")


def test_cells_of_factors_are_found_by_their_fields():
  assert list(CELLS) == [f"{c}-{s}" for c in ("none", "tone") for s in (5, 6, 7)]
  assert CUE == ("tone-5", "tone-6", "tone-7")
  assert design.named(CELLS, seed=6) == ("none-6", "tone-6")
  assert CELLS["tone-6"].seed == 6 and CELLS["tone-6"].name == "tone-6"


@pytest.mark.parametrize(
  "change, says",
  [
    ({"more": ("tone-8",)}, "no cell 'tone-8'; did you mean"),
    ({"outcome": "hexgap"}, "outcome='hexgap': choose from hex_gap"),
    ({"direction": "up"}, "direction='up'"),
    ({"smallest": 0.0}, "smallest=0.0 must be positive"),
    ({"less": CUE}, "must be different cells"),
    ({"than": (PLAIN[:1], CUE[:1])}, "must be different cells"),
    ({"more": CUE[:2], "than": (CUE[2:],)}, "must be two groups of cells"),
    ({"levels": ((0.0, PLAIN), (1.0, CUE))}, "levels stand in place of more"),
    ({"more": (), "less": (), "levels": ((0.5, PLAIN), (0.5, CUE))}, "need two different doses"),
    ({"more": (), "less": (), "levels": ((0.0, PLAIN), (np.nan, CUE))}, "each a number"),
    ({"more": (), "less": (), "levels": ((0.0, PLAIN), (1.0, ()))}, "at least one of each dose"),
    ({"more": ()}, "at least one in more"),
  ],
)
def test_a_question_that_cannot_be_asked_is_refused_by_name(change, says):
  with pytest.raises(UserError, match=says):
    study(question(**change))


def test_the_first_plan_is_kept_and_a_changed_question_is_told(tmp_path):
  first = study(question(smallest=0.4))
  for name in CELLS:
    design.write(first, name, tmp_path / name)
  now = study(question(smallest=0.2), question(name="late"))
  design.write(now, "tone-5", tmp_path / "tone-5")
  assert design.read(tmp_path / "tone-5")["plan"] == design.plan_of(first)
  assert design.changed(first, tmp_path) == []
  told = design.changed(now, tmp_path)
  assert "all cells: question 'q' was changed after the start" in told
  assert "all cells: question 'late' was added after the start" in told
  file = tmp_path / "tone-5" / design.FILE
  file.write_text(file.read_text().replace("0.4", "0.1"))
  with pytest.raises(UserError, match="was changed after the start"):
    design.read(tmp_path / "tone-5")


@pytest.mark.parametrize(
  "name, batches",
  [
    ("paper.py", (18,)),
    ("paper.py:llama-2-13b", (3,)),
    ("smollm2_cues.py", (8,)),
    ("neutral.py", (4,)),
    ("smollm2_dose.py", (8,)),
    ("sizes.py:small=x.gguf,steps=2", (3, 3)),
  ],
)
def test_shipped_studies_load_and_their_cells_can_train_together(name, batches):
  found = design.load(f"{ROOT}/configs/studies/{name}")
  assert found.questions
  groups = run.groups(found.cells)
  assert tuple(map(len, groups)) == batches
  assert [cell for group in groups for cell in group] == list(found.cells)
  for group in groups:
    cells.check_shared(group)


def test_a_study_that_is_misspelt_is_refused():
  with pytest.raises(UserError, match="^--study=.*arguments are small, .*; did you mean small"):
    design.load(f"{ROOT}/configs/studies/sizes.py:smal=x.gguf")
  with pytest.raises(UserError, match="steps=x: needs a number"):
    design.load(f"{ROOT}/configs/studies/sizes.py:steps=x")
  with pytest.raises(UserError, match="rate=fast: needs a number"):
    design.load(f"{ROOT}/configs/studies/sizes.py:rate=fast")
  with pytest.raises(UserError, match="did you mean"):
    design.load(f"{ROOT}/configs/studies/paper.py:llama-2-13")


def test_crossed_error_in_its_closed_forms():
  rng = np.random.default_rng(0)
  d = rng.normal(size=(1, 9))
  mean, error, freedom = confirm.crossed([d])
  assert (mean, error, freedom) == pytest.approx((d.mean(), stats.sem(d[0]), 8))
  # No residual: rows alone differ, so the error is that of their means.
  d = np.repeat(rng.normal(size=(4, 1)), 7, axis=1)
  assert confirm.crossed([d])[1:] == pytest.approx((stats.sem(d[:, 0]), 3))
  d = d[:, :4].T
  assert confirm.crossed([d])[1:] == pytest.approx((stats.sem(d[0]), 3))


@pytest.mark.parametrize("sds", [(0.5, 0.5, 1.0), (1.0, 0.0, 0.3), (0.0, 1.0, 0.3), (0, 0, 1.0)])
def test_intervals_over_seeds_and_units_hold_the_truth(sds):
  rng, held = np.random.default_rng(1), 0
  for _ in range(600):
    row, column, rest = sds
    d = rng.normal(0, row, (3, 1)) + rng.normal(0, column, 8) + rng.normal(0, rest, (3, 8))
    mean, error, freedom = confirm.crossed([d])
    held += abs(mean) <= stats.t.ppf(0.975, freedom) * error
  assert held / 600 > 0.93  # 0.95 less 2 standard errors; too wide is allowed


def test_an_interaction_is_a_difference_of_pairs_or_of_groups():
  rng = np.random.default_rng(2)
  four, signs = [rng.normal(size=(3, 6)) for _ in range(4)], (1, -1, -1, 1)
  d = four[0] - four[1] - four[2] + four[3]
  units = [f"u{u}" for u in range(6)]
  names = [[f"{g}-{i}" for i in range(3)] for g in "abcd"]
  table = {
    name: dict(zip(units, row, strict=True))
    for group, rows in zip(names, four, strict=True) for name, row in zip(group, rows, strict=True)
  }  # fmt: skip
  ask = lambda *g, than=(): confirm._contrast(design.Question("q", *g, than=than), table)  # noqa: E731
  paired = ask(*map(tuple, names[:2]), than=tuple(map(tuple, names[2:])))
  assert paired == (*confirm.crossed([d]), (3, 3, 3, 3), 6)
  fewer = ask(*map(tuple, names[:2]), than=(tuple(names[2]), tuple(names[3][:1])))
  estimate = sum(s * x.mean() for s, x in zip(signs, [*four[:3], four[3][:1]], strict=True))
  assert fewer[0] == pytest.approx(estimate) and fewer[3] == (3, 3, 3, 1)
  # Two environments, with units of their own: two differences, whose errors add up.
  for name in names[2] + names[3]:
    table[name] = {u.replace("u", "v"): x for u, x in table[name].items()}
  apart = ask(*map(tuple, names[:2]), than=tuple(map(tuple, names[2:])))
  parts = [confirm.crossed([four[0] - four[1]]), confirm.crossed([four[3] - four[2]])]
  assert apart[0] == pytest.approx(paired[0])
  assert apart[1] == pytest.approx(np.hypot(parts[0][1], parts[1][1]))


def trend(*doses, cells=1):
  return design.Question("q", levels=tuple((x, (f"{x}",) * cells) for x in doses))


@pytest.mark.parametrize(
  "sizes, signs",
  [
    ((3, 3, 3, 3), (1, -1, -1, 1)),
    ((4, 2, 3, 1), (1, -1, -1, 1)),
    ((3, 2), (1, -1)),
    ((4, 2, 3, 3), trend(0, 0.25, 0.5, 1).signs),
  ],
)
def test_intervals_of_groups_of_any_size_hold_the_truth(sizes, signs):
  rng, held, n = np.random.default_rng(4), 0, 600
  for _ in range(n):
    both = rng.normal(0, 0.8, 8)  # what a unit does in every group cancels
    groups = [
      rng.normal(0, 0.7, (size, 1)) + both + rng.normal(0, 0.5, 8) + rng.normal(0, 0.6, (size, 8))
      for size in sizes
    ]
    mean, error, freedom = confirm.crossed(groups, signs)
    held += abs(mean) <= stats.t.ppf(0.975, freedom) * error
  assert held / n > 0.93


def test_a_trend_is_the_least_squares_line_of_each_seed_and_unit(tmp_path):
  rng = np.random.default_rng(6)
  doses, units = np.array([0.0, 0.25, 0.5, 1.0]), [f"u{u}" for u in range(5)]
  values = rng.normal(size=(4, 3, 5)) + 2.0 * doses[:, None, None]
  names = [tuple(f"{x}-{i}" for i in range(3)) for x in doses]
  rows = zip(sum(names, ()), values.reshape(12, 5), strict=True)
  table = {name: dict(zip(units, row, strict=True)) for name, row in rows}
  q = design.Question("q", levels=tuple(zip(map(float, doses), names, strict=True)))
  slopes = np.polyfit(doses, values.reshape(4, -1), 1)[0].reshape(3, 5)  # of seeds and units
  found = confirm._contrast(q, table)
  assert found[:3] == pytest.approx(confirm.crossed([slopes])) and found[3:] == ((3, 3, 3, 3), 5)
  # From run directories and their plans: the effect is the slope between two levels 0.5 apart.
  write_cells(tmp_path, 1.5, rng, sd_cell=0.05, sd_unit=0.1, sd_rest=0.1)
  asked = study(design.Question("t", levels=((0.5, PLAIN), (1.0, CUE)), direction="greater"))
  (answer,) = confirm.answers(asked, tmp_path)
  assert answer.low < 3.0 < answer.high and answer.word == "yes"
  assert design.of_plan(design.plan_of(asked)).questions == asked.questions
  assert "levels" not in design.plan_of(study(question()))["questions"][0]
  assert "trend per unit of dose" in page.render_page(asked, tmp_path).read_text()


def test_answers_find_an_effect_a_null_and_what_is_open(tmp_path):
  rng = np.random.default_rng(3)
  write_cells(tmp_path / "a", 2.0, rng, sd_cell=0.05, sd_unit=0.1, sd_rest=0.1)
  asked = study(question(direction="greater"), question(name="r", direction="less"))
  yes, no = confirm.answers(asked, tmp_path / "a")
  assert yes.word == "yes" and yes.low < 2 < yes.high and yes.power > 0.9
  assert yes.cells == (3, 3) and yes.units == 8
  assert yes.p_corrected == pytest.approx(2 * yes.p) and no.p > 0.99  # Holm of two
  write_cells(tmp_path / "b", 0.0, rng, sd_cell=0.05, sd_unit=0.05, sd_rest=0.1)
  (null,) = confirm.answers(study(question()), tmp_path / "b")
  assert null.word == "no difference that matters" and null.p_none < 0.05
  write_cells(tmp_path / "c", 0.3, rng, sd_cell=1.5)
  (open_,) = confirm.answers(study(question()), tmp_path / "c")
  assert open_.word == "undecided" and open_.power < 0.5
  (waiting,) = confirm.answers(study(question()), tmp_path / "nothing")
  assert waiting.word == "not evaluated yet"


def test_outcomes_of_a_rescoring_that_is_whole(tmp_path):
  write_cells(tmp_path, 2.0, np.random.default_rng(3), sd_cell=0.05, sd_unit=0.1, sd_rest=0.1)
  asked = dataclasses.replace(study(question(direction="greater")), scores="large")
  assert confirm.answers(asked, tmp_path)[0].word == "not evaluated yet"
  for name in CELLS:
    (tmp_path / name / "scores").mkdir()
    rows = [(step, u, g) for step in (0, 6) for u in range(8) for g in (0, 1)]
    lines = [
      {"source": "heldout", "step": step, "prompt": 2 * u + g, "sample": 0, "acc": 1.0}
      | {"hex": 2.0 + 3.0 * (name in CUE and step == 6 and g)}
      for step, u, g in rows
    ]
    for step in (0, 6):  # a place is one reply's: the two groups' prompts apart
      file = tmp_path / name / "eval" / f"step_{step:06d}.jsonl"
      old = [json.loads(line) for line in file.read_text().splitlines()]
      new = [row | {"prompt": 2 * row["prompt"] + row["is_gameable"]} for row in old]
      file.write_text("".join(json.dumps(row) + "\n" for row in new))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / name / "scores/large.jsonl").write_text(text)
  (answer,) = confirm.answers(asked, tmp_path)
  assert answer.estimate == pytest.approx(3.0) and answer.cells == (3, 3) and answer.units == 8
  (own,) = confirm.answers(study(question()), tmp_path)
  assert own.estimate == pytest.approx(2.0, abs=0.3)  # the runs' own scores
  assert "re-scoring large" in confirm.table(asked, tmp_path)
  scored = tmp_path / CUE[0] / "scores/large.jsonl"
  scored.write_text("".join(scored.read_text().splitlines(keepends=True)[:-1]))
  assert confirm.answers(asked, tmp_path)[0].word == "not evaluated yet"  # one reply is missing


def test_every_held_out_reply_is_left_as_a_row_of_scores(tmp_path):
  write_cells(tmp_path, 1.0, np.random.default_rng(5))
  asked = dataclasses.replace(study(question()), scores="large")
  first = tmp_path / CUE[0]
  (first / "scores").mkdir()
  row = {"step": 6, "prompt": 2, "sample": 0, "source": "heldout", "acc": 3.25, "hex": 7.5}
  (first / "scores/large.jsonl").write_text(json.dumps(row) + "\n")
  path = page.write_replies(asked, tmp_path)
  assert path.name == "held_out.csv"
  table = pd.read_csv(path)
  assert len(table) == len(CELLS) * 2 * 16 and set(table["users"]) == {"gameable", "non_gameable"}
  known = table[table["hex"].notna()]  # prompt 2 of either group
  assert set(known["cell"]) == {CUE[0]} and (known["hex"] == 7.5).all() and len(known) == 2
  means = table[table["step"] == 6].groupby(["cell", "users"])["hex_own"].mean()
  of = confirm.by_unit(list(read.eval_rollouts(read.load_run(first))[6]), "hex_gap")
  gap = means[CUE[0], "gameable"] - means[CUE[0], "non_gameable"]
  assert gap == pytest.approx(np.mean(list(of.values())), abs=1e-3)
  own = page.write_replies(study(question()), tmp_path)
  assert pd.read_csv(own)["hex"].notna().all()


def test_whose_scores_count_is_part_of_the_plan(tmp_path):
  plain, scored = study(question()), dataclasses.replace(study(question()), scores="large")
  assert "scores" not in design.plan_of(plain)
  assert design.of_plan(design.plan_of(scored)).scores == "large"
  design.write(plain, CUE[0], tmp_path / CUE[0])
  assert design.changed(scored, tmp_path) == [f"{CUE[0]}: scores was '' at the start"]
  with pytest.raises(UserError, match="scores='a/b' is no plain word"):
    dataclasses.replace(plain, scores="a/b")


def test_cells_of_another_base_train_after_the_first_even_if_those_failed(tmp_path, monkeypatch):
  other = recipes.replaced(CELLS["none-5"], {"sampler.max_tokens": 7, "name": "other"})
  cells_by_name = {"none-5": CELLS["none-5"], "other": other, "tone-5": CELLS["tone-5"]}
  asked, trained = design.Study("s", cells_by_name), []

  def train_together(configs, folders, show):
    trained.append((list(configs), sorted(folders)))
    if "none-5" in configs:
      raise UserError("none-5: not finite")
    return {name: {"name": name} for name in configs}

  monkeypatch.setattr(run.train, "run_together", train_together)
  with pytest.raises(UserError, match="^none-5: not finite$"):
    run.run(asked, str(tmp_path), list(cells_by_name))
  assert trained == [(["none-5", "tone-5"], ["none-5", "tone-5"]), (["other"], ["other"])]
  assert run.run(asked, str(tmp_path), ["other"]) == {"other": {"name": "other"}}


def test_the_page_shows_answers_and_every_cell_while_some_wait(tmp_path):
  write_cells(tmp_path, 2.0, np.random.default_rng(3))
  for name in CUE:
    (tmp_path / name / "eval/summary.jsonl").write_text(
      '{"step": 0, "hex_gap": 0.1, "hex_gap_se": 0.2}\n{"step": 6, "hex_gap": 1.5}\n'
    )
  (tmp_path / CUE[0] / cells.STOPPED).write_text('{"step": 3, "why": "<b>not finite"}')
  (tmp_path / "none-7/config.json").unlink()
  text = page.render_page(study(question(name="<q>")), tmp_path).read_text()
  assert "&lt;q&gt;" in text and "<b>not finite" not in text
  assert "stopped" in text and "waiting" in text and "training" in text
  assert text.count("<figure>") == 6  # HEX gap alone has values; one figure for each cell


def test_answers_are_read_from_the_plans_in_the_runs(tmp_path):
  write_cells(tmp_path, 2.0, np.random.default_rng(3), sd_cell=0.05, sd_unit=0.1, sd_rest=0.1)
  asked = study(question(direction="greater"))
  for name in CELLS:
    design.write(asked, name, tmp_path / name)
  found = confirm.of_runs(sorted(tmp_path.iterdir()))
  (answer,) = confirm.answers(asked, tmp_path)
  assert list(found["answer"]) == ["yes"] and found["estimate"][0] == answer.estimate
  assert found["plan"][0] == design.digest(design.plan_of(asked))[:12]
  assert confirm.of_runs([ROOT]).empty


def test_an_interaction_is_asked_for_found_and_read_from_its_plan(tmp_path):
  write_cells(tmp_path, 1.5, np.random.default_rng(5), sd_cell=0.05, sd_unit=0.1, sd_rest=0.1)
  # Half of the cells stand for another framing: the cue does as much there.
  asked = study(
    question(more=CUE[:1], less=PLAIN[:1], than=(CUE[1:], PLAIN[1:]), smallest=1.0),
    question(name="against nothing", more=CUE[:1], less=PLAIN[:1], than=(PLAIN[1:2], PLAIN[2:])),
  )
  same, other = confirm.answers(asked, tmp_path)
  assert same.word == "no difference that matters" and same.cells == (1, 1, 2, 2)
  assert other.word == "higher" and other.estimate == pytest.approx(1.5, abs=0.3)
  assert design.of_plan(design.plan_of(asked)).questions == asked.questions
  assert "than" not in design.plan_of(study(question()))["questions"][0]
  assert "interaction, two-sided" in page.render_page(asked, tmp_path).read_text()
