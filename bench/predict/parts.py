"""List what one call of each op launches on a GPU, in the order of the launches. Triton's sizes are those of
kernels/launch_sizes.py, CUDA C++'s those in its host code.

Launches that take no time of their own (kernels over a few rows' numbers) are counted, for each waits for the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bench.harness import BOTH, Case
from bench.predict.cards import Kernel, Part, Product, Torch
from rlhf_fast.kernels.launch_sizes import OWN

Parts = Callable[[Case, str], list[Part]]  # of a case and a backend
SEGMENT, STATE = OWN["token_logprobs"]["SEGMENT"], 16  # columns of a program, CUDA's too, and bytes that it leaves
KL_SEGMENT, KL_STATE = OWN["full_kl"]["SEGMENT"], 24  # the same of full_kl
FINISH_ROWS = 16  # rows of a program of the finishing kernels in Triton


def small(name: str, count: int) -> Torch:
    """Kernels of PyTorch over next to nothing."""
    return Torch(name, count=count)


def launched(op: str, size: str, backend: str, cuda: int) -> tuple[int, int]:
    """What a program takes at a time, and its threads: `cuda` and 256 in CUDA C++."""
    return (OWN[op][size], 32 * OWN[op]["WARPS"]) if backend == "triton" else (cuda, 256)


def dtype_of(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


# --- over logits ------------------------------------------------------------------------------------------------------


def update(rows: int, columns: int, dtype: str, count: int = 1) -> Kernel:
    size, segments = (4 if dtype == "float32" else 2), math.ceil(columns / SEGMENT)
    n = rows * columns
    return Kernel(
        "token_logprobs", "update", (dtype,), n * size, n, special=n, programs=rows * segments, count=count
    )  # fmt: skip


def finish(op: str, name: str, rows: int, segments: int, state: int, backend: str, count: int = 1) -> Kernel:
    """Brings the segments of each row together: a thread a row, or in Triton a program for 16 rows."""
    in_triton = backend == "triton"
    threads = 128 if in_triton else 256
    return Kernel(
        op, name, (), rows * segments * state, threads=threads, count=count,
        passes=math.ceil(rows / FINISH_ROWS) * threads if in_triton else rows,
        programs=math.ceil(rows / (FINISH_ROWS if in_triton else threads)),
        trips=1 if in_triton else segments, cached=not in_triton,
    )  # fmt: skip


def logits_parts(rows: int, columns: int, dtype: str, backend: str, count: int = 1) -> list[Part]:
    segments = math.ceil(columns / SEGMENT)
    return [
        update(rows, columns, dtype, count),
        finish("token_logprobs", "finish", rows, segments, STATE, backend, count),
    ]


def in_logits(rows: int, columns: int, dtype: str, count: int = 1) -> Kernel:
    size, segments, n = (4 if dtype == "float32" else 2), math.ceil(columns / SEGMENT), rows * columns
    return Kernel(
        "token_logprobs", "gradient", (dtype,), 2 * n * size, n, special=n, programs=rows * segments, count=count
    )


def token_logprobs(case: Case, backend: str) -> list[Part]:
    rows, columns = case.shape
    forward = logits_parts(rows, columns, dtype_of(case), backend)
    return [*forward, in_logits(rows, columns, dtype_of(case))] if case.mode == BOTH else forward


def cross_entropy(case: Case, backend: str) -> list[Part]:
    """token_logprobs and its gradient; label smoothing reads the logits once more, for their mean."""
    rows, columns = case.shape
    smoothed = "label smoothing" in case.profile
    parts = [small("what counts", 1), *logits_parts(rows, columns, dtype_of(case), backend)]
    if smoothed:
        parts.append(Torch("mean of each row", rows * columns * case.dtype.itemsize))
    parts.append(small("the mean over rows", 16 if smoothed else 6))
    return [*parts, small("its gradient", 9 if smoothed else 5), in_logits(rows, columns, dtype_of(case))]


def full_kl(case: Case, backend: str) -> list[Part]:
    rows, columns = case.shape
    dtype, n, size = dtype_of(case), rows * columns, case.dtype.itemsize
    js = case.profile.endswith("js")
    segments = math.ceil(columns / KL_SEGMENT)
    js_segment = KL_SEGMENT // 2 if backend == "triton" else KL_SEGMENT
    js_segments = math.ceil(columns / js_segment)
    programs = rows * segments
    parts: list[Part] = [
        Kernel("full_kl", "states", (dtype,), 2 * n * size, n, special=2 * n, programs=programs),
        finish("full_kl", "finish", rows, segments, KL_STATE, backend),
    ]
    if js:  # its terms need the sums of both: a second sweep
        parts += [
            Kernel("full_kl", "js_states", (dtype,), 2 * n * size, n, special=3 * n, programs=rows * js_segments),
            finish("full_kl", "js_finish", rows, js_segments, KL_STATE, backend),
        ]
    if case.mode == BOTH:
        words, each = (dtype, "js" if js else "kl"), (3 if js else 2)
        parts.append(Kernel("full_kl", "gradient", words, 4 * n * size, n, special=each * n, programs=programs))
    return parts


# --- over tokens, sequences and pairs ---------------------------------------------------------------------------------


def kl_estimate(case: Case, backend: str) -> list[Part]:
    (n,), size, dtype = case.shape, case.dtype.itemsize, dtype_of(case)
    tokens, threads = launched("kl_estimate", "BLOCK", backend, 1024)
    programs = math.ceil(n / tokens)

    def kernel(name: str, size: int) -> Kernel:
        return Kernel("kl_estimate", name, (dtype,), n * size, n, special=n, programs=programs, threads=threads)

    forward: list[Part] = [kernel("forward", 2 * size + 4)]
    return [*forward, kernel("gradient", 4 * size + 4)] if case.mode == BOTH else forward


def gae(case: Case, backend: str) -> list[Part]:
    """A program a sequence, tile by tile: a load, then a scan over the threads that takes about as long."""
    (rows, tokens), size = case.shape, case.dtype.itemsize
    tile, threads = launched("gae", "BLOCK", backend, 1024)
    n, tiles = rows * tokens, math.ceil(tokens / tile)
    kernel = Kernel(
        "gae", "forward", (dtype_of(case),), n * (2 * size + 8), n, programs=rows, threads=threads, trips=2 * tiles
    )
    return [kernel]


def ppo_parts(n: int, dtype: str, backend: str, values: bool, count: int = 1) -> list[Part]:
    """Policy, and value if asked for: a range of tokens a program, then one program over the ranges' sums. The counted
    path has all terms in it, so its instructions are too many.

    A program adds up 34 numbers over its threads: in Triton eight at a time, with five barriers each, a trip's time for
    all; in CUDA C++ 32 at a time, which takes half as long as a trip, but it loads float32 in two trips. The last one
    reads the ranges' sums in as many trips as it has rounds of loads under way at once, adds those of its threads up,
    and finds the statistics side by side.
    """
    triton, size = backend == "triton", 4 if dtype == "float32" else 2
    tokens, threads = launched("ppo_loss", "RANGE", backend, 2048)
    ranges = math.ceil(n / tokens)
    loads = math.ceil(ranges / 30)  # of a thread
    rounds = math.ceil(ranges / 256) if triton else loads // 8 + loads % 8
    inputs, gradients = (6, 2) if values else (3, 1)
    return [
        Kernel(
            "ppo_loss", "forward", (dtype,), n * (inputs * size + 1 + 4 * gradients), n, special=2 * n,
            programs=ranges, threads=threads, trips=2 if triton else size // 2 + 0.5, count=count,
        ),
        Kernel(
            "ppo_loss", "finish", (), ranges * 34 * 8, passes=512 * rounds if triton else 1024,
            threads=512 if triton else 1024, trips=rounds + 2 if triton else rounds + 1.5, count=count,
        ),
    ]  # fmt: skip


def ppo_loss(case: Case, backend: str) -> list[Part]:
    (n,) = case.shape
    scale = Kernel(
        "ppo_loss", "scale", (), 2 * 8 * n, n, programs=math.ceil(n / 1024), threads=128 if backend == "triton" else 256
    )
    return [*ppo_parts(n, dtype_of(case), backend, values=True), scale]


def pair_parts(n: int, backend: str) -> list[Part]:
    """Describe a loss of pairs: one program in float64, whose exponentials and sums take a trip's time each."""
    pairs, threads = launched("pair_loss", "BLOCK", backend, 256)
    rounds = math.ceil(n / pairs)
    kernel = Kernel(
        "pair_loss", "forward", ("float32",), n * 24, passes=threads * rounds, threads=threads, trips=3 * rounds + 1
    )
    return [kernel, small("loss, statistics, divisor", 3), small("the gradients, times that of the loss", 3)]


