"""What a run left in its folder, read back: metrics.jsonl, config.yaml and log.txt. Nothing of the engine is loaded.

`report` and `compare` are readers of these files; training doesn't know of them.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from burnish.config.errors import UserError

NOT_CURVES = {"step", "epoch", "num_tokens"}


@dataclass
class RunFiles:
    """records: every line of metrics.jsonl in order. config: key -> (value, origin). facts: log.txt's (topic, text)."""

    folder: Path
    records: list[dict] = field(default_factory=list)
    config: dict[str, tuple[object, str]] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def summary(self) -> dict:
        """The last line a finished run wrote; {} for one that did not end."""
        return next((record for record in reversed(self.records) if "train_runtime" in record), {})

    def series(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of one metric, the summary left out."""
        rows = [record for record in self.records if "train_runtime" not in record]
        return [(record["step"], record[metric]) for record in rows if _number(record.get(metric))]

    def metrics(self) -> list[str]:
        """Names of what was measured along the way, in order of appearance, each training metric before eval_ ones."""
        rows = [record for record in self.records if "train_runtime" not in record]
        names = dict.fromkeys(name for row in rows for name, value in row.items() if _number(value))
        return [name for name in names if name not in NOT_CURVES and not name.endswith("_per_second")]

    def changed(self) -> dict[str, tuple[object, str]]:
        """The configuration's keys that were set by someone."""
        return {key: entry for key, entry in self.config.items() if entry[1] != "default"}


def read_run(folder: str | Path) -> RunFiles:
    """Raises UserError where the folder holds no run, or a file of it can't be read."""
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError("no metrics.jsonl: not a run's folder", where=str(folder), mend="Name the output_dir of a run")
    run = RunFiles(folder)
    for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(metrics.read_text(encoding="utf-8").splitlines()):
                continue  # torn by the kill that ended the run
            raise UserError("not a line of JSON", where=f"{metrics}:{number}", mend="Delete the line") from None
        if isinstance(record, dict) and "step" in record:
            run.records.append(record)
    config, log = folder / "config.yaml", folder / "log.txt"
    if config.is_file():
        run.config = _config(config)
    if log.is_file():
        lines = log.read_text(encoding="utf-8").splitlines()
        parts = (line.partition(" ") for line in lines if line.split(" ")[0])
        run.facts = [(topic, text.lstrip()) for topic, _, text in parts]
    return run


def _config(path: Path) -> dict[str, tuple[object, str]]:
    """config.yaml's keys with values and the origins that stand beside them as comments."""
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError("not YAML", where=str(path), mend="Restore the file the run wrote") from error
    origins = dict(re.findall(r"^(\w+):.*# (.*)$", text, flags=re.MULTILINE))
    return {key: (value, origins.get(key, "")) for key, value in values.items()}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
