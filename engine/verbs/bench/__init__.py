"""`burnish bench`: every op beside its peers in one run, right results first, within a time that is given.

Part of the package, so that an installed burnish can be measured where it runs; what peers are installed decides who
takes part. `minutes` bounds everything, imports and compilations included: 9, or 1.5 for the small shapes.
"""

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from burnish.config.errors import UserError

MINUTES, SMALL_MINUTES = 9.0, 1.5
CASES_SHARE = 0.45  # of the time, where the head on the CPU is studied too
RESERVED_SECONDS = 15.0  # importing torch before the clock starts, and the ceilings and pages at the end
CPU_THREADS = 2
PACKAGES = {
    "burnish": "burnish", "torch": "torch", "triton": "triton", "transformers": "transformers",
    "Liger": "liger-kernel", "CCE": "cut-cross-entropy", "quack": "quack-kernels", "TRL": "trl",
    "flash-attn 2": "flash-attn", "flash-attn 4": "flash-attn-4",
}  # fmt: skip
USAGE = "bench [small=true] [only=OP] [minutes=NUMBER] [out=FOLDER]"


def bench(words: list[str]) -> int:
    """Run the suite as `words` say, print it as it goes, write NAME.json, NAME.md and NAME.svg; 1 if burnish is red.

    small  the small shapes in float32: the only ones on a CPU
    only   cases whose op starts with this text; nothing is written then, unless `out` says where
    """
    options = read_options(words)
    # Ways of very different appetite share the device: freed memory must serve the next one whatever its size.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # On the CPU a thread that waits by spinning stands in the way of the one it waits for, if the cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result = run(options)
    _write(result, options)
    return 1 if any("burnish" in case["red"] for case in result["cases"]) else 0


def read_options(words: list[str]) -> dict[str, Any]:
    """{"small", "only", "minutes", "out"} from key=value words. UserError for anything else."""
    options: dict[str, Any] = {"small": False, "only": "", "minutes": None, "out": None}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in options:
            raise UserError(f"bench doesn't take {word}", where="command line", mend=f"Run: burnish {USAGE}")
        if key == "small":
            if value not in ("true", "false"):
                raise UserError(f"small is true or false, not {value}", where="command line", mend="Write small=true")
            options[key] = value == "true"
        elif key == "minutes":
            options[key] = _minutes(value)
        else:
            options[key] = value
    return options


def _minutes(value: str) -> float:
    try:
        minutes = float(value)
    except ValueError:
        minutes = 0.0
    if not 0.5 <= minutes < float("inf"):
        raise UserError(f"minutes={value}: want a number from 0.5 on", where="command line", mend="Write minutes=9")
    return minutes


def run(options: dict[str, Any]) -> dict[str, Any]:
    """The whole suite; see `bench` for the options. Returns what is written as JSON."""
    import torch

    from burnish.verbs.bench import cpu_head
    from burnish.verbs.bench.aims import aims, behind
    from burnish.verbs.bench.cases import gpu_cases, small_cases
    from burnish.verbs.bench.measure import Clock, ceilings
    from burnish.verbs.bench.pages import aim_line, behind_line, case_lines, seconds
    from burnish.verbs.bench.suite import Suite, add_shares

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options["small"] or device.type == "cpu"
    clock = Clock(60 * (options["minutes"] or (SMALL_MINUTES if small else MINUTES)) - RESERVED_SECONDS)
    dtype = torch.float32 if small else torch.bfloat16
    cases = [case for case in (small_cases() if small else gpu_cases()) if case.op.name.startswith(options["only"])]
    if not cases:
        names = dict.fromkeys(case.op.name for case in (small_cases() if small else gpu_cases()))
        raise UserError(f"no op starts with {options['only']}", where="only", mend=f"One of: {'; '.join(names)}")
    result = _description(device, dtype, small)
    with_study = small and not options["only"]
    suite = Suite(device, dtype, Clock(clock.left() * (CASES_SHARE if with_study else 1)))
    result["ceilings"] = ceilings(suite.watch, dtype, small)
    print(_head(result), flush=True)
    for number, case in enumerate(cases):
        if suite.clock.left() <= 0:
            record = {"op": case.op.name, "case": case.title, "shape": case.shape, "cut": "time"}
            record |= {"phases": {}, "errors": {}, "left_out": {}, "red": {}}
        else:
            record = suite.run(case, len(cases) - number)
            add_shares(record, result["ceilings"])
        result["cases"].append(record)
        print("\n".join(case_lines(record)), flush=True)
    if with_study:
        result["cpu_head"] = cpu_head.study(clock.left(), threads=CPU_THREADS)
    _raise_ceilings(result, ceilings(suite.watch, dtype, small))
    result["aims"], result["behind"] = aims(result), behind(result)
    result["seconds"] = clock.spent()
    for name, figures in result.get("cpu_head", {}).get("ways", {}).items():
        print(f"head on the CPU: {name}: {seconds(figures['seconds'])}, {figures['extra_bytes'] / 2**20:.0f} MiB")
    print("\n".join([*map(aim_line, result["aims"]), *map(behind_line, result["behind"])]))
    print(f"took {result['seconds']:.0f} s")
    return result


