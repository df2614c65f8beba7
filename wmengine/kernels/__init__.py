"""GPU kernels in Triton, one file per step; nothing here is imported before a CUDA tensor meets a training operator."""
