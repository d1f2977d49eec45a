"""Rollouts and learners on a Ray cluster: actors that play matches, the driver's side of them, and ranks.

Only this package knows Ray, which is an extra, `ludus[ray]`: what others import here does without it.
"""
