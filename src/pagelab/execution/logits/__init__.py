"""What changes logits before a token is sampled from them, and what is read from them."""
