"""Our trees <-> HF directories: ``files`` opens and validates, ``hub`` finds, ``load`` reads and ``save`` writes.

Decides nothing itself.
"""
