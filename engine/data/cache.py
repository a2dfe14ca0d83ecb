"""Tokenized data on disk, one folder an entry, named by a hash of everything that decides its content.

An entry is written under a temporary name and renamed, so it is whole or absent; each file's checksum is verified on
load and a damaged entry counts as absent. Arrays come back memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.batch import Examples
from burnish.data.report import DataReport

VERSION = 3  # of the files' layout and of what tokenization means: raised when either changes
_ARRAYS = {"ids": np.int32, "trained": np.bool_, "offsets": np.int64, "rows": np.int64}
_SOME_HAVE = {"prompt": np.int64, "margin": np.float32, "desirable": np.bool_, "question": np.int64}
_DTYPES = _ARRAYS | _SOME_HAVE


def default_dir() -> Path:
    """$BURNISH_CACHE, else burnish/ under $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("BURNISH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "burnish"


def key(source_digest: str, tokenizer: Any, settings: dict[str, Any]) -> str:
    """The name of the entry for rows of this digest under this tokenizer and these settings."""
    content = json.dumps([VERSION, source_digest, _tokenizer_digest(tokenizer), settings], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=20).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()  # state that calls leave behind, not content
        backend.no_padding()
        vocabulary = backend.to_str()
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [
        type(tokenizer).__name__,
        vocabulary,
        json.dumps(tokenizer.chat_template),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        transformers.__version__,
        tokenizers.__version__,
    ]
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def save(folder: Path, examples: Examples, report: DataReport) -> None:
    """Write an entry. Another process that writes the same entry first wins; the content is the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        sums = {}
        for name, dtype in _DTYPES.items():
            if name in _SOME_HAVE and getattr(examples, name) is None:
                continue
            array: np.ndarray = np.ascontiguousarray(getattr(examples, name), dtype=dtype)
            np.save(part / f"{name}.npy", array, allow_pickle=False)
            sums[name] = _checksum(array)
        manifest = {"sums": sums, "paired": examples.paired, "report": report.to_dict()}
        (part / "report.json").write_text(json.dumps(manifest))
        try:
            part.rename(folder)
        except OSError:
            shutil.rmtree(part)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def load(folder: Path) -> tuple[Examples, DataReport] | None:
    """The entry, or None where there is none. A damaged entry is removed."""
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / "report.json").read_text())
        sums, paired = manifest["sums"], bool(manifest["paired"])
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in sums}
        intact = sums.keys() >= _ARRAYS.keys() and all(
            array.dtype == _DTYPES[name] and _checksum(array) == sums[name] for name, array in arrays.items()
        )
        report = DataReport.from_dict(manifest["report"])
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        intact = False
    if not intact:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return Examples(**{name: np.asarray(array) for name, array in arrays.items()}, paired=paired), report


def _checksum(array: np.ndarray) -> int:
    total = 0
    for at in range(0, len(array), 1 << 22):
        total = zlib.crc32(array[at : at + (1 << 22)].data, total)
    return total
