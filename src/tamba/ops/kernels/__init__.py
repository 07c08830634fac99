"""Operators for one kind of machine each, imported when a call is for them."""
