"""`python -m kt_hf.cli`."""

from ..__main__ import main

main()
