"""The style sheet of a report."""

__all__ = ["STYLE"]

STYLE = """
:root {
  --page: #fbfbfa; --ink: #1d2128; --quiet: #5c6470; --line: #dcdfe4; --card: #fff;
  --before: #8a6d1f; --after: #1763b6; --gain: #146c3c; --loss: #a8321f; --new: #e2f1e7; --gone: #fae7e3;
  --matmul: #1763b6; --attention: #7a3fa0; --fused: #8b93a1; --other: #8a6d1f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171c; --ink: #e7e9ed; --quiet: #a3abb8; --line: #323841; --card: #1c2027;
    --before: #e0b84d; --after: #6fb1ff; --gain: #6fd39b; --loss: #ff9a86; --new: #15362360; --gone: #48211c80;
    --matmul: #6fb1ff; --attention: #cf9bf0; --fused: #7d8694; --other: #e0b84d;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .9rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.7rem 0 .5rem; }
h2 small, h3 small { font-weight: 400; color: var(--quiet); font-size: .95rem; }
p { margin: .4rem 0; }
code { font: .9em ui-monospace, monospace; overflow-wrap: break-word; }
.kicker { color: var(--quiet); font-weight: 600; letter-spacing: .02em; }
.quiet { color: var(--quiet); font-size: .92rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1rem; }
.card, .pass { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; }
.pass + .pass { margin-top: .8rem; }
.card h3, .pass h3 { margin: 0 0 .3rem; }
.big { font-size: 1.6rem; line-height: 1.3; }
.gain { color: var(--gain); font-weight: 600; }
.loss { color: var(--loss); font-weight: 600; }
.warning { border-left: 4px solid var(--loss); padding: .3rem .8rem; background: var(--card); }
.badge { font-size: .8rem; font-weight: 600; padding: .1rem .5rem; border-radius: 99px;
  border: 1px solid currentColor; }
.badge.exact { color: var(--gain); }
.badge.approximate { color: var(--loss); }
summary { cursor: pointer; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: .95rem; }
caption { text-align: left; color: var(--quiet); padding: .2rem 0 .4rem; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
thead th { color: var(--quiet); font-weight: 600; white-space: normal; vertical-align: bottom; }
thead th:first-child { text-align: left; }
tbody th { text-align: left; font-weight: 400; white-space: normal; min-width: 9rem; }
tbody th small { display: block; color: var(--quiet); }
.bars { width: 7rem; height: 14px; display: block; margin-left: auto; }
.bar.before { fill: var(--before); }
.bar.after { fill: var(--after); }
.plot { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.plot text { fill: var(--quiet); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--line); }
.roof { fill: none; stroke: var(--ink); stroke-width: 2; }
.roof.inner { stroke-dasharray: 6 5; stroke-width: 1.2; }
.dot { stroke-width: 2; }
.dot.before { fill: none; stroke: var(--before); }
.dot.after { fill: var(--after); stroke: var(--after); fill-opacity: .55; }
.key { display: inline-block; width: .85em; height: .85em; border-radius: 50%; margin-right: .35em; }
.key.before { border: 2px solid var(--before); }
.key.after { background: var(--after); }
.outline { color: var(--quiet); font: .9rem ui-monospace, monospace; overflow-wrap: anywhere; }
.layer { list-style: none; padding: 0; margin: .8rem 0; display: grid; gap: .35rem; }
.layer li { display: grid; grid-template-columns: 1fr 1fr; gap: .35rem 1rem; }
.heads { color: var(--quiet); font-size: .9rem; }
.kernel { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--fused); min-width: 0;
  border-radius: 6px; padding: .3rem .7rem; font-size: .92rem; overflow-wrap: anywhere; }
.kernel small { display: block; color: var(--quiet); }
.kernel.matmul { border-left-color: var(--matmul); }
.kernel.attention { border-left-color: var(--attention); }
.kernel.other { border-left-color: var(--other); }
.kernel.gone { background: var(--gone); }
.kernel.new { background: var(--new); }
@media (max-width: 40rem) {
  main { padding: 1.2rem .9rem 3rem; }
  h1 { font-size: 1.5rem; }
  table { font-size: .84rem; }
  th, td { padding: .34rem .35rem; }
  tbody th { min-width: 6.5rem; }
  .wide, .bars { display: none; }
  .layer li { grid-template-columns: 1fr; }
  .layer .heads, .same > :first-child, .empty { display: none; }
  .plot text { font-size: 20px; }
}
"""
