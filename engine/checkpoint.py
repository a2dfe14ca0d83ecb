"""State on disk: checkpoint-N folders that are whole or not there.

A checkpoint holds Hugging Face weights (or a peft adapter), the tokenizer, optimizer.safetensors, rng.safetensors,
state.json (step, data cursor, schedule, history) and manifest.json with the size and SHA-256 of every other file. It is
written to a temporary folder, flushed and renamed; nothing in it is a pickle.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from burnish.config.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
MANIFEST = "manifest.json"
MEND = "Make room, or the folder writable"
_NAME = re.compile(r"checkpoint-(\d+)$")


@contextmanager
def writing(path: Path, mend: str = MEND, aside: Path | None = None) -> Iterator[None]:
    """Raises UserError where `path` can't be written (a full disk, no permission). aside: what then goes away again."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if not (reason := _refusal(error)):
            raise
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"can't be written ({reason})", where=str(path), mend=mend) from error


def _refusal(error: BaseException) -> str:
    """The machine's reason, as Python or one of the libraries that write files gives it; "" of any other error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or text
    rust = isinstance(error, SafetensorError) or "(os error " in text
    return text if rust and not isinstance(error, UserError) else ""


def write_text(path: Path, text: str) -> None:
    """The whole file or the one before it, never a part: written aside, flushed and renamed. Raises UserError."""
    aside = path.with_name(f".writing-{path.name}")
    with writing(path):
        try:
            aside.write_text(text, encoding="utf-8")
            _flush(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def save_model(model: nn.Module, tokenizer, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Weights (adapter only, for a peft model) and tokenizer, as plain `from_pretrained` reads them.

    state: the state dict to save, where it isn't the model's own (whose parameters may be parts).
    """
    _refuse_names_outside(model, tokenizer)
    own: dict = {"selected_adapters": [model.active_adapter]} if hasattr(model, "peft_config") else {}
    if state is not None:
        own["state_dict"] = state
    model.save_pretrained(folder, **own)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)  # peft's form to be filled in; burnish.card writes the model card
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _refuse_names_outside(model: nn.Module, tokenizer) -> None:
    """Raises UserError for adapters and chat templates whose names would lead out of the folder they are saved in."""
    templates = getattr(getattr(tokenizer, "tokenizer", tokenizer), "chat_template", None)
    adapter = getattr(model, "active_adapter", "") if hasattr(model, "peft_config") else ""
    for name in [adapter, *(templates if isinstance(templates, dict) else ())]:
        if isinstance(name, str) and ("/" in name or os.sep in name or name in (".", "..")):
            raise UserError(f"{name!r} is no name of a file", where="model", mend="Rename the adapter or chat template")


