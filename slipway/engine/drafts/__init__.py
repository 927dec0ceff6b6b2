"""Speculative decoding: drafts of the next tokens, which a step verifies all at once.

Not here: verified drafts as tokens of a step (scheduler.py, batch.py), their acceptance
(pipeline.py).

A token depends on its logits, the request's seed and the token's position only. So a draft is
accepted if it equals the token that the sampler draws at its position, and outputs are those
without speculation, whatever the drafts are (Leviathan et al., Fast inference from transformers via
speculative decoding, 2023, verify greedy outputs in this way).
"""
