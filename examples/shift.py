"""Show which token a row predicts: the ops take rows and tokens as they come, and the caller shifts.

    python examples/shift.py --model smollm2-135m

Row t of a model's output predicts token t + 1: the last row predicts what comes after the text, and nothing predicts
the first token. The first three numbers are the same; the last is what comes out, without any error, if nobody shifts.
"""

from __future__ import annotations

import argparse

import torch

from rlhf_fast import models, ops

TEXT = "The sky is blue, the grass is green, and the sun is yellow."


@torch.no_grad()
def main(words: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    model, tokenizer = models.load(parser.parse_args(words).model)

    input_ids = tokenizer(TEXT, return_tensors="pt").input_ids  # (B, T)
    mask = torch.ones_like(input_ids, dtype=torch.bool)  # (B, T): of padded rows False where there is padding
    output = model(input_ids, labels=input_ids, output_hidden_states=True)
    hidden, weight = output.hidden_states[-1], model.get_output_embeddings().weight  # (B, T, H), (V, H)

    shifted = hidden[:, :-1], weight, input_ids[:, 1:]
    logprobs, _ = ops.token_logprobs(output.logits[:, :-1], input_ids[:, 1:], mask=mask[:, 1:])  # (B, T - 1)
    found = {
        "transformers": output.loss.item(),
        "ours": ops.linear_cross_entropy(*shifted, mask=mask[:, 1:]).item(),
        "from logits": (-logprobs.sum() / mask[:, 1:].sum()).item(),
        "unshifted": ops.linear_cross_entropy(hidden, weight, input_ids, mask=mask).item(),  # wrong
    }
    for name, loss in found.items():
        print(f"{name:<13} {loss:.4f}")
    return found


if __name__ == "__main__":
    main()
