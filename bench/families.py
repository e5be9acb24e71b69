"""Try every class of causal language models in transformers, tiny, with random weights: right here, refused, or wrong.

    python -m bench.families            tries all and writes docs/models.md
    python -m bench.families llama phi3 tries these and prints their rows

What is right is held against the model's own plain forward pass of each sequence alone, in float32: the
log-probabilities that training takes (padded, with a shared prompt, packed), and those of sampled tokens, for sequences
that run past the windows, chunks and original lengths of their tiny configs. Each class has a process of its own.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_fast import Generator, SamplingParams, models
from rlhf_fast.config import LoRAConfig
from rlhf_fast.data.batches import Example, pad
from rlhf_fast.data.conversations import Tokenized, batch_of
from rlhf_fast.models.forward import check_head

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SECONDS = 600  # that one class may take
MEMORY = 12 << 30  # addresses, of which torch itself reserves most
VOCABULARY = 320
POSITIONS = 128
WINDOW, CHUNK, ORIGINAL, FLOOR = 9, 16, 24, 8  # all passed by the longest sequences here
LONGEST = 60
LENGTHS = (1, 5, 7, 17, 40)  # of prompts

# What is made small, by the names that configs have for it. Lists that follow from these are left to the config.
SIZES: dict[str, int | float | bool | None] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "lru_width",
                     "attention_hidden_size", "decoder_hidden_size", "embed_dim", "projection_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dff", "decoder_ffn_dim", "encoder_ffn_dim",
                     "ffn_hidden_size", "shared_intermediate_size", "intermediate_size_mlp", "dim_ff",
                     "feed_forward_size", "block_ff_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers",
                     "num_decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "mamba_num_heads",
                     "linear_num_value_heads", "linear_num_key_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim", "shared_expert_intermediate_size",
                     "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions",
                     "max_target_positions", "max_sequence_length", "seq_length"), POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "local_attention"), WINDOW),
    "attention_chunk_size": CHUNK, "original_max_position_embeddings": ORIGINAL, "floor_scale": FLOOR,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "index_topk": 8, "index_n_heads": 32, "index_head_dim": 8,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_d_ssm": 32, "time_step_rank": 4, "chunk_size": 8,
    "mamba_chunk_size": 8, "n_groups": 1, "mamba_n_groups": 1,
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "laurel_rank": 4,
    "encoder_layers": 1, "num_encoder_layers": 1, "rotary_dim": 4, "dim_model_base": 16,
    "logits_scaling": 4.0, "logit_scale": 0.25, "lm_head_multiplier": 0.5, "logits_soft_cap": 3.0,
    "final_logit_softcapping": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}  # fmt: skip


AND = " // "  # between the reasons of a row


@dataclass(frozen=True)
class Row:
    """Verdict on a class."""

    kind: str  # the model type of its config
    name: str  # of the class
    training: str  # right, right up to N tokens, refused, WRONG, not made
    generation: str  # the same, or "-" where it was not tried
    same_bits: str  # yes, no, or "-"
    why: str


# Tiny models --------------------------------------------------------------------------------------------------------


def tiny_config(kind: str, **changes: Any) -> Any:
    """The config of a tiny model of that type, with windows, chunks and original lengths that short sequences pass."""
    if kind in VARIANTS:
        kind, variant = VARIANTS[kind]
        changes = {**variant, **changes}
    return _smaller(CONFIG_MAPPING[kind], {**OVERRIDES.get(kind, {}), **changes})


def _smaller(config_class: Any, changes: dict[str, Any]) -> Any:
    default = config_class()
    known = default.to_dict()
    set_here = {name for name in known if known[name] is not None or name == "num_experts_per_tok"}
    options: dict[str, Any] = {name: size for name, size in SIZES.items() if name in set_here}
    if known.get("kv_lora_rank"):  # keys and values come from one product
        options |= {"num_key_value_heads": 4, "head_dim": SIZES["qk_rope_head_dim"]}
    for name, inner in known.items():
        if isinstance(inner, dict) and inner.get("model_type") in CONFIG_MAPPING:
            kind = inner["model_type"]
            options[name] = tiny_config(kind, **changes.get(name, {})).to_dict()
    if "is_decoder" in known:
        options["is_decoder"] = True
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    options |= {name: token for name, token in ends.items() if name in known}
    return config_class(**{**options, **changes})


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Build a model with random weights that are wide enough for logits to differ."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


ROPE = {"rope_type": "default", "rope_theta": 1e4}
ALPHA = {**ROPE, "rope_type": "dynamic", "factor": 1.0, "alpha": 100.0}
MIXED = ["sliding_attention", "full_attention"] * 2
OVERRIDES: dict[str, dict[str, Any]] = {  # what the classes ask of sizes, and what would not be tried otherwise
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {"layer_types": MIXED, "rope_parameters": dict.fromkeys(MIXED, ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 32,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": ALPHA},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": ALPHA},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"layer_types": MIXED},
    "gemma4_text": {"layer_types": MIXED},
    "gemma4_unified_text": {"layer_types": MIXED},
    "llama4_text": {"floor_scale": 4096},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}


LONG = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.5, 2.0, 3.0, 4.0]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # of rotations, windows and scales, in families that have them
    "llama, dynamic NTK": ("llama", {
        "max_position_embeddings": ORIGINAL, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}}),
    "llama, YaRN": ("llama", {
        "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}}),
    "phi3, LongRoPE": ("phi3", {
        "sliding_window": None, "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": {**ROPE, "rope_type": "longrope", **LONG, "original_max_position_embeddings": ORIGINAL}}),
    "llama4_text, scaled from the 8th token on": ("llama4_text", {"floor_scale": FLOOR}),
    "ministral3, scaled from the 24th position on": ("ministral3", {
        "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 16.0, "llama_4_scaling_beta": 0.5,
                            "original_max_position_embeddings": ORIGINAL}}),
    "qwen2, windows in some layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
}  # fmt: skip


# What is right ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain(model: Any, example: Example) -> torch.Tensor:
    """The definition: one sequence alone through the model itself, and the log-probabilities of its response: (R,)."""
    ids = torch.tensor([example.prompt + example.response])
    table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
    places = torch.arange(len(example.prompt) - 1, len(example) - 1)
    return table[places, list(example.response)]


def is_near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool(torch.isfinite(want).all()) and torch.allclose(got, want, rtol=1e-4, atol=2e-4)


def examples(longest: int, vocabulary: int = 256) -> list[Example]:
    """Make three responses to one prompt, and others of several lengths, one `longest` tokens long."""
    generator = torch.Generator().manual_seed(5)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    prompt, half = drawn(max(longest // 2, 1)), longest - max(longest // 2, 1)
    shared = [Example(prompt, drawn(n)) for n in (half, max(half // 2, 1), 1)]
    return [*shared, Example(drawn(1), drawn(4)), Example(drawn(3), drawn(max(longest // 3, 2)))]


@torch.no_grad()
def training_is_right(model: Any, longest: int) -> str:
    """Name the form of a batch that gives other log-probabilities than sequences have alone; empty if none does."""
    rows = examples(longest)
    want = torch.cat([plain(model, example) for example in rows])
    scale = f"{float(want.abs().max()):.0f}"
    for form, batch in _forms(model, rows):
        got, _ = models.response_logprobs(model, batch)
        if not is_near(got, want):
            return f"{form}: off by {float((got - want).abs().max()):.1e} of {scale} at {longest} tokens"
    return ""


def adapter_is_right(model: Any) -> str:
    """Say how a fresh adapter changes log-probabilities, or gets no gradient; empty if neither. The model keeps it."""
    rows = examples(WINDOW - 2)
    want = torch.cat([plain(model, example) for example in rows])
    policy = models.trainable(model, LoRAConfig(r=2, alpha=4))
    got, _ = models.response_logprobs(policy, pad(rows))
    got.sum().backward()
    if not is_near(got.detach(), want):
        return "a fresh adapter changes log-probabilities"
    moved = any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in policy.parameters())
    return "" if moved else "an adapter gets no gradient"


def _forms(model: Any, rows: Sequence[Example]) -> Iterator[tuple[str, Any]]:
    yield "padded", pad(rows)
    shared = models.longest_shared(model)
    if max(map(len, rows)) <= shared:
        yield "shared prompt", pad(rows, longest_shared=shared)
    packed = models.longest_packed(model)
    if max(map(len, rows)) <= packed:
        whole = [Tokenized(e.prompt + e.response, (False,) * len(e.prompt) + (True,) * len(e.response)) for e in rows]
        yield "packed", batch_of(whole, packed=True)


def generation_is_right(model: Any, lengths: Sequence[int] = LENGTHS, new: int = 12) -> tuple[str, bool]:
    """Say how sampled log-probabilities differ from the plain pass (empty: they do not), and whether all bits are the
    same whatever else is in the batch."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in lengths]
    params = SamplingParams(n=2, max_new_tokens=new, ignore_eos=True, seed=2)
    runs = []
    settings: list[dict[str, Any]] = [{}, {"max_sequences": 1}, {"max_batch_tokens": 7}]
    for options in settings:
        rollouts = Generator(model, block_size=16, **options).generate(prompts, params)
        want = torch.cat([plain(model, example) for example in rollouts.examples()])
        got = rollouts.logprobs[rollouts.response_mask]
        if not is_near(got, want):
            off = (got - want).abs()
            return f"{options or 'sampled'}: off by {float(off.max()):.1e} of {float(want.abs().max()):.0f}", False
        runs.append(rollouts)
    same = all(torch.equal(runs[0].logprobs, one.logprobs) for one in runs[1:])
    same &= [e.response for e in runs[0].examples()] == [e.response for e in runs[1].examples()]
    return "", same


