"""The d2Cache paper's table on a checkpoint, from local files; an interrupted run can be gone on with."""
