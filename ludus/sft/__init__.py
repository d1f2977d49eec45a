"""Supervised data: files of dialogues, their token ids, and transcripts of players to learn from."""