# Trying all ---------------------------------------------------------------------------------------------------------


def tried(kind: str) -> Row:
    """Test the class of a model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VARIANTS[kind][0] if kind in VARIANTS else kind]
    try:
        model = tiny_model(tiny_config(kind))
        name = type(model).__name__
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False)
    except Exception as error:
        return Row(kind, name, "not made", "-", "-", _words(error))
    return Row(kind, name, *judged(model))


def judged(model: Any) -> tuple[str, str, str, str]:
    """(training, generation, same bits, why)."""
    try:
        check_head(model)
    except ValueError as error:
        return "refused", "refused", "-", _words(error)
    training, why = _up_to(lambda longest: training_is_right(model, longest))
    same = "-"

    def sampled(longest: int) -> str:
        nonlocal same
        wrong, bits = generation_is_right(model, [n for n in LENGTHS if n + 12 <= longest])
        same = "yes" if bits else "no"
        return wrong

    generation, more = _up_to(sampled)
    try:
        lost = adapter_is_right(model)
    except Exception as error:
        lost = _words(error, frames=True)
    if lost:
        training, why = "WRONG", lost
    words = AND.join(dict.fromkeys(x for x in (why, more) if x))
    return training, generation, same if generation.startswith("right") else "-", words


def _up_to(wrong: Callable[[int], str]) -> tuple[str, str]:
    """Say whether all is right with long sequences, or with short ones where long ones are refused."""
    words = ""
    for longest in (LONGEST, ORIGINAL, CHUNK - 1, WINDOW - 1):
        try:
            said = wrong(longest)
        except ValueError as error:
            words = words or _words(error)
            continue
        except Exception as error:
            return "WRONG", _words(error, frames=True)
        if said:
            return "WRONG", said
        return ("right" if longest == LONGEST else "right, short"), words
    return "refused", words


def _words(error: Exception, frames: bool = False) -> str:
    said = " ".join(str(error).split())
    said = said if isinstance(error, ValueError) and not frames else f"{type(error).__name__}: {said}"
    if frames or os.environ.get("FAMILIES_TRACE"):
        last = traceback.extract_tb(error.__traceback__)[-1]
        said += f" ({Path(last.filename).name}:{last.lineno})"
    return said.replace("|", "/")[:300]


def in_a_process(kind: str) -> Row:
    """`tried`, whatever the class does: crash, or take for ever."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.send(tried(kind))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    theirs.close()
    row = None
    if ours.poll(SECONDS):
        try:
            row = ours.recv()
        except EOFError:
            row = None
    if row is None:
        how = f"takes more than {SECONDS} s" if process.is_alive() else f"its process ended with {process.exitcode}"
        row = Row(kind, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)), "not made", "-", "-", how)
    process.kill()
    process.join()
    return row


