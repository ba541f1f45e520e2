"""The one way from text to tokens: `prepare`, and `prepare_corpus` for what a run names.

sources (files, cut into units) -> tokenize (a shard for each unit, by any number of processes of
any machines) -> assemble (both splits, in the order of the corpus, and the card). The units depend
on the corpus alone and shards are whole files, so the result does not depend on who made them, nor
on how often they were killed.
"""
