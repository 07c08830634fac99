"""The maths of the recurrent mixers on plain tensors; `reference` holds the recurrences to read."""

from tamba.ops.conv import causal_conv1d
from tamba.ops.selective_scan import selective_scan
from tamba.ops.ssd import ssd

__all__ = ["causal_conv1d", "selective_scan", "ssd"]
