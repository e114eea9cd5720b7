// Upstreams: targets, the circuit breaker as a state machine, its transitions, and the modes that operators set.

import { call, segment } from "../api.js";
import { action, curlOf, failure, field } from "../controls.js";
import { arrange, badge, h, list, put, say, svg } from "../dom.js";
import { clock, duration, milliseconds, number, percent, plural, seconds } from "../format.js";
import { stream, watch } from "../stream.js";

const KINDS = { pass: "ok", warn: "warn", fail: "fail" };
const WORDS = { pass: "Serving", warn: "Degraded", fail: "Failing" };
const STATES = { CLOSED: ["ok", "closed"], OPEN: ["fail", "open"], HALF_OPEN: ["warn", "half-open"] };
const MODES = { auto: "auto", observe: "observe", forced_open: "forced open", forced_closed: "forced closed" };
const GRAVITY = { fail: 0, warn: 1, pass: 2 };

export function upstreams(main, argument, signal) {
  let selected = argument, detail = null;
  const rows = new Map();
  const filter = h("input", { type: "search", placeholder: "Filter by name or target", "aria-label": "Filter upstreams" });
  const only = h("select", { "aria-label": "Which upstreams" }, h("option", { value: "all" }, "All"), h("option", { value: "bad" }, "Not serving fully"));
  const count = h("span", { class: "muted small" });
  const body = h("tbody", {});
  const place = h("div", { class: "stack" });
  const split = h("div", { class: "split" },
    h("section", { class: "panel list", "aria-label": "Upstreams" }, h("div", { class: "row" }, filter, only),
      h("div", { class: "table-fixed" }, h("table", {},
        h("thead", {}, h("tr", {}, h("th", {}, "State"), h("th", {}, "Upstream"), h("th", { class: "num" }, "Targets"), h("th", { class: "num" }, "In flight"), h("th", { class: "num narrow-off" }, "p50"), h("th", { class: "num narrow-off" }, "p99"), h("th", { class: "narrow-off" }, "Breaker"))), body))),
    place);
  put(main, h("div", { class: "head" }, h("h1", {}, "Upstreams"), count), split);

  const make = (name) => {
    const cells = { state: h("td", {}), targets: h("td", { class: "num" }), flight: h("td", { class: "num" }), p50: h("td", { class: "num narrow-off" }), p99: h("td", { class: "num narrow-off" }), breaker: h("td", { class: "narrow-off" }) };
    const element = h("tr", {}, cells.state, h("td", { class: "key" }, h("a", { href: `#/upstreams/${segment(name)}`, title: name }, name)), cells.targets, cells.flight, cells.p50, cells.p99, cells.breaker);
    return { element, cells, text: "" };
  };
  const write = (row, one) => {
    const serving = one.targets.filter((target) => target.healthy !== false && !target.ejected).length;
    list(row.cells.state, [one.status], String, (status) => badge(KINDS[status], WORDS[status]));
    say(row.cells.targets, `${serving}/${one.targets.length}`);
    say(row.cells.flight, one.limit === null ? number(one.in_flight) : `${number(one.in_flight)}/${number(one.limit)}`);
    say(row.cells.p50, milliseconds(one.p50));
    say(row.cells.p99, milliseconds(one.p99));
    list(row.cells.breaker, [[one.breaker.state, one.breaker.mode]], () => "", () => stateWord(one.breaker));
    row.text = [one.name, ...one.targets.map((target) => target.key)].join("\n").toLowerCase();
    row.status = one.status;
  };
  const isShown = (row) => row.text.includes(filter.value.trim().toLowerCase()) && (only.value === "all" || row.status !== "pass");
  const sort = () => {
    const order = [...rows].sort(([one, row], [other, next]) => GRAVITY[row.status] - GRAVITY[next.status] || one.localeCompare(other, "en", { numeric: true }));
    for (const [, row] of order) row.element.hidden = !isShown(row);
    arrange(body, order.map(([, row]) => row.element));
    const shown = order.filter(([, row]) => !row.element.hidden).length;
    say(count, shown === rows.size ? `${rows.size}` : `${shown} of ${rows.size}`);
  };
  let isArranged = false;
  const update = () => {
    let mustArrange = !isArranged;
    const names = isArranged ? stream.changed : stream.upstreams.keys();
    for (const name of names) {
      const one = stream.upstreams.get(name);
      if (!one) { rows.delete(name); mustArrange = true; continue; }
      let row = rows.get(name);
      if (!row) { row = make(name); rows.set(name, row); mustArrange = true; }
      const was = row.status;
      write(row, one);
      if (was !== row.status) mustArrange = true;
    }
    isArranged = true;
    if (mustArrange) sort();
    if (!selected && rows.size && !detail && matchMedia("(min-width: 1081px)").matches) select(body.querySelector("tr:not([hidden]) a")?.title ?? "", false);
    mark();
    detail?.update();
  };
  const mark = () => { for (const [name, row] of rows) row.element.classList.toggle("chosen", name === selected); };
  const select = (name, isChosen = true) => {
    selected = name;
    split.classList.toggle("opened", Boolean(name) && isChosen);
    detail?.abort.abort();
    detail = null;
    put(place);
    if (name) detail = detailOf(place, name);
    mark();
    detail?.update();
  };
  filter.addEventListener("input", sort);
  only.addEventListener("change", sort);
  signal.addEventListener("abort", () => detail?.abort.abort());
  if (argument) select(argument);
  watch(signal, update);
  return { select };
}

