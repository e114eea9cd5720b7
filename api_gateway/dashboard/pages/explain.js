// What the gateway would do with a request and why, and what it has decided on one that it had.

import { ApiError, call, segment } from "../api.js";
import { curlBlock, curlOf, failure, field } from "../controls.js";
import { badge, h, put } from "../dom.js";
import { clock, duration, milliseconds, number, percent, plural, share } from "../format.js";

const METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"].map((one) => [one, one]);
const DECISIONS = { allowed: ["ok", "Allowed"], limited: ["fail", "Refused: a limit"], exceeds_capacity: ["fail", "Refused: costs more than the limit can hold"], refused: ["fail", "Refused"], fallback: ["warn", "The fallback would respond"] };

export function explain(main, argument, signal) {
  const path = field("Path and query", { value: "/api/", required: true, full: true });
  const method = field("Method", { options: METHODS, value: "GET" });
  const client = field("Client id", { placeholder: "none" });
  const key = field("API key id", { placeholder: "none" });
  const certificate = field("Name in the certificate", { placeholder: "uri=spiffe://acme/orders" });
  const address = field("Address of the peer", { value: "127.0.0.1" });
  const host = field("Host", { placeholder: "any" });
  const forwarded = field("Forwarded addresses", { placeholder: "203.0.113.9, 10.0.0.2" });
  const organisation = field("Organisation of the token", { placeholder: "none" });
  const claims = field("Claims of the token, one on a line", { type: "textarea", placeholder: "plan=gold", full: true });
  const headers = field("Header fields, one on a line", { type: "textarea", placeholder: "X-Tenant: acme", full: true });
  const command = curlBlock("POST", "/explain", {});
  const result = h("section", { class: "panel result", "aria-live": "polite" }, h("header", {}, h("h2", {}, "Order of decisions")), h("p", { class: "empty" }, "Describe a request. Nothing is charged, sent or changed."));
  const id = h("input", { type: "search", placeholder: "Request id, from X-Request-ID or the problem details", "aria-label": "Request id", autocomplete: "off", spellcheck: "false" });
  const found = h("div", { class: "stack", "aria-live": "polite" });

  const body = () => {
    const given = { client_id: client.value || null, method: method.value, path: path.value };
    if (key.value) given.key_id = key.value;
    const [kind, ...name] = certificate.value.split("=");
    if (kind.trim() && name.length) given.certificate = { [kind.trim()]: name.join("=").trim() };
    if (address.value) given.address = address.value;
    if (host.value) given.host = host.value;
    if (forwarded.value) given.forwarded = forwarded.value;
    if (organisation.value) given.organisation = organisation.value;
    const fields = pairs(headers.value, ":"), stated = pairs(claims.value, "=");
    if (fields) given.headers = fields;
    if (stated) given.claims = stated;
    return given;
  };
  const show = () => command.show("POST", "/explain", body());
  const form = h("form", { class: "stack", oninput: show, onchange: show, onsubmit: async (event) => {
    event.preventDefault();
    try {
      put(result, h("header", {}, h("h2", {}, "Order of decisions")), decisions(await call("POST", "/explain", body(), { signal })));
      if (!matchMedia("(min-width: 1081px)").matches) result.scrollIntoView({ block: "start" });
    } catch (error) {
      if (error.name !== "AbortError") put(result, h("header", {}, h("h2", {}, "Order of decisions")), failure(error));
    }
  } },
  h("div", { class: "form" }, path.element, method.element, client.element, address.element, host.element, key.element, certificate.element, forwarded.element, organisation.element, headers.element, claims.element),
  h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Explain")), command);

  const look = async (wanted) => {
    if (!wanted) { put(found); return; }
    id.value = wanted;
    const place = `/explain/${segment(wanted)}`;
    try {
      const view = await call("GET", place, undefined, { signal });
      put(found, view.requests.map(recorded), !view.complete && h("p", { class: "notice warn" }, "A worker did not respond in time, so something may be missing."), curlOf("GET", place));
    } catch (error) {
      if (error.name === "AbortError") return;
      const isUnknown = error instanceof ApiError && error.status === 404;
      put(found, isUnknown ? h("p", { class: "notice warn" }, "No request with this id is remembered. The gateway keeps those of the last minutes, refusals and errors longest. ", h("span", { class: "muted" }, error.message)) : failure(error), curlOf("GET", place));
    }
  };
  put(main, h("div", { class: "head" }, h("h1", {}, "Explain")),
    h("div", { class: "stack" },
      h("section", { class: "panel stack" }, h("header", {}, h("h2", {}, "A request that was made")), h("form", { class: "row", onsubmit: (event) => { event.preventDefault(); const wanted = id.value.trim(); if (wanted && location.hash !== `#/explain/${segment(wanted)}`) location.hash = `#/explain/${segment(wanted)}`; else look(wanted); } }, id, h("button", { type: "submit" }, "Look up")), found),
      h("div", { class: "split" }, h("section", { class: "panel" }, h("header", {}, h("h2", {}, "A request that could be made")), form), result)));
  show();
  look(argument);
  return { select: look };
}

/** Read lines of a name and a value; null if there are none. */
function pairs(text, separator) {
  const lines = text.split("\n").map((line) => line.split(separator)).filter(([name, ...rest]) => name.trim() && rest.length);
  return lines.length ? Object.fromEntries(lines.map(([name, ...rest]) => [name.trim(), rest.join(separator).trim()])) : null;
}

function step(kind, title, word, ...text) {
  return h("li", { class: kind }, h("i", { "aria-hidden": "true" }), h("h3", {}, title, word && h("span", { class: "tag" }, word)), text.filter(Boolean).map((one) => (one instanceof Node ? one : h("p", { class: "muted" }, one))));
}

/** What a route matches: host, path and conditions. */
function matched(route) {
  const conditions = [...(route.match === "prefix" ? [] : [route.match]), ...route.conditions].join(", ");
  return `${route.host ?? ""}${route.path}${conditions ? ` (${conditions})` : ""}`;
}

function decisions(view) {
  const [kind, word] = DECISIONS[view.result.decision] ?? ["none", view.result.decision];
  const steps = [];
  const isDenied = view.result.reason === "address_denied";
  steps.push(step(isDenied ? "fail" : "ok", "Address", view.address.address, view.address.detail));
  steps.push(step(/^(credentials|client_id)/.test(view.result.reason ?? "") ? "fail" : "ok", "Client", `${view.client.id} · ${view.client.tier.name}`, view.client.detail));
  if (!view.route) steps.push(step("fail", "Route", "none", "No route has this path, method and host."));
  else steps.push(step("ok", "Route", view.route.name, `${matched(view.route)} → ${view.route.destination}`, `costs ${number(view.route.cost)} ${view.route.cost === 1 ? "token" : "tokens"} (${view.route.cost_source})`));
  for (const one of view.routes_passed_over) steps.push(step("skipped", `Route ${one.name}`, "not this one", one.detail));
  steps.push(step(view.event_loop.shed_ratio > 0 ? "warn" : "ok", "Load", null, view.event_loop.shed_ratio > 0 ? `${percent(view.event_loop.shed_ratio, 1)} of this tier's requests are refused now` : `nothing is refused for load; the event loop is ${duration(view.event_loop.lag_seconds)} late`));
  const bucket = (one, title, ...text) => {
    const left = Math.max(0, Math.min(1, one.tokens / one.capacity));
    steps.push(step(one.allowed ? "ok" : "fail", title, one.allowed ? "enough tokens" : one.retry_after_seconds === null ? "never enough" : `enough in ${duration(one.retry_after_seconds)}`,
      h("div", { class: "bar" }, h("i", { class: one.allowed ? "" : "fail", style: { width: `${left * 100}%` } })),
      `${number(one.tokens)} of ${number(one.capacity)} tokens${share(one.processes, "is")}, the request takes ${number(one.cost)}; ${one.reset_after_seconds > 0 ? `full in ${duration(one.reset_after_seconds)}` : "full"}`, ...text));
  };
  const slot = (one, title, ...text) => steps.push(step(one.allowed ? "ok" : "fail", title, one.allowed ? "admits another" : "full", `${number(one.in_flight)} of ${number(one.concurrent)} requests are in flight${share(one.processes, "is")}`, ...text));
  for (const one of view.buckets) bucket(one, `Limit ${one.policy}`, one.key === view.limiting_bucket && view.buckets.length > 1 ? "This one decides." : null);
  for (const one of view.concurrency) slot(one, `Limit ${one.policy}`);
  if (view.candidate) bucket(view.candidate, `Candidate ${view.candidate.policy}`, "A candidate refuses nothing.");
  for (const one of view.candidate_concurrency) slot(one, `Candidate ${one.policy}`, "A candidate refuses nothing.");
  for (const one of view.limits_not_applied) steps.push(step("skipped", `Limit ${one.name}`, "does not apply", one.detail));
  for (const one of view.extensions) steps.push(step("ok", `Extension ${one.extension}`, one.hook, one.result));
  if (view.upstream) {
    const up = view.upstream, limit = up.concurrency;
    const isFull = limit !== null && !limit.allowed, isOpen = up.circuit_breaker === "OPEN", isDown = up.targets > 0 && up.healthy_targets + up.unchecked_targets === 0;
    steps.push(step(isFull || isOpen || isDown ? "fail" : up.circuit_breaker === "HALF_OPEN" || up.healthy_targets + up.unchecked_targets < up.targets ? "warn" : "ok", "Upstream", up.name,
      h("p", { class: "muted" }, `breaker ${up.circuit_breaker.toLowerCase().replace("_", "-")}${up.next_probe_in_seconds ? `, next probe in ${duration(up.next_probe_in_seconds)}` : ""}; ${up.healthy_targets} of ${up.targets} targets healthy${up.unchecked_targets ? `, ${up.unchecked_targets} not checked` : ""}${limit ? `; ${limit.in_flight} in flight, this tier is admitted below ${limit.tier_limit}` : ""} `, h("a", { href: `#/upstreams/${segment(up.name)}` }, "Show")),
      up.workers ? `The breaker in each worker: ${Object.entries(up.workers).map(([name, state]) => `${name} ${state.toLowerCase().replace("_", "-")}`).join(", ")}.` : null));
  }
  if (view.fallback) steps.push(step(view.fallback.used ? "warn" : "skipped", "Fallback", view.fallback.name, view.fallback.used ? "used now, because the upstream is not available" : "not needed now"));
  steps.push(step(kind === "none" ? "skipped" : kind, "Result", view.result.status ? String(view.result.status) : null, badge(kind, word), view.result.detail, view.result.retry_after_seconds ? `Allowed in ${duration(view.result.retry_after_seconds)}.` : null,
    view.worker ? `Worker ${view.worker} has decided this, by its own breaker, load and concurrency of the upstream; another one may decide otherwise.` : null));
  return h("ol", { class: "steps" }, steps);
}

/** Show what was decided on a request, in the order of the decisions, and each attempt. */
function recorded(one, index) {
  const kind = { success: "ok", refusal: "fail", error: "fail" }[one.result] ?? "none";
  const steps = [step("ok", "Request", `${one.method} ${one.path}`, `from ${one.client_address}, ${clock(one.time)}`)];
  steps.push(step(one.client_id === null ? "fail" : "ok", "Client", one.client_id === null ? "not identified" : one.tier ?? null,
    one.client_id !== null && h("p", {}, h("a", { href: `#/clients/${segment(one.client_id)}` }, one.client_id), h("span", { class: "muted" }, one.tier_source ? ` (its tier: ${one.tier_source})` : ""))));
  steps.push(step(one.route === null ? "fail" : "ok", "Route", one.route ?? "none", one.route !== null && `costs ${plural(one.cost, "token")}`));
  for (const limit of one.limits) {
    const isKnown = limit.tokens_before !== null && limit.capacity !== null;
    steps.push(step(limit.allowed ? "ok" : "fail", `Limit ${limit.limit}`, limit.allowed ? "allowed" : "refused",
      isKnown && h("div", { class: "bar" }, h("i", { class: limit.allowed ? "" : "fail", style: { width: `${Math.max(0, Math.min(1, limit.tokens_before / limit.capacity)) * 100}%` } })),
      isKnown ? `had ${number(limit.tokens_before)} of ${number(limit.capacity)} tokens${share(limit.processes, "was")}, the request ${limit.allowed ? "took" : "costs"} ${number(limit.cost)}` : limit.concurrent ? `allows ${plural(limit.concurrent, "request")} in flight${share(limit.processes, "was")}; how many there were is not kept` : "its state is not kept with this decision",
      limit.confirmed === false ? "The store was unavailable and has not confirmed this state." : null,
      limit.retry_after_seconds ? `It would have been allowed ${duration(limit.retry_after_seconds)} later.` : null,
      limit.spent_by && spenders(limit.spent_by, `${limit.limit}${index ? `, request ${index + 1}` : ""}`)));
  }
  for (const [index, attempt] of one.upstream_attempts.entries()) {
    const failed = attempt.failure !== null || (attempt.status ?? 0) >= 500;
    steps.push(step(failed ? "fail" : "ok", `Attempt ${index + 1}`, attempt.status ? String(attempt.status) : attempt.failure,
      h("p", { class: "muted" }, h("a", { href: `#/upstreams/${segment(attempt.upstream ?? "")}` }, attempt.upstream ?? ""), ` ${attempt.target ?? "no target"}: ${milliseconds(attempt.duration_ms)}, begun after ${milliseconds(attempt.started_after_ms)}`), attempt.detail));
  }
  for (const settled of one.settlements) steps.push(step("ok", "Cost settled", null, `${number(settled.cost_before)} to ${number(settled.cost_after)} tokens, after ${milliseconds(settled.after_ms)}`));
  steps.push(step(kind, "Response", String(one.status), h("p", {}, badge(kind, one.reason ?? one.result)), one.detail, `request id ${one.request_id}${one.trace_id ? `, trace ${one.trace_id}` : ""}`, `${one.fallback ? `from the fallback ${one.fallback}, ` : ""}by the ${one.source}, in ${milliseconds(one.duration_ms)}; ${number(one.bytes_sent)} bytes`));
  return h("ol", { class: "steps" }, steps);
}

function spenders(spent, limit) {
  if (!spent.requests.length) return h("p", { class: "muted" }, "The requests that had spent the tokens are not remembered.");
  return h("details", { class: "small" }, h("summary", {}, `${plural(spent.requests.length, "request")} had spent the tokens${spent.missing_tokens ? `, and others that were not kept ${number(spent.missing_tokens)}` : spent.complete ? "" : ", and earlier ones"}`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Requests that had spent the tokens of ${limit}` }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Time"), h("th", {}, "Request"), h("th", { class: "num" }, "Status"), h("th", { class: "num" }, "Cost"))),
      h("tbody", {}, spent.requests.map((one) => h("tr", {}, h("td", {}, h("time", {}, clock(one.time))), h("td", { class: "wrap" }, h("a", { href: `#/explain/${segment(one.request_id)}` }, `${one.method} ${one.path}`)), h("td", { class: "num" }, String(one.status)), h("td", { class: "num" }, number(one.cost))))))));
}
