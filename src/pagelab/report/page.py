"""What a page embeds: charts, and the columns that they draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagelab.report.charts import Spec
from pagelab.report.series import Columns

Panel = dict[str, Any]  # what a template draws


class Page:
    """Collects the charts of a page and the columns that they draw."""

    def __init__(self) -> None:
        self.charts: list[dict[str, Any]] = []
        self.data: dict[str, Columns] = {}

    def add_data(self, columns: Columns) -> str:
        """Keep columns under a new name."""
        name = f"d{len(self.data)}"
        self.data[name] = columns
        return name

    def add_chart(
        self,
        spec: Spec,
        label: str,
        uses: Sequence[str] = (),
        hover: Mapping[str, Any] | None = None,
    ) -> Panel:
        """Keep a chart; the template draws a place for it.

        Args:
            spec: Vega-Lite.
            label: what it shows, for those who cannot see it.
            uses: names of the columns that it draws.
            hover: figures at the pointer: `mode` (`before`: the first entry at or after it,
                `after`: the last one up to it, `nearest`: of the values `xs`, called `names`),
                `unit`, and rows of data, field and label.
        """
        identity = f"chart-{len(self.charts)}"
        self.charts.append({"id": identity, "spec": spec, "uses": list(uses), "hover": hover})
        point = hover is not None
        return {"id": identity, "label": label, "height": spec["height"] + 36, "point": point}
