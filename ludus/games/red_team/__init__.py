"""Self-RedTeam's game in a world of invented words: an attacker rewrites requests, a defender answers them.

vocabulary (things, acts, wordings, the split) -> world (what is asked) -> judge (what was answered)
    -> rewards (tables of named terms) -> game
"""
