"""The style sheet of a report: light and dark, any width, print."""

from __future__ import annotations

__all__ = ["STYLE"]

# Text on its background has a contrast of 4.5 or more, lines and areas 3 or more. The six colours of triplets differ in
# lightness too, and numbers or names stand beside them everywhere.
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f4f0; --panel: #ffffff; --ink: #1d2129; --soft: #586070; --rule: #dcdad3; --track: #eceae4;
  --fact: #1f64a8; --emotion: #a8326f; --time: #6a6f7c; --note: #fff3d1; --note-edge: #a06800; --on: #ffffff;
  --t1: #1f64a8; --t2: #b3480f; --t3: #17735a; --t4: #7b3f9d; --t5: #7d6200; --t6: #a8324a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14161b; --panel: #1d2027; --ink: #e8e9ed; --soft: #a4abb8; --rule: #353a45; --track: #2b2f39;
    --fact: #6cb2f0; --emotion: #f08abb; --time: #959cab; --note: #35290f; --note-edge: #e0a93a; --on: #14161b;
    --t1: #6cb2f0; --t2: #f2985f; --t3: #55c5a1; --t4: #cf9bea; --t5: #dcc04e; --t6: #f28b9d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 2rem clamp(.75rem, 3vw, 2.5rem); max-width: 70rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
h1, h2, h3, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
ul, ol { list-style: none; }
a { color: var(--fact); text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 3px solid var(--fact); outline-offset: 2px; border-radius: 2px;
}
.top h1 { font-size: 1.05rem; letter-spacing: .01em; }
.top p, footer p { color: var(--soft); font-size: .875rem; }
footer { margin-top: 2.5rem; max-width: 46rem; }

.notes {
  margin: 1rem 0 0; padding: .7rem 1rem; display: flex; gap: .9rem; align-items: baseline;
  background: var(--note); border: 1px solid var(--note-edge); border-left-width: .4rem; border-radius: .4rem;
}
.notes strong { flex: none; }
.notes li + li { margin-top: .25rem; }

#videos { width: 100%; margin: 1.5rem 0 0; border-collapse: collapse; background: var(--panel); border-radius: .6rem; }
#videos th, #videos td { padding: .55rem .75rem; text-align: left; vertical-align: middle; font-weight: 400; }
#videos thead th { color: var(--soft); font-size: .8125rem; vertical-align: bottom; }
#videos tbody tr { border-top: 1px solid var(--rule); }
#videos th[scope=row] { overflow-wrap: anywhere; min-width: 9rem; width: 20%; }
#videos small { display: block; color: var(--soft); }
#videos .said { font-family: Georgia, "Liberation Serif", "Times New Roman", serif; font-size: 1.0625rem; }
#videos .gate { font-variant-numeric: tabular-nums; text-align: right; }
#videos thead th:nth-last-child(-n+2) { text-align: right; }
#videos thead .over th { padding-bottom: 0; text-align: center; }
#videos .thumb { padding-right: 0; width: 5.5rem; }
#videos img {
  display: block; width: 4.75rem; height: auto; max-height: 4.75rem; object-fit: contain; border-radius: .25rem;
}
.narrow { display: none; }

.failed { margin-top: 1.5rem; font-size: .9375rem; }
.failed h2 { margin: 0; font: inherit; font-weight: 600; }
.failed li { margin-top: .4rem; overflow-wrap: anywhere; }

article { margin-top: 2.5rem; scroll-margin-top: 1rem; }
article + article, #videos + article, .failed + article { border-top: 1px solid var(--rule); padding-top: 2rem; }
.file { color: var(--soft); font-size: .875rem; display: flex; gap: .6rem; align-items: baseline; }
.file bdi { overflow-wrap: anywhere; }
.back { margin-left: auto; flex: none; }
.place { font-weight: 600; color: var(--ink); }
h2 {
  margin: .15rem 0 1.1rem;
  font: 400 clamp(1.6rem, 4.2vw, 2.5rem)/1.2 Georgia, "Liberation Serif", "Times New Roman", serif;
  text-wrap: balance; overflow-wrap: anywhere;
}
article > .notes { margin: 0 0 1.1rem; }
.frames { display: grid; grid-template-columns: repeat(8, 1fr); gap: .5rem .4rem; margin-bottom: 1rem; }
.frames img {
  display: block; width: 100%; height: auto; max-height: 8.5rem; object-fit: contain; object-position: left;
  border-radius: .25rem;
}
.frames figcaption { color: var(--soft); font-size: .75rem; font-variant-numeric: tabular-nums; margin-top: .1rem; }

