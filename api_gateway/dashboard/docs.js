// The API of the gateway, from /openapi.json: to read, and to try with the token.

import { ApiError, call, segment, send } from "./api.js";
import { askToken, curlBlock, failure, field, themeSwitch } from "./controls.js";
import { badge, h, put, say } from "./dom.js";

const main = document.getElementById("main");
const METHODS = ["get", "post", "put", "patch", "delete"];

async function load() {
  put(main, h("p", { class: "muted" }, "Loading the description of the API"));
  let schema;
  try {
    schema = await call("GET", "/openapi.json");
  } catch (error) {
    put(main, h("div", { class: "head" }, h("h1", {}, "API")), failure(error), h("p", { class: "muted" }, "The description needs a token, as every endpoint for operators does."));
    if ([401, 403].includes(error.status)) askToken(load);
    return;
  }
  const groups = new Map();
  for (const [path, item] of Object.entries(schema.paths)) {
    for (const method of METHODS) {
      if (!item[method]) continue;
      const tag = item[method].tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push([path, method, item[method]]);
    }
  }
  const filter = h("input", { type: "search", placeholder: "Filter endpoints", "aria-label": "Filter endpoints" });
  const sections = [...groups].map(([tag, found]) => h("section", { class: "panel operations" }, h("header", {}, h("h2", {}, tag[0].toUpperCase() + tag.slice(1))), found.map((one) => operation(schema, ...one))));
  filter.addEventListener("input", () => {
    for (const one of main.querySelectorAll(".operations details[data-text]")) one.hidden = !one.dataset.text.includes(filter.value.trim().toLowerCase());
  });
  put(main, h("div", { class: "head" }, h("h1", {}, schema.info.title), h("span", { class: "tag" }, schema.info.version)),
    h("div", { class: "stack" }, prose(schema.info.description, "muted"), filter, sections));
}

/** Return a description as paragraphs, with what it has in backticks as code. */
function prose(text, kind = null) {
  return (text ?? "").split("\n\n").filter(Boolean).map((paragraph) => h("p", { class: kind },
    paragraph.replace(/\s+/g, " ").split("`").map((part, index) => (index % 2 ? h("code", {}, part) : part))));
}

function operation(schema, path, method, one) {
  const inside = h("div", { class: "inside stack" });
  const element = h("details", { "data-text": `${method} ${path} ${one.summary ?? ""}`.toLowerCase() },
    h("summary", {}, h("span", { class: "method" }, method.toUpperCase()), h("span", { class: "path" }, path), h("span", { class: "muted" }, one.summary ?? "")), inside);
  element.addEventListener("toggle", () => { if (element.open && !inside.childElementCount) fill(schema, inside, path, method, one); });
  return element;
}

