"""Networks of every task, in 2-D and 3-D, and the convolution that they are built from."""
