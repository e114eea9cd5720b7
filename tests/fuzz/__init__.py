"""A fuzzer of the whole gateway: a client and an upstream that send what they should not, in every possible pace.

    python -m tests.fuzz --minutes 10 --seed 1

A finding is printed with its seed, reduced to the fewest bytes that still show it, and written to a file that
`--replay` runs again.
"""
