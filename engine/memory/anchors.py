"""Published runs that the planner is held against, and the memory model fitted to four of them.

    peak = constant + T * (working set + checkpoints on the device + logits)

for Llama-3.1-8B trained in full with weights and optimizer on the host (ArcticTraining's ALST, arXiv 2506.13996, its
run files). Checkpoints are 2 bytes a hidden element and layer: 256 KiB a token. Four rows of one H200 give the four
unknowns; rows of H100 cards, which the fit has not seen, say how good it is.
"""

from typing import NamedTuple

GIB, KIB = 2**30, 2**10
CHECKPOINTS = 32 * 4096 * 2  # bytes a token


class Published(NamedTuple):
    """One run: tokens of its single document, the peak it reported in GiB, and what it did."""

    card: str
    tokens: int
    gib: float
    logits: bool  # all of them at once
    offload: bool
    tiled: bool


H200 = (
    Published("H200", 65_000, 137.36, logits=True, offload=False, tiled=False),
    Published("H200", 300_000, 134.96, logits=False, offload=False, tiled=False),
    Published("H200", 650_000, 126.81, logits=False, offload=True, tiled=False),
    Published("H200", 1_200_000, 136.15, logits=False, offload=True, tiled=True),
)
# Held out. The second and third are the longest that those cards took, of 79.6 GiB each.
H100 = (
    Published("H100", 32_000, 71.91, logits=True, offload=False, tiled=False),
    Published("H100", 36_000, 79.6, logits=True, offload=False, tiled=False),
    Published("8x H100, no sequence parallelism", 160_000, 79.6, logits=False, offload=False, tiled=False),
)


class Fit(NamedTuple):
    """constant in bytes; the rest in bytes a token."""

    constant: float
    untiled: float
    tiled: float
    logits: float

    def peak(self, run: Published) -> float:
        """Bytes at the peak of a run like this one."""
        each = self.tiled if run.tiled else self.untiled
        each += self.logits if run.logits else 0
        each += 0 if run.offload else CHECKPOINTS
        return self.constant + run.tokens * each


def calibrate(rows: tuple[Published, ...] = H200) -> Fit:
    """The four unknowns from the four rows: plain, without logits, offloaded, tiled."""
    plain, fused, offloaded, tiled = rows
    without = fused.gib * GIB - fused.tokens * CHECKPOINTS
    untiled = (offloaded.gib * GIB - without) / (offloaded.tokens - fused.tokens)
    constant = without - fused.tokens * untiled
    return Fit(
        constant,
        untiled,
        (tiled.gib * GIB - constant) / tiled.tokens,
        (plain.gib * GIB - constant) / plain.tokens - untiled - CHECKPOINTS,
    )