def _raise_ceilings(result: dict[str, Any], after: dict[str, float]) -> None:
    """What the machine reached at the start or at the end of the run, whichever is more, and all shares of that."""
    from burnish.verbs.bench.suite import add_shares

    before = result["ceilings"]
    result["ceilings_before_and_after"] = [before, after]
    result["ceilings"] = {name: max(value, after[name]) for name, value in before.items()}
    for case in result["cases"]:
        add_shares(case, result["ceilings"])


def _head(result: dict[str, Any]) -> str:
    ceilings = result["ceilings"]
    return (
        f"{result['card']}, {result['dtype']}: copy {ceilings['copy_bytes_s'] / 1e9:,.0f} GB/s, "
        f"product {ceilings['matmul_flop_s'] / 1e12:,.3g} TFLOP/s, load {result['load']:.1f}"
    )


def _description(device: Any, dtype: Any, small: bool) -> dict[str, Any]:
    import torch

    on_gpu = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(0) if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "device": device.type,
        "small": small,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: _version(package) for name, package in PACKAGES.items()},
        "python": platform.python_version(),
        "runtime": (f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}")
        if on_gpu
        else None,
        "driver": _driver() if on_gpu else None,
        "load": os.getloadavg()[0],  # of the last minute: a busy machine's times mean little
        "cases": [],
    }


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.M)
    return found.group(1).strip() if found else platform.machine()


def _driver() -> str | None:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        if Path(path).exists():
            text = Path(path).read_text(encoding="utf-8")
            found = re.search(r"\d+\.\d+(\.\d+)*", text)
            return found.group(0) if found else text.strip()
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def results_folder() -> Path:
    """benchmarks/results in a clone, else out/bench below the current folder."""
    clone = Path(__file__).resolve().parents[3] / "benchmarks"
    return clone / "results" if (clone.parent / "pyproject.toml").exists() and clone.is_dir() else Path("out/bench")


def _write(result: dict[str, Any], options: dict[str, Any]) -> None:
    from burnish.verbs.bench.pages import markdown, plot

    if options["only"] and options["out"] is None:
        return
    folder = Path(options["out"]) if options["out"] is not None else results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    card = "cpu" if result["device"] == "cpu" else re.sub(r"[^a-z0-9]+", "-", result["card"].lower()).strip("-")
    name = f"{card}-small" if result["small"] else card
    pages = {"json": json.dumps(rounded(result), indent=1) + "\n", "md": markdown(result), "svg": plot(result)}
    for ending, text in pages.items():
        path = folder / f"{name}.{ending}"
        path.write_text(text, encoding="utf-8")
        print(f"written {path}")


def rounded(value: Any) -> Any:
    """Floats to five digits: more would be noise."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
