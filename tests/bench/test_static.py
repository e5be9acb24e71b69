"""Every GPU kernel, compiled ahead of time for every target: no spills, 16-byte accesses, the committed table."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from bench import static
from rlhf_fast.ops import compiled

triton_only = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
.L_x_3:
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/              @!P1 BRA `(.L_x_4) ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00c0*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5) ;
"""


def test_the_hot_path_is_the_one_that_loads_and_stores_wide() -> None:
    names = [x.split()[0] for x in static.hot_path(SASS.splitlines())]
    assert names == ["LDC", "@P0", "LDG.E.128", "LDG.E.128", "FADD", "@!P1", "STG.E.128", "EXIT"]


def test_a_spill_and_a_narrow_load_are_faults() -> None:
    good = static.Static(
        "token_logprobs", "gradient", "cuda", "bfloat16, identity", 90, 40, 0, 0, 0, 4, 5, 4, 0, 700, 32
    )
    assert not static.faults(good)
    assert static.faults(dataclasses.replace(good, stack=8, spills=2)) == ["2 spills, 8 bytes of stack"]
    assert static.faults(dataclasses.replace(good, wide_loads=3)) == ["3 loads of 16 bytes, expected 4"]
    assert static.faults(dataclasses.replace(good, wide_stores=0)) == ["0 stores of 16 bytes, expected 4"]


def test_docstrings_are_no_part_of_what_a_kernel_is_made_of(tmp_path: Path) -> None:
    texts = {
        "plain.py": "def f(x):\n    return x  # a comment\n",
        "told.py": '"""A file.\n\nOf two lines."""\n\n\ndef f(x):\n    """Return x."""\n    return x  # a comment\n',
        "other.py": '"""A file."""\n\n\ndef f(x):\n    return 2 * x  # a comment\n',
        "told.cu": '"""A file."""\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    plain, told, other, cuda = (static._code(tmp_path / name) for name in texts)
    assert plain == told == b"def f(x):\n    return x  # a comment"
    assert plain != other and cuda == texts["told.cu"].encode()


@triton_only
@pytest.mark.slow
def test_no_kernel_spills_or_loads_narrow_on_any_target_and_the_table_is_up_to_date() -> None:
    """The table is of these very sources. Of one target all CUDA kernels are read, and an eighth of Triton's compiled
    again."""
    versions, sources, table = static.read()
    assert sources == static.sources(), "run: python -m bench.static"
    assert {(one.backend, one.target) for one in table} == {(b, t) for b in ("triton", "cuda") for t in static.TARGETS}
    kernels = static.collect([90], every=8)
    listed = {one.key: one for one in table}
    in_cuda = {key for key, one in listed.items() if (one.backend, one.target) == ("cuda", 90)}
    in_cuda = in_cuda if compiled.cuda is not None else set()
    assert {one.key for one in kernels if one.backend == "cuda"} == in_cuda, "run: python -m bench.static"
    in_triton = [one for one in listed.values() if one.backend == "triton" and one.target == 90]
    assert len(kernels) - len(in_cuda) >= len(in_triton) // 8 and len(in_triton) >= len(list(static.triton_variants()))
    wrong = [f"{one.key}: {fault}" for one in (*kernels, *table) for fault in static.faults(one)]
    assert not wrong
    if versions == static.versions():  # another compiler makes another table
        assert kernels == [listed.get(one.key) for one in kernels], "run: python -m bench.static"


@triton_only
@pytest.mark.slow
def test_triton_kernels_compile_for_amd() -> None:
    """One variant of each kernel, the last: that with the most in it."""
    import triton
    from triton.backends.compiler import GPUTarget

    last = {(one.op, one.kernel): one for one in static.triton_variants()}
    assert len(last) >= 20
    for variant in last.values():
        options = {"num_warps": variant.options.get("num_warps", 4)}
        compiled = triton.compile(static.source_of(variant), target=GPUTarget("hip", "gfx942", 64), options=options)
        assert len(compiled.asm["hsaco"]) > 1000
