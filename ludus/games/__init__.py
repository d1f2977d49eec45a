"""Rules and words: matches that speak text. `base` has the protocols, `registry.make` the games."""
