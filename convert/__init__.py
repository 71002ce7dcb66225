"""PyTorch ↔ JAX: CLIP weights and the official adapter checkpoints, in both directions.

The only package of this project that may import PyTorch, and only while it reads or writes a PyTorch file.
"""
