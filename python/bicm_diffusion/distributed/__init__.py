"""Sampling across processes and machines: N samples with the same bits for any world size, written as they are made."""

from bicm_diffusion.distributed.manifest import Manifest
from bicm_diffusion.distributed.pairs import PairDataset, sample_pairs
from bicm_diffusion.distributed.sampling import sample_shards
from bicm_diffusion.distributed.shards import Shard
from bicm_diffusion.distributed.store import read_samples

__all__ = ["Manifest", "PairDataset", "Shard", "read_samples", "sample_pairs", "sample_shards"]
