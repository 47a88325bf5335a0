"""Every private vLLM name the plugin touches, and every runtime patch; see patches/README.md."""
