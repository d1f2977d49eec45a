"""Rollouts on a Ray cluster: actors that play matches, and the driver's side of them.

Only this package knows Ray, and only `crew.py`, `broadcast.py` and `connect.py` import it: it is an extra,
`ludus[ray]`.
"""
