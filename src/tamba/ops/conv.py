"""Causal depthwise convolution."""

from tamba.ops.reference import causal_conv1d as causal_conv1d
