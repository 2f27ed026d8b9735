"""Experts on kt-kernel's CPU operators. Nothing outside this package imports kt_kernel."""
