"""Data: record formats, chat templates, tokens and batches of them."""

from rlhf_fast.data.conversations import Tokenized
from rlhf_fast.data.tokenize import tokenize_record

__all__ = ["Tokenized", "tokenize_record"]
