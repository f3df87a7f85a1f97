"""What PyTorch does differently on CUDA: autocast, attention kernels, results and workspaces of kernels."""
