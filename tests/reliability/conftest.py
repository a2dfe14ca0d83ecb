"""This folder on sys.path, for the helpers that lie beside the tests (faults); and the runs that they disturb."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("BURNISH_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, tiny_model, chat_file) -> Path:
    """The folder of a run that nobody disturbed."""
    from faults import settings

    from burnish.run import train

    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(folder, tiny_model, chat_file))
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory, whole) -> Path:
    """The same run as a kill after its second checkpoint leaves it: steps 2 and 4, no model."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model.safetensors").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:5]))
    return folder


@pytest.fixture
def stopped(tmp_path, stopped_once) -> Path:
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))
