"""Ours against eager PyTorch, ``torch.compile`` and the bandwidth that a copy reaches, in one run."""
