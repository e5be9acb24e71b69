"""Sampling responses: a prompt batch is prefilled, then decoded token by token over transformers' own cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf_fast.data.chat import Message, decode_response, encode_prompt
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.forward import output_head, unwrapped
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams, sample_tokens, uniforms

Prompts = Sequence[str | list[Message] | Sequence[int]]


@dataclass
class _Request:
    """One response being sampled."""

    prompt_index: int
    prompt: tuple[int, ...]
    uniforms: torch.Tensor  # (max_new_tokens,) float64
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


class Generator:
    """Samples responses from a model, whose weights it shares and leaves as they are.

    Args:
        model: a causal language model, or one wrapped by peft (its adapter is used).
        tokenizer: may be None when prompts are token ids and `stop_token_ids` says where responses end.
        batch_size: sequences decoded together.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase | None = None, batch_size: int = 128) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}; expected at least 1")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rollouts:
        """Sample `params.n` responses for each prompt (text, message lists or token ids).

        `progress(done, total)` is called as sequences end.

        Raises:
            ValueError: an empty prompt, one that leaves no room for an answer in the model's context, or token ids
                outside the model's vocabulary.
            TypeError: `prompts` is one prompt instead of a list of them.
        """
        params = params or SamplingParams()
        requests = self._requests(prompts, params)
        # Prompts of like length are prefilled together; the result is in the order asked for all the same.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        started = time.monotonic()
        with _evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                self._decode([requests[i] for i in order[start : start + self.batch_size]], params)
                if progress:
                    progress(min(start + self.batch_size, len(order)), len(order))
        self.tokens_per_second = sum(len(r.response) for r in requests) / max(time.monotonic() - started, 1e-9)
        return self._rollouts(requests)

    def _requests(self, prompts: Prompts, params: SamplingParams) -> list[_Request]:
        if isinstance(prompts, str):
            raise TypeError("prompts: got one string; expected a list of prompts")
        if not prompts:
            raise ValueError("prompts: the list is empty")
        if self.tokenizer is None and not params.stop_token_ids and not params.ignore_eos:
            raise ValueError("stop_token_ids: without a tokenizer, say which tokens end a response, or set ignore_eos")
        limit = getattr(unwrapped(self.model).config, "max_position_embeddings", None)
        vocabulary = unwrapped(self.model).get_input_embeddings().weight.shape[0]
        requests = []
        for index, prompt in enumerate(prompts):
            ids = self._encode(prompt, index)
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(f"prompts: prompt {index} has token ids outside the vocabulary of {vocabulary}")
            if limit and len(ids) + params.max_new_tokens > limit:
                raise ValueError(
                    f"prompts: prompt {index} has {len(ids)} tokens, which with max_new_tokens = "
                    f"{params.max_new_tokens} exceeds the model's context of {limit}; shorten one of them"
                )
            for sample in range(params.n):
                numbers = torch.from_numpy(uniforms(params.seed, index, sample, params.max_new_tokens))
                requests.append(_Request(index, ids, numbers))
        return requests

    def _encode(self, prompt: str | Sequence[Message] | Sequence[int], index: int) -> tuple[int, ...]:
        if isinstance(prompt, dict):
            raise TypeError(f"prompts: prompt {index} is one message; expected a list of messages")
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            ids = tuple(prompt)
        elif self.tokenizer is None:
            raise ValueError(f"prompts: prompt {index} is text, which needs a tokenizer; give one, or token ids")
        elif not prompt or (isinstance(prompt, str) and not prompt.strip()):
            ids = ()
        else:
            ids = encode_prompt(self.tokenizer, prompt)  # type: ignore[arg-type]
        if not ids:
            raise ValueError(f"prompts: prompt {index} is empty")
        return ids  # type: ignore[return-value]

    @torch.no_grad()
    def _decode(self, requests: list[_Request], params: SamplingParams) -> None:
        """Sample all of `requests` to their ends, which are written into them."""
        inner, head = unwrapped(self.model), output_head(self.model)
        device = head.weight.device
        stops = set(params.stop_token_ids)
        if self.tokenizer is not None and not params.ignore_eos:
            stops.add(self.tokenizer.eos_token_id)
        active = list(requests)
        numbers = torch.stack([request.uniforms for request in active]).to(device)  # (B, max_new_tokens)
        prompts = list(dict.fromkeys(request.prompt for request in active))  # samples of one prompt read it once
        ids, attention = _left_padded(prompts, device)  # (U, T)
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        rows = torch.tensor([prompts.index(request.prompt) for request in active], device=device)  # (B,)
        cache = DynamicCache(config=inner.config)
        for step in range(params.max_new_tokens):
            hidden = inner.base_model(
                input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]  # (U, H) at first, then (B, H)
            if step == 0 and len(prompts) < len(active):
                cache.batch_select_indices(rows)
                hidden, attention, positions = hidden[rows], attention[rows], positions[rows]
            tokens, logprobs = sample_tokens(head.logits(hidden), numbers[:, step], params)  # (B,), (B,)
            going = _record(active, tokens.tolist(), logprobs.tolist(), stops)  # ends are decided on the host
            if not going:
                return
            # Finished rows cost as much as the others, but taking rows out copies the cache: do it when it pays.
            if len(going) <= 0.75 * len(active):
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                active = [active[row] for row in going]
                tokens, attention, positions, numbers = (x[keep] for x in (tokens, attention, positions, numbers))
            ids = tokens.unsqueeze(-1)
            attention = torch.cat([attention, attention.new_ones(len(active), 1)], dim=-1)
            positions = positions[:, -1:] + 1

    def _rollouts(self, requests: list[_Request]) -> Rollouts:
        lengths = [len(request.prompt) + len(request.response) for request in requests]
        device = output_head(self.model).weight.device
        return Rollouts(
            input_ids=torch.tensor([i for r in requests for i in (*r.prompt, *r.response)], device=device),
            response_mask=torch.tensor(
                [m for r in requests for m in [False] * len(r.prompt) + [True] * len(r.response)], device=device
            ),
            logprobs=torch.tensor([x for r in requests for x in [0.0] * len(r.prompt) + r.logprobs], device=device),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device),
            prompt_index=torch.tensor([request.prompt_index for request in requests], device=device),
            texts=[decode_response(self.tokenizer, r.response) if self.tokenizer else "" for r in requests],
            finish_reasons=[request.finish_reason for request in requests],
        )


def _left_padded(prompts: list[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (U, T), padded on the left so that every row's next token comes at one place."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    attention = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention[row, width - len(prompt) :] = 1
    return ids.to(device), attention.to(device)


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Without dropout; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _record(active: list[_Request], tokens: list[int], logprobs: list[float], stops: set[int]) -> list[int]:
    """Append one token to every unfinished request; return the rows that go on."""
    going = []
    for row, (request, token, logprob) in enumerate(zip(active, tokens, logprobs, strict=True)):
        if request.finish_reason == "stop":
            continue
        request.response.append(token)
        request.logprobs.append(logprob)
        if token in stops:
            request.finish_reason = "stop"
        else:
            going.append(row)
    return going
