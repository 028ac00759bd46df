"""The torch library that every family defines its schemas in; implementations register from C++, CUDA or Triton."""

import torch

library = torch.library.Library("bicm_kernels", "DEF")
