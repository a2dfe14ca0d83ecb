"""Memory: checkpointing by value, offload to the host, tiling, and the planner that knows before a run."""
