// The settings in force and where each was set, and the last reloads with their differences.

import { call } from "../api.js";
import { action, curlOf, failure } from "../controls.js";
import { badge, h, list, put, say } from "../dom.js";
import { clock, plural } from "../format.js";
import { stream, watch } from "../stream.js";

const RESULTS = { success: ["ok", "Applied"], invalid: ["fail", "Invalid"], failed: ["fail", "Failed"], unavailable: ["warn", "Not possible"] };
const MANY = 400; // settings of a section, from which it is closed at first

export function configuration(main, argument, signal) {
  let wanted = argument;
  const filter = h("input", { type: "search", placeholder: "Filter by setting, value or origin", "aria-label": "Filter settings" });
  const defaults = h("input", { type: "checkbox", id: "defaults" });
  const facts = h("p", { class: "muted" }), reloads = h("ol", { class: "transitions" }), settings = h("div", { class: "stack" }), problem = h("div", {}), command = h("div", {});
  let view = null, loadedAt = null;
  const reload = action("Reload", { title: "Reload the configuration", text: "The files are read again and applied in every worker, or nothing changes.", request: () => ({ method: "POST", path: "/reload" }),
    done: (found) => { load(); return h("div", { class: "stack" }, h("p", { class: "notice ok" }, found.result === "unchanged" ? "Nothing has changed." : `${plural(found.changes.length, "setting")} changed.`), differences(found.changes)); } });
  put(main, h("div", { class: "head" }, h("h1", {}, "Configuration"), facts, h("span", { class: "push" }, reload)), problem,
    h("div", { class: "stack" },
      h("section", { class: "panel", "aria-labelledby": "reloads" }, h("header", {}, h("h2", { id: "reloads" }, "Last reloads")), reloads),
      h("section", { class: "panel stack" }, h("header", {}, h("h2", {}, "In force")), h("div", { class: "row" }, filter, h("label", { for: "defaults" }, defaults, "with defaults")), settings, command)));

  const load = async () => {
    const path = `/configuration${defaults.checked ? "?defaults=true" : ""}`;
    try {
      view = await call("GET", path, undefined, { signal });
    } catch (error) {
      if (error.name !== "AbortError") put(problem, failure(error));
      return;
    }
    put(problem, view.errors.length > 0 && h("div", { class: "notice fail", role: "alert" }, h("b", {}, "The last reload failed; the former configuration is in force."), h("ul", {}, view.errors.map((one) => h("li", { class: "mono" }, one)))));
    say(facts, `in force since ${clock(view.loaded_at)}`);
    list(reloads, view.reloads.length ? view.reloads : [null], (one) => one?.at ?? "", (one) => (one ? reloaded(one) : h("li", { class: "empty" }, "None since the start.")));
    list(command, [path], () => "", (given) => curlOf("GET", given));
    draw();
  };
  const draw = () => {
    const text = filter.value.trim().toLowerCase();
    const chosen = view.settings.filter((one) => !text || `${one.setting} ${shown(one)} ${one.origin ?? ""}`.toLowerCase().includes(text));
    const groups = new Map();
    for (const one of chosen) {
      const name = /^[^.[]+/.exec(one.setting)?.[0] ?? one.setting;
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(one);
    }
    list(settings, groups.size ? [...groups].map(([name, found]) => [name, found, found.length < MANY || Boolean(text)]) : [["", text ? "No setting matches." : "Nothing is configured; the defaults apply."]], ([name]) => name,
      ([name, found, isOpen]) => (name ? section(name, found, isOpen) : h("p", { class: "empty" }, found)));
    reveal();
  };
  const section = (name, found, isOpen) => {
    const body = h("tbody", {});
    const fill = () => { if (!body.childElementCount) put(body, found.map(row)); };
    const element = h("details", { open: isOpen, "data-section": name }, h("summary", {}, h("b", {}, name), " ", h("span", { class: "muted" }, String(found.length))),
      h("table", { class: "settings" }, h("thead", {}, h("tr", {}, h("th", {}, "Setting"), h("th", {}, "Value"), h("th", {}, "Set by"))), body));
    element.addEventListener("toggle", () => { if (element.open) fill(); });
    if (isOpen) fill();
    return element;
  };
  const reveal = () => {
    const found = [...settings.children].find((one) => one.dataset.section === wanted);
    if (found) { found.open = true; found.scrollIntoView({ block: "start" }); }
  };
  filter.addEventListener("input", () => view && draw());
  defaults.addEventListener("change", load);
  watch(signal, () => { // another operator, or a signal, may have reloaded
    const now = JSON.stringify([stream.overview.loaded_at, stream.problems.some((one) => one.link === "#/configuration")]);
    if (now !== loadedAt) { loadedAt = now; load(); }
  });
  if (!stream.overview) load();
  return { select: (name) => { wanted = name; reveal(); } };
}

function shown(one) {
  if (one.secret) return "secret";
  if (one.value === null) return "not set";
  return typeof one.value === "string" ? one.value : JSON.stringify(one.value);
}

function row(one) {
  return h("tr", { class: one.default ? "default" : null }, h("td", { class: "mono" }, one.setting), h("td", { class: one.secret || one.value === null ? "muted" : "mono" }, one.secret ? "secret, not shown" : shown(one)), h("td", { class: "small muted" }, one.origin ?? "default"));
}

function reloaded(one) {
  const [kind, word] = RESULTS[one.result];
  return h("li", {}, h("div", { class: "what" }, badge(kind, word), h("span", { class: "wrap" }, one.origin), h("time", { datetime: one.at }, clock(one.at))),
    one.errors.map((text) => h("p", { class: "small mono wrap" }, text)),
    one.changes.length > 0 ? differences(one.changes) : one.result === "success" && h("p", { class: "small muted" }, "Nothing had changed."),
    one.omitted > 0 && h("p", { class: "small muted" }, `${one.omitted} more are not kept.`));
}

function differences(changes) {
  const text = (value) => (value === null ? "not set" : typeof value === "string" ? value : JSON.stringify(value));
  return h("div", { class: "change" }, changes.map((one) => [h("code", {}, one.setting, one.needs_restart && [" ", h("span", { class: "tag" }, "after a restart")]), one.secret ? h("span", { class: "muted" }, "secret") : h("del", { class: "mono" }, text(one.old)), h("span", { class: "muted arrow", "aria-hidden": "true" }, "→"), one.secret ? h("span", { class: "muted" }, "changed") : h("ins", { class: "mono" }, text(one.new))]));
}
