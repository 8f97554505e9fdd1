r"""What a completion's answer is, and when two answers are the same number.

Extraction: outside `<think>...</think>` (the first closing tag ends it; an unclosed one hides all that follows, and
text before a closing tag without an opening one is thinking too), the last `<answer>...</answer>`, else the last
`\boxed{}`, else the text after the last `####`. Untagged text is no answer. Comparison: exact rational value once
currency, thousands separators, units and notation are gone; no tolerance and nothing is evaluated (`2+3` is no
number). What is no number is compared as text.
"""
import re
from fractions import Fraction

MAX_CHARS = 1000  # of an answer: beyond it nothing is parsed, so that a flood of digits costs nothing
MAX_EXPONENT = 100  # 1e999999999 would otherwise fill the memory

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_VALUE = re.compile(
    rf"(?P<sign>[+-]?) ?(?:(?P<whole>[0-9]+) (?=[0-9]+ ?/))?(?P<number>{_NUMBER})(?P<exp>[eE][+-]?[0-9]+)?"
    rf"(?: ?/ ?(?P<under>{_NUMBER}))?(?: ?(?:x|\*) ?10(?:\^|\*\*)[({{]?(?P<ten>[+-]?[0-9]+)[)}}]?)?(?P<unit>.*)", re.S
)  # fmt: skip
_CURRENCY = r"(?:US|A|C|HK)?\$|[€£¥₹]|USD|EUR|GBP|CNY|RMB|Rs\.?"
_SCALES = dict(hundred=10**2, thousand=10**3, million=10**6, billion=10**9, trillion=10**12,
               k=10**3, K=10**3, M=10**6, B=10**9)  # fmt: skip
# a unit is words without digits; these words say that the number before them is not the whole answer
_UNIT = re.compile(r"[^\W\d_]+[²³]?\.?(?:\^\{?-?[0-9]\}?)?(?:[ /·-]+[^\W\d_]+[²³]?\.?(?:\^\{?-?[0-9]\}?)?){0,3}|°[CF]?")
_NOT_UNITS = set("or and not but if maybe to plus minus times over squared cubed pi half halves third thirds quarter "
                 "quarters point".split())  # fmt: skip
_LATEX = (
    (r"\\[!,;: ]|\\q?quad|(?<=\S)~|[\u00a0\u2009\u202f]", " "), (r"\{,\}", ","),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""), (r"\^?\{?\\(?:circ|degree)\}?", "°"),
    (r"\\([%$#&_])", r"\1"), (r"\\[dtc]frac", r"\\frac"), (r"\\(?:times|cdot)", "*"),
    (r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}", r" \1 "), ("[−–]", "-"), ("×", "*"), ("⁄", "/"),
)  # fmt: skip
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}


def outside_thinking(text: str) -> str:
    """The text without its thinking."""
    kept, thinking = [], False
    for part in re.split(r"(</?think>)", text):
        if part == "<think>":
            thinking = True
        elif part == "</think>":
            if not thinking:
                kept = []
            thinking = False
        elif not thinking:
            kept.append(part)
    return "".join(kept)


def extract_answer(text: str) -> str | None:
    """The answer's text, stripped; None if there is none or it is blank."""
    text = outside_thinking(text)
    found = None
    if "</answer>" in text and (closed := re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.S)):
        found = closed[-1]
    elif (boxed := _last_boxed(text)) is not None:
        found = boxed
    elif "####" in text:
        found = text.rsplit("####", 1)[1]
    return (found or "").strip() or None


def same(found: str, gold: str) -> bool:
    """Equal as exact numbers, or as text where either is none. A percent sign may be read as a unit or as a hundredth,
    unless both have one."""
    a, b = value(found), value(gold)
    if a is None or b is None:
        return a is b and bool(found.strip()) and _plain(found) == _plain(gold)
    (x, x_percent), (y, y_percent) = a, b
    return x == y or (x_percent and not y_percent and x / 100 == y) or (y_percent and not x_percent and y / 100 == x)