# The page ------------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Models: what is right, and what is refused

Made by `python -m bench.families`, with transformers {transformers} and torch {torch}. Do not edit.

Every class that transformers maps to a causal language model, tiny, with random weights, in float32 on a CPU, and some
of them again with a rotation, windows or scales of note. What is right gives the log-probabilities of the model's own
plain forward pass of each sequence alone, in sequences that run past the windows, chunks and original lengths of their
configs: **training** padded, with a prompt that several responses share, packed, and with an adapter; **generation** of
sampled tokens, in any batch and any chunks. *Right, short* is so up to a length, beyond which it is refused. What is
refused is refused by name, when a model is loaded, or when a generator is made. *Not made* are those that could not be
built tiny here.

**Same bits**: whether the log-probabilities of a response keep every bit whatever else is in the batch. Where that is
"no", the last bits change with the batch, since some of the model's products are torch's (mixtures of experts, GPT-2's
transposed weights, the small products between the layers of Gemma 3n and 4).

{counts}

| config | class | training | generation | same bits | why |
|---|---|---|---|---|---|
"""


def page(rows: Sequence[Row]) -> str:
    """docs/models.md."""
    counts = [
        f"{what}: " + ", ".join(f"{count} {result}" for result, count in collections.Counter(outcomes).most_common())
        for what, outcomes in (
            ("Training", [row.training for row in rows]),
            ("Generation", [row.generation for row in rows if row.generation != "-"]),
            ("Same bits", [row.same_bits for row in rows if row.same_bits != "-"]),
        )
    ]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    lines = [
        f"| {' | '.join((row.kind, row.name, row.training, row.generation, row.same_bits, _short(row)))} |"
        for row in rows
    ]
    return INTRODUCTION.format(**versions, counts=". ".join(counts) + ".") + "\n".join(lines) + "\n"


def _short(row: Row) -> str:
    """Shorten a row's reason by what the table says already."""
    said = [
        one.replace(f"model: {row.name} ", "").partition("; expected a model such as")[0] for one in row.why.split(AND)
    ]
    return "; ".join(dict.fromkeys(said))


def main() -> None:
    transformers.logging.set_verbosity_error()
    asked = sys.argv[1:]
    rows = []
    for kind in asked or sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]):
        rows.append(in_a_process(kind))
        print(" | ".join(dataclasses.astuple(rows[-1])), flush=True)
    if not asked:
        PAGE.write_text(page(rows), encoding="utf-8")
    wrong = [row.kind for row in rows if "WRONG" in (row.training, row.generation)]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
