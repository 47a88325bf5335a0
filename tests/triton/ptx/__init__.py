"""What the compiler made of a kernel, run on CPU tensors thread by thread.

Triton's interpreter runs a program as one thread that does one thing after the other. On a GPU a program is a block of
warps, each of which goes its own way to the next barrier: a number that some warps still have to read may have been
overwritten by another. Here a block's PTX is run, each warp alone to its next barrier, first to last and then last to
first. Of any two warps between two barriers either has been the earlier one, so what depends on it differs.

A difference shows where it reaches a number: warps that write the same thing, or that the compiler's own barriers keep
apart, are no race here. The lanes of a warp go in step, which a card does not promise, and blocks run one by one.

Not here: the instructions that matrix products alone need (mma, ldmatrix, stmatrix, cp.async), atomics, and more than
one barrier. Sums and functions are rounded as NumPy does, not to the bit as a card does: denormal numbers stay, and a
fused product is rounded twice.
"""
