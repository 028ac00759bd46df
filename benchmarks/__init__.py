"""Benchmarks against eager PyTorch, ``torch.compile`` and the bandwidth of a copy, in one run."""
