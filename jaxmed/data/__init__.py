"""Where examples come from: image files, data sets, splits and batches, on the host in NumPy."""
