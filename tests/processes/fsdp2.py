"""FSDP2 and DTensor, which torch before 2.6 kept in a private place and ran on GPUs alone."""

__all__ = ["RUNS_ON_CPUS", "DTensor", "Replicate", "fully_shard"]

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
except ImportError:
    from torch.distributed._composable.fsdp import fully_shard
    from torch.distributed._tensor import DTensor, Replicate

    RUNS_ON_CPUS = False
else:
    RUNS_ON_CPUS = True
