"""``python -m vllm_d2cache.cli``: the same as ``vllm-d2cache``."""

from vllm_d2cache.cli import main

raise SystemExit(main())
