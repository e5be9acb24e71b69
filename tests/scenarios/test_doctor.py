"""The report on the installation, and the instruction set that the compiled module chooses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast import doctor

PARTS = [
    "python",
    "rlhf-fast",
    "torch",
    "transformers",
    "peft",
    "triton",
    "compiled module",
    "nvcc",
    "backends of the ops",
    "launch sizes",
    "memory",
    "disk, model cache",
    "disk, this folder",
    "demo model",
]

# In front of a program: makes importing rlhf_fast._C fail as it does where it was not built.
WITHOUT_C = "import sys; sys.modules['rlhf_fast._C'] = None; "


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_memory_is_what_the_system_says() -> None:
    told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(told[name].split()[0]) * 1024 / 2**30 for name in ("MemAvailable", "MemTotal"))
    found = re.fullmatch(r"([\d.]+) GiB free of ([\d.]+) GiB", dict(doctor.report())["memory"])
    assert found and float(found[2]) == pytest.approx(total, abs=0.06) and float(found[1]) == pytest.approx(free, abs=2)


def run_python(program: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """The instruction set is chosen once per process, so each choice needs a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "RLHF_FAST_ISA"}
    if isa is not None:
        environment["RLHF_FAST_ISA"] = isa
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def compiled():
    return pytest.importorskip("rlhf_fast._C", reason="rlhf_fast._C was not built")


def test_best_available_isa_is_the_default(compiled):
    result = run_python("from rlhf_fast import _C; print(_C.isa())")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == compiled.isa_available()[0]


def test_variable_caps_the_isa(compiled):
    for name in compiled.isa_available():
        result = run_python("from rlhf_fast import _C; print(_C.isa())", isa=name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == name


def test_isa_that_cannot_run_is_named_with_those_that_can(compiled):
    available = compiled.isa_available()
    unsupported = next(name for name in ("neon", "avx2") if name not in available)
    program = "from rlhf_fast import _C\ntry:\n    _C.isa()\nexcept ValueError as error:\n    print(error)"
    for name, complaint in (("avx9000", "unknown"), (unsupported, "not supported by this CPU")):
        result = run_python(program, isa=name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"RLHF_FAST_ISA: '{name}' is {complaint}")
        assert result.stdout.strip().endswith("this CPU has: " + ", ".join(available))


def test_available_isas_agree_with_the_features(compiled):
    available, features = compiled.isa_available(), compiled.cpu_features()
    assert available
    assert all(type(present) is bool for present in features.values())
    if "avx2" in features:
        avx2 = features["avx2"] and features["fma"] and features["f16c"]
        avx512 = avx2 and all(features["avx512" + part] for part in ("f", "bw", "dq", "vl"))
        assert available == ["avx512"] * avx512 + ["avx2"] * avx2 + ["baseline"]


def test_build_info(compiled):
    info = compiled.build_info()
    assert set(info) == {"compiler", "cpp_standard", "threads", "cuda"}
    assert info["threads"] in ("OpenMP", "C++")
    assert info["cpp_standard"] == "C++17"


def test_report_names_each_part():
    assert [name for name, _ in doctor.report()] == PARTS
    assert all(state and "\n" not in state for _, state in doctor.report())


def test_doctor_prints_each_part_and_succeeds(capsys):
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PARTS)
    assert all(line.startswith(part) for line, part in zip(lines, PARTS, strict=True))


def test_doctor_tells_which_kernels_have_tuned_sizes(tmp_path, monkeypatch):
    import torch

    from rlhf_fast.kernels import launch_sizes

    name = launch_sizes.device_name(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    file = tmp_path / "sizes.json"
    monkeypatch.setenv("RLHF_FAST_TUNED", str(file))
    program = "from rlhf_fast import doctor; print(dict(doctor.report())['launch sizes'])"
    file.write_text("{}")
    assert run_python(program).stdout.strip() == f"the Triton kernels' own; none were tuned for {name}"
    file.write_text(f'{{"{name}": {{"gae": {{"sizes": {{"WARPS": 2}}}}}}}}')
    assert run_python(program).stdout.strip() == f"tuned for {name}: gae"
    file.write_text("[]")
    assert run_python(program).stdout.startswith(f"unknown ({file}: expected an object")


def test_doctor_tells_a_bad_isa_from_a_missing_module(compiled):
    result = run_python("from rlhf_fast import doctor; doctor.main()", isa="avx9000")
    assert result.returncode == 0, result.stderr
    assert "'avx9000' is unknown" in result.stdout


def test_everything_imports_and_doctor_runs_without_the_compiled_module():
    result = run_python(WITHOUT_C + "import rlhf_fast; from rlhf_fast import doctor; doctor.main()")
    assert result.returncode == 0, result.stderr
    assert "compiled module      missing" in result.stdout
    assert "Install g++ or clang" in result.stdout


def test_doctor_runs_where_nothing_is_installed():
    blocked = "import importlib.util, importlib.metadata as m\nfrom rlhf_fast import doctor\n"
    blocked += "import sys; sys.modules['torch'] = None; sys.modules['rlhf_fast._C'] = None\n"
    blocked += "def missing(name): raise m.PackageNotFoundError(name)\n"
    blocked += "m.version = missing; importlib.util.find_spec = lambda name: None\ndoctor.main()"
    result = run_python(blocked)
    assert result.returncode == 0, result.stderr
    assert "torch                cannot be imported" in result.stdout
    assert doctor.DEMO_MODEL_INSTALL in result.stdout
