"""Every kernel compiles for every supported GPU generation without spills and with wide loads; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_kernels_compile_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "aot.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert {result["target"] for result in results} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    faults = []
    for result in results:
        where = f"{result['case']} on {result['target']}"
        if result["error"]:
            faults.append(f"{where}: {result['error']}")
        if result["spills"]:
            faults.append(f"{where}: {result['spills']} bytes spilled, {result['registers']} registers")
        if result["vector_loads"] and result["wide_share"] < 0.5:
            faults.append(f"{where}: only {result['wide_share']:.0%} of the bytes come in loads of 16 bytes")
        if not result["error"] and not 0 < result["registers"] <= 256:
            faults.append(f"{where}: {result['registers']} registers")
    assert not faults, "\n".join(faults)
