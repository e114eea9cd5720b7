// Clients: the most limited ones, registered ones by tier, and one client's limits, live.

import { call, segment } from "../api.js";
import { action, curlBlock, curlOf, failure, field } from "../controls.js";
import { badge, h, list, put, say } from "../dom.js";
import { clock, duration, number, percent, seconds, share } from "../format.js";
import { poll, stream } from "../stream.js";

// Orders: the value of `sort`, the button, and the counted share of the requests with its header.
const SORTS = [["limited", "Most limited", "limited", "Limited"], ["requests", "Most requests", "limited", "Limited"], ["bare", "Bare ids", "bare", "Bare ids"]];
const BARE_ID = [["", "as now, but refused from the first key on"], ["refused", "refused: a credential must prove it"], ["accepted", "accepted: anyone can claim it"]];
const UNCONFIRMED = "The client store is unavailable: these values are those in the memory of this gateway.";
const SOURCES = { granted: "grant", registered: "registered", configured: "configuration", credential: "credential", default: "default", address: "address" };

export function clients(main, argument, signal) {
  let sort = "limited", tier = "", after = "", selected = argument, detail = null;
  const search = h("input", { type: "search", placeholder: "Client id", "aria-label": "Client id", maxlength: 128, autocomplete: "off", spellcheck: "false" });
  const tierSelect = h("select", { "aria-label": "Registered clients of a tier" }, h("option", { value: "" }, "Registered by tier…"), h("option", { value: "*" }, "All tiers"));
  const sorts = SORTS.map(([value, label]) => h("button", { type: "button", "aria-pressed": String(value === sort), onclick: () => { sort = value; tier = ""; tierSelect.value = ""; press(); load(); } }, label));
  const head = h("tr", {}), body = h("tbody", {}), more = h("div", { class: "actions" }), problem = h("div", {}), command = h("div", {});
  const region = h("div", { class: "table-fixed", tabindex: 0, role: "region", "aria-label": "List of clients" }, h("table", {}, h("thead", {}, head), body));
  const place = h("div", { class: "stack" });
  const split = h("div", { class: "split" },
    h("section", { class: "panel list stack", "aria-label": "Clients" },
      h("form", { class: "row", onsubmit: (event) => { event.preventDefault(); if (search.value.trim()) location.hash = `#/clients/${segment(search.value.trim())}`; } }, search, h("button", { type: "submit" }, "Open")),
      h("div", { class: "row" }, h("div", { class: "segments", role: "group", "aria-label": "Order" }, sorts), tierSelect),
      problem, region, more, command),
    place);
  put(main, h("div", { class: "head" }, h("h1", {}, "Clients")), split);

  const press = () => sorts.forEach((one, index) => one.setAttribute("aria-pressed", String(SORTS[index][0] === sort && !tier)));
  const path = () => (tier ? `/clients?tier=${encodeURIComponent(tier)}&limit=100${after ? `&after=${encodeURIComponent(after)}` : ""}` : `/clients?sort=${sort}&limit=100`);
  const link = (id) => h("td", { class: "key" }, h("a", { href: `#/clients/${segment(id)}`, title: id }, id));
  const load = async () => {
    try {
      const asked = path();
      const found = await call("GET", asked, undefined, { signal });
      list(problem, [], String, failure);
      list(command, [asked], () => "", (given) => curlOf("GET", given));
      if (tier) registered(found); else heaviest(found);
    } catch (error) {
      if (error.name !== "AbortError") list(problem, [{ message: error.message }], () => "", failure);
    }
  };
  const columns = (...names) => list(head, names, ([name]) => name, ([name, kind]) => h("th", { class: kind }, name));
  const rows = (found, empty, count, make) => list(body, found.clients.length ? found.clients.map((one) => [found.sort, one]) : [[found.sort, null]], ([, one]) => one?.client_id ?? "",
    ([, one]) => (one ? h("tr", { class: one.client_id === selected ? "chosen" : null, "data-client": one.client_id }, make(one)) : h("tr", {}, h("td", { colspan: count, class: "empty" }, empty))));
  const heaviest = (found) => {
    const [, , counted, header] = SORTS.find(([value]) => value === found.sort);
    columns(["Client"], ["Tier"], [header, "num"], ["Requests", "num narrow-off"], ["Share", "num"]);
    const heavy = (one) => [link(one.client_id), h("td", {}, one.tier), h("td", { class: "num", title: `at most ${one[`${counted}_error_bound`]} too high` }, number(one[counted])),
      h("td", { class: "num narrow-off" }, number(one.requests)), h("td", { class: "num" }, percent(Math.min(one[counted], one.requests), one.requests))];
    rows(found, found.sort === "limited" ? "No client has been limited since the start." : "None since the start.", 5, heavy);
    list(more, [], String, String);
  };
  const registered = (found) => {
    columns(["Client"], ["Tier"], ["Source"], ["Keys", "num"]);
    const one = (known) => [link(known.client_id), h("td", {}, known.tier), h("td", {}, SOURCES[known.tier_source] ?? known.tier_source), h("td", { class: "num" }, number(known.keys))];
    rows(found, "No registered client on this page.", 4, one);
    const pages = [["First page", ""], ["Next page", found.next]].filter(([, start], index) => (index ? start : after));
    list(more, pages, ([label]) => label, ([label, start]) => h("button", { type: "button", onclick: () => { after = start; region.focus(); load(); } }, label));
  };
  tierSelect.addEventListener("change", () => { tier = tierSelect.value; after = ""; press(); load(); });
  const select = (id) => {
    selected = id;
    for (const one of body.children) one.classList.toggle("chosen", one.dataset.client === id);
    split.classList.toggle("opened", Boolean(id));
    detail?.abort();
    detail = null;
    put(place);
    if (id) detail = client(place, id, tiers);
    else put(place, h("section", { class: "panel" }, h("p", { class: "empty" }, "Choose a client to see its limits drain and refill, and to change its tier, grant, keys and quotas. Every id has limits, so any can be opened.")));
  };
  let tiers = [];
  call("GET", "/tiers", undefined, { signal }).then((found) => {
    tiers = found.tiers.map((one) => one.name);
    tierSelect.append(...tiers.map((one) => h("option", { value: one }, one)));
  }).catch(() => {}).finally(() => { if (!signal.aborted) select(selected); });
  signal.addEventListener("abort", () => detail?.abort());
  poll(signal, 5000, () => (tier ? (body.childElementCount ? null : load()) : load()));
  return { select };
}

