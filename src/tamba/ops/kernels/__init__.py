"""Triton kernels, imported by the operators inside the call: Triton is optional.

Everything here may assume that `tamba.ops.backend.kernels_run` said yes.
"""
