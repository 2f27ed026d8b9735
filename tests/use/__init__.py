"""Tests of kt_hf.use: chat and evaluation with a trained adapter."""
