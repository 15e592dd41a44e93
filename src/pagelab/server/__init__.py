"""The OpenAI-compatible server and its live page map. Needs the extra `server`."""
