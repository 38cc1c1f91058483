"""Measurements that anyone can repeat: `python -m bench --help`.

Every comparison is paired and interleaved: the variants alternate within one run, in an order
drawn anew each round from a seed, and what is reported is the median of the rounds' own ratios.
"""
