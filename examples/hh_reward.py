"""A reward model on the human comparisons of HH-RLHF (MIT licence), measured on a held-out tenth of the prompts.

    python examples/hh_reward.py harmless-base-test.jsonl.gz runs/hh-reward --max-tokens 192

Comparisons with a longer side are left out, which on a CPU is the difference between minutes and hours; how many remain
is printed. Without --max-tokens all are used.
"""

from __future__ import annotations

import argparse

from rlhf_fast import OptimConfig, RewardConfig, RewardTrainer, models
from rlhf_fast.data.chat import encode
from rlhf_fast.data.records import read_comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="harmless-base-test.jsonl.gz, or any comparisons file")
    parser.add_argument("out", help="folder of the run")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of prompt and response together")
    arguments = parser.parse_args()

    comparisons = read_comparisons(arguments.data)
    _, tokenizer = models.load(arguments.model)
    short = [
        row
        for row in comparisons
        if all(
            len(encode(tokenizer, row.prompt, text, 1 << 30, row.name)) <= arguments.max_tokens
            for text in (row.chosen, row.rejected)
        )
    ]
    print(f"{len(short)} of {len(comparisons)} comparisons have at most {arguments.max_tokens} tokens a side")
    config = RewardConfig(heldout=0.1, max_length=arguments.max_tokens, optim=OptimConfig(lr=2e-4))
    result = RewardTrainer(arguments.model, short, arguments.out, config).train()
    print(result["summary"], f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
