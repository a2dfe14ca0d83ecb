"""The folder of a run: whether it goes on, whether a new one may write there, and its log after a resume."""

import json
from pathlib import Path
from typing import Any

from burnish import checkpoint as disk
from burnish.config.errors import UserError


def goes_on(config: Any) -> bool:
    """Whether output_dir holds a run that was stopped or killed after its first checkpoint: the same command resumes.

    A run that ended and saved its model, or was told to start anew, does not go on; one with other settings is refused
    when it is restored.
    """
    folder = Path(config.output_dir)
    if config.overwrite_output_dir or not disk.checkpoints(folder):
        return False
    return not (_ended(folder) and any((folder / name).exists() for name in disk.WEIGHTS))


def refuse_overwriting(config: Any) -> None:
    """Raises UserError where a new run would write over another run or over a model."""
    folder = Path(config.output_dir)
    named = config.model_name_or_path and Path(config.model_name_or_path).expanduser()
    if named and named.is_dir() and named.resolve() == folder.resolve():
        raise UserError(
            "output_dir is the folder of the model that is trained", where=str(folder), mend="Choose another output_dir"
        )
    if config.overwrite_output_dir:
        return
    found = [path.name for path in disk.checkpoints(folder)]
    patterns = ("config.json", "adapter_config.json", "*.safetensors")
    found += [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
    if found or _ended(folder):  # what a run leaves that was killed before its first checkpoint is no loss
        raise UserError(
            f"output_dir already holds a run or a model ({found[-1] if found else 'metrics.jsonl'})",
            where=str(folder),
            mend="Set resume_from_checkpoint: true to go on, overwrite_output_dir: true to start anew, or another "
            "output_dir",
        )


def clear(folder: Path) -> None:
    """Take away what an earlier run left that must not pass for the new one's: checkpoints and model."""
    for path in disk.checkpoints(folder):
        disk.remove(path)
    for name in disk.WEIGHTS:
        (folder / name).unlink(missing_ok=True)


def trim_log(path: Path, step: int) -> None:
    """Drop records of steps after `step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line torn by the kill that this resume follows
        if not isinstance(record, dict):
            continue
        if step and record.get("step", 0) <= step and "train_runtime" not in record:
            kept.append(line)
    disk.write_text(path, "".join(f"{line}\n" for line in kept))


def _ended(folder: Path) -> bool:
    """Whether the run whose log lies in `folder` came to its end."""
    log = folder / "metrics.jsonl"
    return log.is_file() and '"train_runtime"' in log.read_text(encoding="utf-8", errors="replace")
