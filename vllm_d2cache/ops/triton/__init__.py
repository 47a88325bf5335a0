"""Triton kernels, each beside a PyTorch twin of the same name and signature in ``vllm_d2cache.ops``."""
