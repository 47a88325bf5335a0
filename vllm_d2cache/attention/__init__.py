"""Attention: what a forward pass leaves for the importance stage (capture, no vLLM), and the backend for vLLM."""
