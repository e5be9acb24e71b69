"""Predict the memory of a run from its settings and its model's config, before anything is loaded.

The bytes of weights, gradients and optimiser are counted. Those of a pass are measured: the trainers' own models
(`build`) run their own forward and backward pass (`batch_loss`, and in PPO the passes that score samples) on fake
tensors, which have shapes but no memory, and the bytes that would be alive are added up. So adapters, dtypes,
checkpointing, losses and architectures need no formulas here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.batches import LONGEST_ROW, Batch, Example, pad
from rlhf_fast.data.conversations import Tokenized, batch_of
from rlhf_fast.data.pairs import Pairs
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.ops import lm_head
from rlhf_fast.rewards.model import MAX_TOKENS
from rlhf_fast.rollout.generator import BLOCK_SIZE, MAX_BATCH_TOKENS, MAX_SEQUENCES
from rlhf_fast.trainers import dpo, reward, sft
from rlhf_fast.trainers.ppo import build as ppo
from rlhf_fast.trainers.ppo import loss as ppo_loss
from rlhf_fast.trainers.ppo.build import Models
from rlhf_fast.trainers.ppo.experience import Scorer, inputs

TrainerConfig = SFTConfig | RewardConfig | DPOConfig | PPOConfig
Device = Literal["cpu", "cuda"]
Parts = dict[str, int]  # bytes by what they hold

ATTENTION = "rlhf_fast_sdpa"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)


@dataclass(frozen=True)
class Prediction:
    """Bytes of each part at the peak of each phase. Phases follow each other: they do not add up."""

    phases: dict[str, Parts]

    def total(self, phase: str) -> int:
        """Add up the bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        """Name of the phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return self.total(self.fullest)


def predict(
    config: TrainerConfig,
    shape: PreTrainedConfig,
    device: Device = "cpu",
    rewards: Sequence[PreTrainedConfig] = (),
    available: int | None = None,
) -> Prediction:
    """Predict the memory that a run takes on its device, with every batch as full as the settings let it be.

    Memory that a device keeps for itself is left out: CUDA's context, fragments between blocks, and Python.

    Args:
        config: settings of a trainer; their class says of which.
        shape: transformers' config of the model.
        device: where the run is to be. A GPU has larger blocks of logits, and its optimiser works on all weights at
            once.
        rewards: transformers' configs of PPO's reward models.
        available: bytes of the device; keys and values take at most half of what is free. None: there is no limit.

    Raises:
        ValueError: the model does not run on fake tensors; says why.
    """
    try:
        return _Run(config, shape, device, rewards).predict(available)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: {type(shape).__name__} cannot be run without its weights: {why}; only the "
            "run itself will show its memory"
        ) from error


class _Run:
    """Models of a run as fake tensors, and the bytes that each phase takes."""

    def __init__(
        self, config: TrainerConfig, shape: PreTrainedConfig, device: Device, rewards: Sequence[PreTrainedConfig]
    ) -> None:
        self.config, self.device, self.shape = config, device, shape
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        dtype = getattr(torch, config.dtype)
        with torch.device("meta"):
            self.models = build(config, shape, rewards)
            self.scorers = [models.reward_from_shape(each, dtype).requires_grad_(False) for each in rewards]
        policy, reference, critic = self.models
        trained = [policy, *([] if critic is None else critic.modules)]
        _make_fake([*trained, reference, *self.scorers], self.fake)
        self.parameters = _parameters(*trained)
        self.trained = [p for p in self.parameters if p.requires_grad]

    def predict(self, available: int | None) -> Prediction:
        """Predict each phase, in the order of the run."""
        config, persistent = self.config, self._persistent()
        phases: dict[str, Parts] = {}
        if isinstance(config, PPOConfig):
            sequences = min(config.prompts_per_step * config.samples_per_prompt, MAX_SEQUENCES)
            phases["rollouts"] = {
                **persistent,
                **self._generation_step(self.models.policy, sequences, config.max_length),
            }
            phases["scoring"] = {**persistent, **self._scoring_pass(config)}
        elif isinstance(config, SFTConfig) and config.samples:
            positions = config.max_length + config.sample_tokens
            phases["samples"] = {**persistent, **self._generation_step(self.models.policy, config.samples, positions)}
        elif isinstance(config, RewardConfig) and config.normalize_samples:
            phases["policy's samples"] = {**persistent, **self._policy_samples(config)}
        if available is not None:
            for parts in phases.values():
                if "keys and values" in parts:
                    free = available - sum(parts.values()) + parts["keys and values"]
                    parts["keys and values"] = min(parts["keys and values"], max(free, 0) // 2)
        phases["training"] = {**persistent, "gradients": _bytes(self.trained), **self._training_pass()}
        # PyTorch's AdamW takes the roots of all second moments at once on a GPU, of one after another on a CPU, where
        # the last one's are still there.
        sizes = [4 * p.numel() for p in self.trained]
        one_by_one = max(2 * size + before for before, size in zip([0, *sizes], sizes, strict=False))
        working = sum(sizes) if self.device == "cuda" else one_by_one
        phases["optimiser step"] = {**persistent, "gradients": sum(sizes), "workspace": working}
        if isinstance(config, PPOConfig) and config.cuda_graphs:
            for phase in ("scoring", "training", "optimiser step"):
                phases[phase]["keys and values"] = phases["rollouts"]["keys and values"]
        return Prediction(phases)

    def _persistent(self) -> Parts:
        """Count the bytes of what is there in all phases: weights, copies, moments, reference, reward models."""
        parts = {
            "frozen weights": _loaded_bytes((p for p in self.parameters if not p.requires_grad), self.device),
            "trained weights": _loaded_bytes(self.trained, self.device),
            "float32 copies of those": sum(4 * p.numel() for p in self.trained if p.dtype != torch.float32),
            "Adam's moments": sum(2 * 4 * p.numel() for p in self.trained),
        }
        if isinstance(self.config, PPOConfig):
            shared = set(map(id, self.parameters))
            parts["reference"] = _bytes(p for p in self.models.reference.parameters() if id(p) not in shared)
            parts["reward models"] = _loaded_bytes(_parameters(*self.scorers), self.device)
        return parts

    # What a pass takes ------------------------------------------------------------------------------------------------

    def _training_pass(self) -> Parts:
        """Measure a micro-batch's forward and backward pass, beside the gradients of the ones before."""
        batch = _fake_batch(full_batch(self.config), self.fake)
        with self.fake:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        held = [x for p in self.parameters for x in (p, p.grad) if x is not None]
        return self._measure_pass(lambda: loss(self.config, self.models, batch).backward(), held)

    def _scoring_pass(self, config: PPOConfig) -> Parts:
        """Measure the scoring of samples by policy, reference, critic and reward models: the pass that takes most."""
        batch, budget = _fake_batch(full_batch(config), self.fake), TokenBudget(config.optim.max_tokens_per_microbatch)
        held = [*self.parameters, *self.models.reference.parameters()]
        passes = Scorer(*self.models, config, budget, shared=0).passes(config.lag)
        measured = [self._measure_pass(torch.no_grad()(functools.partial(each, batch)), held) for each in passes]
        longer = _fake_batch(_batch(max(MAX_TOKENS, config.max_length), config.max_length, 2), self.fake)
        for scorer in self.scorers:
            score = functools.partial(models.score_last, scorer, longer)
            measured.append(self._measure_pass(torch.no_grad()(score), scorer.parameters()))
        return max(measured, key=lambda parts: sum(parts.values()))

    def _generation_step(self, model: Model, sequences: int, positions: int) -> Parts:
        """Measure the fullest step of a generator: all keys and values, a chunk of prompts, each sequence's logits."""
        with self.fake:
            ids = torch.zeros(1, MAX_BATCH_TOKENS, dtype=torch.int64)

        @torch.no_grad()
        def step() -> None:
            models.output_head(model).logits(models.hidden_states(model, ids)[0, :sequences])

        per_token = kv_bytes_per_token(self.shape, next(model.parameters()).dtype)
        kv = sequences * -(-positions // BLOCK_SIZE) * BLOCK_SIZE * per_token
        return {"keys and values": kv, **self._measure_pass(step, model.parameters())}

    def _policy_samples(self, config: RewardConfig) -> Parts:
        """Measure sampling from the policy that a reward model starts from, to set the scale of its scores."""
        with torch.device("meta"):
            sampled = models.from_shape(self.shape, getattr(torch, config.dtype))
        _make_fake([sampled], self.fake)
        weights = _loaded_bytes(sampled.parameters(), self.device)
        return {"the policy": weights, **self._generation_step(sampled, MAX_SEQUENCES, config.max_length)}

    def _measure_pass(self, run: Callable[[], object], held: Iterable[torch.Tensor]) -> Parts:
        """Measure the bytes at the peak of `run`, beside the tensors in `held`."""
        with self.fake, LiveBytes(held, self.device) as live:
            run()
        return {"activations": live.peak - live.block, "block of logits": live.block}


def build(config: TrainerConfig, shape: PreTrainedConfig, rewards: Sequence[PreTrainedConfig] = ()) -> Models:
    """Build the models of a run's trainer. Without PPO there is no critic, and the reference is the model itself."""
    if isinstance(config, PPOConfig):
        return ppo.build(config, shape, rewards)
    if isinstance(config, RewardConfig):
        model = reward.build(config, shape)
    elif isinstance(config, DPOConfig):
        model = dpo.build(config, shape)
    else:
        model = sft.build(config, shape)
    return Models(policy=model, reference=model, critic=None)


def loss(config: TrainerConfig, built: Models, batch: Batch) -> torch.Tensor:
    """Compute the trainer's loss on a micro-batch, with arbitrary values for what else it takes."""
    sequences, tokens = len(batch.last), len(batch.response_tokens)
    if isinstance(config, SFTConfig):
        return sft.batch_loss(built.policy, batch, denominator=tokens)
    if isinstance(config, PPOConfig):
        given = {name: torch.zeros(tokens) for name in inputs(config, built.critic is not None)}
        return ppo_loss.batch_loss(config, built.policy, built.critic, batch, given, denominator=tokens, kl_coef=1.0)[0]
    chosen = torch.arange(0, sequences - 1, 2)  # (P,), each beside the one that it was chosen over
    margins, confidences = torch.zeros(len(chosen)), torch.ones(len(chosen))
    pairs = Pairs([], chosen, chosen + 1, margins, confidences)
    if isinstance(config, DPOConfig):
        reference = torch.zeros(sequences)
        return dpo.batch_loss(config, built.policy, batch, pairs, reference, len(chosen), graded=False)[0]
    weights = torch.ones(config.heads * len(chosen)) if config.heads > 1 else None
    return reward.batch_loss(config, built.policy, batch, pairs, len(chosen), weights=weights, soft_labels=False)[0]


def kv_bytes_per_token(shape: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Count the bytes of a token's keys and values in all layers; heads are padded to multiples of 16, as in blocks."""
    text = shape.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return 2 * int(text.num_hidden_layers) * int(kv_heads) * -(-dim // 16) * 16 * dtype.itemsize


def full_batch(config: TrainerConfig) -> Batch:
    """Make the largest micro-batch: as many tokens as the budget, in sequences of the greatest length.

    A sequence longer than the budget goes alone, and a comparison is never cut in two. Comparisons of one prompt are
    not cut either: where a prompt has many, a micro-batch is larger than this.
    """
    tokens = max(config.optim.max_tokens_per_microbatch, longest_microbatch(config))
    if isinstance(config, SFTConfig):
        return _packed(tokens, config.max_length) if config.packing else _batch(tokens, config.max_length, 1)
    return _batch(tokens, config.max_length, config.samples_per_prompt if isinstance(config, PPOConfig) else 2)


def _packed(tokens: int, longest: int) -> Batch:
    """Pack conversations of equal lengths into one row of so many tokens."""
    count = -(-tokens // longest)
    sizes = [max(tokens // count + (i < tokens % count), 2) for i in range(count)]
    return batch_of([Tokenized((0,) * n, (False,) + (True,) * (n - 1)) for n in sizes], packed=count > 1)


def longest_microbatch(config: TrainerConfig) -> int:
    """Count the tokens of the longest sequence, or of a comparison's two, which are never cut apart."""
    return config.max_length * (2 if isinstance(config, RewardConfig | DPOConfig) else 1)


def _batch(tokens: int, longest: int, together: int) -> Batch:
    """Make rows of so many tokens in all; up to `together` responses share a row where a row may be that long."""
    shared = together > 1 and longest <= LONGEST_ROW
    width = min(LONGEST_ROW, longest * together) if shared else longest
    rows = -(-tokens // width)
    width = max(tokens // rows, 3)
    if not shared:
        return pad([Example((0,), (0,) * (width - 1))] * rows)
    half = (width - 1) // 2  # two to a row: more of them would give the same shapes
    sizes = (half, width - 1 - half)
    return pad([Example((row,), (0,) * size) for row in range(rows) for size in sizes], longest_shared=LONGEST_ROW)


# Fake tensors -------------------------------------------------------------------------------------------------------


def _make_fake(modules: Sequence[nn.Module], fake: FakeTensorMode) -> None:
    """Replace the meta tensors of modules by fake CPU tensors, with which models take the paths that they take in runs.

    Shared tensors stay shared. transformers looks at values to see that a batch needs no mask, and would make one for
    fake tensors; under another name (ATTENTION) the same attention gets the mask that it is given.
    """
    known: dict[int, torch.Tensor] = {}
    for part in (part for module in modules for part in module.modules()):
        config: Any = getattr(part, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = ATTENTION
        for tensors in (part._parameters, part._buffers):
            for name, x in list(tensors.items()):
                if x is None or isinstance(x, FakeTensor):
                    continue
                if id(x) not in known:
                    data = FakeTensor(fake, x.data, torch.device("cpu"))
                    is_weight = isinstance(x, nn.Parameter)
                    known[id(x)] = nn.Parameter(data, requires_grad=x.requires_grad) if is_weight else data
                tensors[name] = known[id(x)]  # type: ignore[assignment]


def _fake_batch(batch: Batch, fake: FakeTensorMode) -> Batch:
    """Copy a batch with fake tensors."""
    given: dict[str, Any] = {item.name: getattr(batch, item.name) for item in fields(batch)}
    made: dict[str, Any] = {name: fake.from_tensor(x) for name, x in given.items() if isinstance(x, torch.Tensor)}
    return replace(batch, **made)


def _parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """List the parameters of modules in order, shared ones once."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _loaded_bytes(weights: Iterable[torch.Tensor], device: Device) -> int:
    """Count the bytes of weights as models.load places them: on a CPU, from 1 MiB on, in whole huge pages of 2 MiB."""
    page = 2 << 20
    return sum(-(-x.nbytes // page) * page if device == "cpu" and x.nbytes >= 1 << 20 else x.nbytes for x in weights)


# Counting -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of all tensors that are made within its context and alive, and of their peak.

    Args:
        held: tensors that were there before; they and their views do not count.
        device: decides the size of the blocks of logits that the linear losses work in, which are no tensors here.
    """

    def __init__(self, held: Iterable[torch.Tensor], device: Device) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = self.block = 0  # block: the part of the peak that was a block of logits
        self._held = {x.untyped_storage()._cdata for x in held}
        self._storages: dict[int, Any] = {}  # weak references, by where the storage lies

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._note(x.untyped_storage())
        block = _block_of_logits(function, args, self.device)
        if self.live + block > self.peak:
            self.peak, self.block = self.live + block, block
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or key in self._storages:
            return

        def free(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, free)
        self.live += size


def _block_of_logits(function: Any, args: Any, device: Device) -> int:
    """Count the bytes of the block of logits that an op on hidden states works in (ops/lm_head.py)."""
    if function.namespace != "rlhf_fast" or not function._opname.startswith("linear_"):
        return 0
    given = dict(zip((a.name for a in function._schema.arguments), args, strict=False))
    hidden, weight = given["hidden"], given["weight"]
    rows, columns = hidden.numel() // hidden.shape[-1], weight.shape[0]
    if function._opname.startswith("linear_token_logprobs"):
        height, width = lm_head.block_shape(rows, columns, 1, device)
    else:
        height, width = lm_head.height_of_whole_rows(rows, columns, device, not given["needs"][1]), columns
    narrow = weight.dtype != torch.float32
    block = height * width * 4
    if narrow and device == "cuda":  # gradients in the dtype of the products
        block += height * width * weight.itemsize
    if narrow and device == "cpu":  # states and the block's weights widened
        block += 4 * (hidden.numel() + width * weight.shape[1])
    if given.get("mask") is not None:  # the rows that count, and their gradients among the others
        block += hidden.numel() * (hidden.itemsize + 4)
    return block
