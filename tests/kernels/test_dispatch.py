"""Which implementation runs: the default by device, and what `use` makes of it."""

import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

from burnish import kernels
from burnish.kernels import backend_for, use
from burnish.kernels.dispatch import interpreting


def test_default_on_the_cpu():
    assert backend_for(torch.zeros(1)) == "torch"
    assert backend_for(torch.zeros(1, dtype=torch.float64)) == "torch"


def test_use_overrides_nests_and_restores():
    x = torch.zeros(1)
    with use("reference"):
        assert backend_for(x) == "reference"
        with use("auto"):
            assert backend_for(x) == "torch"
        assert backend_for(x) == "reference"
        with pytest.raises(KeyError), use("auto"):
            raise KeyError
        assert backend_for(x) == "reference"
    assert backend_for(x) == "torch"


def test_use_holds_in_its_thread_only():
    seen = []
    with use("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend_for(torch.zeros(1))))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"use\('cuda'\): unknown backend, use one of auto, reference, triton"),
        use("cuda"),
    ):
        pass


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use("triton"):
        assert interpreting() and backend_for(torch.zeros(1)) == "triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        assert not interpreting()
        with pytest.raises(ValueError, match="set TRITON_INTERPRET=1 before Python starts"):
            backend_for(torch.zeros(1))


def test_triton_refuses_float64():
    with use("triton"), pytest.raises(ValueError, match="a float64 tensor needs 'auto'"):
        backend_for(torch.zeros(1, dtype=torch.float64))


def test_reference_runs_the_definition(monkeypatch):
    home = importlib.import_module("burnish.kernels.rms_norm")
    monkeypatch.setattr(home, "rms_norm_definition", lambda *_, **__: "the definition")
    with use("reference"):
        assert kernels.rms_norm(torch.ones(2, 4), None, 1e-6) == "the definition"


OPS = ("rms_norm", "rope", "swiglu", "geglu", "linear_logprob", "linear_cross_entropy", "varlen_attention")
IMPORTS = """
import importlib, sys
from burnish import kernels
assert "triton" not in sys.modules
for turn in range(2):
    for name in sys.argv[1:]:
        if turn == 0 and name.endswith("m"):
            importlib.import_module("burnish.kernels." + name)  # a file first, its op afterwards
        assert callable(getattr(kernels, name)), name
    from burnish.kernels import rms_norm, rope
    assert callable(rms_norm) and callable(rope)
assert importlib.import_module("burnish.kernels.rope").rope_definition
"""


def test_ops_are_found_by_name_whichever_way_their_files_were_imported(tmp_path):
    """An op and its file share a name; the file's import must not hide the op."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS, *OPS], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
