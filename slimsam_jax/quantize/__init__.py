"""The program `slimsam quantize`; the function of the name is `slimsam_jax.compression.quantize.quantize`."""
