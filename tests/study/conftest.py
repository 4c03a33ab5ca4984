"""What several files of tests share."""

import pytest

from amclr_scale.study.report import curves, plots, probe_figures, rank_scaling
from amclr_scale.study.report.document import Figure


@pytest.fixture
def undrawn(monkeypatch):
    """Figures with their numbers but without their pictures, which take seconds."""

    def finish(name, caption, figure, raw):
        plots.pyplot().close(figure)
        return Figure(name, caption, raw, b"", b"")

    monkeypatch.setattr(plots, "finish", finish)
    monkeypatch.setattr(curves, "finish", finish)
    monkeypatch.setattr(probe_figures, "finish", finish)
    monkeypatch.setattr(rank_scaling, "finish", finish)
