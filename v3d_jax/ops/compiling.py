"""What the compiler is told about programs that run for seconds: samples and fits."""

# XLA tries its own Triton kernels beside cuBLAS and cuDNN for every matrix product and convolution,
# compiling dozens of each. On an H200 that took 12 seconds for SSIM and minutes for LPIPS, and the
# steps became no faster (benchmarks/compile_fits.py); V3D's UNet took 43 seconds with it and 22
# without, for a step of the same 107 ms. Other back ends do not read it.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# Of training steps on TPUs. Its compiler would make of every product with a gathered kernel a loop
# over the pieces, one for each chip that has one: of V3D's UNet in 64 pieces it then gave no
# program in 54 minutes, and without in six. A plan (`training.plan`) must
# be told the same as the step.
TPU_STEP = {
    "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
}

# Of training steps, by platform.
STEP = {"gpu": OPTIONS, "tpu": TPU_STEP}
