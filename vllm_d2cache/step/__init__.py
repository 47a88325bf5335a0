"""One step, without an engine."""
