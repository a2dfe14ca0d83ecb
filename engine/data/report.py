"""What became of the rows: counts and lengths, what was cut or dropped, for the `data` lines of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

_SHOWN = 5  # row numbers named for each reason


@dataclass
class DataReport:
    """Counts over one split. Row numbers count from 0 in the source.

    tokens, trained_tokens   what is left after cutting and dropping; a row's first token is never trained
    tokens_lost, trained_lost  what cutting to max_length took
    trained_dropped          what cutting took of rows of which then nothing was left to train on
    stopped_rows             rows whose last token that is not white space is EOS or another special token, and trained
    quantiles                row lengths in tokens before cutting: p50, p90, p99, max
    spelled_rows             rows of which a message (not a reply) or a tool spells a special token, which stays text
    spelled_replies          rows of which a reply spells one, which is a token there
    unanswered               conversations that don't end in a reply, or have two questions or replies in a row
    packs, fill              sequences made by packing, and the share of max_length that they use

    For preferences `rows` counts sequences, trained tokens are those of completions, and there is more:
    unit, units              what is kept or dropped as a whole ("pair" or "row"), and how many are kept
    lengths                  quantiles of each part: prompt, and chosen and rejected or completion
    equal_rows               rows whose chosen and rejected are the same, which are kept
    desirable                rated completions that are
    cut_to                   the limits that sequences are cut to
    """

    source: str = ""
    format: str = ""
    template: str = ""
    rows_read: int = 0
    rows: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list)
    tokens: int = 0
    trained_tokens: int = 0
    cut_rows: list[int] = field(default_factory=list)
    tokens_lost: int = 0
    trained_lost: int = 0
    trained_dropped: int = 0
    stopped_rows: int = 0
    boundary_moved: int = 0
    doubled_bos: int = 0
    unused_columns: list[str] = field(default_factory=list)
    quantiles: dict[str, int] = field(default_factory=dict)
    max_length: int | None = None
    packs: int | None = None
    fill: float | None = None
    unit: str = "row"
    units: int = 0
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    equal_rows: list[int] = field(default_factory=list)
    spelled_rows: list[int] = field(default_factory=list)
    spelled_replies: list[int] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    desirable: int | None = None
    cut_to: str = ""
    from_cache: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> DataReport:
        report = cls(**values)
        report.dropped = [(int(row), str(reason)) for row, reason in report.dropped]
        return report

    def dropped_by_reason(self) -> dict[str, list[int]]:
        """Reason -> the numbers of the rows dropped for it."""
        result: dict[str, list[int]] = {}
        for row, reason in self.dropped:
            result.setdefault(reason, []).append(row)
        return result

    def lines(self) -> list[str]:
        """The report for the screen, one fact a line, without the topic that the caller puts in the left column."""
        template = f"  template: {self.template}" if self.template else ""
        made = f"{_shown(self.quantiles)} tokens"
        if self.lengths:
            made = f"{self.units:,} pairs" if self.unit == "pair" else f"{self.desirable:,} of {self.units:,} desirable"
        facts = [f"{self.rows_read:,} rows  {self.format} format{template}   {made}"]
        if self.lengths:
            facts.append("tokens   " + "   ".join(f"{part}: {_shown(values)}" for part, values in self.lengths.items()))
        trained = f"trained tokens {100.0 * self.trained_tokens / max(self.tokens, 1):.1f}% of {self.tokens:,}"
        if self.lengths and "prompt" not in self.lengths:
            trained = f"scored tokens {self.tokens:,}"
        facts.append(
            f"{trained}   {self.unit}s dropped {len(self.dropped):,}   "
            f"replies ending in EOS {self.stopped_rows:,}/{self.rows:,}   cut {len(self.cut_rows):,}"
        )
        for reason, rows in self.dropped_by_reason().items():
            facts.append(f"dropped {len(rows):,}: {reason} ({name_rows(rows)})")
        if self.cut_rows:
            share = 100.0 * self.trained_lost / max(self.trained_lost + self.trained_tokens, 1)
            facts.append(
                f"cut to {self.cut_to}: {len(self.cut_rows):,} rows lost {self.tokens_lost:,} tokens, "
                f"{self.trained_lost:,} of them trained ({share:.1f}%) ({name_rows(self.cut_rows)})"
            )
        if self.equal_rows:
            facts.append(
                f"chosen and rejected are equal in {len(self.equal_rows):,} pairs, kept ({name_rows(self.equal_rows)})"
            )
        if self.boundary_moved:
            facts.append(f"prompt tokens merge into the completion in {self.boundary_moved:,} rows: trained from there")
        if self.doubled_bos:
            facts.append(f"doubled BOS removed from {self.doubled_bos:,} rows")
        if self.spelled_rows:
            facts.append(
                f"messages spell special tokens in {len(self.spelled_rows):,} rows: they stay text "
                f"({name_rows(self.spelled_rows)})"
            )
        if self.spelled_replies:
            facts.append(
                f"replies spell special tokens in {len(self.spelled_replies):,} rows: they are tokens there "
                f"({name_rows(self.spelled_replies)})"
            )
        if self.unused_columns:
            facts.append(f"columns not used: {', '.join(self.unused_columns)}")
        if self.packs is not None and self.fill is not None and self.max_length is not None:
            facts.append(f"packed into {self.packs:,} sequences of {self.max_length:,} ({100 * self.fill:.1f}% full)")
        return facts


def _shown(quantiles: dict[str, int]) -> str:
    return "  ".join(f"{name} {value:,}" for name, value in quantiles.items())


def name_rows(numbers: list[int]) -> str:
    """The first few of some row numbers, in words."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{'row' if len(numbers) == 1 else 'rows'} {shown}{', ...' if len(numbers) > _SHOWN else ''}"
