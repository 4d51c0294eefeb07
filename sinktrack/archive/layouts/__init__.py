"""What tensors are called where, one module a layout."""