def save_final(model: nn.Module, tokenizer, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """save_model, written aside and moved in file by file, weights (or their index) last: where they are, all is.
    Raises UserError where it can't be written; checkpoints stay as they are."""
    aside = folder / ".writing-model"
    with writing(folder, f"{MEND}: the run's last checkpoint has the weights", aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_model(model, tokenizer, aside, state)
        for path in sorted(_files(aside), key=lambda path: (path.suffix == ".safetensors", path.name in WEIGHTS)):
            _flush(path)
            target = folder / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        shutil.rmtree(aside)
        _flush(folder)


@dataclass(frozen=True)
class Writers:
    """The processes that write one checkpoint together; by default there is one.

    rank   this process's number; 0 writes what belongs to all
    meet   () -> None: wait for all
    parts  folder -> wait: every process writes its parts of model and optimizer, and has when wait() returns; None:
           number 0 writes them whole
    """

    rank: int = 0
    meet: Callable[[], None] = lambda: None
    parts: Callable[[Path], Callable[[], object]] | None = None


ALONE = Writers()


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, tokenizer, updater_state, state: dict, writers: Writers = ALONE
) -> Path:
    """Write checkpoint-{step} under run_dir and return its path. updater_state: (tensors, scalars) of the Updater.
    Raises UserError where it can't be written; what was written of it goes away, and the checkpoints before stay."""
    return begin_checkpoint(run_dir, step, model, tokenizer, updater_state, state, writers)()


def begin_checkpoint(
    run_dir: Path, step: int, model: nn.Module, tokenizer, updater_state, state: dict, writers: Writers = ALONE
) -> Callable[[], Path]:
    """save_checkpoint up to where it may be waited for: what this returns waits, and makes it a checkpoint."""
    final = run_dir / f"checkpoint-{step}"
    aside = run_dir / f".writing-checkpoint-{step}"
    with writing(final, _goes_on_from(run_dir, step), aside):
        if writers.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        writers.meet()
        wait = writers.parts(aside) if writers.parts is not None else lambda: None
        rng_tensors, rng_scalars = rng_state()
        save_file(rng_tensors, aside / _rng_file(writers.rank))
        if writers.rank:
            (aside / f"rng-{writers.rank}.json").write_text(json.dumps(rng_scalars), encoding="utf-8")
        else:
            _write_common(aside, model, tokenizer, updater_state, {**state, "rng": rng_scalars}, writers.parts is None)

    def finish() -> Path:
        with writing(final, _goes_on_from(run_dir, step), aside):
            wait()
            writers.meet()
            if writers.rank == 0:
                _finish(run_dir, aside, final)
        writers.meet()
        return final

    return finish


def _goes_on_from(run_dir: Path, step: int) -> str:
    """What a user can do whose checkpoint of `step` can't be written."""
    before = [path.name for path in checkpoints(run_dir) if path.name != f"checkpoint-{step}"]
    return MEND + (f": the same command goes on from {before[-1]}" if before else ", and start again")


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.safetensors" if rank else "rng.safetensors"


def _write_common(aside: Path, model: nn.Module, tokenizer, updater_state, state: dict, whole: bool) -> None:
    """What process 0 writes: model and optimizer, unless all write parts of them, and what isn't a tensor."""
    tensors, scalars = updater_state
    if whole:
        save_model(model, tokenizer, aside)
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "optimizer.safetensors")
    else:
        model.config.save_pretrained(aside)  # type: ignore[union-attr, operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    (aside / "state.json").write_text(json.dumps({**state, "updater": scalars}, indent=1), encoding="utf-8")


