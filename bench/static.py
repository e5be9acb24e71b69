"""Measure what compilers made of every GPU kernel, for every target, without a GPU: registers, spills, instructions.

    python -m bench.static            prints the table and writes bench/results/static.json

Triton kernels are compiled ahead of time; CUDA kernels are taken out of the compiled rlhf_fast._C. Both are
disassembled by the tools that triton brings. Counted is the hot path: what a thread executes on a whole segment of an
aligned row, all of it straight-line code, so that a count over the elements of a thread is instructions per element.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.kernels.launch_sizes import OWN

RESULTS = Path(__file__).resolve().parent / "results" / "static.json"
TARGETS = (80, 90, 100, 120)
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
FORMS = ("identity", "scaled", "capped")  # how a raw logit becomes z
ELEMENTS = {"token_logprobs": 32, "full_kl": 16}  # of a thread, of each row that it reads; the others: by dtype


@dataclass(frozen=True)
class Static:
    """Figures of one kernel as compiled for one target, a row of the table."""

    op: str
    kernel: str
    backend: str  # triton, cuda
    variant: str  # dtype and flags
    target: int  # 90 for sm_90
    registers: int
    stack: int  # bytes of a thread's stack, where spills go
    spills: int  # loads from and stores to it
    shared: int  # bytes
    wide_loads: int  # of 16 bytes, in the hot path; the rest are narrower
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    instructions: int  # in the hot path
    elements: int  # that one thread computes

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.op, self.kernel, self.backend, self.variant, self.target


# --- reading machine code ---------------------------------------------------------------------------------------------


def tool(name: str) -> str:
    """Return the path of cuobjdump, nvdisasm or ptxas as triton ships them."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run(*command: str, cwd: str | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def blocks(lines: Iterable[str]) -> tuple[list[list[str]], list[list[int]]]:
    """Split a function into basic blocks; return their instructions, and the successors of each by number."""
    code: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"^(\.L_x_\d+):", line):
            code.append([])
            labels[label[1]] = len(code) - 1
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code[-1].append(instruction[1])
            if re.search(r"\b(BRA|EXIT|RET|BRX)\b", instruction[1]):
                code.append([])
    onwards: list[list[int]] = []
    for i, block in enumerate(code):
        last = block[-1] if block else ""
        targets = [labels[name] for name in re.findall(r"`\((\.L_x_\d+)\)", last) if "BRA" in last and name in labels]
        ends = re.match(r"^(BRA(\.U)? `|EXIT|RET)", last) is not None
        onwards.append([*targets, *([] if ends or i + 1 == len(code) else [i + 1])])
    return code, onwards


def is_wide(instruction: str) -> bool:
    return ".128" in instruction


def count(block: list[str], name: str, wide: bool | None = None) -> int:
    """Count instructions by name: of 16 bytes (`wide`), of fewer (False), or of any width (None)."""
    found = [x for x in block if re.search(rf"\b{name}\b", x.split(".")[0])]
    return len(found) if wide is None else sum(is_wide(x) == wide for x in found)


def hot_path(lines: Iterable[str]) -> list[str]:
    """Find the instructions that run on a whole segment of an aligned row.

    Among the paths through the function the hot one has most 16-byte loads in one block, and then 16-byte stores.
    """
    code, onwards = blocks(lines)
    best: dict[int, tuple[int, list[int]]] = {}

    def way_from(i: int, behind: frozenset[int]) -> tuple[int, list[int]]:
        if i not in best:
            block = code[i]
            score = 100 * count(block, "LDG", wide=True) ** 2 + 10 * count(block, "STG", wide=True)
            score -= count(block, "LDG", wide=False) + count(block, "STG", wide=False)
            ahead = [way_from(j, behind | {i}) for j in onwards[i] if j not in behind | {i}]
            further, path = max(ahead, key=lambda way: way[0], default=(0, []))
            best[i] = score + further, [i, *path]
        return best[i]

    path = way_from(0, frozenset())[1]
    return [x for i in path for x in code[i] if not x.startswith(("NOP", "BRA"))]


