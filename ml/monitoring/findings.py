"""What one test found, and when a set of tests amounts to a change.

A p-value alone alarms on nothing once samples are large, an effect alone alarms on noise while they are small: a change
needs both. p-values of all tests of a check are corrected together (Holm, A simple sequentially rejective multiple test
procedure, 1979), so `significance` is the chance of a false alarm per check, not per test.
"""

from collections.abc import Sequence

from pydantic import Field

from ml.artifacts import Record


class Finding(Record):
    """One two-sample test of current rows against the reference."""

    test: str = Field(description="what was compared, in words")
    sample: str = Field(description="which rows: requests, new data")
    method: str
    p_value: float
    effect: float = Field(description="size of the difference, whatever the number of rows")
    effect_name: str
    effect_limit: float = Field(description="differences smaller than this are none")
    details: str = Field(default="", description="the difference in words")
    corrected_p_value: float = 1.0
    changed: bool = False

    @property
    def verdict(self) -> str:
        if self.changed:
            return "changed"
        return "no change" if self.effect < self.effect_limit else "not significant"


def judge_findings(findings: Sequence[Finding], significance: float) -> tuple[Finding, ...]:
    """The same findings with corrected p-values and verdicts."""
    corrected = holm([finding.p_value for finding in findings])
    return tuple(
        finding.model_copy(
            update={"corrected_p_value": p_value, "changed": p_value <= significance and finding.effect >= finding.effect_limit}
        )
        for finding, p_value in zip(findings, corrected, strict=True)
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number; each may be compared with the level of the whole family."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def p_words(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
