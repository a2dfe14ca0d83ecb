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
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.config.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")


def save_model(model: nn.Module, tokenizer, folder: Path) -> None:
    """Weights (adapter only, for a peft model) and tokenizer, as plain `from_pretrained` reads them."""
    own = {"selected_adapters": [model.active_adapter]} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **own)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_final(model: nn.Module, tokenizer, folder: Path) -> None:
    """save_model, written aside and moved in file by file, weights (or their index) last: where they are, all is."""
    aside = folder / ".writing-model"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_model(model, tokenizer, aside)
    for path in sorted(_files(aside), key=lambda path: (path.suffix == ".safetensors", path.name in WEIGHTS)):
        _flush(path)
        target = folder / path.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(aside)
    _flush(folder)


def save_checkpoint(run_dir: Path, step: int, model: nn.Module, tokenizer, updater_state, state: dict) -> Path:
    """Write checkpoint-{step} under run_dir and return its path. updater_state: (tensors, scalars) of the Updater."""
    tensors, scalars = updater_state
    rng_tensors, rng_scalars = rng_state()
    final = run_dir / f"checkpoint-{step}"
    aside = run_dir / f".writing-checkpoint-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_model(model, tokenizer, aside)
    save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "optimizer.safetensors")
    save_file(rng_tensors, aside / "rng.safetensors")
    written = {**state, "updater": scalars, "rng": rng_scalars}
    (aside / "state.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    manifest = {str(path.relative_to(aside)): _fingerprint(path) for path in _files(aside)}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*aside.rglob("*"), aside]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.rename(aside, final)
    _flush(run_dir)
    return final


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
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
        if _fingerprint(path)["sha256"] != expected["sha256"]:
            return f"{name} is not the file that was written (checksum)"
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
    """(state.json, optimizer tensors) of a verified checkpoint."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return state, load_file(folder / "optimizer.safetensors")


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint into `model`, bit for bit. Raises UserError where they don't belong to it."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        name = model.active_adapter
        found = [folder / "adapter_model.safetensors", folder / name / "adapter_model.safetensors"]
        file = next((path for path in found if path.is_file()), None)
        if file is None:
            raise UserError(f"no weights of the adapter {name}", where=str(folder), mend="Is it this run's checkpoint?")
        set_peft_model_state_dict(model, load_file(file), adapter_name=name)
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
            own[name].copy_(tensor)
            reached.add(own[name].data_ptr())
    absent = [name for name, tensor in own.items() if tensor.data_ptr() not in reached]  # tied weights share memory
    if absent:
        raise UserError(f"weights of {absent[0]} are missing", where=str(folder), mend="Is it this model's checkpoint?")


def rotate(run_dir: Path, limit: int | None, keep: list[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit`, never one of `keep` (the one just written, the best one)."""
    if not limit or limit < 1:
        return
    found, kept = checkpoints(run_dir), {path.resolve() for path in keep}
    candidates = [path for path in found if path.resolve() not in kept]
    for path in candidates[: max(0, len(found) - limit)]:
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


def restore_rng(folder: Path, scalars: dict) -> None:
    """Set the generators as they were when the checkpoint in `folder` was written."""
    tensors = load_file(folder / "rng.safetensors")
    version, words, gauss = scalars["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = scalars["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    devices = sorted(name for name in tensors if name.startswith("cuda."))
    if devices and torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensors[name] for name in devices])
