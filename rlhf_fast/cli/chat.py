"""A chat in the terminal: what was said before stands before each line that is typed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace

from rlhf_fast.data.templates import Message
from rlhf_fast.data.tokenize import tokenize_prompt
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.requests import context_length
from rlhf_fast.rollout.sampling import SamplingParams

COMMANDS = {
    "/new": "begin another conversation: nothing said so far is remembered",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does",
}
_COMMAND = re.compile(r"/[a-z]+")  # alone in its line, so that a path is not taken for one


def chat(generator: Generator, params: SamplingParams, read: Callable[[], str] | None = None) -> None:
    """Answer what is typed until the end of the input. Ctrl-C cuts an answer off, and ends the chat between two."""
    talk = Chat(generator, params)
    shows_prompt = sys.stdin.isatty()
    read = read or (lambda: input("> " if shows_prompt else ""))
    if shows_prompt:
        _note("Ctrl-D ends, /help lists commands." if talk.remembers else _WITHOUT_TEMPLATE)
    while True:
        try:
            line = read()
        except EOFError:
            return
        if _COMMAND.fullmatch(line.strip()):
            if line.strip() == "/quit":
                return
            talk.obey(line.strip())
        elif line.strip():
            talk.answer(line)


_WITHOUT_TEMPLATE = (
    "This model has no chat template: each line is a text of its own, which it goes on with, and nothing is remembered "
    "(--chat_template chatml or plain makes it a chat). Ctrl-D ends."
)


class Chat:
    """A conversation, and the model that answers in it."""

    def __init__(self, generator: Generator, params: SamplingParams) -> None:
        assert generator.tokenizer is not None
        self.generator, self.params, self.tokenizer = generator, params, generator.tokenizer
        self.messages: list[Message] = []
        self.turns = 0  # answered in all conversations; each has random numbers of its own
        config = unwrapped(generator.model).config.get_text_config()
        self.context = min(context_length(config) or sys.maxsize, generator.runner.served.longest)

    @property
    def remembers(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def obey(self, command: str) -> None:
        """Do what a line that begins with a slash says."""
        if command == "/new":
            self.messages = []
            _note("a new conversation")
        else:
            if command != "/help":
                _note(f"there is no command {command}")
            for name, what in COMMANDS.items():
                _note(f"{name:<6} {what}")

    def answer(self, line: str) -> None:
        """Answer a line, and remember both; a line that cannot be answered is forgotten, and why is said."""
        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            prompt = tokenize_prompt(self.tokenizer, asked if self.remembers else line, name="the conversation")
        except ValueError as error:
            return _note(f"{error}; /new begins another")
        room = self.context - len(prompt)
        if room < 1:
            return _note(
                f"the conversation has {len(prompt)} tokens, and the model takes {self.context} with the answer; "
                f"{'/new begins another' if self.messages else 'a shorter line is needed'}"
            )
        params = replace(
            self.params,
            seed=self.params.seed + self.turns,
            max_new_tokens=min(room, self.params.max_new_tokens),
            min_new_tokens=min(room, self.params.min_new_tokens),
        )
        said, reason = self._stream(prompt, params)
        self.turns += 1
        if reason == "length":
            why = f"--max_new_tokens {params.max_new_tokens}" if room > params.max_new_tokens else "the model's context"
            _note(f"cut off by {why}")
        said = said.rpartition("</think>")[2].strip()  # templates drop the thoughts of earlier turns themselves
        if self.remembers and said:
            self.messages = [*asked, {"role": "assistant", "content": said}]
        return None

    def _stream(self, prompt: tuple[int, ...], params: SamplingParams) -> tuple[str, str]:
        """Print an answer as it comes; returns it, and why it ended."""
        shown, reason = "", ""
        pieces = self.generator.stream([prompt], params)
        try:
            for piece in pieces:
                print(printable(piece.text.removeprefix(shown)), end="", flush=True)
                shown, reason = piece.text, piece.finish_reason
        except KeyboardInterrupt:
            reason = "abort"
        finally:
            pieces.close()  # type: ignore[attr-defined]
        print()
        return shown, reason


def printable(text: str) -> str:
    """Drop what a terminal would obey from a text."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _note(text: str) -> None:
    """Print what the program says, and not the model."""
    print(f"[{text}]", file=sys.stderr)
