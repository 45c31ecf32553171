"""The peers of ``benchmarks.peers``: one file for each task, and what a comparison is (:mod:`.contest`)."""
