"""The first row of a file, looked at before anything slow is imported: wrong columns are an answer within a second."""

import json
from pathlib import Path
from typing import Any

from burnish.data.formats import detect
from burnish.data.pairs import Task, take_apart

_LONGEST = 2**24  # characters: what a longer line holds is for the reader to say


def peek(config: Any, task: Task | None) -> None:
    """Raises the UserError that training would end with where row 0 of a local .jsonl file has the wrong columns.

    task  how preference rows are taken apart; None: rows for supervised fine-tuning

    Every other file, and whatever else may be wrong with this one, is left to the reader.
    """
    name = config.dataset_name
    if not name or not str(name).endswith(".jsonl") or not Path(name).is_file():
        return
    try:
        with Path(name).open(encoding="utf-8") as file:
            row = json.loads(file.readline(_LONGEST))
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(row, dict):
        return
    if task is None:
        detect(row, config.dataset_text_field, f"{name} row 0")
    else:
        take_apart(row, task, f"{name} row 0")
