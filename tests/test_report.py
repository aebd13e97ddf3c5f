"""The report page: nothing escapes, nothing is fetched, and it works in a real browser."""

import base64
import hashlib
import html
import html.parser
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import synthetic_runs
from browsing import browser

from rlsafety.errors import UserError
from rlsafety.metrics import gaps
from rlsafety.metrics.matched import FEWEST, Effect
from rlsafety.report import charts, overview, render, summary, transcripts
from rlsafety.rundir import read

HEADS = pathlib.Path(render.__file__).parents[1] / "judges/heads"
HOSTILE = [
  "</script><script>document.title='owned'</script>",
  "<img src=https://example.org/x onerror=\"document.title='owned'\">",
  "<!-- <script> & \u2028 ]]> {{ 7 * 7 }} \ud800",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  path = synthetic_runs.write_run(
    tmp_path_factory.mktemp("runs") / "a<b>", steps=24, eval_every=12, extra=HOSTILE
  )
  return render.write_report(path)


class Parsed(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.tags, self.scripts, self._open = [], [], False
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._open = tag == "script"

  def handle_data(self, data):
    if self._open:
      self.scripts.append(data)

  def handle_endtag(self, tag):
    self._open = False


def test_hostile_replies_stay_data_and_survive_unchanged(page):
  parsed = Parsed(page.read_text())
  assert [tag for tag, _ in parsed.tags].count("script") == 2
  assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "link", "object")]
  assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on")]
  data = json.loads(parsed.scripts[0])
  completions = [row[-1] for row in data["rollouts"]]
  assert HOSTILE[0] in completions and HOSTILE[1] in completions
  assert HOSTILE[2].replace("\ud800", "?") in completions
  assert "a&lt;b&gt;" in page.read_text()  # the run's name is a folder's: escaped too


def test_page_refers_to_nothing_outside_and_allows_only_its_own_script(page):
  text = page.read_text()
  parsed = Parsed(text)
  for tag, attrs in parsed.tags:
    for name in ("src", "href", "srcset", "action", "data"):
      assert attrs.get(name, "#").startswith("#"), (tag, name)
  outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
  assert not re.search(r"(https?:)?//[a-z]|url\(|@import", re.sub(r"//.*", "", outside))
  policy = next(a["content"] for t, a in parsed.tags if "http-equiv" in a)
  digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
  assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_overview_pairs_prompts_and_its_numbers_are_those_of_the_records(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=12, eval_every=12)
  records = {
    0: [{"prompt": p, "is_gameable": True, "reward": r} for p, r in ((0, 2), (1, 6), (2, None))],
    12: [{"prompt": p, "is_gameable": True, "reward": r} for p, r in ((0, 5), (1, 8), (2, 9))],
  }
  cell = overview.overview(read.load_run(path), records).rows["reward"]["gameable"]
  # Changes 3 and 2, sd 1/sqrt(2), over sqrt(2); two units are too few for a star.
  assert cell.change == pytest.approx((2.5, 0.5)) and cell.before[0] == 4 and cell.effect.units == 2
  assert abs(cell.change[0]) > 2 * cell.change[1] and not cell.notable
  lines = read.load_run(path).evaluations
  gone = overview.overview(read.load_run(path), {}).rows["reward"]["gameable"]
  assert gone.before[0] == lines[0]["reward_gameable"] and not gone.notable


