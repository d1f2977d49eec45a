"""Judges of (request, answer) pairs: who says what is harmful and what is a refusal, or that nobody knows."""
