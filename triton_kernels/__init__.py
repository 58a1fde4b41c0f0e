"""The Triton kernels of psilora, one file per kernel; installed as `psilora.triton_kernels`."""