function fill(schema, inside, path, method, one) {
  const resolve = (node) => (node?.$ref ? node.$ref.replace("#/", "").split("/").reduce((found, name) => found?.[name], schema) : node) ?? {};
  const parameters = (one.parameters ?? []).map((given) => {
    const found = resolve(given);
    return { ...found, control: field(`${found.name}${found.required ? "" : " (optional)"}`, { hint: found.description ?? null, required: found.required }) };
  });
  const content = resolve(one.requestBody)?.content?.["application/json"]?.schema;
  const body = content && field("Body", { type: "textarea", value: JSON.stringify(example(content, resolve), null, 2), full: true });
  if (body) body.input.rows = Math.min(14, body.value.split("\n").length + 1);
  const request = () => {
    let target = path;
    const query = new URLSearchParams();
    for (const { name, in: where, control } of parameters) {
      if (where === "path") target = target.replace(`{${name}}`, segment(control.value || `{${name}}`));
      else if (where === "query" && control.value) query.set(name, control.value);
    }
    if (query.size) target += `?${query}`;
    return [method.toUpperCase(), target, body ? JSON.parse(body.value) : undefined];
  };
  const problem = h("p", { class: "notice fail", role: "alert", hidden: true });
  const command = curlBlock("GET", path);
  const response = h("div", { "aria-live": "polite" });
  const show = () => {
    try { command.show(...request()); problem.hidden = true; return true; } catch (error) { say(problem, `The body is not JSON: ${error.message}`); problem.hidden = false; return false; }
  };
  const form = h("form", { class: "stack", oninput: show, onsubmit: async (event) => {
    event.preventDefault();
    if (!show()) return;
    try {
      const got = await send(...request());
      const text = await read(got);
      put(response, h("div", { class: "stack" }, badge(got.ok ? "ok" : "fail", `${got.status} ${got.statusText}`), h("pre", { class: "response", tabindex: 0, role: "region", "aria-label": `Response of ${method.toUpperCase()} ${path}` }, ...text.split("\n").flatMap((line) => [line, h("br", {})]))));
    } catch (error) {
      put(response, failure(error instanceof ApiError ? error : { message: `The gateway cannot be reached: ${error.message}` }));
    }
  } }, h("div", { class: "form" }, parameters.map((given) => given.control.element), body?.element), command, problem, h("div", { class: "actions" }, h("button", { type: "submit", class: method === "get" ? "primary" : null }, "Send")), response);
  const answers = Object.entries(one.responses ?? {}).map(([status, given]) => {
    const found = resolve(given), type = Object.keys(found.content ?? {}).join(", ");
    const shape = Object.values(found.content ?? {})[0]?.schema;
    return h("details", {}, h("summary", {}, h("span", { class: "method" }, status), h("span", {}, (found.description || "").replaceAll("`", ""))), h("div", { class: "inside" }, type && h("p", { class: "small muted" }, type), shape && shapeOf(shape, resolve, 0)));
  });
  put(inside, prose(one.description, "wrap"), form, content && h("details", {}, h("summary", {}, "Schema of the body"), h("div", { class: "inside" }, shapeOf(content, resolve, 0))), h("div", {}, h("h3", {}, "Responses"), answers));
  show();
}

/** Read a response; of a stream, only the first part. */
async function read(got) {
  if (!(got.headers.get("content-type") ?? "").startsWith("text/event-stream")) {
    const text = await got.text();
    try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
  }
  const reader = got.body.pipeThrough(new TextDecoderStream()).getReader();
  const { value } = await reader.read();
  await reader.cancel();
  return `${value}…`;
}

function example(node, resolve, depth = 0) {
  const shape = resolve(node);
  if (depth > 4) return null;
  if (shape.examples?.length) return shape.examples[0];
  if (shape.default !== undefined) return shape.default;
  if (shape.anyOf) return example(shape.anyOf.find((one) => one.type !== "null") ?? {}, resolve, depth + 1);
  if (shape.enum) return shape.enum[0];
  if (shape.type === "object") return Object.fromEntries(Object.entries(shape.properties ?? {}).filter(([name, one]) => (shape.required ?? []).includes(name) || resolve(one).examples).map(([name, one]) => [name, example(one, resolve, depth + 1)]));
  return { string: "", integer: 1, number: 1, boolean: false, array: [] }[shape.type] ?? null;
}

function typeOf(node, resolve) {
  const shape = resolve(node);
  if (shape.anyOf) return shape.anyOf.map((one) => typeOf(one, resolve)).join(" or ");
  if (shape.type === "array") return `list of ${typeOf(shape.items ?? {}, resolve)}`;
  if (shape.enum) return shape.enum.map((one) => `"${one}"`).join(" or ");
  if (shape.const !== undefined) return `"${shape.const}"`;
  return shape.title && shape.type === "object" ? shape.title : shape.type ?? "any";
}

function shapeOf(node, resolve, depth) {
  const shape = resolve(node);
  const inner = shape.anyOf?.map(resolve).find((one) => one.type === "object") ?? (shape.type === "array" ? resolve(shape.items) : shape);
  const properties = Object.entries(inner.properties ?? {});
  if (!properties.length || depth > 3) return h("p", { class: "small muted" }, typeOf(node, resolve));
  return h("dl", { class: "facts" }, properties.map(([name, one]) => [h("dt", { class: "mono" }, name), h("dd", {}, h("span", { class: "muted" }, typeOf(one, resolve)), resolve(one).description || one.description ? prose(one.description ?? resolve(one).description, "small") : null)]));
}

document.getElementById("operator").addEventListener("click", () => askToken(load));
themeSwitch(document.getElementById("theme"));
load();