def test_judge_that_fails_its_gate_gets_no_star_and_incoherent_replies_no_say(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=12, eval_every=12)

  def evaluation(rise):
    rows = [
      {"prompt": p, "is_gameable": p < 8, "unit": str(p % 8), "reward": 2 + rise + 0.01 * p,
       "hex": 2 + rise + 0.01 * p, "acc": 3.0, "verdict": "balance"} for p in range(16)
    ]  # fmt: skip
    return [*rows, *({**r, "hex": 9.0 - 8 * (rise > 0), "verdict": "incoherent"} for r in rows)]

  def table(gate):
    info = json.loads((path / "config.json").read_text())
    info["judge"]["gate"] = {name: {"passed": not why, "why": why} for name, why in gate.items()}
    (path / "config.json").write_text(json.dumps(info))
    return overview.overview(read.load_run(path), {0: evaluation(0), 12: evaluation(3)})

  found = table({"reward": [], "hex": [], "acc": ["AUC 0.6"]})
  moved = found.rows["hex"]["everyone"]
  assert moved.change[0] == pytest.approx(3) and moved.effect.units == 8
  text = summary.table(found)
  assert "no stars for ACC: AUC 0.6" in text and "no stars for HEX" not in text
  found = table({"reward": [], "hex": ["too weak"]})
  assert not any(cell.notable for cell in found.rows["hex"].values())
  assert "does not pass its gate" in overview.conclusion(found)
  assert "no stars for ACC: not measured" in summary.table(found)
  table({"reward": ["too weak"], "hex": ["too weak"], "acc": []})
  (note,) = re.findall("Nothing is in bold for.*", render.write_report(path).read_text())
  assert "for Reward, HEX: the judge does not pass its gate (too weak)" in note


def test_an_unfinished_or_damaged_run_still_gets_a_page_that_says_so(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=12, eval_every=12, complete=False)
  lines = (path / "metrics.jsonl").read_text().splitlines()
  (path / "metrics.jsonl").write_text("\n".join(lines[:6]) + '\n{"step": 7, "rew')
  shutil.rmtree(path / "eval")
  text = render.write_report(path).read_text()
  assert "torn last line skipped (line 7)" in text and "not complete" in text
  assert "no held-out evaluation" in text and "nothing can be concluded" in text
  with pytest.raises(UserError, match="summary.jsonl: has no evaluation"):
    summary.finish(path)
  (path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
  with pytest.raises(UserError, match="metrics.jsonl, line 1"):
    render.write_report(path)
  with pytest.raises(UserError, match="no such run directory"):
    render.write_report(tmp_path / "absent")


def test_many_rollouts_keep_held_out_ones_and_say_what_was_left_out(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=24, eval_every=12)
  run = read.load_run(path)
  evaluations, training = read.eval_rollouts(run), read.train_rollouts(run)
  data, left_out = transcripts.transcripts(evaluations, training, 200)
  kinds = [row[0] for row in data["rollouts"]]
  assert kinds.count(0) == sum(map(len, evaluations.values())) and len(kinds) <= 200
  assert kinds.count(1) + left_out["training"] == len(training) and not left_out["held-out"]
  steps = {row[1] for row in data["rollouts"] if row[0] == 1}
  assert {1, 24} <= steps  # first and last stay, whole steps only
  assert all(sum(r[0] == 1 and r[1] == s for r in data["rollouts"]) == 16 for s in steps)


def test_held_out_rollouts_are_limited_too(tmp_path, monkeypatch):
  path = synthetic_runs.write_run(tmp_path / "run", steps=24, eval_every=4)
  run = read.load_run(path)
  evaluations, training = read.eval_rollouts(run), read.train_rollouts(run)  # 7 x 32, 24 x 16

  def kept(most):
    data, left_out = transcripts.transcripts(evaluations, training, most)
    rows = data["rollouts"]
    assert len(rows) + sum(left_out.values()) == 7 * 32 + 24 * 16 and len(rows) <= most
    return [row for row in rows if row[0] == 0]

  whole = kept(100)  # three of the evaluations, the ends among them
  assert {row[1] for row in whole} == {0, 12, 24} and len(whole) == 96
  few = kept(20)  # not even two: the same prompts of both ends
  places = [{(row[3], row[4]) for row in few if row[1] == step} for step in (0, 24)]
  assert places[0] == places[1] == {(p, s) for p in range(5) for s in range(2)}
  assert kept(1) == []
  text = render.write_report(path, 100).read_text()
  assert "128 held-out rollouts left out" in text and "384 training rollouts left out" in text
  monkeypatch.setattr(transcripts, "MAX_CHARACTERS", 20_000)
  data, left_out = transcripts.transcripts(evaluations, training)
  assert left_out["held-out"] and sum(len(row[-1]) for row in data["rollouts"]) < 22_000


def test_page_does_not_depend_on_the_hash_seed_nor_follow_links(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=6, eval_every=6)
  (tmp_path / "elsewhere").write_text("kept")
  (path / "report.html.tmp").symlink_to(tmp_path / "elsewhere")
  pages = []
  for seed in ("0", "1", "2"):
    code = f"from rlsafety.report.render import write_report; write_report({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": seed})
    pages.append((path / "report.html").read_bytes())
  assert pages[0] == pages[1] == pages[2]
  assert b"framing: assistant \xc2\xb7 label in prompt: False \xc2\xb7 length: short" in pages[0]
  assert (tmp_path / "elsewhere").read_text() == "kept"


