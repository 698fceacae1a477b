"""What makes forwards fast and changes no picture beyond rounding: graphs, kernels, narrower weights."""
