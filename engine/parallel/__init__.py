"""Several processes on torch.distributed, one a device: replicas (DDP), shards (FSDP2), slices of a sequence (Ulysses).

`world` says who this process is, and is a world of one where nothing was started: the rest of burnish asks it, and runs
the same lines for one process and for many. `launch` starts processes, `replicas` and `shards` wire a model and its
optimizer, `sequence` cuts documents, `store` writes and reads sharded checkpoints.
"""
