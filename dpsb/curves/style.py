"""How the page of a sweep looks."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; }
body { font: 15.5px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c1f24; background: #fff;
  margin: 0 auto; padding: 40px 32px 72px; max-width: 880px; }
h1 { font-size: 27px; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 2px; }
h2 { font-size: 17px; margin: 34px 0 8px; }
.sub { color: #5b626c; margin: 0 0 18px; }
.lead { font-size: 18px; line-height: 1.5; margin: 0 0 20px; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif !important; }
figcaption { font-size: 13.5px; color: #5b626c; margin-top: 6px; }
.price { border-left: 5px solid #2e7d4f; background: #f2f8f4; padding: 14px 20px; margin: 26px 0 0; }
.price.none { border-color: #b03030; background: #fbf2f2; }
.price span { display: block; font-size: 13px; color: #5b626c; }
.price b { display: block; font-size: 27px; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 12px 6px 0; border-bottom: 1px solid #e6e8eb; }
th { font-weight: 600; color: #3a4048; } tr:first-child > th { border-bottom: 1.5px solid #8a8f98; }
table.facts tr > th { width: 200px; font-weight: 500; color: #5b626c; border-bottom: 1px solid #e6e8eb; }
td.number, th.number { text-align: right; white-space: nowrap; padding-right: 4px; padding-left: 12px; }
td { overflow-wrap: anywhere; } table.runs { font-size: 12.5px; } table.runs td, table.runs th { padding-right: 8px; }
table.bounds td:first-child { width: 130px; }
table.bounds th:last-child, table.bounds td:last-child { padding-left: 32px; }
ul { margin: 6px 0; padding-left: 20px; } li { margin: 3px 0; }
.reference { color: #6b7078; }
.small { color: #5b626c; font-size: 13px; } code { font: 12.5px ui-monospace, Menlo, Consolas, monospace; }
details { margin-top: 28px; } summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
@media print { body { padding: 0; } h2 { break-after: avoid; } figure, .price, table { break-inside: avoid; } }
"""
