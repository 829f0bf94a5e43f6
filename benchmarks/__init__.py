"""Latency, memory and quality of a bundle, beside what people would use instead: `latentrt bench`.

`scripts/` holds the project's own benchmarks and `results/` what they measured; neither is part of the package.
"""
