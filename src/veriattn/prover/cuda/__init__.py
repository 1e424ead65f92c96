"""The CUDA prover: Triton kernels with the bits of spec.reference. Only this folder imports torch and triton."""
