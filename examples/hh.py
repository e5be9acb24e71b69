"""Human comparisons of HH-RLHF (MIT licence): a reward model, then DPO, each measured on prompts never trained on.

    python examples/hh.py harmless-base-test.jsonl.gz runs/hh --max-tokens 128

Comparisons with a longer side are left out, which on a CPU is the difference between minutes and hours; how many remain
is printed. Without --max-tokens all are used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf_fast import DPOConfig, DPOTrainer, OptimConfig, RewardConfig, RewardTrainer, models
from rlhf_fast.data import tokenize_record
from rlhf_fast.data.records import read_comparisons


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="harmless-base-test.jsonl.gz, or any comparisons file")
    parser.add_argument("out", help="folder of the runs")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of prompt and response together")
    arguments = parser.parse_args(words)

    comparisons = read_comparisons(arguments.data)
    _, tokenizer = models.load(arguments.model)
    short = [
        row for row in comparisons if all(len(side) <= arguments.max_tokens for side in tokenize_record(row, tokenizer))
    ]
    print(f"{len(short)} of {len(comparisons)} comparisons have at most {arguments.max_tokens} tokens a side")
    out, limit = Path(arguments.out), arguments.max_tokens
    reward = RewardConfig(heldout=0.1, max_length=limit, optim=OptimConfig(lr=2e-4))
    dpo = DPOConfig(heldout=0.1, max_length=limit, optim=OptimConfig(lr=5e-5))
    for trainer in (
        RewardTrainer(arguments.model, short, out / "reward", reward),
        DPOTrainer(arguments.model, short, out / "dpo", dpo),
    ):
        result = trainer.train()
        print(result["phase"], result["summary"], f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
