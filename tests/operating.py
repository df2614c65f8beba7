"""What the sequential test comes to, by summing all courses that it can take."""

from wmengine.parts.statistics.sequential import SequentialTest


def operating_point(
    rate: float, p0: float, total: int, log10_bar: float, first_look: int = 16, next_look: int = 8
) -> tuple[float, float]:
    """(chance of being proven, mean queries) of a suspect that matches each trigger with chance `rate`, exactly.

    All 2^n courses of the test are summed by their number of matches. A stranger's rate is p0: its chance of being
    proven is at most 10^-log10_bar.
    """
    chances = [1.0] + [0.0] * total
    asked, proven, queries = 0, 0.0, 0.0
    while asked < total:
        look = min(total, asked + (next_look if asked else first_look))
        for _ in range(look - asked):
            chances = [stay * (1.0 - rate) + (chances[k - 1] * rate if k else 0.0) for k, stay in enumerate(chances)]
        asked = look
        for k, chance in enumerate(chances[: asked + 1]):
            if chance > 0.0:
                test = SequentialTest(p0, total)
                test.count(k, asked)
                # An earlier look that had proven it would have ended the test, so the peak is not needed here.
                done = test.log10_e >= log10_bar
                if done or test.decision is not None:
                    proven += chance if done else 0.0
                    queries += chance * asked
                    chances[k] = 0.0
    return proven, queries
