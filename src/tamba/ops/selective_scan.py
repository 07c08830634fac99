"""Selective scan (Mamba-1)."""

from tamba.ops.reference import selective_scan as selective_scan
