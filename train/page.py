"""One self-contained HTML page: sections, tiles, tables and pictures in it, nothing loaded from anywhere, readable on a phone."""
from __future__ import annotations

import base64
import dataclasses
import html
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is markup already; every other text is escaped."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading of the page and of its menu; an empty body leaves both out."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    shown = [s for s in sections if s.body]
    menu = "".join(f'<a href="#{s.anchor}">{text(s.title)}</a>' for s in shown)
    body = "".join(f'<section id="{s.anchor}"><h2>{text(s.title)}</h2>{s.body}</section>' for s in shown)
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{text(title)}</title><style>{CSS}</style></head><body><header><h1>{text(title)}</h1>'
            f'<p class="sub">{text(subtitle)}</p></header><nav>{menu}</nav><main>{body}</main></body></html>\n')


def text(value: Any) -> str:
    """A cell or a phrase as markup: numbers short, None as a dash."""
    if isinstance(value, Html):
        return value
    if value is None or value == "":
        return '<span class="none">–</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def number(value: float) -> str:
    """Three or four digits that matter."""
    size = abs(value)
    for least, form in ((1000, ",.0f"), (100, ".1f"), (10, ".2f"), (1e-2, ".3f")):
        if size >= least:
            return format(value, form)
    return format(value, ".2g") if size else "0"


def paragraph(*sentences: str) -> Html:
    """Sentences as one paragraph; empty ones are left out."""
    return Html(f"<p>{' '.join(text(s) for s in sentences if s)}</p>")


def tiles(entries: Iterable[tuple[str, Any, Any]]) -> Html:
    """The few numbers to see first: (label, value, remark)."""
    return Html('<div class="tiles">' + "".join(
        f'<div class="tile"><div class="label">{text(label)}</div><div class="value">{text(value)}</div>'
        f'<div class="remark">{text(remark) if remark else ""}</div></div>' for label, value, remark in entries) + "</div>")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", marked: Iterable[int] = ()) -> Html:
    """A table that scrolls sideways inside itself where it is too wide; rows whose numbers are in `marked` stand out."""
    marked, body = set(marked), ""
    for i, row in enumerate(rows):
        cells = "".join(f'<td class="{"n" if _numeric(cell) else ""}">{text(cell)}</td>' for cell in row)
        body += f'<tr class="{"marked" if i in marked else ""}">{cells}</tr>'
    head = "".join(f"<th>{text(c) if c else ''}</th>" for c in columns)
    note = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Html(f'<figure class="table"><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
                f"{note}</figure>")


def _numeric(cell: Any) -> bool:
    """True for what must not be broken: a number, a signed one, an interval."""
    return cell[:1] in ("[", "+", "-") if isinstance(cell, str) else isinstance(cell, (int, float))


def picture(path: pathlib.Path, caption: str = "", wide: bool = False) -> Html:
    """A PNG inlined; its caption is what it shows, also for who cannot see it."""
    data = base64.b64encode(path.read_bytes()).decode()
    note = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Html(f'<figure class="{"wide" if wide else ""}"><img alt="{html.escape(caption or path.stem, quote=True)}" '
                f'src="data:image/png;base64,{data}">{note}</figure>')


def grid(*items: str) -> Html:
    """Pictures or tables, two abreast where there is room."""
    shown = [i for i in items if i]
    return Html(f'<div class="grid">{"".join(shown)}</div>' if shown else "")


def badge(good: bool | None, words: str) -> Html:
    """A verdict: green, red, or grey where neither."""
    return Html(f'<span class="badge {"grey" if good is None else "good" if good else "bad"}">{html.escape(words)}</span>')


def fold(title: str, body: str) -> Html:
    """What is there but not in the way."""
    return Html(f"<details><summary>{text(title)}</summary>{body}</details>")


def code(words: str) -> Html:
    return Html(f"<code>{html.escape(words)}</code>")


def pre(words: str) -> Html:
    return Html(f"<pre>{html.escape(words)}</pre>")


