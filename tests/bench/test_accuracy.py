import pytest

from pipeline.bench.accuracy import calibration


@pytest.mark.parametrize("n", [1, 250, 300])
def test_risk_coverage_ends_with_all_calls(n: int) -> None:
    """Every second of 250 points, the curve's last was left out: "of all calls wrong" was of all but the least sure."""
    rows = [{"called": True, "confidence": 1 - at / n} for at in range(n)]
    exact = [at < n - 1 for at in range(n)]  # only the least sure is wrong
    curve = calibration(rows, exact)["risk_coverage"]
    assert curve[-1] == (1.0, 1 / n)
    kept = [share for share, _ in curve]
    assert kept == sorted(set(kept))
    assert len(curve) <= 126