.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.panel { background: var(--panel); border-radius: .6rem; padding: 1rem 1.15rem 1.15rem; margin-bottom: 1rem; }
.columns { margin-bottom: 1rem; }
.columns .panel { margin: 0; }
h3 { font-size: 1rem; line-height: 1.3; }
.hint { color: var(--soft); font-size: .8125rem; margin-top: .15rem; max-width: 58rem; }

.bars + .hint { margin-top: .6rem; }
.bars { margin-top: .7rem; display: grid; gap: .4rem; }
.bars li { display: grid; grid-template-columns: minmax(5.5rem, 9rem) 1fr 4.6rem; gap: .7rem; align-items: center; }
.bars b { font-weight: 500; overflow-wrap: anywhere; }
.bars small { color: var(--soft); font-size: .75rem; display: block; line-height: 1.2; }
.label { line-height: 1.25; font-size: .9375rem; }
.value { font-variant-numeric: tabular-nums; text-align: right; font-size: .875rem; }
.bar { width: 100%; height: .85rem; display: block; overflow: visible; }
.track { fill: var(--track); }
.fill { fill: var(--c, var(--time)); }
.emotion { --c: var(--emotion); }
.mark { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }

.gauges { display: flex; flex-wrap: wrap; justify-content: space-evenly; gap: .5rem; margin-top: .7rem; }
.gauge { width: 12.5rem; max-width: 48%; height: auto; }
.of-facts { --c: var(--fact); } .of-emotions { --c: var(--emotion); }
.gauge path { fill: none; stroke-width: 20; stroke: var(--track); }
.gauge .fill { stroke: var(--c); fill: none; }
.gauge line { stroke: var(--soft); stroke-width: 1.2; }
.gauge text { text-anchor: middle; fill: var(--ink); font-size: 15px; }
.gauge .reading { font-size: 32px; font-weight: 600; font-variant-numeric: tabular-nums; }
.gauge .tick { font-size: 11px; fill: var(--soft); dominant-baseline: middle; }

