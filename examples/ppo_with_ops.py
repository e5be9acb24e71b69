"""PPO with the ops: a tiny language model learns to write even tokens. ppo_plain.py is the same in plain PyTorch.

python examples/ppo_with_ops.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhf_fast import ops

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
            old, _ = ops.linear_token_logprobs(states, policy.head.weight, tokens[:, 1:], mask=mask)
            ref, _ = ops.linear_token_logprobs(reference(tokens), reference.head.weight, tokens[:, 1:], mask=mask)
            scores = ((tokens[:, 1:] % 2 == 0) * mask).sum(1) / mask.sum(1)  # (B,)
            pay = {"scores": scores, "logprobs": old, "ref_logprobs": ref, "kl_coef": KL_COEF}
            advantages, returns, sums = ops.gae(None, old_values, GAMMA, LAMBDA, mask, sums=True, **pay)
        for _ in range(EPOCHS):
            states = policy(tokens)
            values = policy.value(states)[..., 0]
            loss, stats = ops.linear_ppo_loss(
                states, policy.head.weight, tokens[:, 1:], old, advantages, values=values, old_values=old_values,
                returns=returns, mask=mask, clip_low=CLIP, clip_high=CLIP, value_clip=CLIP, value_coef=0.1,
                entropy_coef=0.001, advantage_sums=sums,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield {"step": step, "score": scores.mean().item(), "loss": loss.item(), "entropy": stats["entropy"].item()}


if __name__ == "__main__":
    for row in train():
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
