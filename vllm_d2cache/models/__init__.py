"""vLLM model classes of the supported families; imported by vLLM by name when a checkpoint asks for one."""
