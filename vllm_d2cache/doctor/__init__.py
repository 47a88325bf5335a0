"""What ``vllm-d2cache doctor`` looks at. Nothing here needs vLLM, and only one check needs torch."""
