"""The compiled extension for CPUs: `library` finds it, `csrc/` is its source."""
