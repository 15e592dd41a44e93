"""Attention over paged K/V behind one Protocol (`base`); `select` picks a backend."""
