"""A single HTML page without network requests: styles, script and plotly.js are embedded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lora_jax.report import figures, summary
from lora_jax.report.runs import RunFiles
from lora_jax.version import __version__

PAGE = Path(__file__).with_name("page")


def render(runs: Sequence[RunFiles]) -> str:
    """Return the page of one run, or of several overlaid.

    Everything from a run's files is escaped: by jinja in text, and as JSON in figures.
    """
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    drawn = {
        "loss": figures.loss_figure(runs),
        "small": figures.small_figures(runs),
        "lengths": figures.lengths_figure(runs),
        "moved": figures.moved_figures(runs),
    }
    return environment.get_template("page.html").render(
        runs=runs,
        title=" · ".join(run.name for run in runs),
        colors=figures.COLORS,
        legend=figures.legend(runs),
        smoothed=figures.SMOOTHED,
        summary=summary,
        version=__version__,
        style=Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup((PAGE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")) if _any(drawn) else "",
        **drawn,
    )


def _any(drawn: dict[str, object]) -> bool:
    return any(drawn.values())