.t1 { --c: var(--t1); } .t2 { --c: var(--t2); } .t3 { --c: var(--t3); }
.t4 { --c: var(--t4); } .t5 { --c: var(--t5); } .t6 { --c: var(--t6); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18.5rem), 1fr)); gap: .9rem; }
.facts { margin-top: .9rem; }
.fact, .whole { border: 1px solid var(--rule); border-radius: .5rem; padding: .8rem .9rem; min-width: 0; }
.fact { border-top: 4px solid var(--c); display: flex; flex-direction: column; }
.fact .bars li { grid-template-columns: minmax(5rem, 6.5rem) 1fr 3.7rem; gap: .5rem; }
.quote { display: flex; gap: .55rem; align-items: baseline; line-height: 1.35; margin-bottom: .15rem; }
.quote q { overflow-wrap: anywhere; }
.triplet { margin-top: .5rem; }
.badge {
  flex: none; display: inline-block; min-width: 1.35rem; border-radius: .7rem; padding: 0 .3rem; text-align: center;
  background: var(--c); color: var(--on); font-size: .8125rem; font-weight: 600; line-height: 1.35rem;
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
.attended { margin-top: .6rem; font-size: .875rem; line-height: 1.35; }
.attended span { color: var(--soft); }
.fact dl { margin-top: auto; padding-top: .7rem; font-size: .8125rem; color: var(--soft); }
.fact dl div { display: flex; justify-content: space-between; gap: .8rem; }
.fact dd { color: var(--ink); font-variant-numeric: tabular-nums; flex: none; }
.whole figure { display: flex; flex-direction: column; gap: .7rem; align-items: center; }
.pie { width: 11rem; height: auto; }
.slice { fill: var(--c); stroke: var(--panel); stroke-width: 2.5; stroke-linejoin: round; }
.pie text { font-size: 17px; font-weight: 600; text-anchor: middle; dominant-baseline: central; fill: var(--ink); }
.pie .inside { fill: var(--on); }
.legend { width: 100%; display: grid; gap: .25rem; font-size: .875rem; }
.legend li { display: grid; grid-template-columns: auto 1fr auto; gap: .5rem; align-items: baseline; line-height: 1.3; }

.scroll { overflow-x: auto; margin-top: .7rem; }
.curves { display: block; width: 100%; min-width: 46rem; height: auto; }
.curves text { fill: var(--ink); font-size: 12.5px; }
.curves .title { font-weight: 600; fill: var(--c); }
.curves .scale { fill: var(--soft); text-anchor: end; dominant-baseline: central; font-size: 11px; }
.curves .word { text-anchor: end; dominant-baseline: central; }
.curves .axis { fill: var(--soft); text-anchor: middle; dominant-baseline: central; }
.curves .base { stroke: var(--soft); } .curves .grid { stroke: var(--rule); }
.curves .area { fill: var(--c); opacity: .16; }
.curves .curve { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; }
.curves .mean { fill: none; stroke: var(--soft); stroke-width: 1.4; stroke-dasharray: 5 4; }
.curves circle { fill: var(--c); }
.curves .peak {
  font-weight: 600; dominant-baseline: central; paint-order: stroke; stroke: var(--panel); stroke-width: 4px;
  stroke-linejoin: round;
}
.curves .late { text-anchor: end; }
details { margin-top: .6rem; font-size: .875rem; }
summary { cursor: pointer; color: var(--soft); }
.numbers { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { padding: .15rem .8rem .15rem 0; text-align: right; font-weight: 400; white-space: nowrap; }
.numbers th:first-child { text-align: left; }
.numbers thead th { color: var(--soft); vertical-align: bottom; white-space: normal; min-width: 6rem; }

@media (max-width: 44rem) {
  body { padding-top: 1.2rem; }
  .frames { grid-template-columns: repeat(4, 1fr); }
  .notes { flex-direction: column; gap: .2rem; }
  #videos thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  #videos, #videos tbody { display: block; }
  #videos tr { display: grid; grid-template-columns: auto 1fr auto; gap: .15rem .8rem; padding: .7rem .8rem; }
  #videos tbody th, #videos tbody td { padding: 0; display: block; text-align: left; grid-column: 2 / -1; }
  #videos .thumb { grid-column: 1; grid-row: 1 / span 4; width: auto; }
  #videos tbody .gate { grid-column: 2; text-align: left; }
  #videos tbody .gate + .gate { grid-column: 3; grid-row: 4; }
  #videos th[scope=row] { min-width: 0; width: auto; }
  .bars li { grid-template-columns: minmax(4.5rem, 6.5rem) 1fr 4.2rem; }
  .narrow { display: inline; color: var(--soft); }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  :root { --page: #ffffff; }
  @page { margin: 12mm; }
  html { font-size: 9.5pt; }
  body { padding: 0; max-width: none; }
  .facts { grid-template-columns: repeat(3, 1fr); }
  .fact .bars li { grid-template-columns: 5.4rem 1fr 3.4rem; }
  .facts, .columns { gap: .6rem; }
  .columns { margin-bottom: .7rem; }
  .panel { padding: .7rem .9rem; margin-bottom: .7rem; }
  .bars { gap: .25rem; }
  .back, details { display: none; }
  .panel { border: 1px solid var(--rule); }
  .panel, .fact, .whole, .frames, .columns, .notes, #videos tr { break-inside: avoid; }
  .panel:has(.facts) { break-inside: auto; }
  h2, h3, h3 + .hint { break-after: avoid; }
  #videos + article, .failed + article, article + article {
    break-before: page; border-top: 0; padding-top: 0; margin-top: 0;
  }
  .scroll { overflow: visible; }
  .curves { min-width: 0; width: 74%; margin: 0 auto; }
}
"""
