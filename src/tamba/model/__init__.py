"""The model: one class for every mix of layers, its configuration and its state."""
