"""What to commit in a step, and how many tokens."""

from vllm_d2cache.samplers.quota import choose_commits
from vllm_d2cache.samplers.scores import ranking_score

__all__ = ["choose_commits", "ranking_score"]
