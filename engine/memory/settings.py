"""What a run does to save memory: one frozen value that the planner chooses and the layers carry out."""

from dataclasses import dataclass
from typing import Any

# On a GPU an attention is worth keeping from documents of this length on: computing it again then costs more than its
# bytes do. A CPU has no other memory to move it to.
LONG = 12288
CPU_TILE = 2048  # tokens: longer tiles are no faster there and hold more


@dataclass(frozen=True)
class Memory:
    """How much of a layer lives between forward and backward, and where.

    checkpointing   keep the input of each segment of layers only, and run its forward again in backward
    segment         layers a checkpoint
    keep_attention  each checkpoint keeps its layers' attention output and log-sum-exp too
    tile            tokens a tile of norms, projections and MLP, in forward and in the recompute; None: all at once
    offload         checkpoints, with all they keep, go to the host; the last keep_on_device of them don't
    """

    checkpointing: bool
    segment: int = 1
    keep_attention: bool = False
    tile: int | None = None
    offload: bool = False
    keep_on_device: int = 1


def from_config(config: Any, *, cuda: bool) -> Memory:
    """The settings that a configuration's keys name, on a GPU or on the CPU; a plain rule where a key is left open."""
    keep = config.keep_attention
    if keep is None:
        keep = cuda and config.gradient_checkpointing and (config.max_length or 0) >= LONG
    tile = config.tile_tokens
    if tile is None:
        tile = 0 if cuda else CPU_TILE
    return Memory(
        config.gradient_checkpointing,
        config.checkpoint_segment,
        keep,
        tile or None,
        config.activation_offloading,
    )