function stateWord(breaker) {
  const [kind, word] = STATES[breaker.state];
  if (breaker.mode === "forced_open") return badge("fail", "forced open");
  if (breaker.mode === "forced_closed") return badge("warn", "forced closed");
  return [badge(kind, word), breaker.mode === "observe" ? [" ", h("span", { class: "tag" }, "observe")] : ""];
}

function detailOf(place, name) {
  const abort = new AbortController();
  const status = h("span", {}), facts = h("dl", { class: "facts" }), mode = h("div", {}), machine = h("div", {}), targets = h("tbody", {}), names = h("div", {});
  const transitions = h("ol", { class: "transitions" }), latency = h("span", { class: "muted small push" });
  const path = `/circuit-breakers/${segment(name)}`;
  const change = (label, value, text, danger = false) => action(label, {
    title: `${label}: ${name}`, text, danger, confirm: label,
    fields: () => value === "auto" ? [] : [
      field("For how long", { options: [["600", "10 minutes"], ["3600", "1 hour"], ["28800", "8 hours"], ["86400", "1 day"], ["", "Until it is changed"]], value: "600" }),
      field("Comment, for other operators", { placeholder: "the database is being moved" })],
    request: (fields) => ({ method: "POST", path, body: value === "auto" ? { mode: "auto" } : { mode: value, duration_seconds: fields[0].value ? Number(fields[0].value) : null, comment: fields[1].value } }),
  });
  put(place,
    h("div", { class: "head" }, h("a", { class: "back", href: "#/upstreams" }, "‹ All upstreams"), h("h1", {}, name), status),
    h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Circuit breaker"), h("span", { class: "push" }, mode)), machine, facts,
      h("div", { class: "actions spaced" },
        change("Force open", "forced_open", "All requests to this upstream are refused until the end of this mode.", true),
        change("Force closed", "forced_closed", "All requests are admitted, whatever fails. Nothing protects the upstream.", true),
        change("Observe", "observe", "The breaker counts calls and changes its state, but rejects no request."),
        change("Return to auto", "auto", "The mode that an operator has set ends; the breaker acts by its state."))),
    h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Targets"), latency), h("div", { class: "scroll wide", tabindex: 0, role: "region", "aria-label": "Targets" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, "Target"), h("th", {}, "State"), h("th", { class: "num" }, "In flight"), h("th", { class: "num", title: "Mean time to the head of the last responses" }, "Responds in"), h("th", { class: "num narrow-off" }, "Share"), h("th", { class: "num" }, "Ejections"), h("th", { class: "num" }, "Check took"), h("th", { class: "narrow-off" }, "Last check"))), targets)), names),
    h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Last transitions")), transitions, curlOf("GET", `${path}/history`)));

  let loaded = null, known = []; // transitions
  const load = async (key) => {
    loaded = key;
    try {
      const { history } = await call("GET", `${path}/history`, undefined, { signal: abort.signal });
      known = history.slice(0, 30).map((one) => known.find((other) => isSame(one, other)) ?? one);
      list(transitions, known.length ? known : [null], transitionKey, (one) => (one ? transition(one) : h("li", { class: "empty" }, "None since the start.")));
      lastTransition = history.find((one) => one.target_url === null) ?? null;
      draw(true);
    } catch (error) {
      if (error.name !== "AbortError") put(transitions, h("li", {}, failure(error)));
    }
  };
  let lastTransition = null, drawn = "";
  const draw = (isForced = false) => {
    const one = stream.upstreams.get(name);
    if (!one) return;
    const key = JSON.stringify([one.breaker.state, one.breaker.mode, one.breaker.workers]);
    if (key === drawn && !isForced) return;
    drawn = key;
    put(machine, stateMachine(one.breaker, lastTransition));
  };
  const update = () => {
    const one = stream.upstreams.get(name);
    if (!one) { put(status, badge("none", "not configured")); return; }
    const breaker = one.breaker, policy = breaker.policy, now = stream.now();
    list(status, [one.status], String, (word) => badge(KINDS[word], WORDS[word]));
    list(mode, [breaker.mode], String, (word) => h("span", { class: "tag" }, `mode: ${MODES[word]}`));
    say(latency, `${number(one.calls)} calls in the last minute · p50 ${milliseconds(one.p50)} · p90 ${milliseconds(one.p90)} · p99 ${milliseconds(one.p99)}`);
    const rows = [["Since", `${clock(breaker.since)} (${duration(now - breaker.since)})`],
      ["Consecutive failures", `${breaker.consecutive_failures} of ${policy.failure_threshold}`],
      ["Failed in the window", breaker.window_calls ? `${breaker.window_failures} of ${breaker.window_calls} calls, ${percent(breaker.window_failures, breaker.window_calls)}; opens at ${percent(policy.failure_rate, 1)} of at least ${policy.minimum_calls}` : `no calls; opens at ${percent(policy.failure_rate, 1)} of at least ${policy.minimum_calls}`]];
    if (policy.slow_call_duration !== null) rows.push(["Slow in the window", `${breaker.window_slow}; slow is ${duration(policy.slow_call_duration)} or longer, opens at ${percent(policy.slow_call_rate, 1)}`]);
    if (breaker.state === "OPEN" && breaker.next_probe_at) rows.push(["Next probe", `in ${duration(breaker.next_probe_at - now)}`]);
    if (breaker.probes_in_flight) rows.push(["Probes in flight", String(breaker.probes_in_flight)]);
    if (breaker.ramp_share !== null) rows.push(["Ramp after recovery", `admits ${percent(breaker.ramp_share, 1)} of the former rate`]);
    if (breaker.opened_at) rows.push(["Last opened", `${clock(breaker.opened_at)}: ${breaker.opened_cause}`]);
    rows.push(["Since the start", `opened ${plural(breaker.opened_total, "time")}, refused ${plural(breaker.rejected_total, "request")}`]);
    if (Object.keys(breaker.workers).length > 1) rows.push(["By worker", Object.entries(breaker.workers).map(([worker, state]) => `${worker}: ${STATES[state][1]}`).join(", ")]);
    const override = one.override;
    if (override) rows.unshift(["Set by", `${override.set_by}, ${override.until ? `until ${clock(override.until)} (${duration(override.until - now)} left)` : "until it is changed"}${override.comment ? `: ${override.comment}` : ""}`]);
    list(facts, rows, ([label]) => label, ([label, text]) => [h("dt", {}, label), h("dd", {}, text)]);
    draw();
    list(targets, one.targets, (each) => each.key, target);
    list(names, one.names, (host) => `${host.host}:${host.port}`, (host) => h("p", { class: "small muted wrap" }, `${host.host}:${host.port} resolves to ${host.addresses.join(", ") || "nothing yet"}${host.error ? `; the last query failed: ${host.error}` : ""}`));
    const history = JSON.stringify([breaker.state, breaker.opened_total, one.targets.map((each) => [each.breaker, each.ejections])]);
    if (history !== loaded) load(history);
  };
  return { abort, update };
}

