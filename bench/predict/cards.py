"""The physics of a prediction, on one page: what a card does in a second, and how long a part of an op takes on it.

A part is one launch: a kernel of ours, whose instructions come from the machine code (bench/results/static.json), a
kernel of PyTorch's, or a matrix product of cuBLAS. It takes the longest of

- bytes: what it reads and writes, at nine tenths of the memory's rate;
- instructions: those of all its threads, at 4 warps a cycle and multiprocessor;
- special functions: exponentials and logarithms, 16 a cycle and multiprocessor;
- products: its operations, at seven tenths of the tensor cores' rate;
- latency: its start, and the trips to memory that a program makes one after another, once for each wave of programs
  that the multiprocessors hold at a time.

Nothing is fitted to a measurement on a GPU. Not modelled: the L2 cache's rate, conflicts of atomics, the clock's fall.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench import static

BINDS = ("bytes", "instructions", "special functions", "products", "latency", "call")

BYTES = 0.9  # of the memory's rate, which streaming kernels reach on an H100: 3.0 of 3.35 TB/s
PRODUCTS = 0.7  # of the tensor cores' rate, which large products in bfloat16 reach on an H100: 700 of 989 TFLOP/s
START = 2e-6  # seconds from the end of one kernel to the first instruction of the next that waits for it
TRIP = 1e-6  # of a program: a load from memory under load, what is computed with it, and the barrier behind that
SHORT_TRIP = 0.5e-6  # the same from the L2 cache
# Seconds that Python takes to launch a kernel: the usual of PyTorch, ours through pybind11, and Triton's own launcher.
LAUNCH = {"torch": 5e-6, "cuda": 5e-6, "triton": 20e-6}


@dataclass(frozen=True)
class Card:
    """Rates of the SXM boards, from NVIDIA's data sheets of the A100 (80 GB), H100, H200 and HGX B200 (dense, without
    sparsity); multiprocessors from the architecture white papers; issue slots and special-function units from the CUDA
    C++ Programming Guide, "Arithmetic Instructions", which are the same for compute capability 8.0, 9.0 and 10.0."""

    target: int
    multiprocessors: int
    clock: float  # Hz, as it holds under load
    bandwidth: float  # bytes a second
    products: float  # bfloat16 operations a second
    shared: int  # bytes of a multiprocessor's shared memory


CARDS = {
    "A100": Card(80, 108, 1.41e9, 2.04e12, 312e12, 164 << 10),
    "H100": Card(90, 132, 1.70e9, 3.35e12, 989e12, 228 << 10),
    "H200": Card(90, 132, 1.70e9, 4.80e12, 989e12, 228 << 10),
    "B200": Card(100, 148, 1.85e9, 8.00e12, 2250e12, 228 << 10),
}
ISSUED, SPECIAL = 128, 16  # instructions of a thread, and special functions, a cycle and multiprocessor
THREADS, REGISTERS, PROGRAMS = 2048, 65536, 32  # that a multiprocessor holds at most


@dataclass(frozen=True)
class Kernel:
    """A launch of ours. Its instructions are those of its hot path, times the threads that go down it.

    ``variant``: words that its entry in the static table has; ``elements``: that all threads compute, the table says
    how many a thread takes on one way down the path; or ``passes``: how often a thread goes down it, all together; or
    ``instructions``, of all threads, counted by hand where the path's loops are not unrolled.
    """

    op: str
    name: str
    variant: tuple[str, ...]
    bytes: float
    elements: float = 0.0
    passes: float = 0.0
    instructions: float = 0.0
    special: float = 0.0  # in all
    programs: int = 1
    threads: int = 256  # of a program
    trips: float = 1.0  # that a program makes one after another
    cached: bool = False  # those go to the L2 cache
    count: int = 1


@dataclass(frozen=True)
class Torch:
    """A kernel of PyTorch's: element by element, or a sum."""

    name: str
    bytes: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Product:
    """A matrix product of cuBLAS: (rows, inner) by (inner, columns); bytes of its inputs and its result."""

    name: str
    rows: int
    inner: int
    columns: int
    bytes: float
    count: int = 1

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns


Part = Kernel | Torch | Product
Table = dict[tuple[str, str, str, int], list[dict[str, Any]]]


def read_table() -> Table:
    """(op, kernel, backend, target) -> the kernels of all variants, of the static table."""
    entries: Table = {}
    for entry in json.loads(static.RESULTS.read_text(encoding="utf-8"))["kernels"]:
        entries.setdefault((entry["op"], entry["kernel"], entry["backend"], entry["target"]), []).append(entry)
    return entries


def compiled(kernel: Kernel, backend: str, card: Card, table: Table) -> dict[str, Any]:
    """The entry of the static table: of those with the words that are asked for, the plainest."""
    every = table[kernel.op, kernel.name, backend, card.target]
    fitting = [entry for entry in every if set(kernel.variant) <= set(entry["variant"].split(", "))]
    return min(fitting, key=lambda entry: ("identity" not in entry["variant"], len(entry["variant"])))


def waves(kernel: Kernel, entry: dict[str, Any], card: Card) -> int:
    """Count how often a kernel's programs fill the multiprocessors: registers, threads or shared memory limit it."""
    registers = -(-entry["registers"] // 8) * 8 * kernel.threads
    held = min(THREADS // kernel.threads, REGISTERS // registers, PROGRAMS)
    if entry["shared"]:
        held = min(held, card.shared // (entry["shared"] + 1024))  # 1 KiB of each program is the system's
    return math.ceil(kernel.programs / (card.multiprocessors * held))


def bounds(part: Part, backend: str, card: Card, table: Table) -> dict[str, float]:
    """Seconds of one launch by each of its limits; the longest binds."""
    times = {"bytes": part.bytes / (BYTES * card.bandwidth), "latency": START + TRIP}
    if isinstance(part, Product):
        times["products"] = part.operations / (PRODUCTS * card.products)
    if isinstance(part, Kernel):
        entry = compiled(part, backend, card, table)
        passes = part.passes or part.elements / entry["elements"]
        executed = part.instructions or entry["instructions"] * passes
        times["instructions"] = executed / (card.multiprocessors * ISSUED * card.clock)
        times["special functions"] = part.special / (card.multiprocessors * SPECIAL * card.clock)
        trip = SHORT_TRIP if part.cached else TRIP
        times["latency"] = START + waves(part, entry, card) * part.trips * trip
    return times


def timed(parts: list[Part], backend: str, card: Card, table: Table) -> Iterator[dict[str, Any]]:
    """Time each part on a card, all its launches together, and name what binds it."""
    for part in parts:
        seconds = bounds(part, backend, card, table)
        binds = max(seconds, key=lambda name: seconds[name])
        name = f"{part.op}.{part.name}" if isinstance(part, Kernel) else part.name
        yield {
            "part": name, "ours": isinstance(part, Kernel), "launches": part.count, "binds": binds,
            "milliseconds": 1e3 * part.count * seconds[binds],
            "bounds_ms": {key: round(1e3 * part.count * value, 5) for key, value in seconds.items() if value},
        }  # fmt: skip
