"""What the compiler is told about programs that are compiled once for a fit of seconds."""

# XLA tries its own Triton kernels beside cuBLAS and cuDNN for every matrix product and convolution,
# compiling dozens of each. On an H200 that took 12 seconds for SSIM and minutes for LPIPS, and the
# steps became no faster (benchmarks/compile_fits.py). Other back ends do not read it.
FIT_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