def pair_loss(case: Case, backend: str) -> list[Part]:
    return pair_parts(case.shape[0], backend)


def sequence_sums(rows: int, tokens: int, backend: str) -> Kernel:
    block, threads = launched("sequence_sum", "BLOCK", backend, 256)
    n = rows * tokens
    rounds = math.ceil(tokens / block)
    return Kernel(
        "sequence_sum", "forward", ("float32",), n * 5, passes=rows * threads * rounds, programs=rows, threads=threads,
        trips=rounds + 1,
    )  # fmt: skip


def sequence_sum(case: Case, backend: str) -> list[Part]:
    rows, tokens = case.shape
    return [
        sequence_sums(rows, tokens, backend),
        Torch("the sequences' gradients, where unmasked", rows * tokens * 5),
    ]


def group_advantages(case: Case, backend: str) -> list[Part]:
    """Describe the op's three ways through a group, with a sum after each of the first two."""
    (groups, size), triton = case.shape, backend == "triton"
    programs, threads = (groups, 32) if triton else (math.ceil(groups / 8), 256)
    kernel = Kernel(
        "group_advantages", "forward", (dtype_of(case),), groups * size * 8, passes=programs * threads,
        programs=programs, threads=threads, trips=4,
    )  # fmt: skip
    return [kernel]