def _finish(run_dir: Path, aside: Path, final: Path) -> None:
    """The manifest, and the name that makes it a checkpoint."""
    manifest = {str(path.relative_to(aside)): _fingerprint(path) for path in _files(aside)}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*aside.rglob("*"), aside]:
        _flush(path)
    if final.is_dir():  # of a run that was resumed before it, or saved twice: renamed, so that one of the two is there
        shutil.rmtree(aside.with_name(f".replaced-{final.name}"), ignore_errors=True)
        os.rename(final, aside.with_name(f".replaced-{final.name}"))
    os.rename(aside, final)
    shutil.rmtree(aside.with_name(f".replaced-{final.name}"), ignore_errors=True)
    _flush(run_dir)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def checkpoints(run_dir: Path) -> list[Path]:
    """checkpoint-N folders under run_dir, oldest step first."""
    if not run_dir.is_dir():
        return []
    found = [(int(m[1]), path) for path in run_dir.iterdir() if (m := _NAME.match(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or "" when every file is as the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    if "state.json" not in listed:
        return f"{MANIFEST} doesn't list state.json"
    for name, (size, checksum) in listed.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{name} lies outside of the checkpoint"
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, {size} were written"
            if _fingerprint(path)["sha256"] != checksum:
                return f"{name} is not the file that was written (checksum)"
        except (OSError, ValueError) as error:
            return f"{name} can't be read ({getattr(error, 'strerror', None) or error})"
    return ""


def find_checkpoint(run_dir: Path, wanted: str | bool) -> tuple[Path, list[str]]:
    """The checkpoint to resume from, verified, and a line for each damaged one passed over.

    wanted: a path, or True for the newest whole one under run_dir. Raises UserError when there is none.
    """
    if wanted is not True:
        folder = Path(str(wanted))
        if not folder.is_dir():
            raise UserError("no such checkpoint", where=str(folder), mend="Give a checkpoint-N folder, or true")
        if reason := damage(folder):
            raise UserError(reason, where=str(folder), mend="Resume from an earlier checkpoint")
        return folder, []
    passed_over: list[str] = []
    for folder in reversed(checkpoints(run_dir)):
        reason = damage(folder)
        if not reason:
            return folder, passed_over
        passed_over.append(f"{folder}: {reason}; passed over")
    detail = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise UserError(
        f"no whole checkpoint to resume from{detail}", where=str(run_dir), mend="Remove resume_from_checkpoint"
    )


def load_state(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(state.json, optimizer tensors) of a verified checkpoint; no tensors where they are in parts."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    whole = folder / "optimizer.safetensors"
    return state, load_file(whole) if whole.is_file() else {}


def load_weights(model: nn.Module, folder: Path, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Put the weights of a checkpoint into `model`, bit for bit. Raises UserError where they don't belong to it.

    put: (the model's tensor, the whole stored one) -> None
    """
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        name = model.active_adapter
        found = [folder / "adapter_model.safetensors", folder / name / "adapter_model.safetensors"]
        file = next((path for path in found if path.is_file()), None)
        if file is None:
            raise UserError(f"no weights of the adapter {name}", where=str(folder), mend="Is it this run's checkpoint?")
        trained = load_file(file)
        if put is Tensor.copy_:
            set_peft_model_state_dict(model, trained, adapter_name=name)
            return
        for own_name, parameter in model.named_parameters():  # peft leaves the adapter's name out of its file
            key = own_name.replace(f".modules_to_save.{name}.", ".").replace(f".{name}.", ".")
            if parameter.requires_grad:
                put(parameter, trained[key])
        return
    own = model.state_dict(keep_vars=True)
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored |= load_file(path)
    if not set(stored) <= set(own):  # transformers renames the weights of some families when it saves them
        fresh = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)  # type: ignore[attr-defined]
        stored = fresh.state_dict()
    reached = set()
    with torch.no_grad():
        for name, tensor in stored.items():
            if own[name].shape != tensor.shape:
                raise UserError(
                    f"{name} is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}", where=str(folder)
                )
            put(own[name], tensor)
            reached.add(id(own[name]))
    absent = [name for name, tensor in own.items() if id(tensor) not in reached]  # a tied weight is one parameter
    if absent:
        raise UserError(f"weights of {absent[0]} are missing", where=str(folder), mend="Is it this model's checkpoint?")


def rotate(run_dir: Path, limit: int | None, keep: list[Path]) -> list[str]:
    """Delete the oldest checkpoints beyond `limit`, never one of `keep` (the one just written, the best one), and none
    where the one just written, read back, is damaged. Returns a line for what was not deleted."""
    if not limit or limit < 1:
        return []
    found, kept = checkpoints(run_dir), {path.resolve() for path in keep}
    surplus = [path for path in found if path.resolve() not in kept][: max(0, len(found) - limit)]
    if surplus and (reason := damage(keep[0])):
        return [f"{keep[0]}: {reason}; the older checkpoints stay"]
    lines = []
    for path in surplus:
        try:
            remove(path)
        except OSError as error:
            lines.append(f"{path} can't be deleted ({error.strerror or error})")
    return lines


def remove(path: Path) -> None:
    """Delete a checkpoint; of a link, the link. Half of a checkpoint never passes for one."""
    if path.is_symlink():
        path.unlink()
    else:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def set_aside(run_dir: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step`, which a run resumed there leaves behind; returns a line for each.

    They are damaged, or of a branch that is now given up: neither may be found by the next resume or rotation.
    """
    lines = []
    for path in checkpoints(run_dir):
        if int(path.name.rpartition("-")[2]) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            lines.append(f"{path} is beyond step {step}, set aside as {target.name}")
    return lines


def rng_state() -> tuple[dict[str, Tensor], dict]:
    """(tensors, scalars) of every generator that training may draw from: torch (each device), numpy, random."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    scalars = {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
    return tensors, scalars


def restore_rng(folder: Path, scalars: dict, rank: int = 0) -> None:
    """Set the generators as they were when process `rank` wrote its part of the checkpoint in `folder`.

    A process that wasn't there then keeps its own.
    """
    if not (folder / _rng_file(rank)).is_file():
        return
    if rank:
        scalars = json.loads((folder / f"rng-{rank}.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / _rng_file(rank))
    version, words, gauss = scalars["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = scalars["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    devices = sorted(name for name in tensors if name.startswith("cuda."))
    if devices and torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensors[name] for name in devices])
