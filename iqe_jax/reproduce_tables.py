"""The table of reproduce.py as text: CSV, Markdown and LaTeX, from the rows that it found."""

import csv
import io
from typing import Any

from iqe_jax.metrics import IMAGE_METRICS

METRICS = (*IMAGE_METRICS, "pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_aupro")


def as_csv(found: dict[str, Any]) -> str:
    """A line for each row of the table, with mean, low and high of each metric."""
    lines = io.StringIO()
    out = csv.writer(lines, lineterminator="\n")
    facts = ["set", "protocol", "weights", "chosen_on_test_data", "phantoms", "runs", "images", "seconds", "peak_bytes"]
    own = [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
    published = [f"mvfa_ad_{name}_{of}" for name in ("image_auroc", "pixel_auroc") for of in ("paper", "code")]
    out.writerow([*facts, *own, *published])
    for row in found["rows"]:
        values: list[Any] = [{**row, "phantoms": found["phantoms"]}.get(name) for name in facts]
        for name in METRICS:
            figure = (row["metrics"] or {}).get(name) or {"mean": None, "interval": None}
            values += [figure["mean"], *(figure["interval"] or (None, None))]
        for name in ("image_auroc", "pixel_auroc"):
            values += [round(value / 100, 6) for value in (row["published"] or {}).get(name, ())] or [None, None]
        out.writerow(values)
    return lines.getvalue()


def _text_rows(found: dict[str, Any]) -> list[list[str]]:
    """The table as text, its heading first."""
    from iqe_jax.report import MARKED, title

    published = [] if found["phantoms"] else ["MVFA-AD image AUROC", "MVFA-AD pixel AUROC"]
    heading = ["set", "protocol", "weights", "runs", *map(title, METRICS), *published, "s per run", "peak MB"]
    lines = [heading]
    for row in found["rows"]:
        weights = row["weights"] + (f", {MARKED}" if row["chosen_on_test_data"] else "")
        line = [_called(row), row["protocol"], weights, str(row["runs"])]
        for name in METRICS:
            figure = (row["metrics"] or {}).get(name) or {"mean": None, "interval": None}
            mean, interval = figure["mean"], figure["interval"]
            text = "" if mean is None else f"{mean:.3f}"
            line.append(text + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""))
        for name in ("image_auroc", "pixel_auroc")[: len(published)]:
            line.append(" / ".join(f"{value / 100:.4f}" for value in (row["published"] or {}).get(name, ())))
        more = "> " if row.get("resumed") else ""  # what was done before it was stopped is not in it
        line.append(f"{more}{row['seconds']:.0f}" if "seconds" in row else "")
        line.append(f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "")
        lines.append(line)
    return lines


def _is_part(row: dict[str, Any]) -> bool:
    """Whether a row is of other images than the published set has."""
    return row["published_images"] not in (None, row.get("images", row["published_images"]))


def _called(row: dict[str, Any]) -> str:
    return f"{row['set']}, {row['images']} of {row['published_images']} images" if _is_part(row) else row["set"]


def _notes(found: dict[str, Any]) -> list[str]:
    notes = ["Means over several seeds and support draws; in brackets 95 % intervals of the mean (Student's t)."]
    if any(row.get("resumed") for row in found["rows"]):
        notes.append("Times with > are of runs that were stopped: what was done before is not in them.")
    if found["phantoms"]:
        return ["RENDERED PHANTOMS: these figures say nothing about real data, nor about any published result.", *notes]
    if any(map(_is_part, found["rows"])):
        notes.append("Figures of other images than the published set's cannot be set beside published ones.")
    source = found["published_source"]
    return [*notes, f"MVFA-AD is another method; its figures, of its paper / of its code, are from {source}."]


def as_markdown(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    heading, *lines = _text_rows(found)
    table = [heading, ["---"] * len(heading), *lines]
    text = [*_notes(found), "\n".join(f"| {' | '.join(line)} |" for line in table), f"```\n{found['command']}\n```"]
    return "\n\n".join(text) + "\n"


def as_latex(found: dict[str, Any]) -> str:
    """The table as a LaTeX tabular, with its notes below."""

    def escaped(text: str) -> str:
        return text.replace("%", r"\%").replace(">", "$>$")

    heading, *lines = [" & ".join(map(escaped, line)) + r" \\" for line in _text_rows(found)]
    columns = "lll" + "r" * (heading.count("&") - 2)
    table = [rf"\begin{{tabular}}{{{columns}}}", heading, r"\hline", *lines, r"\end{tabular}"]
    return "\n".join([*table, *(r"\par " + escaped(note) for note in _notes(found))]) + "\n"
