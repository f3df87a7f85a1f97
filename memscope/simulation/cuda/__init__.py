"""PyTorch's behavior on CUDA that differs from the CPU: autocast, attention, and kernels' results and workspaces."""
