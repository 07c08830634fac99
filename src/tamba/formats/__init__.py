"""Files of tensors, as bytes: what is in them and one tensor at a time, whatever wrote them."""
