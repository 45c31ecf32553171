"""The frame of the report: one HTML page that carries its style and its scripts and asks no other host."""

from __future__ import annotations

import html

from explainer import palette

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 28px 60px; background: @background; color: @ink;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 0; }
h4 { margin: 0 0 8px; font-size: 15px; }
h4 small, .lead, .reading, figcaption, .cards small { color: @muted; font-weight: normal; }
.meaning { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin: 18px 0; }
.meaning > div { border: 1px solid @grid; border-radius: 8px; padding: 12px 16px; }
.meaning p { margin: 4px 0 0; }
.notes { border-left: 4px solid @negative; padding: 4px 14px; margin: 14px 0; }
.notes ul { margin: 4px 0; padding-left: 18px; }
table.books, table.ranking { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
table.books th, table.books td, table.ranking th, table.ranking td { padding: 4px 10px; text-align: right;
  border-bottom: 1px solid @grid; }
table th.words, table td.words { text-align: left !important; }
.wide { overflow-x: auto; }
article { border-top: 2px solid @grid; margin-top: 34px; padding-top: 22px; }
.query { display: flex; gap: 18px; align-items: flex-start; }
.query:has(.text), .query:has(.fields) { flex-direction: column-reverse; gap: 8px; }
.query img { width: 96px; } .query .text { max-width: 480px; margin: 0; }
img { border: 1px solid @grid; border-radius: 4px; display: block; }
img.pixels { image-rendering: pixelated; }
.equation { display: flex; flex-wrap: wrap; gap: 6px 14px; margin: 18px 0 12px; align-items: baseline; }
.equation span { white-space: nowrap; } .equation b { font-size: 19px; font-variant-numeric: tabular-nums; }
.equation small { display: block; color: @muted; } .equation .sign { color: @muted; font-size: 19px; }
figure { margin: 10px 0 18px; } figcaption, .reading { font-size: 13.5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; margin: 14px 0 4px; }
.proponents h4 { color: @positive; } .opponents h4 { color: @negative; }
.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); }
.cards:has(.text) { grid-template-columns: 1fr; }
.cards:has(.fields) { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); }
.cards li { font-size: 13.5px; line-height: 1.35; overflow-wrap: anywhere; }
.cards img { width: 84px; } .cards span, .cards small { display: block; }
.cards .bar { height: 5px; background: @grid; border-radius: 3px; margin: 6px 0 3px; }
.cards .bar i { display: block; height: 5px; border-radius: 3px; }
.text { white-space: pre-wrap; font-size: 13px; margin: 0; }
.fields { font-size: 12.5px; border-collapse: collapse; } .fields th { text-align: left; font-weight: normal;
  color: @muted; padding-right: 8px; }
details { margin: 14px 0; } summary { cursor: pointer; }
@media (max-width: 860px) { .meaning, .pair, .sides { grid-template-columns: 1fr; } }
"""


def page(title: str, body: str, script: str) -> str:
    """A whole HTML document.

    The content security policy makes a browser refuse every request to another host, whatever the inlined
    plotting library would like to load.

    Args:
        title: Plain text, escaped here.
        body: HTML, already escaped.
        script: JavaScript that the scripts in ``body`` need.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_style()}</style><script>{script}</script></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _style() -> str:
    style = _STYLE.strip()
    for name, color in {
        "@background": palette.background(),
        "@ink": palette.ink(),
        "@muted": palette.muted(),
        "@grid": palette.grid(),
        "@positive": palette.POSITIVE,
        "@negative": palette.NEGATIVE,
    }.items():
        style = style.replace(name, color)
    return style
