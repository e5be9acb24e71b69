"""The memory that a run takes, told from its settings and a model's config before anything is loaded.

What weights, gradients and optimiser take is counted. What a pass takes is tried: the trainers' own models (`build`)
run their own forward and backward pass (`batch_loss`, and of PPO what scores samples) on tensors that have shapes but
no memory, and the bytes that would be alive are added up. So adapters, dtypes, checkpointing, losses and architectures
need no formulas here.
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
    """The bytes of each part at the fullest moment of each phase. Phases follow each other: they do not add up."""

    phases: dict[str, Parts]

    def total(self, phase: str) -> int:
        """Bytes."""
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.total(self.fullest)


def predict(
    config: TrainerConfig,
    shape: PreTrainedConfig,
    device: Device = "cpu",
    rewards: Sequence[PreTrainedConfig] = (),
    available: int | None = None,
) -> Prediction:
    """The memory that a run takes on its device, with every batch as full as the settings let it be.

    Left out is what a device keeps for itself: CUDA's context, fragments between blocks, and Python.

    Args:
        config: of a trainer, which is thereby named.
        shape: transformers' config of the model.
        device: where it is to run. A GPU has larger blocks of logits, and its optimiser works on all weights at once.
        rewards: the configs of the reward models that PPO is rewarded by.
        available: bytes of the device; keys and values take at most half of what is free. None: there is no limit.

    Raises:
        ValueError: the model cannot be run without values; says why.
    """
    try:
        return _Run(config, shape, device, rewards).predict(available)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: {type(shape).__name__} cannot be run without its weights: {why}") from error


class _Run:
    """All models of a run, without memory, and what each phase takes."""

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
        _without_values([*trained, reference, *self.scorers], self.fake)
        self.parameters = _parameters(*trained)
        self.trained = [p for p in self.parameters if p.requires_grad]

    def predict(self, available: int | None) -> Prediction:
        config, standing = self.config, self._standing()
        phases: dict[str, Parts] = {}
        if isinstance(config, PPOConfig):
            sequences = min(config.prompts_per_step * config.samples_per_prompt, MAX_SEQUENCES)
            phases["rollouts"] = {**standing, **self._generation(self.models.policy, sequences, config.max_length)}
            phases["scoring"] = {**standing, **self._scoring(config)}
        elif isinstance(config, SFTConfig) and config.samples:
            positions = config.max_length + config.sample_tokens
            phases["samples"] = {**standing, **self._generation(self.models.policy, config.samples, positions)}
        elif isinstance(config, RewardConfig) and config.normalize_samples:
            phases["policy's samples"] = {**standing, **self._policy_samples(config)}
        if available is not None:
            for parts in phases.values():
                if "keys and values" in parts:
                    free = available - sum(parts.values()) + parts["keys and values"]
                    parts["keys and values"] = min(parts["keys and values"], max(free, 0) // 2)
        phases["training"] = {**standing, "gradients": _bytes(self.trained), **self._training()}
        # PyTorch's AdamW takes the roots of all second moments at once on a GPU, of one after another on a CPU, where
        # the last one's are still there.
        sizes = [4 * p.numel() for p in self.trained]
        one_by_one = max(2 * size + before for before, size in zip([0, *sizes], sizes, strict=False))
        working = sum(sizes) if self.device == "cuda" else one_by_one
        phases["optimiser step"] = {**standing, "gradients": sum(sizes), "workspace": working}
        if isinstance(config, PPOConfig) and config.cuda_graphs:
            for phase in ("scoring", "training", "optimiser step"):
                phases[phase]["keys and values"] = phases["rollouts"]["keys and values"]
        return Prediction(phases)

    def _standing(self) -> Parts:
        """What is there in all phases."""
        parts = {
            "frozen weights": _loaded((p for p in self.parameters if not p.requires_grad), self.device),
            "trained weights": _loaded(self.trained, self.device),
            "float32 copies of those": sum(4 * p.numel() for p in self.trained if p.dtype != torch.float32),
            "Adam's moments": sum(2 * 4 * p.numel() for p in self.trained),
        }
        if isinstance(self.config, PPOConfig):
            shared = set(map(id, self.parameters))
            parts["reference"] = _bytes(p for p in self.models.reference.parameters() if id(p) not in shared)
            parts["reward models"] = _loaded(_parameters(*self.scorers), self.device)
        return parts

    # What a pass takes ------------------------------------------------------------------------------------------------

    def _training(self) -> Parts:
        """Of a micro-batch, gradients being there already, as they are from the second one on."""
        batch = _fake_batch(full_batch(self.config), self.fake)
        with self.fake:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        held = [x for p in self.parameters for x in (p, p.grad) if x is not None]
        return self._taken(lambda: loss(self.config, self.models, batch).backward(), held)

    def _scoring(self, config: PPOConfig) -> Parts:
        """Of one pass over the samples, by the policy, the reference, a critic or a reward model: whichever takes
        most."""
        batch, budget = _fake_batch(full_batch(config), self.fake), TokenBudget(config.optim.max_tokens_per_microbatch)
        held = [*self.parameters, *self.models.reference.parameters()]
        passes = Scorer(*self.models, config, budget, shared=0).passes(config.lag)
        found = [self._taken(torch.no_grad()(functools.partial(each, batch)), held) for each in passes]
        longer = _fake_batch(_batch(max(MAX_TOKENS, config.max_length), config.max_length, 2), self.fake)
        for scorer in self.scorers:
            score = functools.partial(models.score_last, scorer, longer)
            found.append(self._taken(torch.no_grad()(score), scorer.parameters()))
        return max(found, key=lambda parts: sum(parts.values()))

    def _generation(self, model: Model, sequences: int, positions: int) -> Parts:
        """Of the fullest step of a generator: all its keys and values, a chunk of prompts, and everybody's logits."""
        with self.fake:
            ids = torch.zeros(1, MAX_BATCH_TOKENS, dtype=torch.int64)

        @torch.no_grad()
        def step() -> None:
            models.output_head(model).logits(models.hidden_states(model, ids)[0, :sequences])

        per_token = kv_bytes_per_token(self.shape, next(model.parameters()).dtype)
        kv = sequences * -(-positions // BLOCK_SIZE) * BLOCK_SIZE * per_token
        return {"keys and values": kv, **self._taken(step, model.parameters())}

    def _policy_samples(self, config: RewardConfig) -> Parts:
        """Of the policy that a reward model starts from, loaded once more to set the scale of scores."""
        with torch.device("meta"):
            sampled = models.from_shape(self.shape, getattr(torch, config.dtype))
        _without_values([sampled], self.fake)
        weights = _loaded(sampled.parameters(), self.device)
        return {"the policy": weights, **self._generation(sampled, MAX_SEQUENCES, config.max_length)}

    def _taken(self, run: Callable[[], object], held: Iterable[torch.Tensor]) -> Parts:
        """At the fullest moment of `run`, beside the tensors that it holds."""
        with self.fake, LiveBytes(held, self.device) as live:
            run()
        return {"activations": live.peak - live.block, "block of logits": live.block}


def build(config: TrainerConfig, shape: PreTrainedConfig, rewards: Sequence[PreTrainedConfig] = ()) -> Models:
    """The models that a run's trainer is made of; without PPO there is no critic, and no reference beside the model."""
    if isinstance(config, PPOConfig):
        return ppo.build(config, shape, rewards)
    if isinstance(config, RewardConfig):
        model = reward.build(config, shape)
    elif isinstance(config, DPOConfig):
        model = dpo.build(config, shape)
    else:
        model = sft.build(config, shape)
    return Models(policy=model, reference=model, critic=None)


def loss(config: TrainerConfig, made: Models, batch: Batch) -> torch.Tensor:
    """The trainer's loss of a micro-batch, for which any numbers do in place of what comes with it."""
    sequences, tokens = len(batch.last), len(batch.response_tokens)
    if isinstance(config, SFTConfig):
        return sft.batch_loss(made.policy, batch, denominator=tokens)
    if isinstance(config, PPOConfig):
        given = {name: torch.zeros(tokens) for name in inputs(config, made.critic is not None)}
        return ppo_loss.batch_loss(config, made.policy, made.critic, batch, given, denominator=tokens, kl_coef=1.0)[0]
    chosen = torch.arange(0, sequences - 1, 2)  # (P,), each beside the one that it was chosen over
    margins, confidences = torch.zeros(len(chosen)), torch.ones(len(chosen))
    pairs = Pairs([], chosen, chosen + 1, margins, confidences)
    if isinstance(config, DPOConfig):
        reference = torch.zeros(sequences)
        return dpo.batch_loss(config, made.policy, batch, pairs, reference, len(chosen), graded=False)[0]
    weights = torch.ones(config.heads * len(chosen)) if config.heads > 1 else None
    return reward.batch_loss(config, made.policy, batch, pairs, len(chosen), weights=weights, soft_labels=False)[0]


def kv_bytes_per_token(shape: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of keys and values in all layers, heads padded to whole 16 as they are in blocks."""
    text = shape.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return 2 * int(text.num_hidden_layers) * int(kv_heads) * -(-dim // 16) * 16 * dtype.itemsize


def full_batch(config: TrainerConfig) -> Batch:
    """As many tokens as a micro-batch may have, in sequences that are as long as they may be.

    A sequence longer than the budget goes alone, and a comparison is never cut in two. Comparisons of one prompt are
    not cut either: where a prompt has many, a micro-batch is larger than this.
    """
    tokens = max(config.optim.max_tokens_per_microbatch, longest_microbatch(config))
    if isinstance(config, SFTConfig):
        return _packed(tokens, config.max_length) if config.packing else _batch(tokens, config.max_length, 1)
    return _batch(tokens, config.max_length, config.samples_per_prompt if isinstance(config, PPOConfig) else 2)


def _packed(tokens: int, longest: int) -> Batch:
    """Conversations of equal lengths in one row."""
    count = -(-tokens // longest)
    sizes = [max(tokens // count + (i < tokens % count), 2) for i in range(count)]
    return batch_of([Tokenized((0,) * n, (False,) + (True,) * (n - 1)) for n in sizes], packed=count > 1)


def longest_microbatch(config: TrainerConfig) -> int:
    """Tokens of one sequence, or of a comparison's two, however small the budget is."""
    return config.max_length * (2 if isinstance(config, RewardConfig | DPOConfig) else 1)


def _batch(tokens: int, longest: int, together: int) -> Batch:
    """Rows of so many tokens in all, with several responses `together` in a row where a row may be that long."""
    shared = together > 1 and longest <= LONGEST_ROW
    width = min(LONGEST_ROW, longest * together) if shared else longest
    rows = -(-tokens // width)
    width = max(tokens // rows, 3)
    if not shared:
        return pad([Example((0,), (0,) * (width - 1))] * rows)
    half = (width - 1) // 2  # two to a row: more of them would give the same shapes
    sizes = (half, width - 1 - half)
    return pad([Example((row,), (0,) * size) for row in range(rows) for size in sizes], longest_shared=LONGEST_ROW)


# Without memory -----------------------------------------------------------------------------------------------------


def _without_values(modules: Sequence[nn.Module], fake: FakeTensorMode) -> None:
    """Give modules on the meta device tensors that seem to be on a CPU, where models choose the paths that they take
    with values. What they share stays shared.

    transformers looks at values to see that a batch needs no mask; where there are none it would make one. Under
    another name the same attention gets the mask that it is given.
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
    given: dict[str, Any] = {item.name: getattr(batch, item.name) for item in fields(batch)}
    made: dict[str, Any] = {name: fake.from_tensor(x) for name, x in given.items() if isinstance(x, torch.Tensor)}
    return replace(batch, **made)


def _parameters(*modules: nn.Module) -> list[nn.Parameter]:
    """Each once, in order."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _loaded(weights: Iterable[torch.Tensor], device: Device) -> int:
    """Bytes of weights as models.load places them: on a CPU, from 1 MiB on, in whole huge pages of 2 MiB."""
    page = 2 << 20
    return sum(-(-x.nbytes // page) * page if device == "cpu" and x.nbytes >= 1 << 20 else x.nbytes for x in weights)


# Counting -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it and alive.

    Args:
        held: tensors that were there before; they and their views do not count.
        device: on which the losses of hidden states would work in their blocks of logits, which no tensor shows.
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

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size


def _block_of_logits(function: Any, args: Any, device: Device) -> int:
    """Bytes that an op on hidden states works in: see ops/lm_head.py."""
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
