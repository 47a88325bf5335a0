"""Plain PyTorch references for tests: no vLLM, no paging, nothing fast."""
