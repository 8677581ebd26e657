"""Any JAX function as a flat list of equations, which pruning and quantization run again in their own way."""