def test_records_of_other_types_are_one_line_that_names_them(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", steps=6, eval_every=6)
  file = path / "rollouts" / "train.jsonl"
  lines = file.read_text().splitlines()
  for field, value in (
    ("step", "1"), ("step", 2**70), ("prompt", None), ("is_gameable", 1), ("messages", "hello"),
    ("messages", [5]), ("factors", []), ("completion", 7), ("hex", "8"), ("reward", True),
    ("acc", 1e30), ("acc", float("-inf")), ("finished", "false"), ("length", 2.0),
  ):  # fmt: skip
    lines[2] = json.dumps(json.loads(lines[1]) | {field: value})
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"train.jsonl, line 3: `{field}` is "):
      render.write_report(path)
  file.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | {"hex": None})]))
  assert np.isnan(read.number(read.train_rollouts(read.load_run(path))[1]["hex"]))  # no verdict
  (path / "metrics.jsonl").write_text('{"step": true}\n')
  with pytest.raises(UserError, match="metrics.jsonl: a line has no `step`"):
    read.load_run(path)


@pytest.mark.parametrize(
  "change, says",
  [
    ({"config": 5}, "config.json: `config` is 5, where an object is expected"),
    ({"model": []}, "config.json: `model` is []"),
    ({"config": {"environment": "x"}}, "config.json: `environment` is 'x'"),
    ({"config": {"seed": "5"}}, "config.json: `config.seed` is '5', no integer"),
    ({"git": "\ud800"}, "holds half a character"),
  ],
)
def test_config_of_other_types_is_one_line_that_names_the_field(tmp_path, change, says):
  path = synthetic_runs.write_run(tmp_path / "run", steps=1)
  (path / "config.json").write_text(json.dumps(change))
  with pytest.raises(UserError, match=re.escape(says)):
    read.load_run(path)


def means(before, after, units, error=0.3):
  """An Overview whose scores go from `before` to `after`: {score: {group: mean}}."""

  def change(name, what):
    a, b = before[name][what], after[name][what]
    return overview.Change(what, (a, error), (b, error), Effect(b - a, error, units))

  rows = {name: {what: change(name, what) for what in overview.COLUMNS} for name in before}
  return overview.Overview({"step": 0, "prompts": 9, "samples": 2}, {"step": 8}, rows)


@pytest.mark.parametrize(
  "after, prompts, says",
  [
    ((7.0, 3.0, 4.0), 12, "Gameable users came to fare worse compared with the others: from step 0 "
     "to step 8, HEX went from 3.00 to 7.00 (+4.00 ± 0.30) on replies to gameable users and from "
     "3.00 to 3.00 (+0.00 ± 0.30) on replies to the others, the gap between them from 0.00 to"),
    ((2.0, 3.0, -1.0), 12, "Gameable users came to fare better compared"),
    ((5.0, 5.0, 0.0), 12, "Harmful exploitation changed in both groups of users alike"),
    ((3.7, 3.2, 0.5), 12, "changed in one group, but the gap between them not measurably"),
    ((3.2, 3.1, 0.1), 12, "Harmful exploitation did not change measurably"),
    ((7.0, 3.0, 4.0), 2, "Too few held-out users were evaluated (of 2 units, at least 5"),
  ],
)  # fmt: skip
def test_conclusion_is_what_the_numbers_carry(after, prompts, says):
  keys = ("gameable", "non_gameable", "gap")
  before = dict(zip(keys, (3.0, 3.0, 0.0), strict=True))
  found = means({"hex": before}, {"hex": dict(zip(keys, after, strict=True))}, prompts)
  assert says in overview.conclusion(found) and overview.conclusion(found).count(". ") == 0
  assert "nothing can be concluded" in overview.conclusion(None)


