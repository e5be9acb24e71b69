"""PPO in plain PyTorch: a tiny language model learns to write even tokens. ppo_with_ops.py is the same with the ops.

python examples/ppo_plain.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, BATCH = 1000, 64, 32, 64
STEPS, EPOCHS, GAMMA, LAMBDA, CLIP, KL_COEF = 30, 4, 1.0, 0.95, 0.2, 0.02


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.value = nn.Linear(WIDTH, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """States that predict each token but the first: (B, T, H)."""
        return self.trunk(self.embed(tokens[:, :-1]))[0]


@torch.no_grad()
def sample(policy: Policy) -> tuple[Tensor, Tensor]:
    """Token 0, then LENGTH sampled ones: (B, 1 + T). Responses differ in length, what follows is masked: (B, T)."""
    tokens = torch.zeros(BATCH, 1, dtype=torch.long)
    for _ in range(LENGTH):
        probabilities = policy.head(policy(torch.cat([tokens, tokens[:, -1:]], 1))[:, -1]).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], 1)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    return tokens, torch.arange(LENGTH) < lengths


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def score(policy: Policy, states: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy: (B, T) twice."""
    logp = torch.log_softmax(policy.head(states), -1)
    return logp.gather(-1, tokens[:, 1:, None])[..., 0] * mask, -(logp.exp() * logp).sum(-1)


def advantages_and_returns(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantages: (B, T) twice."""
    values, zero = values * mask, torch.zeros(len(values))
    after, advantages = zero, []
    for t in reversed(range(LENGTH)):
        following = values[:, t + 1] if t + 1 < LENGTH else zero
        after = (rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * after) * mask[:, t]
        advantages.insert(0, after)
    stacked = torch.stack(advantages, 1)
    return stacked, stacked + values


def ppo_loss(
    policy: Policy,
    states: Tensor,
    tokens: Tensor,
    old: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss and entropy, advantages whitened."""
    logprobs, entropy = score(policy, states, tokens, mask)
    mean = masked_mean(advantages, mask)
    deviation = (((advantages - mean) ** 2 * mask).sum() / (mask.sum() - 1) + 1e-8).sqrt()
    advantages = (advantages - mean) / deviation
    ratio = (logprobs - old).exp()
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    value_loss = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
    mean_entropy = masked_mean(entropy, mask)
    return masked_mean(policy_loss, mask) + 0.1 * masked_mean(value_loss, mask) - 0.001 * mean_entropy, mean_entropy


def train(steps: int = STEPS) -> Iterator[dict[str, float]]:
    torch.manual_seed(0)
    policy, reference = Policy(), Policy()
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for step in range(steps):
        tokens, mask = sample(policy)
        with torch.no_grad():
            states = policy(tokens)
            old_values = policy.value(states)[..., 0]
            old, _ = score(policy, states, tokens, mask)
            ref, _ = score(reference, reference(tokens), tokens, mask)
            scores = ((tokens[:, 1:] % 2 == 0) * mask).sum(1) / mask.sum(1)  # (B,)
            rewards = -KL_COEF * (old - ref)
            rewards[torch.arange(BATCH), mask.sum(1) - 1] += scores
            advantages, returns = advantages_and_returns(rewards, old_values, mask)
        for _ in range(EPOCHS):
            states = policy(tokens)
            values = policy.value(states)[..., 0]
            loss, entropy = ppo_loss(policy, states, tokens, old, advantages, values, old_values, returns, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield {"step": step, "score": scores.mean().item(), "loss": loss.item(), "entropy": entropy.item()}


if __name__ == "__main__":
    for row in train():
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
