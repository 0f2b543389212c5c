"""Triton kernels and their launchers. They know tensors, not models: no nn.Module, no autograd.

Imported as `fastvit.kernels`; importing a module of it imports Triton. Every launcher takes tensors that
`fastvit.ops` has checked, and returns new tensors.
"""
