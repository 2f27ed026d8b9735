"""Using what was trained: `kt-hf chat` and `kt-hf eval`."""