def data(identifier: str, value: Any) -> Html:
    """JSON for a script of the page; no text in it can end the script."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for mark, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        plain = plain.replace(mark, escaped)
    return Html(f'<script type="application/json" id="{identifier}">{plain}</script>')


def settings(flat: Mapping[str, Any]) -> Html:
    """Dotted leaves as a table, one block for each first name."""
    blocks: dict[str, list[tuple[Any, Any]]] = {}
    for path, value in flat.items():
        first, _, rest = path.partition(".")
        blocks.setdefault(first if rest else "run", []).append((code(rest or first), code(json.dumps(value, ensure_ascii=False))))
    return grid(*(table((name, ""), rows) for name, rows in blocks.items()))


CSS = """
:root{--ink:#1f2933;--muted:#66727f;--line:#e4e7eb;--paper:#fff;--back:#f5f6f8;--blue:#2563a8;--good:#1d7a4f;--bad:#b42318}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:36px;padding-bottom:14px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:1.25rem;margin:0 0 10px}
h3{font-size:1rem;margin:22px 0 6px}
.sub{margin:0;color:var(--muted);overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:2;background:rgba(245,246,248,.95);border-bottom:1px solid var(--line);display:flex;gap:4px;
 overflow-x:auto;padding:8px max(24px,calc((100% - 1072px)/2));scrollbar-width:none}
nav a{color:var(--muted);text-decoration:none;white-space:nowrap;padding:3px 10px;border-radius:99px;font-size:.88rem}
nav a:hover{background:var(--line);color:var(--ink)}
section{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:18px 0;scroll-margin-top:52px}
p{max-width:74ch;margin:0 0 12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:6px 0 16px}
.tile{border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.label{color:var(--muted);font-size:.8rem}
.value{font-size:1.45rem;font-weight:650;font-variant-numeric:tabular-nums;line-height:1.3}
.remark{font-size:.8rem;color:var(--muted)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:14px 22px;align-items:start}
figure{margin:8px 0;min-width:0}
figure img{width:100%;height:auto;display:block}
figure.wide{max-width:660px}
figcaption{color:var(--muted);font-size:.86rem;margin-top:4px;max-width:74ch}
.scroll{overflow-x:auto;background:linear-gradient(to right,#fff 40%,#fff0) left/40px 100% no-repeat local,
 linear-gradient(to left,#fff 40%,#fff0) right/40px 100% no-repeat local,
 linear-gradient(to right,#0002,#0000) left/10px 100% no-repeat scroll,
 linear-gradient(to left,#0002,#0000) right/10px 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,280px)}
th{text-align:left;color:var(--muted);font-weight:600;font-size:.8rem;vertical-align:bottom}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line)}
td{vertical-align:top;font-variant-numeric:tabular-nums}
td.n{text-align:left;white-space:nowrap}
tr.marked td{background:#fff6d6}
code{font:.86em ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{font:.84rem/1.45 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:var(--back);border-radius:8px;padding:10px 12px;
 white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 10px}
.under{color:#8a95a1;font-size:.76rem;white-space:nowrap}
mark{background:#ffe9a8;border-radius:4px;padding:0 3px}
.none{color:#a3adb8}
.badge{display:inline-block;border-radius:99px;padding:1px 9px;font-size:.8rem;font-weight:600;white-space:nowrap}
.good{background:#e2f4ea;color:var(--good)}
.bad{background:#fde8e6;color:var(--bad)}
.grey{background:var(--line);color:var(--muted)}
details{margin:10px 0}
summary{cursor:pointer;color:var(--blue);font-size:.92rem}
.bar{display:flex;flex-wrap:wrap;gap:8px;margin:8px 0 12px;align-items:center}
select,button,input{font:inherit;font-size:.88rem;padding:5px 9px;border:1px solid #cbd2d9;border-radius:8px;background:#fff;
 color:var(--ink);max-width:100%}
button.on{background:var(--blue);border-color:var(--blue);color:#fff}
.trace{border:1px solid var(--line);border-radius:10px;padding:10px 14px;margin:0 0 10px}
.trace .meta{color:var(--muted);font-size:.82rem;margin-bottom:4px}
.trace pre.ask{background:none;padding:0;margin:0 0 6px;font-weight:650}
.think{color:#5b6f86}
@media(max-width:600px){
 header,main{padding-left:12px;padding-right:12px}
 nav{padding-left:8px;padding-right:8px}
 section{padding:16px 14px;border-radius:10px}
 h1{font-size:1.45rem}
 .tiles{grid-template-columns:repeat(2,1fr)}
 .tile{padding:8px 10px}
 .value{font-size:1.2rem}
}
@media print{nav,.bar{display:none}section{break-inside:avoid}}
"""
