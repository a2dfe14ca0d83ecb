"""Every kernel compiles for every supported GPU generation as it did when it was last looked at; no GPU needed.

Every case for two targets, and each kernel's hungriest case for all five. Always: no spills, no stack, no local memory,
addresses in 64 bits, loads of 16 bytes. With the release of triton that made aot_golden.tsv also: no more registers, no
more shared memory and no narrower loads than recorded there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import COMMAND, golden

HERE = Path(__file__).parent
WIDE = 0.75  # least share of the bytes in loads of 16, where a case does not say that it has none
NARROWER = 0.05  # of the share of wide loads, which is recorded to two places
OTHER_RELEASE = 1.25  # how many more registers another release of triton may take before it is worth a look


def margin(registers: int) -> int:
    """How many registers more than recorded pass: an instruction moved takes a few, and hardware counts in eights."""
    return max(8, registers // 10)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{"triton": release, "results": [figures of one case on one target]}"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(HERE / "aot.py")], env=environment, cwd=tmp_path_factory.mktemp("aot"),
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_kernels_compile_without_spills_and_with_wide_loads(compiled):
    results = compiled["results"]
    assert {result["target"] for result in results} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    faults = []
    for result in results:
        where = f"{result['case']} on {result['target']}"
        if result["error"]:
            faults.append(f"{where}: {result['error']}")
            continue
        if result["spills"] or result["stack"] or result["local"]:
            faults.append(
                f"{where}: {result['spills']} bytes spilled, stack {result['stack']}, local {result['local']}, "
                f"{result['registers']} registers"
            )
        if result["vector_loads"] and result["wide_share"] < WIDE:
            faults.append(f"{where}: only {result['wide_share']:.0%} of the bytes come in loads of 16 bytes")
        if not 0 < result["registers"] <= 256:
            faults.append(f"{where}: {result['registers']} registers")
    assert not faults, "\n".join(faults)


def test_case_05_addresses_are_made_in_64_bits(compiled):
    """Anything that grows with the number of tokens is widened before it is multiplied."""
    faults = [f"{r['case']} on {r['target']}" for r in compiled["results"] if r["narrow_products"]]
    assert not faults, "a product in 32 bits reaches an address:\n" + "\n".join(faults)


def test_figures_are_those_of_the_golden_table(compiled):
    release, table = golden()
    results = {(r["case"], r["target"]): r for r in compiled["results"]}
    cases, recorded = ({name for name, _ in keys} for keys in (results, table))
    assert cases == recorded, (
        f"cases without figures: {sorted(cases - recorded)}; figures without a case: {sorted(recorded - cases)}; "
        f"`{COMMAND}` makes the table anew"
    )
    faults = []
    for key, result in results.items():
        was, where = table[key], f"{key[0]} on {key[1]}"
        registers = int(was["registers"])
        limit = registers + margin(registers) if release == compiled["triton"] else int(registers * OTHER_RELEASE) + 8
        if result["registers"] > limit:
            faults.append(f"{where}: {result['registers']} registers, were {registers}")
        if release != compiled["triton"]:
            continue
        if result["shared"] > int(was["shared"]):
            faults.append(f"{where}: {result['shared']} bytes of shared memory, were {was['shared']}")
        if result["wide_share"] < float(was["wide_share"]) - NARROWER:
            faults.append(f"{where}: {result['wide_share']:.0%} of the bytes in wide loads, were {was['wide_share']}")
    assert not faults, "\n".join([*faults, f"if this is meant: `{COMMAND}`"])
