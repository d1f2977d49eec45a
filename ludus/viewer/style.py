"""The style sheet of every page."""

STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e3e7ee;--page:#f6f7f9;--card:#fff;--good:#177245;--bad:#b3261e;
--c0:#2f5fd0;--c1:#d9652b;--c2:#2b8a57;--c3:#8a4fc7;--c4:#b08900;--c5:#0f8b9d}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b5;--line:#2c3442;--page:#12161d;
--card:#1a202a;--good:#5ccf94;--bad:#ff8a80;--c0:#7aa2ff;--c1:#ff9a62;--c2:#66cf97;--c3:#c39bf5;--c4:#e0bc4a;
--c5:#56c8d8}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1040px;margin:0 auto;padding:0 24px}
header{padding-top:32px}
h1{font-size:26px;margin:0}
header p{color:var(--soft);margin:4px 0 0}
h2{font-size:18px;margin:0 0 14px}
h3{font-size:15px;margin:14px 0 6px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px;margin:20px 0}
section>p{color:var(--soft);margin:10px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500;font-size:13px}
.better{color:var(--good);font-weight:600}
.worse{color:var(--bad);font-weight:600}
figure{display:inline-block;width:calc(50% - 12px);margin:0 8px 18px 0;vertical-align:top}
@media (max-width:760px){figure{width:100%}}
figcaption{font-weight:600;font-size:14px;margin-bottom:4px}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:11px;font-family:inherit}
svg .grid{stroke:var(--line);stroke-width:1}
svg polyline{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
svg circle{fill:currentColor}
svg .alarm{fill:var(--bad)}
svg .bar{stroke:currentColor;stroke-width:1.5;opacity:.45}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}
.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.legend{font-size:12px}
.key{margin-right:14px}
.key::before{content:"";display:inline-block;width:10px;height:10px;border-radius:2px;background:currentColor;
margin-right:5px}
.move{display:inline-block;position:relative;min-width:150px;margin-right:12px;padding-bottom:4px}
.move i{position:absolute;left:0;bottom:0;height:3px;background:var(--c0);border-radius:2px}
.wide{overflow-x:auto}
.heat{width:auto}
.heat td{position:relative;z-index:0;padding:6px 12px;text-align:right;min-width:72px}
.heat i{position:absolute;inset:1px;z-index:-1}
.won{background:var(--c0)}
.lost{background:var(--c1)}
details{margin:8px 0}
summary{cursor:pointer}
section>details>summary{font-weight:600}
.turn{margin:10px 0;padding:8px 12px;border-left:3px solid var(--c0)}
.turn.seat1{border-color:var(--c1)}
.who,.turn summary{color:var(--soft);font-size:13px}
.action{font-weight:600}
.action::before{content:"\\2192\\00a0";color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--page);border-radius:6px;padding:10px 12px;
margin:6px 0;font:13px/1.45 ui-monospace,Menlo,Consolas,monospace}
.private{border:1px dashed var(--line)}
.tag{float:right;color:var(--soft);font-size:11px}
"""
