// Charts of the last hour. Series differ by dash pattern and label as well as by colour; each chart has a table, too.

import uPlot from "./vendor/uPlot.js";
import { h, put, say, svg } from "./dom.js";
import { clock } from "./format.js";

const HOUR = 3600;
const GAP = 25; // seconds between two points, above which the line is interrupted
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];

/** Return a chart: `{element, legend, update(points, now)}`.
 *
 * `series`: [{label, color (a custom property), value(point), filled}]; `format` shows a value. */
export function chart(title, series, format, signal) {
  const place = h("div", { class: "chart", role: "img", "aria-label": `${title}, last hour` });
  const values = series.map(() => h("b", {}));
  const legend = h("ul", { class: "legend" }, series.map((one, index) => h("li", {}, key(one, index), one.label, values[index])));
  const body = h("tbody", {});
  const table = h("details", { class: "table" }, h("summary", {}, "As a table"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title} as a table` }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Time"), series.map((one) => h("th", { class: "num" }, one.label)))), body)));
  let plot = null, points = [], data = null;

  const write = (index) => {
    const point = points[index ?? points.length - 1];
    series.forEach((one, number) => say(values[number], point ? format(one.value(point)) : "–"));
  };
  const build = () => {
    plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: `11px ${color("--sans")}` };
    plot = new uPlot({
      width: Math.max(200, place.clientWidth), height: place.clientHeight, padding: [8, 18, 0, 0],
      legend: { show: false }, cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: true, range: () => [plotNow - HOUR, plotNow] }, y: { range: (_, __, high) => [0, high > 0 ? high * 1.12 : 1] } },
      axes: [{ ...axis, size: 26, space: 70, values: (_, splits) => splits.map((at) => clock(at).slice(-8, -3)) },
        { ...axis, size: 50, space: 34, values: (_, splits) => splits.map((value) => format(value)) }],
      series: [{}, ...series.map((one, index) => ({
        label: one.label, stroke: color(one.color), width: 1.6, dash: DASHES[index % DASHES.length], points: { show: false },
        fill: one.filled ? withAlpha(color(one.color), "1f") : undefined,
      }))],
      hooks: { setCursor: [(self) => write(self.cursor.idx === null || self.cursor.idx === undefined ? null : mapping[self.cursor.idx])] },
    }, data ?? [[], ...series.map(() => [])], place);
  };
  let plotNow = Date.now() / 1000, mapping = [];
  const update = (given, now) => {
    points = given;
    plotNow = now;
    const times = [], columns = series.map(() => []);
    mapping = [];
    points.forEach((point, index) => {
      const before = points[index - 1];
      if (before && point.at - before.at > Math.max(GAP, point.seconds * 1.5)) { times.push(before.at + 1); columns.forEach((one) => one.push(null)); mapping.push(index - 1); }
      times.push(point.at);
      mapping.push(index);
      series.forEach((one, number) => columns[number].push(one.value(point)));
    });
    data = [times, ...columns];
    if (plot) plot.setData(data); else build();
    write(null);
    if (table.open) list();
  };
  const list = () => put(body, points.slice(-60).reverse().map((point) => h("tr", {}, h("td", {}, h("time", {}, clock(point.at))), series.map((one) => h("td", { class: "num" }, format(one.value(point)))))));
  table.addEventListener("toggle", () => { if (table.open) list(); });
  const sizes = new ResizeObserver(() => plot?.setSize({ width: place.clientWidth, height: place.clientHeight }));
  sizes.observe(place);
  addEventListener("theme", () => plot && build(), { signal });
  signal.addEventListener("abort", () => { sizes.disconnect(); plot?.destroy(); });
  return { element: h("div", {}, place, table), legend, update };
}

function key(one, index) {
  return svg("svg", { width: 22, height: 8, "aria-hidden": "true" },
    svg("line", { x1: 0, y1: 4, x2: 22, y2: 4, "stroke-width": 2.4, "stroke-dasharray": DASHES[index % DASHES.length].join(" ") || null, style: { stroke: `var(${one.color})` } }));
}

function withAlpha(color, alpha) {
  return /^#[0-9a-f]{6}$/i.test(color) ? color + alpha : undefined;
}
