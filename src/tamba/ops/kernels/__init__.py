"""Operators for one kind of machine each, imported inside the call that is for them.

`ssd`, `selective_scan`, `conv`, `losses` and `directions` are Triton kernels and may assume that
`tamba.ops.backend.kernels_run` said yes; `scan_cpu` and `rows_cpu` are compiled loops for
CPUs.
"""
