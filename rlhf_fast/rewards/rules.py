"""Rules that check a response: an answer's equality, a number, a letter, tags, JSON, a length. Each gives 0.0 to 1.0.

Responses are hostile: nothing in them is executed, every rule reads them in linear time, and a number too long to be
meant is compared as text. For the same reason there is no rule for a pattern of one's own: Python's `re` may take
exponential time on a text that was made for it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rlhf_fast.config.settings import nearest

MAX_DIGITS = 100  # of a number; its exponent may be as large

_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*([-+]?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])([0-9]))")
_UNIT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
# A sign after a digit, a letter or a bracket subtracts; digits after a letter or a point belong to a name or a version.
_NUMBER = re.compile(
    r"((?:(?<![A-Za-z0-9.)\]}])[-+])?(?<![A-Za-z0-9.])"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))"
    r"(?:[eE]([-+]?[0-9]+))?(?:\s?/\s?([0-9]+))?(\s?%)?"
)
_SAID = re.compile(r"(?i:answer)(?:\s{1,9}(?i:is))?\s{0,9}[:=]?\s{0,9}[*_\"'(\[]{0,9}([A-Z])(?![A-Za-z'])")
_LETTER = re.compile(r"[*_\"'(\[]{0,9}([A-Za-z])[*_\"')\].:]{0,9}")
_LETTER_FIRST = re.compile(r"[*_\"'(\[]{0,9}([A-Z])[*_\"')\].:]{1,9}\s")


def exact(response: str, answer: Any) -> float:
    """1.0 for the answer (or one of a list of them); case, width, spacing and a closing full stop do not count."""
    accepted = answer if isinstance(answer, list | tuple) else [answer]
    return float(_normal(response) in {_normal(_text(each)) for each in accepted})


def math_answer(response: str, answer: Any) -> float:
    r"""1.0 when the final answer of a response equals `answer`.

    The final answer is the last `\\boxed{...}`, or what follows the last `####`, or the last number. Numbers are equal
    when they are exactly the same: 1,000 and 1e3; 1/2, \\frac{1}{2}, 0.5 and 50%. Other answers, which need the box or
    the `####`, are compared as LaTeX without its spacing. `answer` may itself be a worked solution with such an end.
    """
    text = _text(answer)
    expected = _marked(text)
    expected = text if expected is None else expected
    wanted = _value(expected)
    given = _marked(response)
    if given is None:
        return float(wanted is not None and _last_number(response) == wanted)
    value = _value(given)
    if wanted is not None and value is not None:
        return float(value == wanted)
    return float(_plain_latex(given) == _plain_latex(expected))


def choice(response: str, answer: Any) -> float:
    r"""1.0 when the letter chosen in a response is that of `answer`, such as "B" or "(B)".

    It is that of the last `\\boxed{B}`, or of the last "answer is B", or the one that is or begins the response.
    """
    text = _text(answer)
    expected = _LETTER.fullmatch(text.strip())
    if expected is None:
        raise ValueError(f"answer: {text[:80]!r}; expected a letter")
    return float(_chosen(response) == expected[1].upper())


def tags(response: str, names: Sequence[str]) -> float:
    """1.0 when the response is `<name>...</name>` for each of the names, in this order, once, and nothing else."""
    rest = response.strip()
    for name in names:
        start, end = f"<{name}>", f"</{name}>"
        if response.count(start) != 1 or response.count(end) != 1 or not rest.startswith(start) or end not in rest:
            return 0.0
        rest = rest.partition(end)[2].lstrip()
    return float(not rest)


def json_object(response: str, keys: Sequence[str] = ()) -> float:
    """1.0 when the response is a JSON object, alone or in one fence; with `keys`, the share of them that it has."""
    text = response.strip()
    if text.startswith("```") and text.endswith("```") and len(text) > 6:
        text = text[3:-3].removeprefix("json")
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # the latter for thousands of brackets
        return 0.0
    if not isinstance(value, dict):
        return 0.0
    return sum(key in value for key in keys) / len(keys) if keys else 1.0


def length(response: str, target: int) -> float:
    """1.0 for `target` words, falling evenly to 0.0 at none and at twice as many."""
    return max(0.0, 1.0 - abs(len(response.split()) - target) / target)


WITH_ANSWER: dict[str, Callable[[str, Any], float]] = {"exact": exact, "math": math_answer, "choice": choice}
RULES = (*WITH_ANSWER, "tags", "json", "length")


def rule(text: str) -> Callable[..., list[float | None]]:
    """The reward function that `text` means: `exact`, `math`, `choice`, `tags:think,answer`, `json`, `json:name,age`
    or `length:200`.

    The first three ask for the column `answer`; where that is null, they have no score.

    Raises:
        ValueError: no such rule, or not with this after its colon.
    """
    name, _, argument = text.partition(":")
    if name in WITH_ANSWER and not argument:
        return _with_answers(WITH_ANSWER[name], text)
    items = argument.split(",")
    if name == "tags" and all(re.fullmatch(r"[A-Za-z][\w-]*", item) for item in items):
        return lambda prompts, responses: [tags(response, items) for response in responses]
    if name == "json" and (all(items) or not argument):
        return lambda prompts, responses: [json_object(response, items if argument else ()) for response in responses]
    if name == "length" and re.fullmatch(r"[1-9][0-9]{0,8}", argument):
        return lambda prompts, responses: [length(response, int(argument)) for response in responses]
    if name in RULES:
        usage = {"tags": "rule:tags:think,answer", "json": "rule:json:name,age", "length": "rule:length:200"}
        raise ValueError(f"reward: rule:{text}; expected {usage.get(name, f'rule:{name} alone')}")
    raise ValueError(f"reward: there is no rule {name!r}; the nearest one is {nearest(name, RULES)!r}")


def _with_answers(check: Callable[[str, Any], float], name: str) -> Callable[..., list[float | None]]:
    def score(prompts: list[Any], responses: list[str], answer: list[Any]) -> list[float | None]:
        scores: list[float | None] = []
        for i, (response, expected) in enumerate(zip(responses, answer, strict=True)):
            try:
                scores.append(None if expected is None else check(response, expected))
            except ValueError as error:
                raise ValueError(f"reward rule:{name}: response {i}: {error}") from error
        return scores

    return score


def _text(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"answer: {answer!r:.80}; expected text or a number")
    return str(answer)


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = " ".join(folded.split())
    return words.removesuffix(".").rstrip() or words


def _marked(text: str) -> str | None:
    r"""Extract what is in the last `\\boxed{...}`, or else behind the last `####`, or None."""
    start = text.rfind("\\boxed{")
    depth, i = 0, start + len("\\boxed")
    while start >= 0 and i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace is a character
        elif text[i] in "{}":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + len("\\boxed{") : i]
        i += 1
    _, mark, after = text.rpartition("####")
    return after.strip().partition("\n")[0] if mark else None


def _value(text: str) -> Fraction | None:
    """The number that a short text is, units and what stands before a last `=` aside; None when it is none."""
    bare = _without_symbols(_UNIT.sub("", text)).rpartition("=")[2].strip().removesuffix(".")
    match = _NUMBER.fullmatch(bare)
    return _number(match) if match else None


def _last_number(text: str) -> Fraction | None:
    numbers = list(_NUMBER.finditer(_without_symbols(text)))
    return _number(numbers[-1]) if numbers else None


def _without_symbols(text: str) -> str:
    r"""Write plain signs for typographic ones, `a/b` for `\\frac{a}{b}`, and no currency, degrees or thin spaces."""
    for old, new in (("−", "-"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\%", "%"), ("\\$", "$")):
        text = text.replace(old, new)
    text = text.replace("^{\\circ}", "").replace("^\\circ", "")
    text = text.replace("-$", "-").replace("+$", "+").replace("$", " ")
    return _FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]}", text)


def _number(match: re.Match[str]) -> Fraction | None:
    mantissa, exponent, denominator, percent = match.groups()
    if any(len(part or "") > MAX_DIGITS for part in (mantissa, denominator)) or len(exponent or "") > 5:
        return None
    power = int(exponent or 0)
    if abs(power) > MAX_DIGITS or (denominator and int(denominator) == 0):
        return None
    value = Fraction(mantissa.replace(",", "")) * Fraction(10) ** power / int(denominator or 1)
    return value / 100 if percent else value


def _plain_latex(text: str) -> str:
    text = _UNIT.sub(r"\1", text).replace("\\left", "").replace("\\right", "").replace("\\!", "").replace("\\,", "")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("$", "")
    return "".join(text.split()).removesuffix(".")


def _chosen(response: str) -> str | None:
    marked = _marked(response)
    if marked is not None and (match := _LETTER.fullmatch(_UNIT.sub(r"\1", marked).strip())):
        return match[1].upper()
    if said := _SAID.findall(response):
        return str(said[-1])
    text = response.strip()
    match = _LETTER.fullmatch(text) or _LETTER_FIRST.match(text)
    return match[1].upper() if match else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
