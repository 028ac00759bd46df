"""Sampling across processes and machines: N samples that are the same bits for any world size, written as they come."""

from bicm_diffusion.distributed.sampling import Shard, sample_shards
from bicm_diffusion.distributed.store import Manifest, read_samples

__all__ = ["Manifest", "Shard", "read_samples", "sample_shards"]
