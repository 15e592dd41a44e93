"""What people see of a results file: `html` (one self-contained page) and `terminal`."""