# --- products and sweeps ----------------------------------------------------------------------------------------------


def bare_products(case: Case) -> list[Part]:
    """List what no implementation can do without: logits, and their gradients by the weights and by the states."""
    n, width, vocabulary = case.shape
    n = n // 2 if "half masked" in case.profile else n
    states, weights, logits = 2 * n * width, 2 * vocabulary * width, 2 * n * vocabulary
    count = (2 if "frozen head" in case.profile else 3) if case.mode == BOTH else 1
    return [Product("product", n, width, vocabulary, states + weights + logits, count)]


def sweep(case: Case, backend: str, loss: Callable[[int, int], list[Part]]) -> list[Part]:
    """Blocks of whole rows: logits in float32, log-probabilities, the loss of the block, the gradient over the logits,
    narrowed, and the products with it, whose sums are float32."""
    n, width, vocabulary = case.shape
    frozen, masked = "frozen head" in case.profile, "half masked" in case.profile
    n = n // 2 if masked else n
    count = math.ceil(n / ((1 << 28) * (2 if frozen else 1) // vocabulary))
    rows = math.ceil(n / count)
    states, weights, logits = rows * width, vocabulary * width, rows * vocabulary
    parts: list[Part] = [small("rows that count, zeros", 12)]
    parts += [
        Product("logits", rows, width, vocabulary, 2 * states + 2 * weights + 4 * logits, count),
        *logits_parts(rows, vocabulary, "float32", backend, count),
        *loss(rows, count),
        in_logits(rows, vocabulary, "float32", count),
        Torch("gradient in bfloat16", 6 * logits, count),
        Product("gradient in the states", rows, vocabulary, width, 2 * logits + 2 * weights + 8 * states, count),
    ]
    if not frozen:
        read = 2 * logits + 2 * states
        parts.append(Product("gradient in the weights", vocabulary, rows, width, read + 4 * weights))
        if count > 1:  # added to what is there
            parts.append(Product("... of the other blocks", vocabulary, rows, width, read + 8 * weights, count - 1))
        parts += [Torch("that, times the loss's gradient", 8 * weights), Torch("... in bfloat16", 6 * weights)]
    return [*parts, Torch("gradient in the states, in bfloat16", 14 * n * width), small("the loss's gradient", 2)]


def linear_ppo_loss(case: Case, backend: str) -> list[Part]:
    n = case.shape[0] // 2 if "half masked" in case.profile else case.shape[0]

    def loss(rows: int, count: int) -> list[Part]:
        return ppo_parts(rows, "float32", backend, values=False, count=count)

    return [*sweep(case, backend, loss), *ppo_parts(n, "float32", backend, values=False)]


def linear_cross_entropy(case: Case, backend: str) -> list[Part]:
    return [*sweep(case, backend, lambda rows, count: [small("the loss", 3 * count)]), small("the mean", 4)]


def linear_token_logprobs(case: Case, backend: str) -> list[Part]:
    """Blocks of columns, each for all rows, in float32; computed again for the gradient."""
    n, width, vocabulary = case.shape
    high = min(n, 8192)
    wide = min(vocabulary, max((1 << 26) // high // SEGMENT, 1) * SEGMENT)
    count = math.ceil(vocabulary / wide) * math.ceil(n / high)
    columns = math.ceil(vocabulary / math.ceil(vocabulary / wide))  # on average
    states, weights, logits = high * width, columns * width, high * columns
    fill = Product("logits", high, width, columns, 2 * states + 2 * weights + 4 * logits, count)
    segments = math.ceil(vocabulary / SEGMENT)
    parts: list[Part] = [
        small("zeros", 5), fill, update(high, columns, "float32", count),
        finish("token_logprobs", "finish", n, segments, STATE, backend),
    ]  # fmt: skip
    if case.mode == BOTH:
        parts += [
            small("zeros", 2), fill, in_logits(high, columns, "float32", count),
            Torch("gradient in bfloat16", 6 * logits, count),
            Product("gradient in the states", high, columns, width, 2 * logits + 2 * weights + 8 * states, count),
            Product("gradient in the weights", columns, high, width, 2 * logits + 2 * states + 4 * weights, count),
            Torch("... in bfloat16", 6 * weights, count),
            Torch("gradient in the states, in bfloat16", 6 * n * width),
        ]  # fmt: skip
    return parts


def linear_dpo_loss(case: Case, backend: str) -> list[Part]:
    """Pairs of sequences of 1,024 tokens."""
    n, tokens = case.shape[0], 1024
    pairs = max(n // tokens // 2, 1)
    gradient = Torch("the sequences' gradients, where unmasked", n * 5)
    sums = sequence_sums(2 * pairs, tokens, backend)
    return [*linear_token_logprobs(case, backend), sums, *pair_parts(pairs, backend), gradient]


# --- rollouts ---------------------------------------------------------------------------------------------------------


def sample(case: Case, backend: str) -> list[Part]:
    """Sweeps over a row that stays in the L2 cache: a program a row, 2,048 columns at a time in Triton, 8,192 in CUDA
    C++ (2,048 to find the token, half of them on average, with two scans each).

    Triton: 4 sweeps, and to find where top_p cuts 13 more: one to weigh, and of a bisection over the weights' bits as
    many as 0.9 of normal logits in bfloat16 take (float32: 7 to 20). Its loops are counted one by one, for sm_90: 7
    instructions an element to find the largest, 16 for the sum, 19 for what is kept, 65 to find the token; 15 to weigh,
    21 a sweep to cut. CUDA C++: 3 sweeps and the search, with top_p 4 more; the counted path holds 6 of 32 elements and
    a search of 8, which is 200 where the table says 8.
    """
    (rows, columns), cut = case.shape, "top_p" in case.profile
    n, own = rows * columns, 4  # the settings that the benchmark's case makes
    if backend == "triton":
        sweeps = 17 if cut else 4
        trips, of_path = sweeps * math.ceil(columns / OWN["sample"]["BLOCK"]), 0.0
        instructions = n * (7 + 16 + 19 + 65 + (15 + 12 * 21 if cut else 0))
    else:
        sweeps = 7 if cut else 3
        trips = sweeps * math.ceil(columns / 8192) + math.ceil(columns / 2048)
        of_path, instructions = (sweeps + 0.5) * 8 / 200, 0
    kernel = Kernel(
        "sample", "forward", (dtype_of(case),), n * case.dtype.itemsize, n * of_path, instructions=instructions,
        special=sweeps * n, programs=rows, trips=trips, cached=True,
    )  # fmt: skip
    return [small("settings", own), kernel]


def paged_attention(case: Case, backend: str) -> list[Part]:
    """New tokens, one a sequence: keys and values are read once, and those of shared parts once for all.

    A program takes a part of 256 keys of one key head: in Triton all heads that read it, 32 keys at a time; in CUDA C++
    a warp, 32 keys at a time, and what is shared comes from the L2 cache. Loops that are not unrolled are counted as
    often as they run: 32 keys cost a warp 46 instructions for 4 dimensions, 190 for 4 keys' values, and 200 more.
    """
    sequences, context, heads, kv_heads, dim = case.shape
    part = OWN["paged_attention"]["PART"] if backend == "triton" else 256
    size, block = case.dtype.itemsize, 32
    parts_of = math.ceil(context / part)
    shared = (context - 64) // block * block if "shared" in case.profile else 0
    together = shared // part * part if backend == "triton" else shared
    key = 2 * kv_heads * dim * size  # bytes of a position
    states = sequences * heads * parts_of * (dim + 2) * 4
    out = 2 * sequences * heads * dim * size
    read = key * (sequences * (context - together) + together)
    split = parts_of > 1
    if backend == "cuda":
        counted = 46 * dim / 4 + 190 * 8 + 200  # of a warp, over 32 keys
        kernel = Kernel(
            "paged_attention", "forward", (dtype_of(case), f"4 x {dim // 32}"), read + states + out,
            instructions=sequences * kv_heads * context * counted, threads=128, trips=2 * min(context, part) / 32,
            programs=math.ceil(sequences * kv_heads * parts_of / 4),
        )  # fmt: skip
        finishing = math.ceil(sequences * heads / 4)
        return [kernel, *_parts_together(split, states, finishing, 128, parts_of, (dtype_of(case), f"{dim // 32}"))]
    words = (dtype_of(case), "a part" if split else "all parts")

    def launch(tokens: int, positions: float, read: float) -> Kernel:
        """Describe a launch over so many tiles of tokens, each over so many positions of each key head."""
        each = min(positions, part) if split else positions
        programs, blocks = math.ceil(tokens * kv_heads * positions / each), each / block
        return Kernel(
            "paged_attention", "forward", words, read, passes=programs * blocks * 128, programs=programs, threads=128,
            special=tokens * kv_heads * positions * 16, trips=blocks,
        )  # fmt: skip

    parts: list[Part] = [
        launch(sequences, context - together, key * sequences * (context - together) + states + out),
    ]
    if together:  # the heads of four tokens share a tile of 16 rows
        parts.append(launch(math.ceil(sequences / 4), together, key * together + states))
    return [*parts, *_parts_together(split, states, sequences * heads, 32, parts_of, (dtype_of(case),))]


def _parts_together(
    split: bool, states: float, programs: int, threads: int, parts_of: int, words: tuple[str, ...]
) -> list[Part]:
    kernel = Kernel(
        "paged_attention", "finish", words, states, passes=programs * threads * parts_of, programs=programs,
        threads=threads, trips=parts_of, cached=True,
    )  # fmt: skip
    return [kernel] if split else []


def write_kv(case: Case, backend: str) -> list[Part]:
    """A warp a head of a token: keys, values and queries, turned. Dimensions of a key lie a block apart, each in a
    sector of 32 bytes."""
    tokens, heads, kv_heads, dim = case.shape
    size, triton = case.dtype.itemsize, backend == "triton"
    warps = tokens * (heads + kv_heads)
    programs, threads = (warps, 32) if triton else (math.ceil(warps / 4), 128)
    moved = dim * (kv_heads * (3 * size + 32) + 2 * heads * size + 2 * size)
    kernel = Kernel(
        "paged_attention", "write", (dtype_of(case),), tokens * moved, passes=programs * threads, programs=programs,
        threads=threads, trips=2,
    )  # fmt: skip
    return [kernel]


OPS: dict[str, Parts] = {
    "token_logprobs": token_logprobs,
    "cross_entropy": cross_entropy,
    "full_kl": full_kl,
    "kl_estimate": kl_estimate,
    "gae": gae,
    "ppo_loss": ppo_loss,
    "dpo_loss": pair_loss,
    "reward_loss": pair_loss,
    "sequence_sum": sequence_sum,
    "group_advantages": group_advantages,
    "linear_token_logprobs": linear_token_logprobs,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_ppo_loss": linear_ppo_loss,
    "linear_dpo_loss": linear_dpo_loss,
    "sample": sample,
    "paged_attention": paged_attention,
    "write_kv": write_kv,
}
