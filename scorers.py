"""A stand-in."""

import math


def pass_at_k(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers, truth, k):
    return float(truth in sorted({*answers}, key=lambda a: (-answers.count(a), a))[:k])