function client(place, id, tiers) {
  const abort = new AbortController(), { signal } = abort;
  const base = `/clients/${segment(id)}`;
  const status = h("span", {}), facts = h("dl", { class: "facts" }), buckets = h("div", { class: "buckets" }), concurrency = h("div", { class: "buckets" }), problem = h("div", { class: "stack" });
  const quotas = h("div", { class: "buckets" }), quotaPanel = h("section", { class: "panel", hidden: true }, h("header", {}, h("h2", {}, "Calendar quotas")), quotas, curlOf("GET", `${base}/quotas`));
  const options = () => tiers.map((one) => [one, one]);
  let view = null;
  const refresh = () => { load(); loadKeys(); loadQuotas(); };
  const change = (label, more) => action(label, { title: `${label}: ${id}`, ...more, done: (...given) => { const shown = more.done?.(...given); refresh(); return shown; } });
  const faults = new Map(); // what cannot be shown, by the part of the page; the same words are shown once
  const report = (part, error) => {
    if (error?.name === "AbortError") return;
    if (error) faults.set(part, ["fail", error.message]);
    else faults.delete(part);
    list(problem, [...new Map([...faults.values()].map((one) => [one[1], one])).values()], ([, text]) => text, ([kind, text]) => h("p", { class: `notice ${kind}`, role: kind === "fail" ? "alert" : null }, text));
  };
  const endGrant = change("End the grant", { text: "The client's own tier applies again.", request: () => ({ method: "DELETE", path: `${base}/grants` }) });
  const keys = h("tbody", {}), noKeys = h("p", { class: "empty", hidden: true }, "The client has no keys.");
  const keyRegion = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "API keys", hidden: true }, h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "Key"), h("th", {}, "Label"), h("th", {}, "Routes"), h("th", {}, "Created"), h("th", {}, "Expires"), h("th", {}, "Last used"), h("th", {}, h("span", { class: "sr" }, "Changes")))), keys));
  const createKey = change("Create a key", { text: "The key is shown once.", fields: () => [field("Label", { placeholder: "user or purpose" }), ...expiry("never"), field("Routes", { placeholder: "all routes", hint: "Names with commas between them. The key is valid for no other route." }), field("Bare id of the client", { options: BARE_ID })],
    request: ([label, after, at, routes, bare]) => ({ method: "POST", path: `${base}/keys`, body: { label: label.value, ...expires(after, at), ...named(routes), ...(bare.value ? { verified_only: bare.value === "refused" } : {}) } }), done: secret });
  const proof = (label, text, isRequired) => change(label, { text, request: () => ({ method: "POST", path: `${base}/verified-only`, body: { verified_only: isRequired } }) });
  const acceptId = proof("Accept the bare id", "The id alone identifies the client again; anyone can claim it.", false);
  const requireProof = proof("Require a credential", "Only a credential identifies the client; its bare id is refused.", true);
  put(place,
    h("div", { class: "head" }, h("a", { class: "back", href: "#/clients" }, "‹ All clients"), h("h1", {}, id), status), problem,
    h("section", { class: "panel" }, h("header", {}, h("h2", {}, "Limits"), h("span", { class: "muted small push" }, "live")), h("div", { class: "stack" }, buckets, concurrency)),
    h("section", { class: "panel stack" }, h("header", {}, h("h2", {}, "Tier")), facts,
      h("div", { class: "actions" },
        change("Set tier", { text: "The client is registered with this tier, which applies to its next request.", fields: () => [field("Tier", { options: options(), value: view?.tier.name ?? tiers[0] })], request: ([tier]) => ({ method: "POST", path: `${base}/tier`, body: { tier: tier.value } }) }),
        change("Grant a tier", { text: "The tier overrides the client's own until the end of the grant.", fields: () => [field("Tier", { options: options(), value: tiers.at(-1) }), field("For how long", { options: [["3600", "1 hour"], ["86400", "1 day"], ["604800", "1 week"], ["2592000", "30 days"]], value: "3600" })], request: ([tier, time]) => ({ method: "POST", path: `${base}/grants`, body: { tier: tier.value, duration_seconds: Number(time.value) } }) }),
        endGrant,
        change("Fill the limits", { text: "The client's own buckets become full.", request: () => ({ method: "POST", path: `${base}/reset` }) }),
        change("Remove the registration", { danger: true, text: "Its registration, grant and keys are removed. The client then has the tier of the configuration, else the default tier.", request: () => ({ method: "DELETE", path: base }) })),
      curlOf("GET", base)),
    quotaPanel,
    h("section", { class: "panel stack" }, h("header", {}, h("h2", {}, "API keys")), noKeys, keyRegion, h("div", { class: "actions" }, createKey, acceptId, requireProof), curlOf("GET", `${base}/keys`)));

  const bars = new Map();
  const load = async () => {
    try {
      view = await call("GET", base, undefined, { signal });
      if (view.confirmed) faults.delete("store");
      else faults.set("store", ["warn", UNCONFIRMED]);
      report("client", null);
      list(status, [view.tier.name], String, (name) => h("span", { class: "tag" }, name));
      endGrant.disabled = view.grant === null;
      const rows = [["Tier", `${view.tier.name}: ${number(view.tier.rate)} tokens a second, at most ${number(view.tier.capacity)}`], ["Source", SOURCES[view.tier_source] ?? view.tier_source]];
      if (view.grant) rows.push(["Grant", `${view.grant.tier} until ${clock(view.grant.until)} (${duration(seconds(view.grant.until) - stream.now())} left), then ${view.grant.tier_after}`]);
      rows.push(["Identified by", view.verified_only ? "a credential only" : "its id alone, which anyone can claim"]);
      list(facts, rows, ([label]) => label, ([label, text]) => [h("dt", {}, label), h("dd", {}, text)]);
      const all = [{ name: `tier ${view.tier.name}`, rate: view.tier.rate, ...view.bucket }, ...view.limits.map((one) => ({ name: one.route ? `${one.limit}, route ${one.route}` : one.limit, ...one }))];
      if ([...bars.keys()].join("\n") !== all.map((one) => one.name).join("\n")) {
        bars.clear();
        for (const one of all) bars.set(one.name, bucket(one.name));
        put(buckets, [...bars.values()].map((one) => one.element));
      }
      for (const one of all) bars.get(one.name).set(one);
      list(concurrency, view.concurrency ?? [], (one) => `${one.limit} ${one.route ?? ""}`, (one) => h("div", { class: "bucket" }, h("header", {}, h("b", {}, one.route ? `${one.limit}, route ${one.route}` : one.limit), h("span", { class: "muted" }, `requests in flight${share(one.processes, "is")}`), h("span", { class: "num" }, `${number(one.in_flight)} of ${number(one.concurrent)}`)),
        h("div", { class: "bar" }, h("i", { class: one.in_flight >= one.concurrent ? "fail" : null, style: { width: `${Math.min(100, (one.in_flight / one.concurrent) * 100)}%` } }))));
    } catch (error) {
      report("client", error);
    }
  };
  const loadKeys = async () => {
    try {
      const found = await call("GET", `${base}/keys`, undefined, { signal });
      report("keys", null);
      list(keys, found.keys, (one) => one.id, keyRow);
      if (!found.keys.length && document.activeElement === keyRegion) createKey.focus();
      keyRegion.hidden = found.keys.length === 0;
      noKeys.hidden = found.keys.length > 0;
      const [shown, other] = found.verified_only ? [acceptId, requireProof] : [requireProof, acceptId];
      shown.hidden = false;
      if (document.activeElement === other) shown.focus(); // which would be lost
      other.hidden = true;
    } catch (error) {
      report("keys", error);
    }
  };
  const keyRow = (one) => h("tr", {}, h("td", { class: "mono wrap" }, one.id), h("td", { class: "wrap" }, one.label || "–", one.configured && [" ", h("span", { class: "tag" }, "configuration")], one.replaced_by && [" ", h("span", { class: "tag" }, "replaced")]), h("td", { class: "wrap" }, one.routes ? one.routes.map((name, index) => [index ? ", " : "", name, one.unknown_routes.includes(name) && [" ", badge("warn", "does not exist")]]) : "all"),
    h("td", {}, one.created_at ? clock(one.created_at) : "–"), h("td", {}, one.expired ? badge("none", "expired") : one.expires_at ? clock(one.expires_at) : "never"), h("td", {}, one.last_used_at ? clock(one.last_used_at) : "never"),
    h("td", {}, !one.configured && h("div", { class: "actions" }, !one.expired && !one.replaced_by && change("Rotate", { text: "A new key with the same label and routes; the old one stays valid for the overlap.", fields: () => [field("Overlap", { options: [["0", "none"], ["3600", "1 hour"], ["86400", "1 day"], ["604800", "1 week"]], value: "86400" }), ...expiry(one.expires_at ? "after as long as the old one" : "never")], request: ([overlap, after, at]) => ({ method: "POST", path: `${base}/keys/${segment(one.id)}/rotate`, body: { overlap_seconds: Number(overlap.value), ...expires(after, at) } }), done: secret }),
      change("Revoke", { danger: true, text: `The key ${one.id} is refused at once.`, request: () => ({ method: "DELETE", path: `${base}/keys/${segment(one.id)}` }) }))));
  const loadQuotas = async () => {
    try {
      const found = await call("GET", `${base}/quotas`, undefined, { signal });
      report("quotas", null);
      quotaPanel.hidden = found.quotas.length === 0;
      list(quotas, found.quotas, (one) => `${one.limit} ${one.route ?? ""}`, quota);
    } catch (error) {
      report("quotas", error);
    }
  };
  const quota = (one) => {
    const path = (change) => `${base}/quotas/${segment(one.limit)}/${change}${one.route ? `?route=${encodeURIComponent(one.route)}` : ""}`, whole = one.quota + one.carried_over;
    const amount = (label) => [field(label, { type: "number", value: "100", min: 0, required: true })];
    return h("div", { class: "bucket" }, h("header", {}, h("b", {}, one.route ? `${one.limit}, route ${one.route}` : one.limit), h("span", { class: "muted" }, `each ${one.period}, ${one.time_zone}`), h("span", { class: "num" }, `${number(one.used)} of ${number(whole)} used`)),
      h("div", { class: "bar" }, h("i", { class: one.remaining <= 0 ? "fail" : one.used > 0.8 * whole ? "warn" : null, style: { width: `${Math.min(100, (one.used / Math.max(1, whole)) * 100)}%` } })),
      h("p", {}, `${number(one.remaining)} left until ${clock(one.period_end)}${one.carried_over ? `, ${number(one.carried_over)} carried over` : ""}${one.top_up ? `, ${number(one.top_up)} of top-ups` : ""}`),
      h("div", { class: "actions" },
        change("Top up", { text: "Tokens that are spent after the quota is used up.", fields: () => amount("Tokens to add"), request: ([tokens]) => ({ method: "POST", path: path("top-up"), body: { amount: Number(tokens.value) } }) }),
        change("Set carry-over", { text: "Tokens that the current period has in addition to the quota.", fields: () => amount("Tokens carried over"), request: ([tokens]) => ({ method: "POST", path: path("carry-over"), body: { amount: Number(tokens.value) } }) }),
        change("Reset", { text: "The used tokens of the current period are set to 0.", request: () => ({ method: "POST", path: path("reset") }) })));
  };
  poll(signal, 1000, load);
  poll(signal, 10000, async () => { await loadKeys(); await loadQuotas(); });
  const timer = setInterval(() => { for (const one of bars.values()) one.advance(); }, 250);
  signal.addEventListener("abort", () => clearInterval(timer));
  return abort;
}

