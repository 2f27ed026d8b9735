"""What the command line runs around a stock trainer."""
