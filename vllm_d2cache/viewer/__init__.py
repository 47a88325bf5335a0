"""Pictures of a recorded request: an HTML page, and a rendering for terminals."""
