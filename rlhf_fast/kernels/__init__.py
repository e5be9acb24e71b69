"""Triton kernels, one file an op. Nothing here is imported before an op needs it, and no check is made here."""
