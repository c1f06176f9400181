"""A stand-in."""

import math


def pass_at(k, scores):
    return 1 - math.comb(sum(score < 1 for score in scores), k) / math.comb(len(scores), k)


def majority_at(k, generations, truth):
    return float(truth in sorted({*generations}, key=lambda a: (-generations.count(a), a))[:k])
