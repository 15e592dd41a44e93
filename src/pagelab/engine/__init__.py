"""The engine: the step loop (`core`, no torch), text in and out, and `LLM` around them."""
