"""Kernels that torch lacks, each family in one file; which one runs is decided where it is used."""
