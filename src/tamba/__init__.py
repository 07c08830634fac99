"""tamba."""