def functions(sass: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (mangled name, lines) of each kernel in nvdisasm's output."""
    for part in re.split(r"^(?=\.text\.)", sass, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        yield name.removeprefix(".text.").rstrip(":"), body.splitlines()


def resources(usage: str) -> dict[str, tuple[int, int, int, int]]:
    """Read (registers, stack, shared, local bytes) of each function from the output of cuobjdump -res-usage."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {name: (int(reg), int(stack), int(shared), int(local)) for name, reg, stack, shared, local in found}


def measure(cubin: Path, target: int, name_of: Any) -> Iterator[Static]:
    """Measure each kernel in a file of machine code.

    Args:
        name_of: from a mangled name to (op, kernel, backend, variant, elements).
    """
    used = resources(run(tool("cuobjdump"), "-res-usage", str(cubin)))
    for mangled, lines in functions(run(tool("nvdisasm"), str(cubin))):
        op, kernel, backend, variant, elements = name_of(mangled)
        registers, stack, shared, local = used[mangled]
        path = hot_path(lines)
        yield Static(
            op, kernel, backend, variant, target, registers, stack + local,
            sum("LDL" in line or "STL" in line for line in lines), shared,
            count(path, "LDG", True), count(path, "LDG", False), count(path, "STG", True), count(path, "STG", False),
            len(path), elements,
        )  # fmt: skip


# --- CUDA -------------------------------------------------------------------------------------------------------------


def cuda_name(mangled: str) -> tuple[str, str, str, str, int]:
    """Parse _ZN9rlhf_fast4cuda..._full_kl_cu_...15gradient_kernelI13__nv_bfloat16LNS0_4FormE1ELNS_10DivergenceE0E..."""
    ops = (
        "token_logprobs|full_kl|kl_estimate|gae|ppo_loss|pair_loss|sequence_sum|group_advantages|paged_attention|sample"
    )
    op = re.search(rf"_({ops})_cu_", mangled)
    kernel = re.search(r"\d+([a-z][a-z_]*?)_kernel", mangled)
    assert op is not None and kernel is not None, mangled
    dtype = re.search(r"_kernelI(f|13__nv_bfloat16|6__half)", mangled)
    form, divergence = re.search(r"FormE(\d)", mangled), re.search(r"DivergenceE(\d)", mangled)
    name = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}[dtype[1]] if dtype else ""
    parts = [name, FORMS[int(form[1])] if form else "", ("kl", "js")[int(divergence[1])] if divergence else ""]
    sizes = re.search(r"_kernelI\w*?((?:Li\d+E)+)E", mangled)  # of paged_attention: rows, and vectors of a head
    if sizes:
        parts.append(" x ".join(re.findall(r"Li(\d+)E", sizes[1])))
    elements = ELEMENTS.get(op[1], 4 if name in ("float32", "") else 8)
    return op[1], kernel[1], "cuda", ", ".join(part for part in parts if part), elements


def cuda_kernels(targets: Sequence[int]) -> Iterator[Static]:
    """Measure the kernels in the compiled module; none if it was built without CUDA."""
    from rlhf_fast.ops import compiled

    if compiled.cuda is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        run(tool("cuobjdump"), "-xelf", "all", str(compiled._C.__file__), cwd=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            architecture = re.search(r"sm_(\d+)", cubin.name)
            if architecture is not None and int(architecture[1]) in targets:
                yield from measure(cubin, int(architecture[1]), cuda_name)


# --- Triton -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Variant of a Triton kernel: its compile-time arguments; the types of the others follow from their names."""

    op: str
    kernel: str
    variant: str
    dtype: str  # of logits, as Triton calls it
    constants: dict[str, Any]
    options: dict[str, int]
    elements: int


NUMBERS = """scale softcap temperature gamma lam critic_lam terms_number tokens_number divisor_number clip_low clip_high
    dual_clip value_clip value_coef entropy_coef kl_coef rollout_cap tau_pos tau_neg beta agree differ center_coef
    eps""".split()
SIZES = re.compile(r"(length|columns|inner|stride|first_column|segments|states_per_row|rows|count|ranges)$")
NARROW = """logits out p q out_p out_q logprobs ref_logprobs ref_out rewards values old_logprobs advantages old_values
    returns entropy rollout_logprobs chosen rejected ref_chosen ref_rejected x""".split()
POINTERS = {
    "tokens": "*i64",
    "mask": "*i1",
    "cu_seqlens": "*i32",
    "sums": "*fp64",
    "advantage_sums": "*fp64",
    "partials": "*fp64",
    "totals": "*fp64",
    "counts": "*i64",
}


# Arguments of single ops, by the type that they have there.
OF_OP: dict[str, dict[str, str]] = {
    "paged_attention": {
        "*i32": "tables starts firsts shared positions",
        "i32": "units heads kv_heads window number_of_parts key_token key_head value_token value_head query_token "
        "query_head",
        "*i64": "slots",
        "narrow": "query key value keys cos sin",
    },
    "sample": {"*i32": "top_ks", "*fp64": "uniforms"},
}


def _type(op: str, name: str, dtype: str) -> str:
    """Name the type of a kernel's argument, as its launch function would pass it."""
    for kind, names in OF_OP.get(op, {}).items():
        if name in names.split():
            return f"*{dtype}" if kind == "narrow" else kind
    if name in NUMBERS:
        return "fp32"
    if op == "gae" and name in ("advantages", "returns"):
        return "*fp32"  # its results
    if SIZES.search(name):
        return "i32"
    return POINTERS.get(name, f"*{dtype}" if name in NARROW else "*fp32")


def _warps(op: str) -> dict[str, int]:
    return {"num_warps": OWN[op]["WARPS"]}


def triton_variants() -> Iterator[Variant]:
    from rlhf_fast.kernels import full_kl, token_logprobs

    four_warps, token_warps, kl_warps = {"num_warps": 4}, _warps("token_logprobs"), _warps("full_kl")
    kl_segment = OWN["full_kl"]["SEGMENT"]
    for name, short in DTYPES.items():
        for form, masked in ((0, False), (2, True)):
            flags = {"FORM": form, "PER_ROW": masked, "HAS_MASK": masked}
            label = f"{name}, {FORMS[form]}" + (", masked, temperature a row" if masked else "")
            whole = {**flags, "SEGMENT": OWN["token_logprobs"]["SEGMENT"]}
            yield Variant("token_logprobs", "_update", label, short, whole, token_warps, 32)
            both = {**whole, "HAS_LOGPROBS": True, "HAS_ENTROPY": True, "HAS_LOG_SUM": masked, "HAS_EACH": masked}
            yield Variant("token_logprobs", "_gradient", label, short, both, token_warps, 32)
            parts = {**flags, "SEGMENT": kl_segment}
            states = {**parts, "STATE": full_kl.STATE}
            js_states = {**states, "SEGMENT": full_kl.js_segment(kl_segment)}
            yield Variant("full_kl", "_states", label, short, states, kl_warps, 16)
            yield Variant("full_kl", "_js_states", label, short, js_states, kl_warps, 8)
            for js in (False, True):
                needs = {**parts, "JS": js, "NEED_P": True, "NEED_Q": True}
                kind = f"{label}, {'js' if js else 'kl'}"
                yield Variant("full_kl", "_gradient", kind, short, needs, kl_warps, 16)
        options = {"KIND": 2, "HAS_MASK": False, "BLOCK": OWN["kl_estimate"]["BLOCK"]}
        yield Variant("kl_estimate", "_forward", f"{name}, k3", short, options, _warps("kl_estimate"), 8)
        needs = {**options, "NEED": True, "NEED_REF": True}
        yield Variant("kl_estimate", "_gradient", f"{name}, k3", short, needs, _warps("kl_estimate"), 8)
        yield from _of_tokens(name, short)
        yield from _of_pairs(name, short)
        yield from _of_sequences(name, short)
        yield from _of_rollouts(name, short)
    finish = {"HAS_MASK": False, "ROWS": token_logprobs.FINISH_ROWS, "STATES": 16}
    yield Variant("token_logprobs", "_finish", "16 segments", "fp32", {**finish, "SAVE": True}, four_warps, 16)
    finish = {**finish, "ROWS": full_kl.FINISH_ROWS, "STATES": 32, "STATE": full_kl.STATE}
    yield Variant("full_kl", "_finish", "32 segments", "fp32", finish, four_warps, 16)
    yield Variant("full_kl", "_js_finish", "32 segments", "fp32", finish, four_warps, 16)


def _of_tokens(name: str, short: str) -> Iterator[Variant]:
    """Yield the variants of gae and ppo_loss with every option, and of gae with rewards and values alone."""
    from rlhf_fast.kernels import ppo_loss

    block, tokens = OWN["gae"]["BLOCK"], OWN["ppo_loss"]["RANGE"]
    for everything in (False, True):
        flags: dict[str, Any] = {f"HAS_{x}": everything for x in ("KL", "SCORES", "MASK", "BOOTSTRAP", "SUMS")}
        flags = {**flags, "HAS_REWARDS": True, "TWO": everything, "PACKED": False, "BLOCK": block}
        label = f"{name}, {'everything' if everything else 'rewards'}"
        yield Variant("gae", "_forward", label, short, flags, _warps("gae"), block // 128)
    flags = {f"HAS_{x}": x != "WEIGHTS" for x in ("MASK", "VALUES", "ENTROPY", "KL", "WEIGHTS")}
    flags = {**flags, "KL_COUNTS": True}
    flags = {**flags, "NEED": True, "NEED_VALUES": True, "NEED_ENTROPY": True, "CLIPS_VALUES": True, "DUAL": True}
    flags = {**flags, "OBJECTIVE": 0, "HAS_ROLLOUT": True, "HAS_LOG_RATIOS": False, "WHITENS": True}
    flags = {**flags, "KL": 2, "KL_SLOPE": 2, "BLOCK": tokens, "SUMS": ppo_loss.SUMS}
    yield Variant("ppo_loss", "_forward", f"{name}, everything", short, flags, _warps("ppo_loss"), tokens // 128)
    if short == "fp32":
        flags = {"FINISH": ppo_loss.FINISH, "SUMS": ppo_loss.SUMS, "DENOMINATOR": 0, "TOKENS": 0}
        flags = {**flags, "VALUES_COUNT": True, "ENTROPY_COUNTS": True, "KL_COUNTS": True}
        yield Variant("ppo_loss", "_finish", "many ranges", short, flags, {"num_warps": ppo_loss.FINISH_WARPS}, 16)
        flags = {"NEED": True, "NEED_VALUES": True, "NEED_ENTROPY": True, "BLOCK": ppo_loss.SCALE}
        yield Variant("ppo_loss", "_scale", "float32", short, flags, {"num_warps": 4}, ppo_loss.SCALE // 128)


def _of_pairs(name: str, short: str) -> Iterator[Variant]:
    flags: dict[str, Any] = {f"HAS_{x}": True for x in ("REFERENCE", "MARGINS", "WEIGHTS", "KL")}
    flags = {**flags, "DENOMINATOR": 0, "NEED": True, "NEED_REJECTED": True, "BLOCK": OWN["pair_loss"]["BLOCK"]}
    for kind in (0, 3):
        label = f"{name}, {'kto' if kind else 'logistic'}"
        yield Variant("pair_loss", "_forward", label, short, {**flags, "KIND": kind}, _warps("pair_loss"), 2)


def _of_sequences(name: str, short: str) -> Iterator[Variant]:
    from rlhf_fast.kernels import group_advantages

    flags: dict[str, Any] = {"HAS_MASK": True, "PACKED": True}
    options = {**flags, "BLOCK": OWN["sequence_sum"]["BLOCK"]}
    yield Variant("sequence_sum", "_forward", name, short, options, _warps("sequence_sum"), 8)
    flags, options = {**flags, "KIND": 0, "BLOCK": group_advantages.BLOCK}, {"num_warps": group_advantages.WARPS}
    yield Variant("group_advantages", "_forward", name, short, flags, options, 2)


def _of_rollouts(name: str, short: str) -> Iterator[Variant]:
    """Yield the variants of paged_attention and sample, for heads of 128, four to a key head (8B models)."""
    block, own = 32, OWN["paged_attention"]
    options = {**_warps("paged_attention"), "num_stages": own["STAGES"]}
    sizes = {"DIM": 128, "WIDE": 128, "HAS_SINKS": False}
    flags: dict[str, Any] = {
        **sizes, "REP": 4, "REPS": 4, "TOKENS": 4, "WIDTH": 128, "BLOCK": block, "KEYS": block, "HAS_CAP": False,
        "BLOCKS": own["PART"] // block, "OF_GROUPS": False, "WIDEN": False,
    }  # fmt: skip
    for split in (False, True):
        label = f"{name}, {'a part' if split else 'all parts'}"
        yield Variant("paged_attention", "_forward", label, short, {**flags, "SPLIT": split}, options, 16)
    finish = {**sizes, "PER_PART": own["PART"]}
    yield Variant("paged_attention", "_finish", f"{name}", short, finish, {"num_warps": 1}, 4)
    write = {"DIM": 128, "HALF": 64, "WIDTH": 128, "BLOCK": block, "SIZE": 128, "ROTATED": True, "HAS_QUERY": True}
    yield Variant("paged_attention", "_write", name, short, write, {"num_warps": 1}, 4)
    block = OWN["sample"]["BLOCK"]
    yield Variant("sample", "_forward", name, short, {"BLOCK": block}, _warps("sample"), block // 256)


def _absent_from_gae(name: str, constants: dict[str, Any]) -> bool:
    flag = {"logprobs": "HAS_KL", "ref_logprobs": "HAS_KL", "cu_seqlens": "PACKED"}.get(name, f"HAS_{name.upper()}")
    return flag in constants and not constants[flag]


def _absent_from_attention(name: str, constants: dict[str, Any]) -> bool:
    return name in ("parts", "part_stats") and constants.get("SPLIT") is False


def source_of(variant: Variant) -> Any:
    """Build the source that Triton compiles, specialised as by a launch on aligned, contiguous rows."""
    import importlib

    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"rlhf_fast.kernels.{variant.op}"), variant.kernel)
    constants = dict(variant.constants)
    types = {}
    for name in function.arg_names:
        absent = (name == "mask" and not constants["HAS_MASK"]) or (
            name == "temperatures" and not constants.get("PER_ROW", True)
        )
        absent |= variant.op == "gae" and _absent_from_gae(name, constants)
        absent |= variant.op == "ppo_loss" and name in ("weights", "log_ratios")
        absent |= name == "sinks" or (variant.op == "paged_attention" and _absent_from_attention(name, constants))
        absent |= name in ("divisor_tensor", "terms_tensor", "tokens_tensor")  # what counts divides
        if name in constants or absent or name.endswith("column_stride"):
            constants.setdefault(name, None if absent else 1)  # Triton itself specialises on a stride of 1
            types[name] = "constexpr"
        else:
            types[name] = _type(variant.op, name, variant.dtype)
    not_specialised = {function.arg_names[p] if isinstance(p, int) else p for p in function.do_not_specialize}
    divisible = [
        name for name, kind in types.items()
        if (kind.startswith("*") or (kind == "i32" and name not in not_specialised)) and name != "rows"
    ]  # fmt: skip
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(function, types, constants, attributes)


def compile_variant(job: tuple[Variant, int]) -> list[Static]:
    """Compile a variant for a target ahead of time, and measure its kernels."""
    import triton
    from triton.backends.compiler import GPUTarget

    variant, target = job
    compiled = triton.compile(source_of(variant), target=GPUTarget("cuda", target, 32), options=variant.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        kernel = variant.kernel.strip("_")
        name = variant.op, kernel, "triton", variant.variant, variant.elements
        shared = compiled.metadata.shared
        found = list(measure(Path(file.name), target, lambda _: name))
        return [dataclasses.replace(one, shared=shared) for one in found]


def triton_kernels(targets: Sequence[int], every: int = 1) -> Iterator[Static]:
    work = [(variant, target) for variant in list(triton_variants())[::every] for target in targets]
    environment = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    os.environ.update(environment)  # before triton is imported in the workers; multiplying and adding at once is meant
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for found in pool.imap(compile_variant, work, chunksize=4):
            yield from found


# --- the table --------------------------------------------------------------------------------------------------------


def faults(one: Static) -> list[str]:
    """List a kernel's faults: spills, and element-wise accesses to a row where 16 bytes at a time are possible."""
    found = []
    # A frame that nothing reads or writes costs nothing, and ptxas puts a few numbers of sample there that live from
    # sweep to sweep.
    if one.spills > (16 if one.op == "sample" else 0):
        found.append(f"{one.spills} spills, {one.stack} bytes of stack")
    if one.kernel.endswith("finish") or one.op in ("pair_loss", "sequence_sum", "group_advantages"):
        return found  # reads a few states a row, some tens of pairs, or sequences that start anywhere
    if one.op in ("paged_attention", "sample"):
        return found  # a key or a value a lane, blocks through shared memory; sweeps of a row that is in the cache
    itemsize = 4 if "float32" in one.variant or one.kernel == "scale" else 2
    rows = 3 if one.kernel == "scale" else {"token_logprobs": 1, "ppo_loss": 8}.get(one.op, 2)
    needed = rows * one.elements * itemsize // 16
    if one.op == "kl_estimate" and one.kernel == "gradient":
        needed += one.elements * 4 // 16  # the upstream gradients, one an element
    if one.wide_loads < needed:
        found.append(f"{one.wide_loads} loads of 16 bytes, expected {needed}")
    if one.kernel == "gradient" and one.wide_stores < rows * one.elements * itemsize // 16:
        found.append(f"{one.wide_stores} stores of 16 bytes, expected {rows * one.elements * itemsize // 16}")
    stores = {"gae": 2, "ppo_loss": 3}.get(one.op, 0) * one.elements * 4 // 16  # in float32 whatever the inputs are
    if one.wide_stores < stores:
        found.append(f"{one.wide_stores} stores of 16 bytes, expected {stores}")
    return found


def versions() -> dict[str, str]:
    import triton

    from rlhf_fast.ops import compiled

    ptxas = run(tool("ptxas"), "--version").splitlines()[-1].strip()
    cuda = "" if compiled._C is None else str(compiled._C.build_info()["cuda"] or "")
    return {"triton": triton.__version__, "triton_ptxas": ptxas, "cuda": cuda}


def sources() -> str:
    """Hash all that the kernels are compiled from, and how; docstrings, which change no kernel, are left out."""
    state = hashlib.blake2b(digest_size=16)
    for folder, pattern in (("rlhf_fast/kernels", "*.py"), ("csrc/cuda", "*"), ("csrc/common", "*.h")):
        for file in sorted((RESULTS.parents[2] / folder).glob(pattern)):
            state.update(file.name.encode() + _code(file))
    state.update(_code(Path(__file__)))
    return state.hexdigest()


def _code(file: Path) -> bytes:
    text = file.read_bytes()
    if file.suffix != ".py":
        return text
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [b""] * (last + 1 - first)
    return b"\n".join(line for line in lines if line)


def collect(targets: Sequence[int] = TARGETS, every: int = 1) -> list[Static]:
    """Measure the kernels of these targets: CUDA's, which are compiled already, and Triton's.

    Args:
        every: measures only each so-many-th Triton kernel, to save time in tests.
    """
    return sorted([*cuda_kernels(targets), *triton_kernels(targets, every)], key=lambda one: one.key)


def write(kernels: list[Static]) -> None:
    lines = ",\n".join(json.dumps(dataclasses.asdict(one)) for one in kernels)
    aside = RESULTS.with_suffix(".new")
    about = f'"versions": {json.dumps(versions())},\n"sources": "{sources()}"'
    aside.write_text(f'{{{about},\n"kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    aside.replace(RESULTS)


def read() -> tuple[dict[str, str], str, list[Static]]:
    """Read the table: the versions and sources that it was made from, and its rows."""
    whole = json.loads(RESULTS.read_text(encoding="utf-8"))
    return whole["versions"], whole["sources"], [Static(**one) for one in whole["kernels"]]


def main() -> int:
    kernels = collect()
    write(kernels)
    print(
        f"{'kernel':58} {'sm':>4} {'regs':>5} {'shared':>6} {'16-byte loads':>13} {'stores':>6} {'instr/element':>13}"
    )
    for one in kernels:
        name = f"{one.backend} {one.op}.{one.kernel} ({one.variant})"
        print(
            f"{name:58.58} {one.target:4} {one.registers:5} {one.shared:6} {one.wide_loads:13} {one.wide_stores:6} "
            f"{one.per_element:13.1f} {'; '.join(faults(one))}"
        )
    seen = collections.Counter(bool(faults(one)) for one in kernels)
    print(f"{len(kernels)} kernels, {seen[True]} with faults; written to {RESULTS}")
    return 1 if seen[True] else 0


if __name__ == "__main__":
    sys.exit(main())
