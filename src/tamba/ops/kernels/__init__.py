"""Operators for one kind of machine each, imported inside the call that is for them.

`ssd`, `selective_scan` and `conv` are Triton kernels and may assume that
`tamba.ops.backend.kernels_run` said yes; `scan_cpu` is a compiled loop for CPUs.
"""
