"""What the Triton kernels of the operators share."""

import torch
import triton.language as tl

ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}
