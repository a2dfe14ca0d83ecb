"""Where rows come from: files, saved `datasets` folders, hub ids, `Dataset` objects, plain lists.

A `Source` gives its rows in blocks (memory stays bounded) and a digest of its content for the token cache. Our own
reader parses JSON, so that tool schemas keep their shape (Arrow gives every row every key that any row has, with None
where it had none); `datasets` and pyarrow are imported only for what needs them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.config.errors import UserError
from burnish.data.completion import ConstantLengthDataset

Row = dict[str, Any]
_READABLE = "a .jsonl, .json, .csv or .parquet file, a folder saved by datasets, a hub id"
_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".parquet"}


@dataclass
class Source:
    """rows()  a fresh iterator over all rows, in order
    digest()   hex digest of the content
    arrow      rows went through Arrow: None may stand for a key that was absent
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]
    arrow: bool = False

    def blocks(self, size: int) -> Iterator[list[Row]]:
        return blocks(self.rows(), size)


def blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Runs of `size` rows, the last one shorter."""
    iterator = iter(rows)
    while block := list(islice(iterator, size)):
        yield block


def is_stream(source: Any) -> bool:
    """Whether rows can only be iterated, as with `datasets.IterableDataset`: no length, no second look ahead of use."""
    if isinstance(source, ConstantLengthDataset):
        return source.infinite
    return not isinstance(source, str | Path) and hasattr(source, "__iter__") and not hasattr(source, "__len__")


def open_source(source: Any, *, config_name: str | None = None, split: str = "train") -> Source:
    """The rows behind a path, a hub id, a `Dataset` (or `DatasetDict`) or a sequence of dicts.

    Raises UserError for a missing or unreadable file, an unknown hub id or an object that holds no rows.
    """
    if isinstance(source, str | Path):
        return _from_path(str(source), config_name, split)
    if type(source).__module__.partition(".")[0] == "datasets":
        return _from_dataset(_pick_split(source, split, "dataset"), "dataset")
    if isinstance(source, ConstantLengthDataset) and not source.infinite:
        source = [{name: ids.tolist() for name, ids in block.items()} for block in source]  # each pass shuffles anew
    if isinstance(source, dict) or is_stream(source) or not hasattr(source, "__getitem__"):
        raise UserError(
            f"cannot read rows from a {type(source).__name__}", mend=f"Give {_READABLE}, or a list of dicts"
        )
    return Source("list", lambda: _checked(source, "list"), lambda: digest_rows(source))


def digest_rows(rows: Iterable[Row]) -> str:
    """Content digest of rows in memory: their JSON, key order included (templates print schemas in order)."""
    digest = hashlib.blake2b(digest_size=20)
    for row in rows:
        digest.update(json.dumps(row, default=repr).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _from_path(name: str, config_name: str | None, split: str) -> Source:
    path = Path(name).expanduser()
    if path.is_file():
        reader = {
            ".jsonl": _jsonl_rows,
            ".ndjson": _jsonl_rows,
            ".json": _json_rows,
            ".csv": _csv_rows,
            ".parquet": _parquet_rows,
        }.get(path.suffix.lower())
        if reader is None:
            raise UserError(f"unknown kind of data file {path.suffix!r}", where=name, mend=f"Give {_READABLE}")
        return Source(name, lambda: reader(path), lambda: _digest_file(path), arrow=path.suffix.lower() == ".parquet")
    if path.is_dir():
        return _from_folder(path, config_name, split)
    if path.suffix.lower() in _SUFFIXES or name.startswith((".", "/", "~")):
        raise UserError("no such data file or folder", where=name)
    return _from_dataset(_load_from_hub(name, config_name, split), name)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()  # type: ignore[arg-type]


def _checked(rows: Iterable[Any], name: str) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"a row must be an object, this one is a {type(row).__name__}", where=f"{name} row {number}"
            )
        yield row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"not JSON: {error.msg}, column {error.colno}", where=f"{path}:{number}") from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless brackets
                    raise UserError(f"can't be read as JSON: {error}", where=f"{path}:{number}") from None
                if not isinstance(row, dict):
                    raise UserError("a row must be a JSON object", where=f"{path}:{number}")
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8: {error.reason}", where=str(path)) from None


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several documents: JSON lines under the name .json
            yield from _jsonl_rows(path)
            return
        raise UserError(f"not JSON: {error.msg}, column {error.colno}", where=f"{path}:{error.lineno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason}", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"can't be read as JSON: {error}", where=str(path)) from None
    if isinstance(whole, dict):
        whole = whole["data"] if isinstance(whole.get("data"), list) else [whole]
    if not isinstance(whole, list):
        raise UserError('expected a list of rows or {"data": [rows]}', where=str(path))
    yield from _checked(whole, str(path))


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"this row's fields do not match the {len(reader.fieldnames or ())} columns of the header",
                        where=f"{path}:{reader.line_num}",
                    )
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8: {error.reason}", where=str(path)) from None
        except csv.Error as error:
            raise UserError(f"not CSV: {error}", where=f"{path}:{reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"not a parquet file ({error})", where=str(path)) from None
    for batch in file.iter_batches(batch_size=1024):
        yield from batch.to_pylist()


def _from_folder(path: Path, config_name: str | None, split: str) -> Source:
    import datasets

    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    try:
        if saved:
            loaded = _pick_split(datasets.load_from_disk(str(path)), split, str(path))
        else:
            loaded = datasets.load_dataset(str(path), config_name, split=split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; each means that the folder can't be read
        raise UserError(f"cannot read a data set here ({_first_line(error)})", where=str(path)) from error
    return _from_dataset(loaded, str(path))


def _load_from_hub(name: str, config_name: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # network, spelling, split, config: the hub's own words say which
        raise UserError(
            f"no such file, and the hub could not be asked for it ({_first_line(error)})",
            where=name,
            mend=f"Give {_READABLE}",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _pick_split(loaded: Any, split: str, name: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise UserError(f"no split {split!r}", where=name, mend=f"It has: {', '.join(loaded)}")
    return loaded[split]


def _from_dataset(dataset: Any, name: str) -> Source:
    def rows() -> Iterator[Row]:
        for at in range(0, len(dataset), 1000):
            columns = dataset[at : at + 1000]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    return Source(name, rows, lambda: digest_rows(rows()), arrow=True)
