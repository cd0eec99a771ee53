"""GPU kernels for what lies between matmuls: norms, and activations with their bias and their rounding to fp8.

XLA's own kernels for the backward passes of these read their operands twice, are slow where a row is not a power of
two (head dims 72 and 88), keep intermediate values of the activation, and take a pass of their own to transpose what
fp8 matmuls read. These (Pallas, in its Triton form) read each value once, compute everything else anew in registers,
and sum the gradients of vectors on the way. BENCHMARKS.md has what they save. Elsewhere than on GPUs they are
interpreted, slowly, for tests; layers.py decides where they are used.
"""
