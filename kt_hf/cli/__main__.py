"""`python -m kt_hf.cli` is `kt-hf`."""

from kt_hf.cli import app

app(prog_name="kt-hf")