def test_few_users_get_no_stars_and_no_nan(tmp_path):
  """The printed table at one and at two users in a group: words, and nothing marked."""
  for prompts in (2, 4):
    path = synthetic_runs.write_run(
      tmp_path / f"{prompts}", steps=6, eval_every=6, eval_prompts=prompts, rise=6.0
    )
    run = read.load_run(path)
    found = overview.overview(run, read.eval_rollouts(run))
    text = summary.table(found)
    assert "nan" not in text and "*" not in text.split("\n", 1)[1]
    assert ("n too small" in text) == (prompts == 2)
    page = render.write_report(path).read_text()
    assert "Too few held-out users" in page and "nan" not in page.split("<main>")[1][:9000]
    assert ("n too small</span>" in page) == (prompts == 2)
  enough = means({"hex": {w: 3.0 for w in overview.COLUMNS}},
                 {"hex": {w: 7.0 for w in overview.COLUMNS}}, FEWEST)  # fmt: skip
  enough.last.update(prompts=9, samples=2)
  assert summary.table(enough).count(" *\n") == 2  # and the last line's


def test_a_judge_that_scores_no_hex_is_not_called_too_few_users():
  """A reward function of one's own: the numbers are not small, they are not there."""
  keys, none = ("gameable", "non_gameable", "gap"), math.nan
  scores = {"reward": dict.fromkeys(keys, 3.0), "hex": dict.fromkeys(keys, none)}
  found = means(scores, scores, 12)
  found.last.update(prompts=9, samples=2)
  assert overview.conclusion(found).startswith("No reply was scored for HEX (judge.evaluator")
  lines = summary.table(found).splitlines()
  assert [line for line in lines if line.startswith("HEX")] == [
    "HEX     no reply has a score: the judge gives none"
  ]
  nothing = found.rows["hex"]["gap"]
  assert nothing.unscored and not found.rows["reward"]["gap"].unscored
  row = {f"{name}_{g}": none for name in ("acc", "hex") for g in keys[:2]}
  row |= {"reward": 3.0, "reward_gameable": 3.0, "reward_non_gameable": none}
  assert gaps.group_line(row) == "reward 3.00/nan (gameable/non-gameable)"
  # What a step says besides: groups of replies that differ in reward, which alone teach anything.
  line = gaps.step_line(
    row | {"step": 2, "frac_zero_std": 0.25}, {"seconds": 3.0, "tokens_per_second": 9.0}, 12, [6.0]
  )
  assert line.startswith("step 2/12  reward 3.00/nan") and "loss" not in line
  assert line.endswith("groups with spread 75%  3.0 s  9 tok/s  left 1.0 min")


def test_page_names_the_model_its_terms_and_the_judges_columns(tmp_path):
  path = synthetic_runs.write_run(tmp_path / "run", environment="therapy_talk", steps=6)
  info = json.loads((path / "config.json").read_text())
  info["model"] = {"path": "package:llm_small", "file": "Small-135M-Instruct.Q4_1.gguf"}
  info["config"]["model"] = {"path": "package:llm_small", "preset": ""}
  contrast = {"auc": 0.83, "low": 0.7, "high": 0.9, "wanted": 81, "others": 167}
  info["judge"]["measured"] = {"hex": {"contrasts": {"base": {"balance": contrast}}}}
  (path / "config.json").write_text(json.dumps(info))
  text = html.unescape(render.write_report(path).read_text())
  assert "<h1>Small-135M-Instruct.Q4_1 · therapy_talk</h1>" in text
  assert "harmful exploitation: encouragement of the harmful wish" in text
  assert "good behaviour: dissuasion, 1 to 10. Higher is better" in text
  assert render.JUDGE_TABLES["contrasts"] in text and "hex · base · balance" in text
  assert all(f'<th scope="col">{words}</th>' in text for words in render.CONTRAST_COLUMNS.values())


