"""What parts of the library take, beside the same work in PyTorch and MONAI where these are."""