function secret(found) {
  return h("div", { class: "stack" }, h("p", { class: "notice warn" }, "This key is shown only now. Copy it to where it is used."), h("pre", { class: "response" }, found.key));
}

/** Return the fields for when a key expires; `otherwise` is said of a key that gets no time. */
function expiry(otherwise) {
  return [field("Expires", { options: [["", otherwise], ["2592000", "in 30 days"], ["7776000", "in 90 days"], ["31536000", "in a year"]] }), field("Or at this time", { type: "datetime-local", hint: "Your local time, in place of the choice above." })];
}

/** Return the members of a body that say when a key expires, of the fields of `expiry`. */
function expires(after, at) {
  if (at.value) return { expires_at: new Date(at.value).toISOString() };
  return after.value ? { expires_in_seconds: Number(after.value) } : {};
}

/** Return the member of a body that names the routes of a key; none if it is valid for all. */
function named(routes) {
  const names = routes.value.split(",").map((name) => name.trim()).filter(Boolean);
  return names.length ? { routes: names } : {};
}

/** A bucket as a bar, which refills between two responses as the bucket does. */
function bucket(name) {
  const fill = h("i", {}), tokens = h("span", { class: "num" }), note = h("p", {});
  const element = h("div", { class: "bucket" }, h("header", {}, h("b", {}, name), tokens), h("div", { class: "bar", role: "meter", "aria-label": `Tokens of ${name}`, "aria-valuemin": 0 }, fill), note);
  const meter = element.querySelector(".bar");
  let view = null, at = 0;
  const advance = () => {
    if (!view) return;
    const rate = view.reset_after_seconds > 0 ? (view.capacity - view.tokens) / view.reset_after_seconds : 0;
    const passed = (performance.now() - at) / 1000, now = Math.min(view.capacity, view.tokens + rate * passed);
    const left = Math.max(0, now / view.capacity);
    fill.style.width = `${left * 100}%`;
    fill.className = left < 0.02 ? "fail" : left < 0.25 ? "warn" : "";
    say(tokens, `${number(Math.floor(now * 10) / 10)} of ${number(view.capacity)}`);
    say(note, `${now >= view.capacity ? "full" : `full in ${duration(view.reset_after_seconds - passed)}, refills ${number(rate)} a second`}${share(view.processes, "is")}`);
    meter.setAttribute("aria-valuemax", view.capacity);
    meter.setAttribute("aria-valuenow", Math.round(now * 10) / 10);
  };
  return { element, advance, set: (given) => { view = given; at = performance.now(); advance(); } };
}

export { curlBlock };
