"""Steps on a device: the KV cache's tensors, a step's inputs, the model, sampling."""
