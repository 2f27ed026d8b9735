"""The model and the data set that come without a download."""
