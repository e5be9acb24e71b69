"""What annotators and owners are told when something cannot be done: words for people, without a traceback."""

from __future__ import annotations


class FeedbackError(ValueError):
    """Something that cannot be done with the store; the message can be shown to an annotator as it is."""


class NotYours(FeedbackError):
    """The task belongs to another person, or is none."""


class Removed(FeedbackError):
    """The person has been taken out of the store."""


class Expired(FeedbackError):
    """The lease has run out and others have taken the last place of the pair."""


class AlreadyDone(FeedbackError):
    """The task has been answered, skipped or reported already."""