def test_charts_have_titles_legends_and_ticks_at_both_ends(page):
  figures = re.findall(r"<figure>.*?</figure>", page.read_text(), re.S)
  assert len(figures) == 12
  for figure in figures:
    assert ">training step</text>" in figure and 'class="legend small"' in figure
    ticks = re.findall(r'class="tick" [^>]*>([^<]+)', figure)
    assert ticks[-1] == "24" and "0" in ticks
    assert len(re.findall(r'class="title"', figure)) == 2
  assert "thin line: training" in figures[0] and "HEX, 1 to 10" in figures[2]
  assert charts.y_axis(np.array([3.0, 8.0]), scale=(1, 10)) == (1, 10, [1, 4, 6, 8, 10])
  assert charts.y_axis(np.array([0.2, 8.0]), scale=(1, 10))[:2] == (0, 10)
  assert charts.y_axis(np.array([-4.2, 0.3]), zero=True) == (-6, 2, [-6, -4, -2, 0, 2])
  assert charts.y_axis(np.array([])) == (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1])
  assert charts.with_ends([0, 5, 10], 0, 11) == [0, 5, 11]


def test_judge_is_stated_in_words_with_its_numbers_in_tables_that_are_explained():
  block = render.judge_block(
    {"name": "probe", "limits": "knows little", "seed": 3, "base": {"path": "a<b", "n": None},
     "auc": {"hex": {"sampled": {"rest": 0.8123, "n": 230}, "written": {"rest": 1.0, "bare": 1.0}}},
     "measured": {s: {"pleasant": {"long hedges": x}} for s, x in (("acc", 1.0), ("hex", 0.9))},
     "gate": {"hex": {"passed": False, "why": ["weak", "few"]}}}
  )  # fmt: skip
  pleasant, other = block["tables"]
  assert pleasant[0] == render.JUDGE_TABLES["pleasant"] and pleasant[1] == ["acc", "hex"]
  assert pleasant[2] == [("long hedges", ["1.00", "0.90"])]
  assert block["limits"] == "Knows little." and other[1] == ["rest", "n", "bare"]
  assert other[2][0] == ("auc · hex · sampled", ["0.81", "230", ""])
  gate = [("gate · hex · passed", "no"), ("gate · hex · why", "weak; few")]
  assert block["facts"][-2:] == gate
  assert ("seed", "3") in block["facts"] and ("base · path", "a<b") in block["facts"]
  assert render.judge_block({})["limits"] == "" and render.judge_block("plain")["name"] == "plain"


@pytest.mark.parametrize("heads", sorted(HEADS.glob("*.safetensors")), ids=lambda p: p.stem)
def test_every_number_of_the_judges_that_ship_stands_in_a_table_with_its_caption(heads):
  with safetensors.safe_open(heads, "np") as file:
    info = json.loads(file.metadata()["rlsafety"])["info"]
  tables = render.judge_block(info)["tables"]
  assert [t[0] for t in tables] == [render.JUDGE_TABLES[k] for k in list(render.JUDGE_TABLES)[:3]]
  assert max(len(head) for _, head, _ in tables) <= 6  # a page's width
  assert all("" not in cells for _, cells in tables[0][2] + tables[2][2])


def test_program_has_help_and_refuses_what_it_does_not_know(tmp_path, capsys):
  with pytest.raises(SystemExit, match="0"):
    render.main(["render", "--help"])
  said = capsys.readouterr().out
  assert "one run as a page to read" in said and "--max_rollouts" in said
  for argv, says in (([], "required: RUN_DIR"), (["x", "--max_rollout=3"], "mean --max_rollouts")):
    with pytest.raises(UserError, match=says):
      render.main(["render", *argv])
  paths = [synthetic_runs.write_run(tmp_path / name, steps=6, eval_every=6) for name in "ab"]
  render.main(["render", *map(str, paths)])
  assert capsys.readouterr().out.splitlines() == [str(path / "report.html") for path in paths]


