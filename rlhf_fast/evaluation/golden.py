"""Golden set: fixed prompts with checks that a right reply passes, on which a candidate is held against a baseline.

A row is `{"id", "prompt", "category", "checks": [...]}`, with an `answer` where a check asks for one. A reply is right
if it passes all of its prompt's checks:

- `words:10-120`: so many words;
- `mentions:logo|sign`: one of these at least, as whole words in any case; `enquir*` takes what begins like that;
- `avoids:guarantee|100 %`: none of these;
- `finished`: it ends as a sentence does;
- `exact`, `math`, `choice`, `tags:think,answer`, `json`, `json:name,age`: the rules of docs/rewards.md, passed at 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from rlhf_fast.config.settings import nearest
from rlhf_fast.data.records import PromptRecord, RecordError, Source, prompt_text, read_prompts, user_text
from rlhf_fast.data.text_metrics import words
from rlhf_fast.evaluation.judges import Verdict
from rlhf_fast.feedback.coverage import near_duplicates
from rlhf_fast.rewards import rules
from rlhf_fast.statistics.intervals import Interval, clustered_bootstrap

Check = Callable[[str, Any], bool]  # (reply, answer) -> whether it passes
BETTER_OR_EQUAL, REGRESSION, UNDECIDED = 0, 1, 3  # exit codes; 2 is that of wrong usage and broken files
_ENDS = tuple(".!?…。！？")
_CLOSING = "\"'”’»)*_` \n"


@dataclass(frozen=True)
class Decision:
    """What a comparison on a golden set decides, and by what."""

    code: int
    words: str


def read_golden(source: Source) -> list[PromptRecord]:
    """Read a golden set, each row with its checks and an id of its own.

    Raises:
        RecordError: a row without id or checks, an id or a prompt that came before, or a check that there is not.
    """
    records = read_prompts(source)
    ids: dict[str, str] = {}
    prompts: dict[str, str] = {}
    for record in records:
        row, checks = record.columns, record.columns.get("checks")
        if not isinstance(row.get("id"), str) or not row["id"]:
            raise RecordError(f"{record.name}: id: {row.get('id')!r}; expected a text that is this prompt's alone")
        if not isinstance(checks, list) or not checks or not all(isinstance(check, str) for check in checks):
            raise RecordError(f'{record.name}: checks: {checks!r:.80}; expected a list such as ["words:10-120"]')
        for check in checks:
            try:
                if check in rules.WITH_ANSWER and row.get("answer") is None:
                    raise ValueError(f"{check}: the row has no answer to hold a reply against")
                check_of(check)("", row.get("answer"))  # an answer of another kind is said before any reply is sampled
            except ValueError as error:
                raise RecordError(f"{record.name}: checks: {error}") from error
        for seen, key, what in ((ids, row["id"], "id"), (prompts, prompt_text(record.prompt), "prompt")):
            if key in seen:
                raise RecordError(f"{record.name}: the {what} {key[:60]!r} came before, in {seen[key]}")
            seen[key] = record.name
    return records


def fingerprint(golden: Sequence[PromptRecord]) -> str:
    """Hash what is asked and what is right, in any order of rows: figures of one hash can be compared."""
    rows = [
        json.dumps(
            [r.columns["id"], r.prompt, r.category, r.columns["checks"], r.columns.get("answer")], sort_keys=True
        )
        for r in golden
    ]
    return hashlib.blake2b("\n".join(sorted(rows)).encode(), digest_size=8).hexdigest()


def refuse_trained_on(golden: Sequence[PromptRecord], trained: Sequence[PromptRecord]) -> None:
    """Refuse a golden set of which a prompt, or one nearly like it, was trained on.

    Raises:
        ValueError: names the first, and how many there are.
    """
    asked, seen = [user_text(r.prompt) for r in golden], [user_text(r.prompt) for r in trained]
    folded = {" ".join(words(text)): i for i, text in enumerate(seen)}
    pairs = {i: folded[key] for i, text in enumerate(asked) if (key := " ".join(words(text))) in folded}
    for i, j, _ in near_duplicates(asked, seen):
        pairs.setdefault(i, j)
    if pairs:
        i, j = min(pairs.items())
        raise ValueError(
            f"{golden[i].name}: {asked[i][:80]!r} was trained on ({trained[j].name}: {seen[j][:80]!r}), or nearly; "
            f"{len(pairs)} of {len(golden)} golden prompts were, and say nothing of others. Take them out of either"
        )


class GoldenJudge:
    """Judge by each prompt's own checks: 1 for a reply that passes all of them, else 0."""

    name = "checks of the golden set"
    note = "a reply is right or wrong by rules that were written beforehand, which read no meaning"

    def check(self, prompts: Sequence[PromptRecord]) -> None:
        for prompt in prompts:
            if not prompt.columns.get("checks"):
                raise ValueError(f"{prompt.name or 'a prompt'}: it has no checks to judge by")

    def rate(self, prompts: Sequence[PromptRecord], replies: Sequence[str]) -> list[Verdict]:
        verdicts = []
        for prompt, reply in zip(prompts, replies, strict=True):
            answer = prompt.columns.get("answer")
            passed = {check: check_of(check)(reply, answer) for check in prompt.columns["checks"]}
            kinds: dict[str, float] = {}
            for check, right in passed.items():
                kind = check.partition(":")[0]
                kinds[kind] = min(kinds.get(kind, 1.0), float(right))
            verdicts.append(Verdict(float(all(passed.values())), kinds))
        return verdicts


