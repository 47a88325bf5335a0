"""The texts being written: who runs, what stands where, and the rows of a step."""