def value(text: str) -> tuple[Fraction, bool] | None:
    """(exact value, has a percent sign), or None if the text is not one number with at most currency and unit around
    it.
    """
    if len(text) > MAX_CHARS:
        return None
    text = _clean(text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2 ", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r" \1/\2 ", text)
    text = re.sub(r"^(?:[a-zA-Z] ?=|=) ?", "", " ".join(text.split()))
    text = re.sub(rf"^([+-]?) ?(?:{_CURRENCY}) ?(?=[-+.0-9])", r"\1", text)
    text = re.sub(r"^- (?=[0-9.])", "-", text)
    match = _VALUE.fullmatch(text)
    if not match:
        return None
    unit, percent = match["unit"].strip().rstrip(".").strip(), False
    scale = 1
    if head := re.match(r"(%|percent\b|per cent\b)\s*", unit):
        unit, percent = unit[head.end() :], True
    elif (head := re.match(r"([a-zA-Z]+)\b\s*", unit)) and head[1] in _SCALES:
        if len(head[1]) == 1 and match["unit"].startswith(" "):  # `5 k` is a unit, `5k` is a number
            return None
        scale, unit = _SCALES[head[1]], unit[head.end() :]
    unit = re.sub(rf"^(?:{_CURRENCY})$", "", unit)
    words = set(re.split(r"[ /·-]+", unit))
    if unit and (not _UNIT.fullmatch(unit) or _NOT_UNITS & {w.lower() for w in words}):
        return None
    if any(len(w) == 1 and w.isalpha() and w not in "mgshlLJNWVACF" for w in words):  # 5a is algebra, 5 m a length
        return None
    number = _decimal(match["number"])
    if match["under"]:
        under = _decimal(match["under"])
        if not under:
            return None
        number /= under
    exponent = int(match["exp"][1:]) if match["exp"] else 0
    exponent += int(match["ten"]) if match["ten"] else 0
    if abs(exponent) > MAX_EXPONENT:
        return None
    number = (number + int(match["whole"] or 0)) * scale * Fraction(10) ** exponent
    return (-number if match["sign"] == "-" else number), percent


def _decimal(text: str) -> Fraction:
    text = re.sub("[, ]", "", text)
    return Fraction(text + "0" if text.endswith(".") else text)


def _clean(text: str) -> str:
    r"""Notation removed: maths delimiters, `\boxed`, bold marks, full-width digits, spacing, a final full stop."""
    text = text.translate({0xFF10 + i: str(i) for i in range(10)} | {0xFF0E: ".", 0xFF05: "%", 0xFF04: "$"}).strip()
    for vulgar, plain in _VULGAR.items():
        text = text.replace(vulgar, f" {plain}")
    for _ in range(4):  # each layer once: **$\boxed{5}$**
        before = text
        text = text.strip().strip("*`").strip()
        if len(text) > 2 and text[0] == text[-1] == "$":
            text = text[1:-1]
        text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text, flags=re.S)
        if (boxed := re.fullmatch(r"\\boxed\s*\{(.*)\}", text, re.S)) and _last_boxed(text) is not None:
            text = boxed[1]
        if text.endswith(".") and text.count(".") == 1:
            text = text[:-1]
        if text == before:
            break
    for pattern, replacement in _LATEX:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _plain(text: str) -> str:
    """Text to compare when it is no number: notation and blanks removed, case folded."""
    return re.sub(r"\s+", "", _clean(text)).casefold() if len(text) <= MAX_CHARS else text


def _last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance; one pass, however many are left open."""
    opened, found = [], (-1, None)
    for match in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if match[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and start > found[0]:
                found = start, text[start : match.start()]
        elif match[0][-1] == "{" and match[0] != "\\{":
            opened.append(match.end() if len(match[0]) > 1 else None)
    return found[1]
