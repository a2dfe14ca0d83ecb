"""One split of a data set: from what the user named to flat token arrays, and the report of what became of its rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config.errors import UserError
from burnish.data import cache
from burnish.data.batch import Examples
from burnish.data.completion import Templates
from burnish.data.formats import check_same, detect, unused_columns
from burnish.data.packing import pack
from burnish.data.read import Row, Source, digest_rows, is_stream, open_source
from burnish.data.report import DataReport, name_rows
from burnish.data.tokenize import RowTokenizer, TokenizeSettings, Tokens

_BLOCK = 2048  # rows tokenized per call: enough to keep the tokenizer's threads busy
_BATCH = 1000  # rows that a formatting function of lists gets at a time
FormattingFunc = Callable[[Row], str] | Callable[[dict[str, list]], list[str]]


def prepare(
    source: Any,
    tokenizer: Any,
    config: Any,
    *,
    split: str = "train",
    train: bool = True,
    config_name: str | None = None,
    cache_dir: str | Path | None = None,
    formatting_func: FormattingFunc | None = None,
    vocab_size: int | None = None,
    templates: Templates | None = None,
) -> tuple[Examples, DataReport]:
    """Tokenize a split, or map it from the cache where these rows went through this tokenizer and settings before.

    source      a path, hub id, `datasets.Dataset` or list of dicts (for rows that can only be iterated: `stream.py`)
    split       the split's name in sources that have several
    train       whether `packing` (else `eval_packing`) says how this split is packed
    cache_dir   default $BURNISH_CACHE, else $XDG_CACHE_HOME/burnish, else ~/.cache/burnish
    vocab_size  ids of already tokenized rows must lie below it
    templates   tokens that come before what is trained on (see `completion.py`)

    Rows longer than max_length are cut (unless packing splits or wraps them) and rows that train on nothing are
    dropped; the report lists both. Raises UserError for unreadable, unrecognised or empty data, and where no row is
    left to train on.
    """
    started = time.perf_counter()
    assert not is_stream(source), "rows that can only be iterated go through burnish.data.stream"
    opened = open_source(source, config_name=config_name, split=split)
    if formatting_func is not None:
        opened = formatted(opened, formatting_func, config)
    settings = tokenize_settings(config, vocab_size, templates)
    limit = cut_length(config, train)
    mode = getattr(config, "truncation_mode", "keep_start")

    def build() -> tuple[Examples, DataReport]:
        collector = Collector(limit, mode)
        for number, tokens in tokenized(opened, tokenizer, settings, collector.report):
            collector.add(tokens, number)
        return collector.finish(), collector.report

    chosen = {"settings": asdict(settings), "limit": limit, "mode": mode}
    examples, report = cached(opened, tokenizer, chosen, cache_dir, build)
    report.template = template_name(config, report.format)
    report.max_length = config.max_length
    report.cut_to = f"max_length {config.max_length:,}" if config.max_length is not None else ""
    _report_packing(examples, report, config, train)
    report.seconds = time.perf_counter() - started
    return examples, report


def cached(
    opened: Source,
    tokenizer: Any,
    settings: dict[str, Any],
    cache_dir: str | Path | None,
    build: Callable[[], tuple[Examples, DataReport]],
) -> tuple[Examples, DataReport]:
    """What the cache has of these rows, this tokenizer and these settings, or else what `build` makes, then kept."""
    folder = Path(cache_dir or cache.default_dir()) / "tokens" / cache.key(opened.digest(), tokenizer, settings)
    found = cache.load(folder)
    if found is not None:
        examples, report = found
        report.from_cache, report.source = True, opened.name
        return examples, report
    examples, report = build()
    try:
        cache.save(folder, examples, report)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache ({error.strerror or error})",
            where=str(folder.parent),
            mend="Point BURNISH_CACHE at a folder with room",
        ) from error
    return examples, report


def tokenize_settings(config: Any, vocab_size: int | None, templates: Templates | None = None) -> TokenizeSettings:
    asked = config.dataset_kwargs or {}
    return TokenizeSettings(
        text_field=config.dataset_text_field,
        completion_only=config.completion_only_loss,
        assistant_only=bool(config.assistant_only_loss),
        vocab_size=vocab_size,
        templates=templates,
        special=asked.get("add_special_tokens") is not False,
        end=asked.get("append_concat_token") is not False,
    )


def packs_split(config: Any, train: bool) -> bool:
    """Whether this split is packed: eval_packing None means as packing."""
    if not train and config.eval_packing is not None:
        return bool(config.eval_packing)
    return bool(config.packing)


def check_length(config: Any) -> None:
    """Raises UserError for a max_length or truncation_mode that no row could be cut by."""
    mode = getattr(config, "truncation_mode", "keep_start")
    if mode not in ("keep_start", "keep_end"):
        raise UserError(f"unknown truncation_mode {mode!r}", mend="Use keep_start or keep_end")
    if config.max_length is not None and config.max_length < 2:
        raise UserError(f"max_length={config.max_length} leaves no token to predict", mend="Use at least 2, or null")


def cut_length(config: Any, train: bool) -> int | None:
    """The length rows are cut to before packing; None where nothing is cut or packing itself divides long rows."""
    check_length(config)
    if packs_split(config, train):
        if config.max_length is None:
            raise UserError("packing needs a max_length", mend="Set max_length, or packing=false")
        if config.packing_strategy != "bfd":
            return None
    return config.max_length


def formatted(source: Source, formatting_func: FormattingFunc, config: Any) -> Source:
    """The source with each row turned into text by the user's function: of one row, or of TRL's older form, which takes
    a mapping of lists, one for each column, and returns a list of texts."""
    if config.completion_only_loss:
        raise UserError("completion_only_loss needs prompt and completion, and formatting_func makes one text of a row")

    def rows() -> Iterator[Row]:
        number, batched = 0, None
        for block in source.blocks(_BATCH):
            if batched is None:
                batched = _takes_lists(formatting_func, block[0])
            texts = formatting_func(_columns(block)) if batched else map(formatting_func, block)  # type: ignore[arg-type]
            if batched and len(texts) != len(block):  # type: ignore[arg-type]
                raise UserError(
                    f"formatting_func made {len(texts)} texts of {len(block)} rows",  # type: ignore[arg-type]
                    where=f"{source.name} rows {number} to {number + len(block) - 1}",
                    mend="Return one text for each row",
                )
            for text in texts:
                if not isinstance(text, str):
                    raise UserError(
                        f"formatting_func returned a {type(text).__name__}, it must return text for one row",
                        where=f"{source.name} row {number}",
                    )
                number += 1
                yield {config.dataset_text_field: text}

    return Source(source.name, rows, lambda: digest_rows(rows()), arrow=False)


def _columns(rows: list[Row]) -> dict[str, list]:
    """Rows as a mapping of lists, one for each column of the first."""
    return {name: [row.get(name) for row in rows] for name in rows[0]}


def _takes_lists(formatting_func: Callable, row: Row) -> bool:
    """Whether the function takes lists, told from what it does with one row and with a pair of them. A function of one
    row returns text for it, even where it would swallow lists as well."""
    try:
        if isinstance(formatting_func(row), str):
            return False
    except Exception:  # lists may be what it is made for: then it works on a pair
        pass
    try:
        pair = formatting_func(_columns([row, row]))
    except Exception:
        return False  # whatever is wrong comes up again, on the row itself
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def tokenized(
    source: Source, tokenizer: Any, settings: TokenizeSettings, report: DataReport, *, block_size: int = _BLOCK
) -> Iterator[tuple[int, Tokens]]:
    """Every row's number and tokens, in order; fills in what the report says about the rows as they are."""
    row_tokenizer: RowTokenizer | None = None
    first = 0
    for block in source.blocks(block_size):
        if row_tokenizer is None:
            format = detect(block[0], settings.text_field, f"{source.name} row 0")
            report.source, report.format = source.name, format
            report.unused_columns = unused_columns(block[0], format, settings.text_field)
            row_tokenizer = RowTokenizer(tokenizer, format, settings, name=source.name, arrow=source.arrow)
        for i, row in enumerate(block):
            check_same(row, row_tokenizer.format, settings.text_field, f"{source.name} row {first + i}")
        for i, tokens in enumerate(row_tokenizer.block(block, first)):
            tokens.stopped = row_tokenizer.stops_well(tokens)
            yield first + i, tokens
        first += len(block)
    if row_tokenizer is None:
        raise UserError("the data set is empty", where=source.name)


