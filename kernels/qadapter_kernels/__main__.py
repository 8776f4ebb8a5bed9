"""``python -m qadapter_kernels``: which compiled libraries are there, and why one is not."""

from qadapter_kernels.native import SIGNATURES, describe

for name in SIGNATURES:
    print(f"{name}: {describe(name)}")