function target(one) {
  let [kind, word] = ["ok", "serving"];
  let more = null;
  if (one.ejected) { [kind, word] = ["warn", "ejected"]; more = `${one.cause}${one.next_probe_at ? `; next probe at ${clock(one.next_probe_at)}` : ""}`; }
  else if (one.healthy === false) { [kind, word] = ["fail", "unhealthy"]; more = one.check_error; }
  else if (one.share < 1) { [kind, word] = ["warn", "slow start"]; }
  return h("tr", {}, h("td", { class: "wrap" }, one.key, more && h("div", { class: "small muted" }, more)), h("td", {}, badge(kind, word)), h("td", { class: "num" }, number(one.in_flight)),
    h("td", { class: "num" }, milliseconds(one.response_ms)), h("td", { class: "num narrow-off" }, percent(one.share, 1)), h("td", { class: "num" }, number(one.ejections)), h("td", { class: "num" }, milliseconds(one.check_ms)), h("td", { class: "narrow-off wrap" }, one.checked ?? "not checked"));
}

/** Tell whether two responses mean the same transition: its time is that of two clocks, so it differs by a little. */
function isSame(one, other) {
  return ["from", "to", "target_url", "worker"].every((name) => one[name] === other[name]) && Math.abs(seconds(one.at) - seconds(other.at)) < 0.05;
}

