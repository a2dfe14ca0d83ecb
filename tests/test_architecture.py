"""The house rules, read from the source: arrows between rooms, sizes, no second copy of a module, and a whole wheel."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Top to bottom: a room may import only rooms of lines below its own. Rooms on one line don't know each other.
LINES = [
    {"__main__"},
    {"cli"},
    {"verbs"},
    {"trainers", "ppo", "doors"},
    {"run"},
    {"training"},
    {"loop", "reference"},
    {"objectives"},
    {"logprobs"},
    {"memory"},
    {"parallel"},
    {"model"},
    {"data"},
    {"trackers"},
    {"checkpoint", "optim", "metrics", "interrupt", "card", "hub"},
    {"config"},
    {"kernels"},
]
LEVEL = {room: level for level, rooms in enumerate(LINES) for room in rooms}
MODULES = sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
SOURCES = sorted([*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports(path: Path) -> set[tuple[str, int]]:
    """Every absolute module name that the file imports, at the top or inside a function, with its line."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            found |= {(f"{node.module}.{alias.name}", node.lineno) for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[tuple[str, int]]:
    names = [(name.split("."), line) for name, line in imports(path)]
    return {(parts[1], line) for parts, line in names if parts[0] == "burnish" and parts[1:2] and parts[1] in LEVEL}


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """stdout of a fresh Python that runs `code` in `cwd`, with the folder `path` first among the user's."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_import_only_from_below(path):
    room = room_of(path)
    if room == "__init__":
        assert not rooms_imported(path), "engine/__init__.py loads every room lazily"
        return
    assert room in LEVEL, f"{name_of(path)}: give the room {room} its line in LINES, and in the design"
    for other, line in rooms_imported(path):
        assert other == room or LEVEL[other] > LEVEL[room], f"{name_of(path)}:{line}: {room} may not import {other}"


def test_the_arrow_check_sees_lazy_imports(tmp_path):
    """The check itself: an import inside a function, of a module or of a name, is found."""
    lazy = tmp_path / "lazy.py"
    lazy.write_text(
        "def f():\n    from burnish.run import train\n    import burnish.loop\n    from burnish import optim\n"
    )
    assert rooms_imported(lazy) == {("run", 2), ("loop", 3), ("optim", 4)}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nobody_imports_the_folders_by_their_bare_names(path):
    """`import engine` would make a second copy of every module; `import kernels` may be Hugging Face's package."""
    for name, line in imports(path):
        assert name.split(".")[0] not in ("engine", "kernels"), f"{name_of(path)}:{line}: import burnish.*"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    most = 400 if path in MODULES else 500
    assert len(text.splitlines()) <= most, f"{name_of(path)} has more than {most} lines"
    if path not in MODULES:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name_of(path)


def test_config_needs_only_the_standard_library_and_yaml():
    for path in (ROOT / "engine" / "config").rglob("*.py"):
        for name, line in imports(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names | {"yaml", "burnish"}, f"{name_of(path)}:{line}: {top}"


def test_import_burnish_imports_no_torch(tmp_path):
    code = "import sys, burnish, burnish.cli, burnish.config.load; print({'torch', 'transformers'} & set(sys.modules))"
    assert run_python(code, cwd=tmp_path) == "set()"


def test_the_folder_engine_refuses_to_be_imported_by_its_own_name(tmp_path):
    code = "try:\n    import engine\nexcept ImportError as error:\n    print(error)"
    assert "import burnish" in run_python(code, cwd=tmp_path, path=ROOT)


def test_the_wheel_has_every_package(tmp_path):
    """A folder with Python files that setup.py misses would be importable here and absent from the wheel."""
    code = (
        "import setuptools, json; setuptools.setup = lambda **given: print(json.dumps(given['packages']))\n"
        "exec(open('setup.py').read())"
    )
    packages = set(json.loads(run_python(code, cwd=ROOT)))
    folders = set()
    for path in MODULES:
        parts = path.parent.relative_to(ROOT).parts
        folders.add(".".join(("burnish", "kernels", *parts[1:]) if parts[0] == "kernels" else ("burnish", *parts[1:])))
    assert folders == packages


IN_THE_ROOT = """
import transformers, torch
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     num_key_value_heads=2, vocab_size=32))
print(model(torch.arange(4)[None]).logits.shape[-1])
"""


def test_python_in_the_repository_root_can_use_transformers():
    """There our kernels/ answers to the bare name `kernels`, which transformers looks for."""
    assert run_python(IN_THE_ROOT, cwd=ROOT) == "32"


# Stands in for Hugging Face's package: every name exists, decorators change nothing.
HUGGING_FACE = """
class Anything:
    TRAINING = INFERENCE = FALLBACK = TORCH_COMPILE = 0
    def __init__(self, *args, **kwargs): ...
    def __call__(self, target=None, *args): return target

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything

__version__ = "VERSION"
"""


def test_python_in_the_repository_root_finds_hugging_faces_kernels_where_it_is_installed(tmp_path):
    """Installed beside ours it must win: transformers imports names from it that ours doesn't have."""
    version = run_python("from transformers.utils import import_utils as i; print(i.KERNELS_MIN_VERSION)", cwd=tmp_path)
    package, metadata = tmp_path / "kernels", tmp_path / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(HUGGING_FACE.replace("VERSION", version))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    # The current folder comes before PYTHONPATH for `python -c` and `python -m`, so ours is found first.
    probe = "import kernels; print(kernels.__version__, kernels.__file__)"
    assert run_python(probe, cwd=ROOT, path=tmp_path) == f"{version} {package / '__init__.py'}"
    used = IN_THE_ROOT + "print(transformers.utils.is_kernels_available())"
    assert run_python(used, cwd=ROOT, path=tmp_path).split() == ["32", "True"]
    both = "import kernels, burnish.kernels; print(kernels is burnish.kernels, burnish.kernels.__name__)"
    assert run_python(both, cwd=ROOT, path=tmp_path) == "False burnish.kernels"
