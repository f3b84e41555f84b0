"""What the compiler is told about programs that run for seconds: samples, fits, training steps."""

from typing import Any

# XLA tries its own Triton kernels beside cuBLAS and cuDNN for every matrix product and convolution,
# compiling dozens of each. On an H200 that took 12 seconds for SSIM and minutes for LPIPS, and the
# steps became no faster (benchmarks/compile_fits.py); V3D's UNet took 43 seconds with it and 22
# without, for a step of the same 107 ms. Other back ends do not read it.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# Gradients that are summed and split over devices together: this many bytes of them.
_SUMMED_AT_ONCE = 2**26


def step(platform: str, shares: int) -> dict[str, Any] | None:
    """What is told of a training step whose weights lie in so many shares.

    A plan (`training.plan`) must be told the same.
    """
    if platform == "tpu":
        # TPUs' compiler would make of every product with a gathered kernel a loop over the pieces,
        # one for each chip that has one: of V3D's UNet in 64 pieces it then gave no program in 54
        # minutes, and without in six.
        return {
            "xla_tpu_enable_windowed_einsum_for_all_gather": False,
            "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
        }
    if platform == "gpu":
        # XLA counts what a device keeps. By its own 30 MiB, with 64 shares, the gradients of V3D's
        # UNet are summed all at once, after the last of them.
        at_once = max(1, _SUMMED_AT_ONCE // shares)
        return OPTIONS | {"xla_gpu_reduce_scatter_combine_threshold_bytes": at_once}
    return None
