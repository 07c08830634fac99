"""SSD (Mamba-2)."""

from tamba.ops.reference import ssd_chunked as ssd
