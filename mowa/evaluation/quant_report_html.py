"""Render a quantization report as one self-contained HTML file."""

from __future__ import annotations

from html import escape
from pathlib import Path

from mowa.evaluation.quant_report import QuantReport, ReportRow
from mowa.io.atomic import atomic_write

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.5rem; margin-bottom: 0 } p.sub { color: #666; margin-top: .2rem }
table { border-collapse: collapse; width: 100%; margin: 1.2rem 0; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; color: #555; font-size: .85rem }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e6e6e6; vertical-align: top }
td.n { text-align: right; white-space: nowrap } .bar { background: #dfe7f3; height: .35rem; border-radius: 2px }
.bar i { display: block; height: 100%; background: #4a76b8; border-radius: 2px }
.v { border-radius: 3px; padding: .05rem .45rem; font-weight: 600; font-size: .85rem }
.pass { background: #dff3e3; color: #19692c } .inconclusive { background: #fdf1d3; color: #7a5800 }
.fail { background: #fbe0df; color: #9c1c16 } .why { color: #666; font-size: .85rem }
td.n .why, td.verdict .why { display: block } td.verdict { min-width: 15rem }
"""
COLUMNS = (
    "scheme",
    "format",
    "size",
    "memory",
    "RTFx",
    "speedup",
    "top-1 agreement",
    "KL",
    "WER %",
    "CER %",
    "WER change",
)


def write_html(report: QuantReport, path: Path) -> None:
    """Write the page to `path`."""
    atomic_write(path, render_html(report))


def render_html(report: QuantReport) -> str:
    """Return the page."""
    largest = max((row.size_bytes for row in report.rows), default=1) or 1
    rows = "\n".join(_row(row, largest) for row in report.rows)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*COLUMNS, "verdict"))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(report.model)}: quantization report</title><style>{CSS}</style>
<h1>{escape(report.model)}: quantization report</h1>
<p class="sub">{report.num_recordings} recordings of {escape(report.data)}, {report.audio_s / 60:.1f} minutes ·
{escape(report.machine)} · {escape(versions)}</p>
<table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table>
<p class="why">Speedup, agreement and WER change are relative to float32; the limit for the WER change is
{report.max_wer_increase:+.1%}. Intervals are 95 % bootstrap intervals over recordings, paired for changes. Memory is
the peak resident memory of the process. Timings are from one run.</p>
{_groups(report)}{_throughput(report)}
</html>
"""


def _row(row: ReportRow, largest: int) -> str:
    verdict = f'<span class="v {row.verdict}">{row.verdict}</span> <span class="why">{escape(row.reason)}</span>'
    if row.diff is None:
        empty = "<td class=n>–</td>" * (len(COLUMNS) - 2)
        return f"<tr><td>{escape(row.scheme)}</td><td>{row.format}</td>{empty}<td class=verdict>{verdict}</td></tr>"
    bar = f'<div class="bar"><i style="width:{row.size_bytes / largest * 100:.1f}%"></i></div>'
    cells = [
        f"{row.size_bytes / 1e6:.1f} MB, {row.size_ratio:.1%}{bar}",
        f"{row.peak_memory_bytes / 1e6:.0f} MB",
        f"{1 / row.rtf:.1f}",
        f"{row.speedup:.2f}",
        f"{row.diff.agreement:.2%}",
        f"{row.diff.kl:.4f}",
    ]
    if row.error_rates and row.error_rate_change:
        low, high = row.error_rates.wer_interval
        cells += [
            f'{row.error_rates.wer * 100:.1f} <span class="why">{low * 100:.1f}–{high * 100:.1f}</span>',
            f"{row.error_rates.cer * 100:.2f}",
            f'{row.error_rate_change.wer:+.1%} <span class="why">{_span(row.error_rate_change.wer_interval)}</span>',
        ]
    else:
        cells += ["–"] * 3
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    return f"<tr><td>{escape(row.scheme)}</td><td>{row.format}</td>{numbers}<td class=verdict>{verdict}</td></tr>"


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.1%} to {interval[1]:+.1%}"


def _groups(report: QuantReport) -> str:
    rows = [
        f"<tr><td>{escape(row.scheme)}</td><td>{row.format}</td><td>{escape(value or '–')}</td>"
        f"<td class=n>{group.error_rates.wer * 100:.1f}</td><td class=n>{group.error_rates.cer * 100:.2f}</td>"
        f"<td class=n>{group.error_rate_change.wer:+.1%} "
        f"<span class=why>{_span(group.error_rate_change.wer_interval)}</span></td>"
        f"<td class=n>{group.error_rates.num_words}</td></tr>"
        for row in report.rows
        for value, group in row.by_group.items()
    ]
    head = "<tr><th>scheme<th>format<th>group<th>WER %<th>CER %<th>WER change<th>words</tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def _throughput(report: QuantReport) -> str:
    rows = [
        f"<tr><td>{escape(row.scheme)}</td><td>{row.format}</td><td class=n>{one.threads}</td>"
        f"<td class=n>{one.batch_size}</td><td class=n>{one.rtf:.4f}</td><td class=n>{1 / one.rtf:.1f}</td></tr>"
        for row in report.rows
        for one in row.throughput
    ]
    head = "<tr><th>scheme<th>format<th>threads<th>batch size<th>RTF<th>RTFx</tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
