"""A simulated annotator: a written rule that rates replies to clients, in place of people.

It exists so that the whole loop can run unattended and be checked. What it prefers is no human judgement, and every
file and report that comes of it says `simulated`. The rule rates four criteria between 0 and 1:

- helpfulness: the reply takes up the client's own subject words, and commits to a next step with a time;
- harmlessness: it holds a boundary where the request is adversarial or off topic, and does not decline a fair request;
- honesty: no promises that nobody can keep, no claims of work already done, no figures, links or placeholders that the
  client did not give;
- style fit: 25 to 70 words of plain prose, no hedging, no exclamation, no repetition, a finished last sentence.

The score is their weighted mean. A comparison goes to the higher score, except for a chosen share of errors; scores
that are near each other are a tie, and ties are left out. The rule is easy to please, which is why no result of it
says anything about what people would prefer.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass

from rlhf_fast.config import AnnotatorConfig
from rlhf_fast.data.records import Comparison, user_text
from rlhf_fast.data.templates import Prompt
from rlhf_fast.data.text_metrics import repetition

NAME = "simulated"
WEIGHTS = {"helpfulness": 0.4, "harmlessness": 0.2, "honesty": 0.15, "style_fit": 0.25}
GUARDED = ("adversarial", "off_topic")  # categories in which a reply should hold a boundary

_DAYS = "monday|tuesday|wednesday|thursday|friday|saturday|sunday"
_TIME = re.compile(
    rf"\b(today|tomorrow|tonight|{_DAYS}|this (week|morning|afternoon|evening)|next week|noon|by the end of|"
    r"within (an?|one|two|three|\d+) (hours?|days?|weeks?))\b|\b\d{1,2}(:\d\d)? ?(am|pm)\b",
    re.IGNORECASE,
)
_COMMITMENT = re.compile(
    r"\b(i|we)('ll| will| shall)\b|\bour (\w+ ){1,2}will\b|\bplease (send|tell|share|call|reply|confirm|choose|give|"
    r"let)\b|\b(shall|should) (i|we)\b|\bwould you like\b",
    re.IGNORECASE,
)
_BOUNDARY = re.compile(
    r"\b(cannot|can't|can not|do not|don't|will not|won't|not able to|unable to|outside (of )?what|"
    r"not something (we|i)|must decline|have to decline|not part of)\b",
    re.IGNORECASE,
)
_OVERPROMISE = re.compile(
    r"\b(guarantee[sd]?|100 ?%|definitely|absolutely|always|never fails?|no risk|risk[- ]free|best in the world|"
    r"number one|instantly|promise)\b",
    re.IGNORECASE,
)
_ALREADY_DONE = re.compile(
    r"\b(i|we)( have|'ve) (already |just )?(attached|sent|updated|fixed|changed|completed)\b|\battached (is|are)\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(r"\[[^\]\n]{1,40}\]|\{[^}\n]{1,40}\}|<[^>\n]{1,40}>")
_INVENTED = re.compile(r"https?://\S+|www\.\S+|\S+@\S+\.\S+|[£$€]\s?\d[\d,.]*|\b\d[\d,.]{2,}\b")
_HEDGE = re.compile(
    r"\b(maybe|perhaps|possibly|probably|might|could be|i think|i believe|i guess|it depends|hopefully|not sure|"
    r"sort of|kind of|seems?|try to)\b",
    re.IGNORECASE,
)
_UNPROFESSIONAL = re.compile(
    r"!|^\s*(\d+\.|[-*#•])|\*\*|[\U0001F300-\U0001FAFF]|\b(lol|omg|hey|gonna|wanna)\b", re.IGNORECASE | re.MULTILINE
)
_WORD = re.compile(r"[a-z0-9][a-z0-9'-]*", re.IGNORECASE)
_COMMON = frozenset(
    """a about after all also am an and any are as at be because been before but by can could do does did for from get
    give go good had has have he hello her here hi him his how i if in into is it its just like make me more my need no
    not now of on one only or our out over please put she should so some still than thank thanks that the their them
    then there they this to up us use very want was we were what when where which who why will with would yes you your
    i'm it's we're don't can't""".split()
)


@dataclass(frozen=True)
class Rating:
    """Scores that the annotator gives one reply: each criterion between 0 and 1."""

    helpfulness: float
    harmlessness: float
    honesty: float
    style_fit: float

    @property
    def score(self) -> float:
        """The weighted mean of the criteria, between 0 and 1."""
        return sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())

    def as_dict(self) -> dict[str, float]:
        return {name: round(getattr(self, name), 4) for name in WEIGHTS}


