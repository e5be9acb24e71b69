"""`rlhf-fast bench rollout`: tokens a second of Generator beside transformers' generate and generate_batch.

All have the same float32 weights and the same prompts and draw from the whole distribution; each of several rounds
begins with another one. Beside them stands what this machine allows: the bytes of weights, keys and values that must
be read, and the products that must be done, at rates measured in the same run. One more run of ours says where its time
goes, kernel by kernel.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import harness
from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.ops import compiled

ROUNDS, ENOUGH = 5, 90.0  # no further round after so many seconds
Run = Callable[[], int]  # generates; returns the number of new tokens


@dataclass(frozen=True)
class Case:
    """Prompts of so many tokens, and so many new ones for each of their samples."""

    name: str
    prompts: list[list[int]]
    new_tokens: list[int]  # of each sample of a prompt
    n: int = 1

    def tokens(self) -> int:
        return self.n * sum(self.new_tokens)


def cases(vocabulary: int) -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int, least: int, most: int) -> list[list[int]]:
        sizes = torch.randint(least, most + 1, (count,), generator=generator).tolist()
        return [torch.randint(100, vocabulary, (size,), generator=generator).tolist() for size in sizes]

    cases = [Case(f"{count} prompts", prompts(count, 8, 24), [48] * count) for count in (1, 8, 32, 64)]
    ragged = (8 * 2.0 ** (5 * torch.rand(64, generator=generator))).long().tolist()  # 8 to 256, most of them short
    cases.append(Case("64 ragged", prompts(64, 8, 24), ragged))
    cases.append(Case("8 prompts of 400 x 8", prompts(8, 400, 400), [48] * 8, n=8))
    return cases


def ours(case: Case, model: Any, **options: Any) -> Run:
    generator = Generator(model, **options)
    params = [SamplingParams(n=case.n, max_new_tokens=count, ignore_eos=True, seed=1) for count in case.new_tokens]

    def run() -> int:
        generator._weights = None  # nothing is kept from the last round
        return int(generator.generate(case.prompts, params).response_mask.sum())

    return run


def generate(case: Case, model: Any) -> Run:
    """Generate one batch, padded on the left; it goes on until the longest response is done."""
    rows = [prompt for prompt in case.prompts for _ in range(case.n)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    longest = max(case.new_tokens)

    def run() -> int:
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=longest, min_new_tokens=longest,
            pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == width + longest
        return case.tokens()  # what was asked for; the rest is waste

    return run


def generate_batch(case: Case, model: Any) -> Run:
    """transformers' own continuous batching; one length for all, so it is left out of the ragged case."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=case.new_tokens[0], eos_token_id=-1, pad_token_id=0
    )
    rows = [prompt for prompt in case.prompts for _ in range(case.n)]

    def run() -> int:
        out = model.generate_batch(inputs=rows, generation_config=config, progress_bar=False)
        return sum(len(sequence.generated_tokens) for sequence in out.values())

    return run


def limit(case: Case, model: Any, rates: harness.Rates) -> float:
    """Seconds at least, if sequences start together: each step reads all weights, and the keys and values of each
    context; or is bound by its products. What prompts have in common is computed once."""
    config, total = model.config, sum(p.numel() for p in model.parameters())
    head = config.vocab_size * config.hidden_size
    trunk = total - head if config.tie_word_embeddings else total - 2 * head
    kv_heads = config.num_key_value_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    size = model.dtype.itemsize
    per_token = 2 * kv_heads * config.num_hidden_layers * size
    prompt = sum(map(len, case.prompts))
    operations = 2.0 * (trunk * prompt + head * len(case.prompts))
    seconds = max(operations / rates.product, size * (trunk + head) / rates.read)
    for step in range(1, max(case.new_tokens)):
        going = [len(p) + step for p, count in zip(case.prompts, case.new_tokens, strict=True) if count > step]
        read = size * (trunk + head) + per_token * sum(length + (case.n - 1) * step for length in going)
        seconds += max(2.0 * (trunk + head) * len(going) * case.n / rates.product, read / rates.read)
    return seconds


