"""Compiles every kernel ahead of time, for GPUs that are not here, and prints what came out as one JSON list.

Run as a script, in a process without TRITON_INTERPRET (test_aot.py does). Every aot_*.py beside this file describes one
family of kernels by a function `cases() -> list[Case]`, with `from aot import Case`.
"""

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One kernel with one choice of types, as a launch would specialise it.

    name          what the report calls it
    kernel_fn     the @triton.jit function
    signature     type of every argument that is not a constexpr: "*bf16", "*fp32", "*i64", "i32", "i64", "fp32".
                  Pointers count as 16-byte aligned (torch allocations are); an integer that the launch finds divisible
                  by 16 (H, V, row strides of real models) is written "i32:16" or "i64:16".
    constexprs    value of every constexpr argument, and of every argument that the launch folds (None, stride 1)
    num_warps     warps a program, as the launch chooses it
    vector_loads  demand that at least half of the bytes in the code's global loads go through loads of 16 bytes or more
    num_stages    software pipelining depth, as the launch chooses it
    """

    name: str
    kernel_fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    vector_loads: bool = True
    num_stages: int = 3


@dataclass
class Result:
    """What one Case became on one target. `error` is empty if it compiled; the counts are bytes except registers."""

    case: str
    target: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    spills: int = 0
    shared: int = 0
    wide_share: float = 0.0  # of the bytes in global load instructions, the share in loads of 16 bytes or more
    vector_loads: bool = True
    error: str = ""


def compile_case(case: Case, target_name: str) -> Result:
    result = Result(case.name, target_name, vector_loads=case.vector_loads)
    try:
        compiled = triton.compile(source(case), target=TARGETS[target_name], options=options(case))
        result.shared = compiled.metadata.shared
        if "cubin" in compiled.asm:
            read_cubin(result, compiled.asm["cubin"])
            result.wide_share = ptx_wide_share(compiled.asm["ptx"])
        else:
            read_amdgcn(result, compiled.asm["amdgcn"])
            result.wide_share = amdgcn_wide_share(compiled.asm["amdgcn"])
    except Exception as failure:  # a report with one broken kernel is worth more than none
        result.error = f"{type(failure).__name__}: {failure}"
    return result


def source(case: Case) -> ASTSource:
    names = case.kernel_fn.arg_names
    missing = set(names) - set(case.signature) - set(case.constexprs)
    unknown = (set(case.signature) | set(case.constexprs)) - set(names)
    if missing or unknown:
        raise ValueError(f"case {case.name}: missing arguments {sorted(missing)}, unknown arguments {sorted(unknown)}")
    signature, attrs = {}, {}
    for position, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, divisor = case.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or divisor == "16":
            attrs[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.kernel_fn, signature=signature, constexprs=case.constexprs, attrs=attrs)


def options(case: Case) -> dict[str, Any]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages}


def read_cubin(result: Result, cubin: bytes) -> None:
    """Registers, stack and local memory as ptxas recorded them in the binary; a spill lives on the stack."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout + run.stderr)
    if usage is None:
        raise ValueError(f"cuobjdump gave no usage: {run.stdout} {run.stderr}")
    result.registers, result.stack, result.local = map(int, usage.groups())
    result.spills = result.stack + result.local


def read_amdgcn(result: Result, text: str) -> None:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise ValueError(f"no .{name} in the assembly")
        return int(found.group(1))

    result.registers = field("vgpr_count")
    result.stack = field("private_segment_fixed_size")
    result.spills = field("vgpr_spill_count") + field("sgpr_spill_count") + result.stack


def ptx_wide_share(ptx: str) -> float:
    widths = []
    for vector, bits in re.findall(r"ld\.global(?:\.[a-zA-Z_:0-9]+)*?(?:\.v(\d))?\.[bufs](\d+)\s", ptx):
        widths.append(int(vector or 1) * int(bits) // 8)
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)", ptx):
        widths.append(int(size, 0))
    return wide_share(widths)


def amdgcn_wide_share(text: str) -> float:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", text)
    return wide_share([sizes.get(kind, 2) for kind in loads])


def wide_share(widths: list[int]) -> float:
    return sum(w for w in widths if w >= 16) / max(sum(widths), 1)


def all_cases() -> list[Case]:
    here = Path(__file__).parent
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    families = [importlib.import_module(path.stem) for path in sorted(here.glob("aot_*.py"))]
    cases = [case for family in families for case in family.cases()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), f"two cases of one name: {sorted(n for n in names if names.count(n) > 1)}"
    return cases


CASES: list[Case] = []  # filled before the workers fork, so that nothing of triton's has to be pickled


def compile_index(job: tuple[int, str]) -> Result:
    return compile_case(CASES[job[0]], job[1])


def main(pattern: str = "") -> None:
    """Compile every case whose name contains `pattern` for every target."""
    CASES.extend(case for case in all_cases() if pattern in case.name)
    jobs = [(index, target) for index in range(len(CASES)) for target in TARGETS]
    with multiprocessing.get_context("fork").Pool(min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(compile_index, jobs, chunksize=1)
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
