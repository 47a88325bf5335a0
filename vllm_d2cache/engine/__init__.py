"""Inside vLLM: configuration, admission, scheduling, and the hooks of its model runner."""
