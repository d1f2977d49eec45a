"""Problems outside any game: who asks, who marks the answers, what figures come out (docs/reasoning.md)."""
