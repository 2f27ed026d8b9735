"""`python -m kt_hf.cli` is `kt-hf`."""

from . import app

app(prog_name="kt-hf")
