"""vLLM plugin that serves diffusion language models with d2Cache's partial refresh in paged KV memory."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; vLLM calls it in each of its processes, maybe twice."""
    from vllm_d2cache.registration import register_all

    register_all()