def check_of(text: str) -> Check:
    """The check that `text` means.

    Raises:
        ValueError: no such check, or not with this after its colon.
    """
    name, _, argument = text.partition(":")
    if name == "words":
        ends = re.fullmatch(r"(\d{1,6})-(\d{1,6})", argument)
        if ends is None or int(ends[1]) > int(ends[2]):
            raise ValueError(f"{text}: expected words:LEAST-MOST, such as words:10-120")
        least, most = int(ends[1]), int(ends[2])
        return lambda reply, _: least <= len(reply.split()) <= most
    if name in ("mentions", "avoids"):
        phrases = [_phrase(part) for part in argument.split("|")]
        if not all(phrases):
            raise ValueError(f"{text}: expected {name}: and words or phrases with | between them")
        return lambda reply, _: _has_any(reply, phrases) == (name == "mentions")
    if text == "finished":
        return lambda reply, _: reply.rstrip(_CLOSING).endswith(_ENDS)
    if text in rules.WITH_ANSWER:
        return lambda reply, answer: rules.WITH_ANSWER[text](reply, answer) == 1.0
    if name in ("json", "tags"):
        score = rules.rule(text)
        return lambda reply, _: score([""], [reply]) == [1.0]
    known = ("words", "mentions", "avoids", "finished", *rules.WITH_ANSWER, "json", "tags")
    raise ValueError(f"{text}: there is no check {name!r}; the nearest one is {nearest(name, known)!r}")


def _phrase(text: str) -> str:
    """A phrase as it stands among the words of a text; behind it a space, or nothing where what follows is free."""
    said = " ".join(_words(text))
    return f" {said}" + ("" if text.rstrip().endswith("*") else " ") if said else ""


def _has_any(reply: str, phrases: Sequence[str]) -> bool:
    said = f" {' '.join(_words(reply))} "
    return any(phrase in said for phrase in phrases)


def _words(text: str) -> list[str]:
    return words(text.replace("’", "'"))


def difference_of(rows: Sequence[dict[str, Any]]) -> Interval:
    """The candidate's share of right replies less the baseline's, with a 95 % interval over prompts.

    Resampling says nothing of what no prompt has shown: where none lost (or gained), as many may as n prompts can all
    miss once in 40 times, 1 - 0.025 ** (1 / n), and the interval reaches that far.

    Args:
        rows: of `evaluate`, each with its prompt and the scores of a, the candidate, and b.
    """
    prompts = [row["prompt"] for row in rows]
    values = [row["a"]["score"] - row["b"]["score"] for row in rows]
    found = clustered_bootstrap(values, prompts)
    changed: dict[str, float] = dict.fromkeys(prompts, 0.0)
    for prompt, value in zip(prompts, values, strict=True):
        changed[prompt] += value
    unseen = 1 - 0.025 ** (1 / len(changed))
    low = found.low if min(changed.values()) < 0 else min(found.low, -unseen)
    return Interval(found.mean, low, found.high if max(changed.values()) > 0 else max(found.high, unseen))


def decide(difference: Interval, margin: float) -> Decision:
    """Decide by the candidate's share of right replies less the baseline's.

    Better or equal: the interval leaves no room for a loss beyond `margin`. Regression: it leaves none for a gain. Else
    the prompts are too few. At a level of 95 % either is said wrongly at most once in 40 times.

    Args:
        difference: with its 95 % interval, in shares.
        margin: the loss that is still called equal.
    """
    shown = f"{100 * difference.mean:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    if difference.low >= -margin:
        return Decision(BETTER_OR_EQUAL, f"better or equal: {shown}, a loss of {100 * margin:g} points is ruled out")
    if difference.high < 0:
        return Decision(REGRESSION, f"a regression: {shown}, no gain is left")
    return Decision(UNDECIDED, f"undecided, not enough evidence: {shown} leaves room for too great a loss and for none")


def detectable(prompts: int, samples: int, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest difference of shares that this many prompts show with this power, before any reply is known.

    As if half of the replies were right, each a coin of its own: the most that samples of one prompt can vary. Prompts
    on which the two differ for good make it larger, shares near 0 or 1 smaller.
    """
    quantile = NormalDist().inv_cdf
    return (quantile((1 + level) / 2) + quantile(power)) * math.sqrt(2 * 0.25 / (prompts * samples))
