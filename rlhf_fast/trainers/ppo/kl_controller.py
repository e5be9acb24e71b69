"""Control the coefficient of the KL penalty: fixed, or adapted towards a target."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class KLController:
    """Proportional control of the KL penalty (arXiv 1909.08593, section 2.2); without a target it stays as it is."""

    coef: float
    target: float | None = None  # nats a sequence
    horizon: float = 10_000.0  # sequences

    def update(self, kl: float, sequences: int) -> None:
        """Update the coefficient after a step over `sequences` sequences whose mean KL was `kl` nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * sequences / self.horizon

    def state_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