function transitionKey(one) {
  return one ? `${STATES[one.from][1]} to ${STATES[one.to][1]} at ${one.at}${one.target_url ? ` of ${one.target_url}` : ""}${one.worker ? ` in worker ${one.worker}` : ""}` : "";
}

function transition(one) {
  const states = h("b", {}, `${STATES[one.from][1]} → ${STATES[one.to][1]}`);
  const counts = `${one.window_failures} of ${one.window_calls} calls in the window had failed${one.window_slow_calls ? `, ${one.window_slow_calls} were slow` : ""}`;
  return h("li", {},
    h("div", { class: "what" }, badge(STATES[one.to][0], ""), states, one.target_url && h("span", { class: "tag wrap" }, one.target_url), one.worker && h("span", { class: "tag" }, `worker ${one.worker}`), h("time", { datetime: one.at }, clock(one.at))),
    h("p", { class: "small wrap" }, one.detail, h("span", { class: "muted" }, ` · ${counts}`)),
    one.last_failures.length > 0 && h("details", { class: "small" }, h("summary", {}, `${one.last_failures.length} calls that failed before`),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Failed calls before ${transitionKey(one)}` }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Time"), h("th", {}, "Failure"), h("th", {}, "Route"), h("th", { class: "num" }, "Took"), h("th", {}, "Request"))),
        h("tbody", {}, one.last_failures.map((call) => h("tr", {}, h("td", {}, h("time", {}, clock(call.at))), h("td", { class: "wrap" }, call.detail), h("td", {}, call.route ?? "–"), h("td", { class: "num" }, call.duration_seconds === null ? "–" : milliseconds(call.duration_seconds * 1000)),
          h("td", { class: "wrap" }, call.request_id ? h("a", { href: `#/explain/${segment(call.request_id)}` }, call.request_id) : "–"))))))));
}

function stateMachine(breaker, last) {
  const isLast = (from, to) => last !== null && last.from === from && last.to === to;
  const box = (x, y, state, word, sub) => svg("g", { class: `state${breaker.state === state ? ` now ${STATES[state][0]}` : ""}` },
    svg("rect", { x: x - 74, y: y - 25, width: 148, height: 50, rx: 8 }), svg("text", { x, y: y - 2 }, word), svg("text", { class: "sub", x, y: y + 15 }, sub));
  const arrow = (from, to, d, x, y, label) => [
    svg("path", { class: isLast(from, to) ? "last" : null, d, "marker-end": "url(#head)" }),
    svg("text", { class: `label${isLast(from, to) ? " last" : ""}`, x, y }, label)];
  const word = STATES[breaker.state][1];
  const label = `The breaker is ${word}${breaker.mode === "auto" ? "" : `, its mode is ${MODES[breaker.mode]}`}.${last ? ` Last transition: ${STATES[last.from][1]} to ${STATES[last.to][1]}, ${last.detail}.` : ""}`;
  const now = (state, text) => (breaker.state === state ? `since ${clock(breaker.since)}` : text);
  return svg("svg", { class: "machine", viewBox: "0 0 500 222", role: "img", "aria-label": label },
    svg("defs", {}, svg("marker", { id: "head", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse" }, svg("path", { d: "M0 0 8 4 0 8z" }))),
    arrow("CLOSED", "OPEN", "M154 46 C 210 26, 290 26, 346 46", 250, 22, "threshold reached"),
    arrow("OPEN", "HALF_OPEN", "M438 85 C 434 140, 390 182, 326 188", 446, 160, "timeout over"),
    arrow("HALF_OPEN", "OPEN", "M282 159 C 294 122, 326 92, 376 86", 262, 116, "probe failed"),
    arrow("HALF_OPEN", "CLOSED", "M174 188 C 110 182, 66 140, 62 85", 58, 160, "probes passed"),
    box(80, 58, "CLOSED", "Closed", now("CLOSED", "admits all")), box(420, 58, "OPEN", "Open", now("OPEN", "refuses all")), box(250, 188, "HALF_OPEN", "Half-open", now("HALF_OPEN", "admits probes")));
}
