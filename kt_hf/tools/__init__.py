"""What the command line runs besides training: doctor, self-test, benchmark, quantizing."""