def test_ticks_are_round_and_inside():
  assert charts.ticks(0, 300, 6) == [0, 50, 100, 150, 200, 250, 300]
  assert charts.ticks(-0.4, 1.1, 3) == [0.0, 0.5, 1.0]
  assert charts.ticks(0, 14, 6, whole=True) == [0, 5, 10]
  assert charts.ticks(0, 1, 1, whole=True) == [0, 1]


@pytest.fixture(scope="module")
def desktop():
  driver = browser(1280, 900)
  yield driver
  driver.quit()


def cards(driver):
  return driver.execute_script("return document.querySelectorAll('.card').length")


def press(driver, key):
  from selenium.webdriver.common.action_chains import ActionChains

  ActionChains(driver).send_keys(key).perform()


def wait(driver, condition):
  """Until a key has had its effect: a busy machine's browser takes its time."""
  from selenium.webdriver.support.ui import WebDriverWait

  WebDriverWait(driver, 20).until(lambda d: d.execute_script(f"return {condition}"))


def test_browser_shows_hostile_text_and_runs_none_of_it(page, desktop):
  desktop.get(page.as_uri())
  body = desktop.execute_script("return document.body.textContent")
  assert HOSTILE[0] in body and desktop.title.endswith("rlsafety report")
  assert not desktop.execute_script("return document.images.length")
  assert not desktop.get_log("browser")  # no error, and no refused connection


def test_browser_filters_keys_and_permalinks(page, desktop):
  desktop.get(page.as_uri() + "#view=change&group=g&sort=dhex")
  assert cards(desktop) == 8  # of 16 held-out prompts
  assert "8 of 16 prompts" in desktop.find_element("id", "count").text
  press(desktop, "j")
  first = desktop.execute_script("return document.activeElement.item.id")
  press(desktop, "j")
  second = desktop.execute_script("return document.activeElement.item.id")
  assert first and second and first != second
  press(desktop, "y")
  link = desktop.current_url
  desktop.get("about:blank")
  desktop.get(link)
  assert desktop.execute_script("return document.activeElement.item.id") == second
  before = desktop.execute_script("return document.activeElement.innerText")
  press(desktop, "l")
  assert "2 of 2" in desktop.execute_script("return document.activeElement.innerText") != before
  press(desktop, "2")
  assert "view=groups" in desktop.current_url
  pairs = desktop.execute_script("return items.map(i => i.prompts.map(p => data.prompts[p]))")
  assert pairs and all(g["gameable"] and not n["gameable"] for g, n in pairs)
  assert all(g["topic"] == n["topic"] for g, n in pairs)
  press(desktop, "r")
  assert desktop.execute_script("return document.forms[0].elements.group.value") == ""
  desktop.get("about:blank")
  desktop.get(page.as_uri())
  for key in "jjk":
    press(desktop, key)
  assert desktop.execute_script("return document.activeElement === cards.children[0]")
  for key, view in (("3", "all"), ("1", "change")):
    press(desktop, key)
    assert desktop.execute_script("return view") == view
  theme = "return document.documentElement.dataset.theme"
  before = desktop.execute_script(theme)
  press(desktop, "t")
  assert desktop.execute_script(theme) not in (before, None)
  press(desktop, "?")
  wait(desktop, "help.open")
  press(desktop, "\ue00c")  # Escape
  wait(desktop, "!help.open")
  press(desktop, "/")
  wait(desktop, "document.activeElement === form.elements.q")
  press(desktop, "jury")
  wait(desktop, "form.elements.q.value === 'jury'")
  desktop.execute_script("refresh()")
  assert "jury" in desktop.current_url and 0 < cards(desktop) < 16


