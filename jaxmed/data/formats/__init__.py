"""One file a family of image formats; `jaxmed.data.images` chooses among them."""
