#include "io/report_parts.h"

namespace annulus {
namespace {

// Hues follow Okabe and Ito, darkened or lightened until text on paper reaches a contrast of 4.5
// and marks 3. Each activity has a texture of its own as well, so that no meaning rests on colour.
constexpr std::string_view kStyleSheet = R"css(
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f23;--quiet:#5b636b;--line:#d5d9dd;--wash:#f4f5f6;
--compute:#1f66ad;--on-compute:#fff;--mask:#3674b3;--wait:#b45f06;--wait-wash:#fbead2;--send:#00785a;
--pack:#7d4a8d;--pack-wash:#efe3f2;--good:#0b6b4f;--bad:#b3261e;}
@media screen and (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e4e7ea;--quiet:#a3abb3;--line:#353b41;
--wash:#1d2125;--compute:#6aaeee;--on-compute:#0b1016;--mask:#4684bf;--wait:#f0a94a;--wait-wash:#3d2c13;--send:#45cba2;
--pack:#cb9bd9;--pack-wash:#382741;--good:#5fd0a8;--bad:#ff9a90;}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%;text-size-adjust:100%}
main,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding:36px 0 4px}
h1{font-size:26px;line-height:1.25;font-weight:600;margin:0 0 10px;overflow-wrap:anywhere}
h2{font-size:17px;font-weight:600;margin:0 0 4px}
p{margin:0 0 12px;max-width:72ch;overflow-wrap:anywhere}
.lead{font-size:17px}
.note,figcaption{color:var(--quiet);font-size:14px;max-width:72ch}
section{padding:22px 0;border-top:1px solid var(--line);min-width:0}
figure{margin:12px 0 0}
figcaption{margin-top:8px}
.pair{display:flex;flex-wrap:wrap;column-gap:48px}
.pair>section{flex:1 1 320px}
.scroll{overflow-x:auto;overflow-y:hidden}
.chart{display:flex;width:max-content}
.chart>svg{flex:none;display:block}
.fluid{max-width:100%;height:auto}
.chart>.names{position:sticky;left:0;background:var(--paper)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:14px 16px;margin:20px 0 24px}
.facts>div{border-left:2px solid var(--line);padding-left:10px;min-width:0}
.facts dt{color:var(--quiet);font-size:13px}
.facts dd{margin:0;font-size:17px;line-height:1.35;overflow-wrap:anywhere}
.badge{display:inline-block;border:1.5px solid;border-radius:3px;padding:1px 9px;font-size:13px;font-weight:600;
letter-spacing:.04em}
.passed{color:var(--good)}.failed{color:var(--paper);background:var(--bad);border-color:var(--bad)}
.unchecked{color:var(--quiet);border-style:dashed}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:10px 0 0;padding:0;font-size:14px}
.legend svg{vertical-align:-1px;margin-right:3px}
table{border-collapse:separate;border-spacing:0;font-size:14px;margin:10px 0 4px}
caption{text-align:left;max-width:min(72ch,100vw - 36px);color:var(--quiet);padding-bottom:6px}
th,td{padding:4px 0 4px 22px;text-align:right;white-space:nowrap;font-weight:400}
th:first-child{padding-left:0;padding-right:4px;text-align:left;position:sticky;left:0;background:var(--paper)}
thead th{color:var(--quiet);font-size:13px;vertical-align:bottom;border-bottom:1px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--line)}
tfoot th,tfoot td{border-top:1px solid var(--ink);font-weight:600}
.words td,.words th{white-space:normal;text-align:left;overflow-wrap:anywhere}
.words th{min-width:8em;color:var(--quiet)}
.bar{display:inline-block;width:72px;height:9px;margin-left:10px;background:var(--wash);text-align:left;line-height:0;
vertical-align:0}
.bar i{display:inline-block;height:9px;background:var(--compute)}
dl.plan{display:grid;grid-template-columns:minmax(7em,max-content) 1fr;gap:5px 22px;margin:12px 0 0}
dl.plan dt{color:var(--quiet)}dl.plan dd{margin:0;overflow-wrap:anywhere}
ul.notes{margin:12px 0 0;padding-left:18px;max-width:80ch;overflow-wrap:anywhere}
details{margin-top:8px;font-size:14px}
summary{cursor:pointer;color:var(--quiet);width:max-content;max-width:100%}
summary:focus-visible{outline:2px solid var(--compute);outline-offset:2px}
footer{color:var(--quiet);font-size:13px;padding-top:14px;padding-bottom:40px}
.defs{position:absolute}
svg text{font-size:12px;fill:var(--ink)}
svg .quiet{fill:var(--quiet)}
svg .mid{text-anchor:middle}svg .end{text-anchor:end}
svg .on{fill:var(--on-compute);text-anchor:middle}svg .hint{pointer-events:none}
svg .small{font-size:11px}
.rule{stroke:var(--line);fill:none}.frame{stroke:var(--quiet);fill:none}
.cell{fill:var(--wash)}.cell-line{fill:none;stroke:var(--line)}.gauge{fill:var(--line)}
.compute{fill:var(--compute)}.wait{fill:url(#t-wait)}.pack{fill:url(#t-pack)}.plan-work{fill:url(#t-plan)}
.finish{fill:url(#t-finish)}.send{fill:var(--send)}.send-line{stroke:var(--send);stroke-width:1.5;fill:none}
.skip{fill:var(--paper);stroke:var(--ink);stroke-width:1.25}
.skipped{fill:url(#t-skip)}.other{fill:var(--quiet)}
.message{stroke:var(--send);fill:none;opacity:.75}
.owner-a{fill:var(--wash)}.owner-b{fill:var(--line)}
.owner-line{stroke:var(--quiet);stroke-opacity:.6;stroke-width:.75;fill:none}
.owner-over{stroke:var(--paper);stroke-opacity:.5;stroke-width:.75;fill:none}
.d1,.d2,.d3,.d4,.d5,.d6,.d7,.d8{fill:var(--mask);shape-rendering:crispEdges}
.d1{fill-opacity:.14}.d2{fill-opacity:.24}.d3{fill-opacity:.36}.d4{fill-opacity:.48}.d5{fill-opacity:.6}
.d6{fill-opacity:.72}.d7{fill-opacity:.86}
.ink-wait{fill:var(--wait)}.wash-wait{fill:var(--wait-wash)}.ink-pack{fill:var(--pack)}.wash-pack{fill:var(--pack-wash)}
.ink-quiet{fill:var(--quiet)}.ink-line{fill:var(--line)}.wash{fill:var(--wash)}
@media (max-width:600px){main,footer{padding:0 16px}header{padding-top:24px}.facts{grid-template-columns:1fr 1fr}
.facts dd{font-size:16px}.lead{font-size:16px}th,td{padding-left:16px}
dl.plan{grid-template-columns:1fr;gap:0}dl.plan dd{margin-bottom:8px}}
@media print{@page{margin:14mm}body{font-size:12px}main,footer{max-width:none;padding:0}.scroll{overflow:visible}
.chart{zoom:.62}.scroll>table{zoom:.8}figure,tr{break-inside:avoid}h2,section>p{break-after:avoid}
th:first-child{position:static}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}details:not([open]){display:none}}
)css";

constexpr std::string_view kPatterns =
    R"svg(<svg class="defs" width="0" height="0" aria-hidden="true"><defs>
<pattern id="t-wait" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<path class="wash-wait" d="M0 0h6v6h-6z"/><path class="ink-wait" d="M0 0h2.4v6h-2.4z"/></pattern>
<pattern id="t-pack" width="5" height="5" patternUnits="userSpaceOnUse">
<path class="wash-pack" d="M0 0h5v5h-5z"/>
<circle class="ink-pack" cx="1.5" cy="1.5" r="1.3"/><circle class="ink-pack" cx="4" cy="4" r="1.3"/></pattern>
<pattern id="t-finish" width="4" height="4" patternUnits="userSpaceOnUse">
<path class="wash" d="M0 0h4v4h-4z"/><path class="ink-quiet" d="M0 0h2.2v4h-2.2z"/></pattern>
<pattern id="t-plan" width="4" height="4" patternUnits="userSpaceOnUse">
<path class="wash" d="M0 0h4v4h-4z"/><path class="ink-quiet" d="M0 0h4v1.6h-4z"/></pattern>
<pattern id="t-skip" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">
<path class="ink-line" d="M0 0h1.4v6h-1.4z"/></pattern>
</defs></svg>
)svg";

}  // namespace

std::string_view style_sheet() { return kStyleSheet; }
std::string_view pattern_definitions() { return kPatterns; }

}  // namespace annulus