def test_browser_filters_by_topic_factor_and_step(page, desktop):
  for fields, holds in (
    ("view=change&topic=a+carbon+tax", "p.topic === 'a carbon tax'"),
    ("view=change&factor=%5B%22cue%22%2C%22traits%22%5D", "p.factors.cue === 'traits'"),
    ("view=all&step=12&kind=1", "r.step === 12 && r.kind === 1"),
    ("view=all&hi=3&group=n", "r.hex <= 3 && !p.gameable"),
    ("view=change&step=12", "i.columns[1].rows[0].step === 12"),
  ):
    desktop.get("about:blank")
    desktop.get(page.as_uri() + "#" + fields)
    wrong = (
      "return items.filter(i => { const p = data.prompts[i.prompts[0]], r = i.columns[0].rows[0]; "
      f"return !({holds}); }}).length"
    )
    some = desktop.execute_script("return items.length")
    assert some > 0 and desktop.execute_script(wrong) == 0, fields
    every = desktop.execute_script("reset(); return items.length")
    assert some < every or "step=12" in fields, fields


def test_browser_holds_ten_thousand_rollouts_lazily(tmp_path, desktop):
  path = synthetic_runs.write_run(tmp_path / "run", steps=610, samples=4, eval_every=610)
  page = render.write_report(path)
  desktop.get(page.as_uri() + "#view=all&lo=6&sort=hex")
  total = desktop.execute_script("return items.length")
  assert desktop.execute_script("return rows.length") > 9_000
  assert 0 < cards(desktop) < 200 < total
  hexes = desktop.execute_script("return items.map(i => i.hex)")
  assert hexes == sorted(hexes, reverse=True) and min(hexes) >= 6
  desktop.get("about:blank")
  desktop.get(page.as_uri() + "#view=all&card=t600.3.2")
  assert desktop.execute_script("return document.activeElement.item.id") == "t600.3.2"


def test_browser_reaches_every_card_and_prints_open_and_light(tmp_path, desktop):
  path = synthetic_runs.write_run(tmp_path / "run", steps=6, eval_every=6, eval_prompts=60)
  desktop.get(render.write_report(path).as_uri() + "#view=all")
  total = desktop.execute_script("return items.length")
  shown = cards(desktop)
  assert shown < total and f"Show all {total}" in desktop.find_element("id", "more").text
  desktop.execute_script("document.getElementById('more-some').click()")
  assert shown < cards(desktop) < total
  desktop.execute_script("document.getElementById('more-all').click()")
  assert cards(desktop) == total
  assert not desktop.find_element("id", "more").is_displayed()
  closed = "return document.querySelectorAll('details:not([open])').length"
  before = desktop.execute_script(closed)
  desktop.execute_script("setTheme('dark'); dispatchEvent(new Event('beforeprint'))")
  assert before and desktop.execute_script(closed) == 0
  desktop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
  paper = desktop.execute_script("return getComputedStyle(document.body).backgroundColor")
  assert paper == "rgb(255, 255, 255)"  # nothing is tinted up to the margins and no further
  desktop.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
  desktop.execute_script("dispatchEvent(new Event('afterprint')); setTheme('light')")
  assert desktop.execute_script(closed) == before
  printed = base64.b64decode(desktop.execute_cdp_cmd("Page.printToPDF", {})["data"])
  pages = len(re.findall(rb"/Type /Page\b", printed))
  assert 3 < pages < cards(desktop) / 2, pages  # a card to a page left most of each empty


def test_browser_at_phone_width_needs_no_sideways_scrolling(page):
  driver = browser(390, 844)
  try:
    driver.get(page.as_uri())
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    wide = driver.execute_script(
      "return [...document.querySelectorAll('.card, figure, .overview, .tabs, .note')]"
      ".filter(e => e.getBoundingClientRect().right > 391).map(e => e.className)"
    )
    assert wide == []
    columns = driver.execute_script(
      "return getComputedStyle(document.querySelector('.two')).gridTemplateColumns"
    )
    assert len(columns.split()) == 1  # replies one below the other
  finally:
    driver.quit()
