"""Looks and behaviour of ``report.html``: one style sheet and one small script, both inline in the page."""

STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1c2230;--soft:#5b6475;--line:#dfe3ea;--accent:#1f6feb;
--good:#1a7f4b;--look:#a86400;--bad:#c4281c;--good-bg:#e9f6ee;--look-bg:#fdf3e1;--bad-bg:#fdebe9;--code:#f0f2f6}
@media(prefers-color-scheme:dark){:root{--page:#0e1116;--card:#171b22;--ink:#e7eaf0;--soft:#9aa4b5;--line:#2a303b;
--accent:#6ea8ff;--good:#4cc38a;--look:#f0b354;--bad:#ff7a6e;--good-bg:#11261b;--look-bg:#2a2010;--bad-bg:#2e1614;
--code:#10141a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Liberation Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:25px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:0 0 4px}h3{font-size:15px;margin:18px 0 2px}
p{margin:0 0 10px}.soft{color:var(--soft)}.small{font-size:13px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:16px 0}
.names{display:grid;grid-template-columns:auto 1fr;gap:0 12px;margin-top:8px}.names dt{color:var(--soft)}
.names dd{margin:0;overflow-wrap:anywhere}
.verdict{border-left:6px solid}.verdict.good{border-left-color:var(--good)}
.verdict.look{border-left-color:var(--look)}
.verdict.bad{border-left-color:var(--bad)}.verdict h2{font-size:21px}.verdict.good h2{color:var(--good)}
.verdict.look h2{color:var(--look)}.verdict.bad h2{color:var(--bad)}
.checks{list-style:none;margin:10px 0 0;padding:0}.checks li{padding:5px 0 5px 30px;position:relative;
border-top:1px solid var(--line)}
.checks li::before{position:absolute;left:4px;font-weight:700}.checks .good::before{content:"\\2713";
color:var(--good)}
.checks .look::before{content:"!";color:var(--look);left:8px}.checks .bad::before{content:"\\2715";color:var(--bad)}
.checks .note::before{content:"i";color:var(--soft);left:9px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:16px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:22px;line-height:1.25;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);
font-size:13px}
.views{display:flex;gap:8px;margin:8px 0;align-items:stretch}
.pane{position:relative;background:#000;border-radius:6px;overflow:hidden;min-width:0}
.layer{position:absolute;inset:0;background-size:100% 100%;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.edge{position:absolute;color:#fff;font:600 12px/1 system-ui,"Liberation Sans",sans-serif;opacity:.85;
text-shadow:0 0 3px #000,0 0 3px #000}
.edge.t{top:5px;left:50%;transform:translateX(-50%)}.edge.b{bottom:5px;left:50%;transform:translateX(-50%)}
.edge.l{left:6px;top:50%;transform:translateY(-50%)}.edge.r{right:6px;top:50%;transform:translateY(-50%)}
.bar{display:flex;flex-wrap:wrap;gap:8px 16px;align-items:center;margin:10px 0 4px}
.choice{display:inline-flex;border:1px solid var(--line);border-radius:8px;overflow:hidden}
.choice button,.copy{border:0;background:transparent;color:var(--ink);font:inherit;font-size:14px;padding:5px 12px;
cursor:pointer}
.choice button+button{border-left:1px solid var(--line)}.choice button[aria-pressed=true]{background:var(--accent);
color:#fff}
@media(prefers-color-scheme:dark){.choice button[aria-pressed=true]{color:#0b1220}}
button:focus-visible,input:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
input[type=range]{width:220px;accent-color:var(--accent)}
.viewer .stage{visibility:hidden}.viewer[data-stage=before] .before,.viewer[data-stage=aligned] .aligned,
.viewer[data-stage=after] .after{visibility:visible}
.viewer[data-mode=slide] .stage{clip-path:inset(0 0 0 var(--cut))}
.viewer[data-mode=flicker].off .stage{opacity:0}
.viewer[data-mode=checker] .stage{-webkit-mask:conic-gradient(#000 25%,#0000 0 50%,#000 0 75%,#0000 0) 0 0/56px 56px;
mask:conic-gradient(#000 25%,#0000 0 50%,#000 0 75%,#0000 0) 0 0/56px 56px}
.viewer[data-lines=no] .outline{visibility:hidden}.viewer .cut{position:absolute;top:0;bottom:0;width:2px;
margin-left:-1px;left:var(--cut);background:#ffd23d;visibility:hidden}
.viewer[data-mode=slide] .cut{visibility:visible}.viewer:not([data-mode=slide]) .sliding{visibility:hidden}
.overview{display:grid;grid-template-columns:repeat(4,1fr);gap:8px;align-items:center}.overview .head{font-weight:600;
font-size:14px}
.legend{display:flex;align-items:center;gap:14px;flex-wrap:wrap;font-size:13px;color:var(--soft);margin:6px 0 2px}
.scale{display:inline-block;width:300px;max-width:100%}.scale i{display:block;height:12px;border-radius:3px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.scale span{display:flex;justify-content:space-between;font-variant-numeric:tabular-nums}
.chip{display:inline-block;width:12px;height:12px;border-radius:3px;vertical-align:-1px;margin-right:5px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.better{color:var(--good)}
td.worse{color:var(--bad)}
.meter{display:inline-block;height:8px;border-radius:4px;background:var(--accent);vertical-align:middle}
svg text{fill:var(--soft);font:12px system-ui,"Liberation Sans",sans-serif}svg .axis{stroke:var(--soft);
stroke-width:1}
pre{background:var(--code);border:1px solid var(--line);border-radius:8px;padding:12px;margin:6px 0;
white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.45 ui-monospace,Consolas,"Liberation Mono",monospace}
.copy{border:1px solid var(--line);border-radius:8px}.about{margin-top:12px}.bars{width:40%}
.light{display:inline-block;width:14px;height:14px;border-radius:50%;vertical-align:-2px;print-color-adjust:exact;
-webkit-print-color-adjust:exact;border:2px solid var(--soft)}.light.good{background:var(--good);\
border-color:var(--good)}
.light.look{background:var(--look);border-color:var(--look);border-radius:3px}.light.bad{background:var(--bad);
border-color:var(--bad);border-radius:0;transform:rotate(45deg)}
details{margin-top:8px}summary{cursor:pointer;color:var(--accent)}
@media(max-width:720px){.views{flex-direction:column}.overview{grid-template-columns:repeat(2,1fr)}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}.bar{display:none}}
"""

SCRIPT = """
const viewer=document.querySelector('.viewer');
function set(name,value){viewer.dataset[name]=value;
 viewer.querySelectorAll('[data-set='+name+']').forEach(b=>b.setAttribute('aria-pressed',b.dataset.to===value));}
viewer.addEventListener('click',e=>{const b=e.target.closest('[data-set]');
 if(b)set(b.dataset.set,b.dataset.set==='lines'?(viewer.dataset.lines==='yes'?'no':'yes'):b.dataset.to);});
const range=viewer.querySelector('input');
function cut(percent){range.value=percent;viewer.style.setProperty('--cut',percent+'%');}
range.addEventListener('input',()=>cut(range.value));
viewer.querySelectorAll('.pane').forEach(p=>p.addEventListener('pointermove',e=>{
 if(viewer.dataset.mode==='slide'){const r=p.getBoundingClientRect();cut(Math.round(100*(e.clientX-r.left)/r.width));}
}));
setInterval(()=>viewer.classList.toggle('off'),600);
document.querySelectorAll('.copy').forEach(b=>b.addEventListener('click',()=>{
 navigator.clipboard.writeText(document.getElementById(b.dataset.of).textContent).then(()=>{b.textContent='copied';});
}));
"""
