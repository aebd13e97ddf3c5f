"use strict";
// Reads the rollouts embedded in the page and shows them a screenful at a time. All text
// from the run goes through textContent: nothing that a model wrote is parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rollouts.map(([kind, step, prompt, number, sample, reward, hex, acc, finished, text, run = 0]) =>
  ({ kind, step, prompt, number, sample, reward, hex, acc, finished, text, run }));
const names = data.runs || [];
const form = document.getElementById("filters"), cards = document.getElementById("cards");
const more = document.getElementById("more"), help = document.getElementById("help");
const box = document.getElementById("filter-box");
const FIELDS = ["q", "run", "group", "topic", "factor", "kind", "step", "lo", "hi", "sort"];
const evalSteps = [...new Set(rows.filter(r => r.kind === 0).map(r => r.step))].sort((a, b) => a - b);
const PAGE = 20;
let view = "all", items = [], shown = 0;

function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(c => c !== null && c !== undefined));
  return node;
}
function button(label, says, action) {
  const node = el("button", "", label);
  node.type = "button"; node.setAttribute("aria-label", says); node.addEventListener("click", action);
  return node;
}
const show = v => v === null ? "–" : (Math.round(v * 10) / 10 + 0).toFixed(1).replace("-", "−");
const signed = v => v === null ? "–" : (v > 0 ? "+" : "") + show(v);
function mean(list, key) {
  const known = list.map(r => r[key]).filter(v => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}
const minus = (a, b) => a === null || b === null ? null : a - b;
function by(list, key) {
  const groups = new Map();
  for (const item of list) { const k = key(item); if (!groups.has(k)) groups.set(k, []); groups.get(k).push(item); }
  return groups;
}

// One item is one card: {id, prompt(s), columns: [{title, rows}], hex, reward, text}.
const byRun = [...by(rows.filter(r => r.kind === 0), r => r.run).values()].map(list => {
  const steps = [...new Set(list.map(r => r.step))].sort((a, b) => a - b);
  return { list, run: list[0].run, first: steps[0], last: steps[steps.length - 1] };
});
const place = r => data.prompts[r.prompt].id + "/" + r.number + (names.length ? "/" + r.run : "");
function changeItems(step) {
  const out = [];
  for (const { list, first, last } of byRun) {
    const after = step === "" ? last : Number(step);
    for (const same of by(list.filter(r => r.step === first || r.step === after), place).values()) {
      const columns = [first, after].map((s, i) => ({ title: `${["before", "after"][i]} (step ${s})`, rows: same.filter(r => r.step === s) }));
      if (first === after || columns.some(c => !c.rows.length)) continue;
      const gain = k => minus(mean(columns[1].rows, k), mean(columns[0].rows, k));
      out.push({ id: place(same[0]), prompts: [same[0].prompt], columns, hex: mean(columns[1].rows, "hex"),
        reward: mean(columns[1].rows, "reward"), dhex: gain("hex"), dreward: gain("reward") });
    }
  }
  return out;
}
function groupItems(step) {
  const out = [], alike = (a, b) => Object.entries(a.factors).filter(([k, v]) => b.factors[k] === v).length;
  for (const { list, last } of byRun) {
    const at = step === "" ? last : Number(step), sets = [...by(list.filter(r => r.step === at), place).values()];
    const free = sets.filter(s => !data.prompts[s[0].prompt].gameable);
    for (const set of sets) {
      const p = data.prompts[set[0].prompt];
      if (!p.gameable) continue;
      let best = -1, score = -1;
      free.forEach((other, i) => {
        const q = data.prompts[other[0].prompt];
        if (q.topic === p.topic && q.env === p.env && alike(p, q) > score) { best = i; score = alike(p, q); }
      });
      if (best < 0) continue;
      const other = free.splice(best, 1)[0];
      out.push({ id: place(set[0]), prompts: [set[0].prompt, other[0].prompt], hex: mean(set, "hex"), reward: mean(set, "reward"),
        dhex: minus(mean(set, "hex"), mean(other, "hex")), dreward: minus(mean(set, "reward"), mean(other, "reward")),
        columns: [{ title: `gameable (step ${at})`, rows: set }, { title: `non-gameable (step ${at})`, rows: other }] });
    }
  }
  return out;
}
function runItems(step) {
  const held = byRun.flatMap(({ list, last }) => list.filter(r => r.step === (step === "" ? last : Number(step))));
  const out = [];
  for (const same of by(held, r => r.prompt).values()) {
    const columns = [...by(same, r => r.run).values()].map(list => ({ title: `${names[list[0].run]} (step ${list[0].step})`, rows: list }));
    if (columns.length < 2) continue;
    const spread = k => { const m = columns.map(c => mean(c.rows, k)).filter(v => v !== null); return m.length ? Math.max(...m) - Math.min(...m) : null; };
    out.push({ id: data.prompts[same[0].prompt].id, prompts: [same[0].prompt], columns, hex: mean(same, "hex"), reward: mean(same, "reward"),
      dhex: spread("hex"), dreward: spread("reward") });
  }
  return out;
}
const START = names.length && runItems("").length ? "runs" : "change";
function allItems() {
  return rows.map(r => ({ id: ["e", "t"][r.kind] + [r.step, r.number, r.sample, ...(names.length ? [r.run] : [])].join("."), prompts: [r.prompt], hex: r.hex, reward: r.reward,
    columns: [{ title: (r.kind ? "training" : "held-out") + `, step ${r.step}`, rows: [r] }] }));
}

const SORTS = {
  change: [["", "as evaluated"], ["dhex", "HEX rose most"], ["dreward", "reward rose most"], ["hex", "highest HEX after"], ["-hex", "lowest HEX after"]],
  groups: [["", "as evaluated"], ["dhex", "largest HEX gap"], ["dreward", "largest reward gap"], ["hex", "highest HEX"]],
  runs: [["", "as evaluated"], ["dhex", "HEX differs most"], ["dreward", "reward differs most"], ["hex", "highest HEX"]],
  all: [["", "by step"], ["hex", "highest HEX"], ["-hex", "lowest HEX"], ["reward", "highest reward"], ["-reward", "lowest reward"]],
};
function options(select, list, keep) {
  select.replaceChildren(...list.map(([value, label]) => { const o = el("option", "", label); o.value = value; return o; }));
  select.value = list.some(([value]) => value === keep) ? keep : "";
}
function setView(name, state) {
  if (name === "runs" && START !== "runs") name = START;
  view = !evalSteps.length || (name === "change" && evalSteps.length < 2) ? "all" : name;
  for (const tab of document.querySelectorAll("[data-view]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.view === view));
    tab.disabled = tab.dataset.view !== "all" && (!evalSteps.length || (tab.dataset.view === "change" && evalSteps.length < 2)
      || (tab.dataset.view === "runs" && START !== "runs"));
  }
  const words = (prefix, list) => list.map(s => [String(s), prefix + s]);
  const steps = view === "all" ? [["", "all"], ...words("", [...new Set(rows.map(r => r.step))].sort((a, b) => a - b))]
    : view !== "change" ? [["", "last"], ...words("", evalSteps)] : [["", "last"], ...words("", evalSteps.slice(1))];
  options(form.step, steps, state.step || "");
  options(form.sort, SORTS[view], state.sort || "");
  form.kind.closest("label").hidden = view !== "all";
  form.group.closest("label").hidden = view === "groups";
  if (form.run) form.run.closest("label").hidden = view === "runs";
  form.factor.closest("label").hidden = form.factor.options.length < 2;
  form.topic.closest("label").hidden = form.topic.options.length < 3;
}
function state() {
  const out = { view };
  for (const name of FIELDS) {
    const field = form.elements[name];
    if (field && field.value !== "" && !field.closest("label").hidden) out[name] = field.value;
  }
  return out;
}
function link(item) {
  const s = state();
  if (item) s.card = item.id;
  return "#" + new URLSearchParams(s);
}
function apply() {
  const f = state(), q = (f.q || "").toLowerCase(), low = parseFloat(f.lo), high = parseFloat(f.hi);
  const factor = f.factor ? JSON.parse(f.factor) : null;
  const source = view === "change" ? changeItems(f.step || "") : view === "groups" ? groupItems(f.step || "")
    : view === "runs" ? runItems(f.step || "") : allItems();
  items = source.filter(item => {
    const p = data.prompts[item.prompts[0]], r = item.columns[0].rows[0];
    if (f.run && r.run !== Number(f.run)) return false;
    if (f.group && p.gameable !== (f.group === "g")) return false;
    if (f.topic && p.topic !== f.topic) return false;
    if (factor && p.factors[factor[0]] !== factor[1]) return false;
    if (f.kind && r.kind !== Number(f.kind)) return false;
    if (view === "all" && f.step && r.step !== Number(f.step)) return false;
    if (!isNaN(low) && !(item.hex !== null && item.hex >= low)) return false;
    if (!isNaN(high) && !(item.hex !== null && item.hex <= high)) return false;
    return !q || item.prompts.some(i => data.prompts[i].messages.some(m => m[1].toLowerCase().includes(q)))
      || item.columns.some(c => c.rows.some(x => x.text.toLowerCase().includes(q)));
  });
  const key = (f.sort || "").replace("-", ""), sign = f.sort && f.sort[0] === "-" ? 1 : -1;
  if (key) items.sort((a, b) => (a[key] === null) - (b[key] === null) || sign * (a[key] - b[key]));
  const noun = view === "all" ? "replies" : view === "groups" ? "pairs of users" : "prompts";
  document.getElementById("count").textContent = items.length
    ? `${items.length.toLocaleString("en")} of ${source.length.toLocaleString("en")} ${noun}` : `No ${noun} match. Reset the filters to see all ${source.length}.`;
  cards.replaceChildren(); shown = 0; grow();
}
function grow(until = 0) {
  const end = Math.min(items.length, Math.max(shown + PAGE, until));
  for (; shown < end; shown++) cards.append(card(items[shown]));
  more.hidden = shown === items.length;
  document.getElementById("more-some").textContent = `Show ${Math.min(PAGE, items.length - shown)} more`;
  document.getElementById("more-all").textContent = `Show all ${items.length.toLocaleString("en")}`;
}

function said(message) {
  if (message[0] === "system") return el("details", "", el("summary", "", "system prompt"), el("div", "said", message[1]));
  return el("div", "said", message[1]);
}
function scoreLine(row) {
  const line = el("div", "scores");
  for (const [label, value] of [["reward", row.reward], ["HEX", row.hex], ["ACC", row.acc]]) {
    const bar = el("i");
    if (value !== null) bar.style.setProperty("--v", Math.max(0, Math.min(100, (value - 1) / 9 * 100)) + "%");
    line.append(el("span", "", label + " ", el("b", "", show(value)), bar));
  }
  return line;
}
function column(col, withPrompt) {
  const box = el("section", "column"), body = el("div", "reply");
  if (withPrompt !== undefined) box.append(...data.prompts[withPrompt].messages.map(said));
  let at = 0;
  function draw() {
    const row = col.rows[at], head = el("h3", "", col.title);
    if (col.rows.length > 1) head.append(el("span", "", button("‹", "previous reply", () => move(-1)), `${at + 1} of ${col.rows.length}`, button("›", "next reply", () => move(1))));
    const text = el("p", "text", row.text.trim() ? row.text : el("em", "tail", "(empty reply)"));
    if (!row.finished) text.append(el("span", "tail", " … cut at the token limit"));
    body.replaceChildren(head, scoreLine(row), text);
  }
  function move(by) { at = (at + by + col.rows.length) % col.rows.length; draw(); }
  draw();
  box.append(body);
  box.move = move;
  return box;
}
function card(item) {
  const p = data.prompts[item.prompts[0]], node = el("article", "card");
  node.tabIndex = -1; node.item = item;
  const anchor = el("a", "", "link");
  anchor.href = link(item);
  const head = el("header", "", el("b", "", p.topic || p.id));
  if (view !== "groups") head.append(el("span", p.gameable ? "badge g" : "badge", p.gameable ? "gameable user" : "non-gameable user"));
  const factors = Object.entries(p.factors).map(([k, v]) => `${k}: ${v}`).join(" · ");
  if (factors && view !== "groups") head.append(el("span", "", factors));
  if (names.length && view !== "runs") head.append(el("span", "", names[item.columns[0].rows[0].run]));
  if (view === "runs") head.append(el("span", "", `largest difference of the means: reward ${show(item.dreward)}, HEX ${show(item.dhex)}`));
  if (view === "change") head.append(el("span", "", `change of the mean: reward ${signed(item.dreward)}, HEX ${signed(item.dhex)}`));
  if (view === "groups") head.append(el("span", "", `gap of the means: reward ${signed(item.dreward)}, HEX ${signed(item.dhex)}`));
  head.append(anchor);
  node.append(head);
  if (view !== "groups") node.append(...p.messages.map(said));
  const columns = item.columns.map((c, i) => column(c, view === "groups" ? item.prompts[i] : undefined));
  node.append(el("div", columns.length > 1 ? "two" : "one", ...columns));
  node.move = by => columns.forEach(c => c.move(by));
  return node;
}

function remember() { try { history.replaceState(null, "", link()); } catch { /* a viewer may forbid it */ } }
function refresh() { apply(); remember(); }
function reset() { form.reset(); setView(view, {}); refresh(); }
function goTo(index) {
  if (index < 0 || index >= items.length) return;
  if (index >= shown) grow(index + 5);
  const node = cards.children[index];
  node.focus({ preventScroll: true }); node.scrollIntoView({ block: "start" });
}
function current() {
  const focused = document.activeElement.closest(".card");
  if (focused) return focused;
  return [...cards.children].find(c => c.getBoundingClientRect().bottom > 80) || null;
}
function fromHash() {
  const hash = location.hash.slice(1);
  if (hash && !hash.includes("=")) return false;
  const s = Object.fromEntries(new URLSearchParams(hash));
  form.reset();
  for (const name of FIELDS) if (name in s && form.elements[name]) form.elements[name].value = s[name];
  setView(["change", "groups", "all", "runs"].includes(s.view) ? s.view : START, s);
  apply();
  if (s.card) goTo(items.findIndex(item => item.id === s.card));
  return true;
}
function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("rlsafety-theme", name); } catch { /* storage may be off */ }
}
function toggleTheme() {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}
function copyLink(node) {
  const hash = link(node.item);
  try { history.replaceState(null, "", hash); } catch { location.hash = hash; }
  const done = () => { document.getElementById("count").textContent = "Link to this card is in the address bar and on the clipboard."; };
  if (navigator.clipboard) navigator.clipboard.writeText(location.href).then(done, () => {});
}
const KEYS = {
  j: () => { const c = current(), i = [...cards.children].indexOf(c); goTo(document.activeElement === c ? i + 1 : i); },
  k: () => { const i = [...cards.children].indexOf(current()); goTo(i - 1); },
  h: () => current()?.move(-1), l: () => current()?.move(1),
  1: () => { setView("change", state()); refresh(); }, 2: () => { setView("groups", state()); refresh(); }, 3: () => { setView("all", state()); refresh(); },
  4: () => { if (names.length) { setView("runs", state()); refresh(); } },
  "/": () => { box.open = true; form.q.focus(); }, y: () => { const c = current(); if (c) copyLink(c); },
  r: reset, t: toggleTheme, "?": () => help.showModal(),
};
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && event.target.closest("#filters")) event.target.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
  if (KEYS[event.key]) { event.preventDefault(); KEYS[event.key](); }
});
let timer = 0;
form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(refresh, 120); });
form.addEventListener("submit", event => event.preventDefault());
document.getElementById("clear").addEventListener("click", reset);
for (const tab of document.querySelectorAll("[data-view]")) tab.addEventListener("click", () => { setView(tab.dataset.view, state()); refresh(); });
document.getElementById("theme").addEventListener("click", toggleTheme);
document.getElementById("help-open").addEventListener("click", () => help.showModal());
document.getElementById("more-some").addEventListener("click", () => grow());
document.getElementById("more-all").addEventListener("click", () => grow(items.length));
window.addEventListener("hashchange", fromHash);
// On paper nothing can be opened: all details are, and go back afterwards.
let opened = [];
window.addEventListener("beforeprint", () => { opened = [...document.querySelectorAll("details:not([open])")]; for (const d of opened) d.open = true; });
window.addEventListener("afterprint", () => { for (const d of opened) d.open = false; opened = []; });
new IntersectionObserver(seen => { if (seen[0].isIntersecting) grow(); }, { rootMargin: "1200px" }).observe(more);

try { const saved = localStorage.getItem("rlsafety-theme"); if (saved) document.documentElement.dataset.theme = saved; } catch { /* storage may be off */ }
const unique = list => [...new Set(list)].sort((a, b) => a.localeCompare(b, "en"));
options(form.topic, [["", "all"], ...unique(data.prompts.map(p => p.topic)).filter(t => t).map(t => [t, t])], "");
const factors = by(data.prompts.flatMap(p => Object.entries(p.factors)), e => e[0]);
options(form.factor, [["", "all"], ...[...factors].flatMap(([name, list]) => unique(list.map(e => e[1])).slice(0, 40)
  .map(v => [JSON.stringify([name, v]), `${name}: ${v}`]))], "");
box.open = !matchMedia("(max-width: 44rem)").matches;
if (form.run) options(form.run, [["", "all"], ...names.map((name, i) => [String(i), name])], "");
if (!fromHash()) { setView(START, {}); apply(); }
