"""``python -m qadapter_kernels``: which compiled libraries are there, and why one is not."""

from qadapter_kernels.native import build_report, unavailable_reason

for name in ("cpu", "cuda"):
    reason = unavailable_reason(name)
    print(f"{name}: {reason or 'built with ' + build_report()[name]['compiler']}")