def profile(run: Run) -> dict[str, float]:
    """Milliseconds of a run in each compiled kernel, products by their first dimension (rows), and in all the rest."""
    spent: dict[str, float] = {}
    kernels = compiled.cpu

    class Timed:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            kernel = getattr(kernels, name)

            def timed(*arguments: Any) -> Any:
                started = time.perf_counter()
                result = kernel(*arguments)
                label = name.removesuffix("_forward")
                if label == "linear":
                    label = f"linear, {arguments[2]} rows"
                spent[label] = spent.get(label, 0.0) + 1e3 * (time.perf_counter() - started)
                return result

            return timed

    started = time.perf_counter()
    try:
        compiled.cpu = Timed()
        run()
    finally:
        compiled.cpu = kernels
    spent["all else"] = 1e3 * (time.perf_counter() - started) - sum(spent.values())
    return spent


def main(only: str, out: Path) -> None:
    warnings.simplefilter("ignore")
    model, _ = models.load("smollm2-135m")
    chosen = [case for case in cases(model.config.vocab_size) if only in ("", case.name)]
    if not chosen:
        raise ValueError(f"op: no case {only!r}; there are {', '.join(c.name for c in cases(1000))}")
    about, rates = harness.environment(torch.device("cpu")), harness.rates(torch.device("cpu"))
    print(
        f"{about['device']}, {about['threads']} threads, isa {about['isa']}, torch {about['torch']}, {about['commit']}"
    )
    print(f"reads {rates.read / 1e9:.1f} GB/s, multiplies {rates.product / 1e9:.0f} GFLOP/s; smollm2-135m in float32")
    for case in tqdm(chosen, desc="bench", unit="case", disable=None):
        runs: dict[str, Run] = {"rlhf-fast": ours(case, model), "generate": generate(case, model)}
        if len(set(case.new_tokens)) == 1 and case.n == 1:  # it would take many minutes over long prompts
            runs["generate_batch"] = generate_batch(case, model)
        if case.n > 1:
            runs["rlhf-fast without sharing"] = ours(case, model, share_prefixes=False)
        least = limit(case, model, rates)
        records = timed(case, runs, least, about, rates)
        if compiled.cpu is not None:
            spent = profile(runs["rlhf-fast"])
            largest = sorted(spent.items(), key=lambda item: -item[1])[:7]
            tqdm.write("  our ms: " + ", ".join(f"{name} {ms:.0f}" for name, ms in largest))
            records[0]["profile_ms"] = spent
        harness.write_records(records, out)  # case by case: what is done stays, whatever comes
    print(f"\nwritten to {out}")


def timed(
    case: Case, runs: dict[str, Run], least: float, about: dict[str, Any], rates: harness.Rates, rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Time everybody, whom the others are compared with first; prints a line for each and returns their records."""
    times = _interleaved(runs, rounds)
    first = next(iter(times.values()), [])
    records: list[dict[str, Any]] = []
    tqdm.write(f"\n{case.name}: {case.tokens()} new tokens, limit {case.tokens() / least:.0f} tokens/s")
    for name, took in times.items():
        middle = statistics.median(took)
        ratio = statistics.median(t / o for t, o in zip(took, first, strict=True))
        tqdm.write(
            f"  {name:28} {case.tokens() / middle:8.1f} tokens/s   {100 * least / middle:4.0f} % of the limit"
            f"   {ratio:6.2f} x our time"
        )
        records.append(
            {"op": f"rollout: {case.name}", "case": case.name, "provider": name, "tokens": case.tokens(),
             "seconds": middle, "rounds": len(took), "limit_seconds": least, "speedup": ratio, **about,
             "rates": dataclasses.asdict(rates)}
        )  # fmt: skip
    return records


def _interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds that each begin with another one; one that fails is told of and left out."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    begun = time.monotonic()
    for i in range(rounds):
        if time.monotonic() - begun > ENOUGH:
            break
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            if name not in times:
                continue
            gc.collect()
            started = time.perf_counter()
            try:
                runs[name]()
            except Exception as error:
                tqdm.write(f"  {name}: left out, {type(error).__name__}: {str(error)[:150]}", sys.stderr)
                del times[name]
                continue
            times[name].append(time.perf_counter() - started)
    return times
