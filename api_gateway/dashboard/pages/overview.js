// What happens now, what is wrong, and the last hour.

import { chart } from "../charts.js";
import { badge, h, list, put, say } from "../dom.js";
import { latency, milliseconds, number, percent } from "../format.js";
import { stream, watch } from "../stream.js";

const SHOWN = 5; // problems, until all are asked for
const COLORS = ["--s1", "--s2", "--s4", "--s5", "--s3", "--s6", "--s7"];

export function overview(main, _, signal) {
  const figure = (label) => {
    const value = h("span", {}), unit = h("small", {}), note = h("dd", { class: "note" });
    return { element: h("div", {}, h("dt", {}, label), h("dd", {}, value, unit), note), set: (text, units = "", more = "") => { say(value, text); say(unit, units); say(note, more); } };
  };
  const figures = Object.fromEntries(["Requests", "Refused", "Errors", "p50", "p90", "p99", "In flight"].map((one) => [one, figure(one)]));
  const rate = (name) => (point) => point[name] / point.seconds;
  const traffic = chart("Requests per second", [
    { label: "requests", color: "--s1", value: rate("requests"), filled: true },
    { label: "refused", color: "--s2", value: rate("refused") },
    { label: "errors", color: "--s3", value: rate("errors") },
  ], (value) => number(value), signal);
  const times = chart("Latency", [
    { label: "p50", color: "--s4", value: (point) => point.p50 },
    { label: "p90", color: "--s1", value: (point) => point.p90 },
    { label: "p99", color: "--s5", value: (point) => point.p99 },
  ], (value) => milliseconds(value), signal);
  const count = h("span", {}), problems = h("ul", { class: "problems" });
  let isWhole = false;
  const whole = h("button", { type: "button", class: "quiet", onclick: () => { isWhole = !isWhole; show(); } });
  const share = h("div", { class: "share", "aria-hidden": "true" }), tiers = h("div", { class: "bars" }), kinds = h("div", { class: "bars" });
  const status = h("span", {});

  put(main, h("div", { class: "head" }, h("h1", {}, "Overview"), status),
    h("div", { class: "stack" },
      h("dl", { class: "figures", "aria-label": "Figures of the last minute" }, Object.values(figures).map((one) => one.element)),
      h("section", { class: "panel", "aria-labelledby": "wrong" }, h("header", {}, h("h2", { id: "wrong" }, "What is wrong now"), count), problems, whole),
      h("div", { class: "columns" },
        h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Requests per second"), h("span", { class: "push" }, traffic.legend)), traffic.element),
        h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Latency"), h("span", { class: "push" }, times.legend)), times.element)),
      h("div", { class: "columns" },
        h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Requests by tier"), h("span", { class: "muted small push" }, "last hour")), share, tiers),
        h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Refusals and errors by reason"), h("span", { class: "muted small push" }, "last hour")), kinds))));

  let drawn = null, said = null;
  const update = () => {
    const now = stream.overview;
    const words = { pass: ["ok", "Nothing is wrong"], warn: ["warn", "Something needs attention"], fail: ["fail", "Something is failing"] };
    list(status, [words[now.status]], String, (one) => badge(...one));
    figures.Requests.set(number(now.requests_per_second), "/s", `${number(now.total)} since the start`);
    figures.Refused.set(percent(now.limited, now.requests), "", `${number(now.limited)} by rate limits`);
    figures.Errors.set(percent(now.errors, now.requests), "", `${number(now.errors)} with status 5xx`);
    for (const name of ["p50", "p90", "p99"]) figures[name].set(...latency(now[name]), "last minute");
    figures["In flight"].set(number(now.in_flight), "", `${now.workers} ${now.workers === 1 ? "worker" : "workers"}${now.workers === 1 && now.processes > 1 ? `; the store had ${number(now.processes)} gateway processes, each with a view of its own` : ""}`);
    if (stream.problems !== said) { said = stream.problems; show(); }
    const last = stream.points.at(-1)?.at;
    if (last !== drawn || !drawn) { drawn = last ?? null; draw(); }
  };
  const show = () => {
    const found = stream.problems;
    put(count, found.length ? h("span", { class: "muted small" }, String(found.length)) : "");
    whole.hidden = found.length <= SHOWN;
    say(whole, isWhole ? "Show fewer" : `Show all ${found.length}`);
    list(problems, found.length ? found.slice(0, isWhole ? found.length : SHOWN) : [null], (one) => (one ? `${one.link} ${one.text.replace(/[\d.]+/g, "#")}` : ""), (one) => (one
      ? h("li", {}, h("a", { href: one.link }, badge(one.severity, one.severity === "fail" ? "Failing" : "Warning"), h("span", {}, one.text)))
      : h("li", { class: "row" }, badge("ok", "Nothing"), h("span", { class: "muted" }, "Every breaker is closed, every target in rotation, and no share of refusals or errors is high."))));
  };
  const draw = () => {
    const points = stream.points;
    traffic.update(points, stream.now());
    times.update(points, stream.now());
    const byTier = sums(points, "tiers"), total = byTier.reduce((sum, [, one]) => sum + one, 0);
    put(share, byTier.map(([, one], index) => h("i", { style: { flex: String(one), background: `var(${COLORS[index % COLORS.length]})` } })));
    put(tiers, byTier.length ? byTier.map(([name, one], index) => [
      h("span", { title: name }, name === "_none" ? "not identified" : name),
      h("span", { class: "bar" }, h("i", { style: { width: `${(one / total) * 100}%`, background: `var(${COLORS[index % COLORS.length]})` } })),
      h("span", {}, `${percent(one, total)}  `, h("span", { class: "muted" }, number(one)))]) : h("p", { class: "empty" }, "No requests in the last hour."));
    const byKind = sums(points, "kinds"), most = byKind[0]?.[1] ?? 1;
    put(kinds, byKind.length ? byKind.slice(0, 12).map(([name, one]) => [
      h("span", { class: "mono", title: name }, name),
      h("span", { class: "bar" }, h("i", { class: stream.hello.refusals.includes(name) ? "warn" : "fail", style: { width: `${(one / most) * 100}%` } })),
      h("span", {}, number(one))]) : h("p", { class: "empty" }, "No refusals and no errors in the last hour."));
  };
  watch(signal, update);
  return {};
}

function sums(points, name) {
  const found = new Map();
  for (const point of points) for (const [key, count] of Object.entries(point[name])) found.set(key, (found.get(key) ?? 0) + count);
  return [...found].sort((one, other) => other[1] - one[1]);
}