class Collector:
    """Cuts rows to length, drops those that train on nothing, counts both, and lays the rest end to end."""

    def __init__(self, limit: int | None, mode: str, report: DataReport | None = None):
        self.report = report or DataReport()
        self._limit, self._mode = limit, mode
        self._ids: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._rows: list[int] = []
        self._lengths: list[int] = []

    def add(self, tokens: Tokens, row: int) -> bool:
        """Take in one row. Returns whether it was kept."""
        report = self.report
        report.rows_read += 1
        report.boundary_moved += tokens.boundary_moved
        report.doubled_bos += tokens.doubled_bos
        report.spelled_rows += [row] * tokens.spelled
        report.spelled_replies += [row] * tokens.spelled_reply
        report.unanswered += [row] * tokens.unanswered
        ids, trained, stopped = tokens.ids, tokens.trained, tokens.stopped
        self._lengths.append(len(ids))
        before = int(np.count_nonzero(trained[1:]))
        cut = self._limit is not None and len(ids) > self._limit
        if self._limit is not None and cut:
            kept = slice(None, self._limit) if self._mode == "keep_start" else slice(-self._limit, None)
            ids, trained = ids[kept], trained[kept]
            stopped = stopped and self._mode == "keep_end"
        left = int(np.count_nonzero(trained[1:]))
        if left == 0:
            reason = "no tokens" if not len(tokens.ids) else tokens.missing or "no trained tokens"
            if before:
                reason = f"all trained tokens lie beyond max_length {self._limit}"
                report.trained_dropped += before
            report.dropped.append((row, reason))
            return False
        if cut:
            report.cut_rows.append(row)
            report.tokens_lost += len(tokens.ids) - len(ids)
            report.trained_lost += before - left
        report.rows += 1
        report.tokens += len(ids)
        report.trained_tokens += left
        report.stopped_rows += stopped
        self._ids.append(ids)
        self._trained.append(trained)
        self._rows.append(row)
        return True

    def finish(self) -> Examples:
        """All rows kept so far. Raises UserError where there are none."""
        report = self.report
        if not self._rows:
            reasons = "; ".join(f"{reason}: {name_rows(rows)}" for reason, rows in report.dropped_by_reason().items())
            raise UserError(f"no row trains on anything ({reasons})", where=report.source)
        report.quantiles = quantiles(self._lengths)
        return self.take()

    def take(self) -> Examples:
        """The rows kept since the last call, as one store."""
        offsets = np.zeros(len(self._rows) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in self._ids], out=offsets[1:])
        examples = Examples(
            ids=np.concatenate([np.zeros(0, dtype=np.int32), *self._ids]),
            trained=np.concatenate([np.zeros(0, dtype=bool), *self._trained]),
            offsets=offsets,
            rows=np.array(self._rows, dtype=np.int64),
        )
        self._ids, self._trained, self._rows, self._lengths = [], [], [], []
        return examples


def quantiles(lengths: list[int]) -> dict[str, int]:
    """p50, p90, p99 and max."""
    at = np.percentile(lengths, [50, 90, 99, 100], method="lower").astype(int).tolist()
    return dict(zip(("p50", "p90", "p99", "max"), at, strict=True))


def template_name(config: Any, format: str) -> str:
    if not format.endswith("messages"):
        return ""
    return str(getattr(config, "chat_template_path", None) or "tokenizer")


def _report_packing(examples: Examples, report: DataReport, config: Any, train: bool) -> None:
    if not packs_split(config, train):
        return
    packs = pack(examples.lengths, config.max_length, config.packing_strategy)
    report.packs = len(packs)
    report.fill = float(packs.tokens.sum() / (len(packs) * config.max_length))
