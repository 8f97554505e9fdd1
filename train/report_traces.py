"""The browser of sample traces in a report: filter wrong, long or mixed ones, two stages side by side on one prompt.

Reads lines of samples.jsonl: stage, step, prompt, completion, reward, answer, right; `length` (tokens) and `consistency` (share of the
text in one language) where a line has them, else words are counted and both kinds of digits are looked for.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from train import page

PER_STAGE = 400  # newest lines of a stage kept in the page: some 200 bytes each
LONG = 0.75  # quantile of a stage's lengths above which a trace is long


def browser(samples: Sequence[dict[str, Any]]) -> str:
    """The controls, the traces as JSON, and the script that shows them; '' without samples."""
    rows = records(samples)
    if not rows:
        return ""
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    options = "".join(f"<option>{page.text(s)}</option>" for s in stages)
    filters = "".join(f'<button data-filter="{f}" class="{"on" if f == "all" else ""}">{f}</button>'
                      for f in ("all", "wrong", "right", "long", "mixed"))
    return page.Html(
        f'<div class="bar"><label>stage <select id="stage-a">{options}</select></label>'
        f'<label>beside <select id="stage-b"><option value="">none</option>{options}</select></label>{filters}'
        '<input id="find" type="search" placeholder="prompt or text" aria-label="find in prompts and texts">'
        '<span id="counted" class="none"></span></div><div id="trace-list"></div><button id="more">more</button>'
        f"{page.data('trace-data', rows)}<script>{SCRIPT}</script>")


def records(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page keeps of each line: stage, step, prompt, text, reward, answer, right, length, long, mixed."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for line in samples:
        if "completion" in line:
            by_stage.setdefault(line.get("stage") or "run", []).append(line)
    rows = []
    for stage, lines in by_stage.items():
        lines = lines[-PER_STAGE:]
        lengths = [line.get("length") or len(str(line["completion"]).split()) for line in lines]
        bound = sorted(lengths)[min(len(lengths) - 1, int(LONG * len(lengths)))]
        rows += [dict(stage=stage, step=line.get("step"), prompt=str(line.get("prompt", "")), text=str(line["completion"]),
                      reward=line.get("reward"), answer=line.get("answer"), right=line.get("right"), length=n,
                      long=n >= bound and n > min(lengths), mixed=mixed(line)) for line, n in zip(lines, lengths, strict=True)]
    return rows


def mixed(line: dict[str, Any]) -> bool:
    """Two written languages in one completion."""
    if line.get("consistency") is not None:
        return line["consistency"] < 1
    words = str(line["completion"])
    return bool(re.search("[0-9A-Za-z]", re.sub("<[^>]*>", "", words)) and re.search("[\u3007\u4e00-\u9fff]", words))


SCRIPT = """
(() => {
const rows = JSON.parse(document.getElementById('trace-data').textContent);
const at = id => document.getElementById(id);
const a = at('stage-a'), b = at('stage-b'), find = at('find'), list = at('trace-list'), more = at('more');
const buttons = [...document.querySelectorAll('[data-filter]')];
let filter = 'all', shown = 12;
const keep = {all: r => true, wrong: r => r.right === false, right: r => r.right === true, long: r => r.long, mixed: r => r.mixed};
const make = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text !== undefined)
  e.textContent = text; return e; };
function words(text) {
  const pre = make('pre');
  for (const part of text.split(/(<think>[^]*?(?:<\\/think>|$))/))
    pre.append(make('span', part.startsWith('<think>') ? 'think' : '', part));
  return pre;
}
function meta(r) {
  const m = make('div', 'meta');
  if (r.right !== null) { m.append(make('span', 'badge ' + (r.right ? 'good' : 'bad'), r.right ? 'right' : 'wrong'), ' '); }
  m.append([r.stage, 'step ' + r.step, r.length + ' tokens', r.reward === null ? '' : 'reward ' + (+r.reward).toFixed(2),
    r.answer === null ? '' : 'gold ' + r.answer].filter(Boolean).join(' · '));
  if (r.mixed) m.append(' ', make('span', 'badge grey', 'mixed'));
  return m;
}
function draw() {
  const q = find.value.toLowerCase(), other = new Map();
  for (const r of rows) if (r.stage === b.value) other.set(r.prompt, r);
  let chosen = rows.filter(r => r.stage === a.value && keep[filter](r) && (r.prompt + r.text).toLowerCase().includes(q)).reverse();
  if (b.value) { const seen = new Set();
    chosen = chosen.filter(r => other.has(r.prompt) && !seen.has(r.prompt) && seen.add(r.prompt)); }
  list.replaceChildren(...chosen.slice(0, shown).map(r => {
    const box = make('div', 'trace'), pair = make('div', b.value ? 'grid' : '');
    box.append(make('pre', 'ask', r.prompt), pair);
    for (const one of b.value ? [r, other.get(r.prompt)] : [r]) { const side = make('div'); side.append(meta(one), words(one.text));
      pair.append(side); }
    return box;
  }));
  at('counted').textContent = chosen.length + (b.value ? ' prompts in both, chosen by ' + a.value : ' traces');
  more.hidden = chosen.length <= shown;
}
for (const x of buttons) x.onclick = () => { filter = x.dataset.filter; shown = 12;
  buttons.forEach(y => y.classList.toggle('on', y === x)); draw(); };
a.onchange = b.onchange = find.oninput = () => { shown = 12; draw(); };
more.onclick = () => { shown += 24; draw(); };
draw();
})();
"""
