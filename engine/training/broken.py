"""What is kept of an update that has no number: its rows, as the model saw them, and the model that saw them.

`burnish check --replay` runs them again (burnish.verbs.replay). The update was not applied, so the weights are those
of the forward that went wrong.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish import checkpoint as disk
from burnish.config.errors import UserError
from burnish.data.batch import Batch
from burnish.parallel.shards import sharded, whole_state
from burnish.parallel.world import world


def keep_broken(run: Any, step: int, batches: list[Batch]) -> str:
    """Write the micro-batches of `step` and the model of a `Run` into its folder; the path of the batches, or "".

    non_finite-STEP.safetensors has the tensors, and non_finite-STEP.json the rest; non_finite-STEP/ is the model. Of
    several processes each keeps its own micro-batches, the first one the model. A disk without room is told, no more.
    """
    state = whole_state(run.model, keep=world().main) if sharded(run.model) else None
    suffix = f"-rank{world().rank}" if world().rank else ""
    path = run.folder / f"non_finite-{step}{suffix}.safetensors"
    try:
        with disk.writing(path):
            save_batches(path, batches)
        if world().main:
            disk.save_final(run.model, run.tokenizer, model_of(path), state)
    except UserError as error:
        run.log.warn(str(error))
        return str(path) if path.is_file() else ""
    return str(path)


def model_of(path: Path) -> Path:
    """The folder of the model that belongs to kept batches."""
    return path.with_name(path.stem.partition("-rank")[0])


def save_batches(path: Path, batches: list[Batch]) -> None:
    """Batches as `load_batches` reads them: tensors in `path`, the other fields in the .json beside it."""
    tensors: dict[str, Tensor] = {}
    plain = []
    for number, batch in enumerate(batches):
        others = {}
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor):
                tensors[f"{number}.{field.name}"] = value.cpu().contiguous()
            elif field.name == "inputs" and value is not None:
                whole = {name: each for name, each in value.items() if isinstance(each, Tensor)}
                tensors |= {f"{number}.inputs.{name}": each.cpu().contiguous() for name, each in whole.items()}
            else:
                others[field.name] = value
        plain.append(others)
    path.with_suffix(".json").write_text(json.dumps(plain), encoding="utf-8")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def load_batches(path: Path) -> list[Batch]:
    """What `save_batches` wrote, on the CPU. Raises UserError where it can't be read."""
    try:
        plain, tensors = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), load_file(path)
        batches = []
        for number, fields in enumerate(plain):
            own = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.split(".", 1)[0] == str(number)}
            inputs = {name.removeprefix("inputs."): t for name, t in own.items() if name.startswith("inputs.")}
            own = {name: t for name, t in own.items() if not name.startswith("inputs.")}
            fields |= {"inputs": inputs} if inputs else {}
            fields["edge"] = tuple(fields["edge"]) if fields.get("edge") else None
            batches.append(Batch(**{**fields, **own}))
    except Exception as error:  # of json's, safetensors' and our own kinds: all mean that these are not kept batches
        raise UserError(
            f"holds no kept rows ({' '.join(str(error).split()) or type(error).__name__})",
            where=str(path),
            mend="Name the non_finite-STEP.safetensors of a run",
        ) from error
    assert all(isinstance(batch.input_ids, torch.Tensor) for batch in batches)
    return batches
