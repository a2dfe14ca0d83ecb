"""Fixtures of kernel tests, and this folder on sys.path for the helpers that lie beside them (head_cases)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def triton_on_the_cpu(request):
    """For tests whose tensors lie on the CPU: with a GPU and no interpreter, test_head_gpu.py runs the kernels."""
    from burnish.kernels.dispatch import interpreting

    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend == "triton" and not interpreting():
        pytest.skip("TRITON_INTERPRET is not set")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows, several GEMM tiles a chunk and several blocks a tile, at sizes the interpreter can do."""
    from burnish.kernels import head_chunks, head_rows, head_triton

    monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device: min(n, 4) or 1)
    monkeypatch.setattr(head_chunks, "CAST_TILE", 16)
    monkeypatch.setattr(head_triton, "BLOCK", 8)
    monkeypatch.setattr(head_triton, "COLUMNS", 16)
    monkeypatch.setattr(head_rows, "BLOCK_ELEMENTS", 100)
