"""Compiles every kernel ahead of time, for GPUs that are not here, and prints what came out as one JSON list.

Run as a script, in a process without TRITON_INTERPRET (test_aot.py does). Every aot_*.py beside this file describes one
family of kernels by a function `cases() -> list[Case]`, with `from aot import Case`.

`python tests/kernels/aot.py --golden` writes the figures of all cases to aot_golden.tsv, with which test_aot.py
compares: after a change to a kernel, look at what its diff says.
"""

import csv
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

EVERY_CASE = ("sm_90", "gfx942")  # targets that a test compiles every case for
GOLDEN = Path(__file__).parent / "aot_golden.tsv"
COMMAND = "python tests/kernels/aot.py --golden"
FIGURES = ("case", "target", "registers", "stack", "local", "spills", "shared", "wide_share")


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
    vector_loads  demand that nearly all bytes of global loads come through loads of 16 bytes or more
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
    wide_share: float = (
        0.0  # of the bytes that threads load, but for a program's single numbers: in loads of 16 or more
    )
    narrow_products: int = 0  # multiplications in 32 bits that make addresses out of what grows with the tokens
    vector_loads: bool = True
    error: str = ""


def compile_case(case: Case, target_name: str) -> Result:
    result = Result(case.name, target_name, vector_loads=case.vector_loads)
    try:
        compiled = triton.compile(source(case), target=TARGETS[target_name], options=options(case))
        result.shared = compiled.metadata.shared
        result.narrow_products = narrow_products(compiled.asm["ttir"])
        if "cubin" in compiled.asm:
            read_cubin(result, compiled.asm["cubin"])
            result.wide_share = ptx_wide_share(compiled.asm["ptx"], scalar_bytes(compiled.asm["ttgir"]))
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


def scalar_bytes(ttgir: str) -> int:
    """Bytes of loads that a whole program makes once, of one number each: a row's target, factor or sum."""
    bits = re.findall(r"= tt\.load .*: !tt\.ptr<[a-z]+(\d+)>", ttgir)
    return sum(int(size) // 8 for size in bits)


def ptx_wide_share(ptx: str, scalars: int) -> float:
    widths = []
    for vector, bits in re.findall(r"ld\.global(?:\.[a-zA-Z_:0-9]+)*?(?:\.v(\d))?\.[bufs](\d+)\s", ptx):
        widths.append(int(vector or 1) * int(bits) // 8)
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)", ptx):
        widths.append(int(size, 0))
    return wide_share(widths, scalars)


def amdgcn_wide_share(text: str) -> float:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", text)
    return wide_share([sizes.get(kind, 2) for kind in loads])


def wide_share(widths: list[int], scalars: int = 0) -> float:
    wide = sum(w for w in widths if w >= 16)
    return min(1.0, wide / max(sum(widths) - scalars, wide, 1))


def narrow_products(ttir: str) -> int:
    """How many 32-bit products reach an address and may pass 2^31: of a grid's first axis, or of two values that are
    not constants. (Other axes end at 65,535; a product with a constant of an argument that fits does not overflow
    before 2^29 rows.)"""
    operation, operands, addresses, open_loops = {}, {}, set(), []
    for line in ttir.splitlines():
        names = re.findall(r"%([\w$.-]+)", line)
        found = re.match(r"\s*%([\w$.-]+)(?::\d+)? = \"?([\w.]+)", line)
        if found:
            names = names[1:]
            operation[found[1]], operands[found[1]] = line, names
            if found[2] == "tt.addptr":
                addresses.add(names[1])
        if "scf.for" in line or "scf.while" in line:
            carried = re.findall(r"%([\w$.-]+) = %([\w$.-]+)[,)]", line)
            operands.update((inner, [outer]) for inner, outer in carried)
            open_loops.append([inner for inner, _ in carried])
        elif line.rstrip().endswith("{"):
            open_loops.append([])
        if "scf.yield" in line and open_loops:
            for inner, outer in zip(open_loops[-1], names, strict=False):
                operands[inner].append(outer)
        if line.strip().startswith("}") and open_loops:
            open_loops.pop()
    return sum(_may_overflow(name, operation, operands) for name in _behind(addresses, operation, operands))


def _behind(names: set[str], operation: dict[str, str], operands: dict[str, list[str]]) -> set[str]:
    """The values that the named ones are computed from, through no load."""
    seen, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen and "tt.load" not in operation.get(name, ""):
            seen.add(name)
            waiting += operands.get(name, [])
    return seen


def _may_overflow(name: str, operation: dict[str, str], operands: dict[str, list[str]]) -> bool:
    if not re.search(r"arith\.muli .*: (?:tensor<[\dx]*x)?i32\b", operation.get(name, "")):
        return False
    sources = [_behind({operand}, operation, operands) for operand in operands[name][:2]]
    if any("tt.get_program_id x" in operation.get(source, "") for behind in sources for source in behind):
        return True
    constant = [all("arith.constant" in operation.get(s, "") or operands.get(s) for s in behind) for behind in sources]
    return not any(constant)


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


def golden() -> tuple[str, dict[tuple[str, str], dict[str, str]]]:
    """(the release of triton that made the table, {(case, target): figures})"""
    with GOLDEN.open(encoding="utf-8") as file:
        release = file.readline().split()[-1]
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return release, {(row["case"], row["target"]): row for row in rows}


def jobs(cases: list[Case]) -> list[tuple[int, str]]:
    """(case, target) pairs that tell most in the time that a test has: every case for sm_90 and gfx942, and of each
    kernel the case that is recorded with the most registers, and so is the nearest to a spill, for all targets. Cases
    that have no record yet are compiled for all."""
    registers: dict[str, int] = {}
    for (name, _), figures in (golden()[1] if GOLDEN.exists() else {}).items():
        registers[name] = max(registers.get(name, 0), int(figures["registers"]))
    hungriest: dict[Any, Case] = {}
    for case in cases:
        known = hungriest.setdefault(case.kernel_fn, case)
        if registers.get(case.name, 0) > registers.get(known.name, 0):
            hungriest[case.kernel_fn] = case
    return [
        (index, target)
        for index, case in enumerate(cases)
        for target in TARGETS
        if target in EVERY_CASE or case.name not in registers or hungriest[case.kernel_fn] is case
    ]


def compile_all(pattern: str = "", every_target: bool = False) -> list[Result]:
    """Compile the cases whose name contains `pattern`: `jobs`, or every one for every target."""
    CASES.extend(case for case in all_cases() if pattern in case.name)
    work = [(index, target) for index in range(len(CASES)) for target in TARGETS] if every_target else jobs(CASES)
    with multiprocessing.get_context("fork").Pool(min(4, len(os.sched_getaffinity(0)))) as pool:
        return pool.map(compile_index, work, chunksize=1)


def write_golden(results: list[Result]) -> None:
    broken = [f"{result.case} on {result.target}: {result.error}" for result in results if result.error]
    if broken:
        sys.exit("\n".join(broken))
    with GOLDEN.open("w", encoding="utf-8") as file:
        print(f"# made by {COMMAND} with triton", triton.__version__, file=file)
        print(*FIGURES, sep="\t", file=file)
        for result in results:
            values = asdict(result) | {"wide_share": f"{result.wide_share:.2f}"}
            print(*(values[name] for name in FIGURES), sep="\t", file=file)


def main(pattern: str = "") -> None:
    if pattern == "--golden":
        write_golden(compile_all(every_target=True))
    else:
        results = [asdict(result) for result in compile_all(pattern)]
        print(json.dumps({"triton": triton.__version__, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:2])