class SimulatedAnnotator:
    """Rates by the rule above; compares with errors at `error_rate`, drawn from `seed` and the texts alone."""

    def __init__(self, config: AnnotatorConfig | None = None) -> None:
        self.config = config or AnnotatorConfig()

    @property
    def name(self) -> str:
        """Name the annotator for files and reports: always simulated, with what decides its answers."""
        config = self.config
        return f"{NAME} (seed {config.seed}, error rate {config.error_rate:g}, tie margin {config.tie_margin:g})"

    def rate(self, prompt: Prompt, category: str, reply: str) -> Rating:
        """Rate one reply, without error."""
        asked = user_text(prompt)
        return Rating(
            helpfulness=_helpfulness(asked, reply),
            harmlessness=_harmlessness(category, reply),
            honesty=_honesty(asked, reply),
            style_fit=_style_fit(reply),
        )

    def compare(self, prompt: Prompt, category: str, first: str, second: str) -> Comparison | None:
        """The comparison of two replies, or None when they are the same to the annotator, or nearly so."""
        ratings = [self.rate(prompt, category, first), self.rate(prompt, category, second)]
        if abs(ratings[0].score - ratings[1].score) <= self.config.tie_margin + 1e-9:
            return None
        replies = [first, second]
        better = 0 if ratings[0].score > ratings[1].score else 1
        if self._errs(prompt, first, second):
            better = 1 - better
        return Comparison(
            prompt=prompt,
            chosen=replies[better],
            rejected=replies[1 - better],
            annotator=self.name,
            category=category,
            ratings={"chosen": ratings[better].as_dict(), "rejected": ratings[1 - better].as_dict()},
        )

    def compare_all(self, prompt: Prompt, category: str, replies: list[str]) -> list[Comparison]:
        """Compare every pair among the distinct replies to a prompt that the annotator sees a difference in."""
        distinct = [reply for reply in dict.fromkeys(replies) if reply.strip()]
        pairs = (self.compare(prompt, category, a, b) for a, b in itertools.combinations(distinct, 2))
        return [pair for pair in pairs if pair is not None]

    def _errs(self, prompt: Prompt, first: str, second: str) -> bool:
        """A coin that depends on what is compared, not on when: the same pair gets the same answer in any order."""
        key = repr((self.config.seed, prompt, *sorted((first, second)))).encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        return number / 2**64 < self.config.error_rate


def _helpfulness(asked: str, reply: str) -> float:
    shared = _content_words(asked) & _content_words(reply)
    addresses = min(1.0, len(shared) / 2)
    sentences = [sentence for sentence in re.split(r"(?<=[.?!])\s+", reply) if _COMMITMENT.search(sentence)]
    if any(_TIME.search(sentence) for sentence in sentences):
        next_step = 1.0
    else:
        next_step = 0.4 if sentences else 0.0
    return 0.4 * addresses + 0.6 * next_step


def _harmlessness(category: str, reply: str) -> float:
    beginning = " ".join(re.split(r"(?<=[.?!])\s+", reply)[:2])
    declines = bool(_BOUNDARY.search(beginning))
    if category in GUARDED:
        return 1.0 if declines else 0.0
    return 0.5 if declines else 1.0


def _honesty(asked: str, reply: str) -> float:
    faults = len(_OVERPROMISE.findall(reply)) + len(_ALREADY_DONE.findall(reply)) + len(_PLACEHOLDER.findall(reply))
    faults += sum(figure.strip(".,") not in asked for figure in _INVENTED.findall(reply))
    return max(0.0, 1.0 - 0.5 * faults)


def _style_fit(reply: str) -> float:
    words = [word.lower() for word in _WORD.findall(reply)]
    if not words:
        return 0.0
    score = _length_fit(len(words))
    score -= 0.25 * len(_HEDGE.findall(reply))
    score -= 0.25 * bool(_UNPROFESSIONAL.search(reply))
    score -= 0.4 * (not reply.rstrip().endswith((".", "?")))
    score -= 1.5 * repetition(reply)
    return max(0.0, score)


def _length_fit(words: int) -> float:
    """1 from 25 to 70 words, falling to 0 at none and at 150."""
    if words < 25:
        return words / 25
    return 1.0 if words <= 70 else max(0.0, (150 - words) / 80)


def _content_words(text: str) -> set[str]:
    words = {word.lower().removesuffix("'s").removesuffix("s") for word in _WORD.findall(text)}
    return {word for word in words if len(word) > 2 and word not in _COMMON}
