"""Answer quality through the front door: lm-evaluation-harness, unmodified, over a running server."""
