"""Packages whose kernels run on a GPU only: inside a simulation of one, their functions stand in."""
