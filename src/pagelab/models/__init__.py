"""Models: what one is made of (`spec`), where its files are (`fetch`), and how they are read.

The decoder itself is ours; formats and tokenizers are the field's own libraries'.
"""
