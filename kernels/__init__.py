"""Fused GPU kernels of the sampling step, each with a plain PyTorch `<op>_ref` that serves where Triton does not run.

One file per op: Triton kernel, launcher, reference, and registration as `torch.ops.ddpm.<op>`. Nothing here knows
checkpoints or samplers.
"""

if __name__ == "kernels":
    raise ImportError("import this package as ddpm.kernels: under a second name its operators would register twice")
