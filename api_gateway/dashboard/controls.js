// Buttons that send requests. Each shows its request as curl before it is sent.

import { ApiError, call, curl, hasToken, setToken, unsendable } from "./api.js";
import { h, put, say } from "./dom.js";
import { stream } from "./stream.js";

/** Return a block with a command and a button that copies it; `show` changes the command. */
export function curlBlock(method, path, body) {
  const text = h("code", {});
  const copy = h("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      say(copy, "Copied");
    } catch {
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      say(copy, "Selected");
    }
    setTimeout(() => say(copy, "Copy"), 1500);
  } }, "Copy");
  const block = h("div", { class: "curl" }, h("pre", {}, text), copy);
  block.show = (...request) => { say(text, curl(...request)); return block; };
  return block.show(method, path, body);
}

/** Return a disclosure with a command, for requests that only read. */
export function curlOf(method, path, body) {
  return h("details", { class: "small" }, h("summary", {}, "As curl"), curlBlock(method, path, body));
}

/** Return a field of a form, and read its value with `.value`. Options: a list of [value, text]. */
export function field(label, { type = "text", value = "", options = null, placeholder = null, hint = null, required = false, min = null, full = false } = {}) {
  const input = options
    ? h("select", {}, options.map(([one, text]) => h("option", { value: one, selected: one === value }, text)))
    : type === "textarea" ? h("textarea", { rows: 3, placeholder }) : h("input", { type, placeholder, min, autocomplete: "off", spellcheck: "false" });
  if (!options) input.value = value;
  else if (value !== "") input.value = value;
  input.required = required;
  const element = h("label", { class: `field${full ? " full" : ""}` }, h("span", {}, label), input, hint && h("small", { class: "muted" }, hint));
  return { element, input, get value() { return input.value; } };
}

/** Return a button that asks for confirmation, shows the request as curl and sends it.
 *
 * `fields` are of `field`. `request` returns {method, path, body} from them. `done` gets the body of the response, and
 * may return nodes that the dialog then shows instead of closing. */
export function action(label, { title, text, fields = () => [], request, done = () => {}, danger = false, confirm = label, role = "operate" }) {
  return h("button", {
    type: "button", class: danger ? "danger" : null, onclick: () => open({ title: title ?? label, text, fields: fields(), request, done, danger, confirm, role }),
  }, label);
}

function open({ title, text, fields, request, done, danger, confirm, role }) {
  const first = request(fields);
  const block = curlBlock(first.method, first.path, first.body);
  const error = h("p", { class: "notice fail", role: "alert", hidden: true });
  const hindrance = role === "operate" && !stream.mayChange ? "This token has the role read. The request needs a token with the role operate." : unsendable(first.path);
  const isAllowed = hindrance === null;
  const send = h("button", { type: "submit", class: danger ? "danger" : "primary", disabled: !isAllowed }, confirm);
  const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
  const refresh = () => { const one = request(fields); block.show(one.method, one.path, one.body); };
  const form = h("form", { method: "dialog", class: "stack", oninput: refresh, onchange: refresh, onsubmit: async (event) => {
    event.preventDefault();
    if (send.disabled) return;
    send.disabled = true;
    error.hidden = true;
    try {
      const one = request(fields);
      const shown = done(await call(one.method, one.path, one.body), one);
      if (shown instanceof Node) put(form, h("h2", {}, title), shown, h("div", { class: "actions" }, h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close")));
      else dialog.close();
    } catch (problem) {
      say(error, problem instanceof ApiError ? problem.message : `The response cannot be shown: ${problem.message}`);
      error.hidden = false;
      send.disabled = !isAllowed;
    }
  } },
  h("h2", { id: "dialog-title" }, title),
  text && h("p", { class: "muted" }, text),
  fields.map((one) => one.element),
  block,
  !isAllowed && h("p", { class: "notice warn" }, hindrance),
  error,
  h("div", { class: "actions" }, cancel, send));
  const dialog = show(form, "dialog-title");
  (fields[0]?.input ?? (danger || !isAllowed ? cancel : send)).focus();
}

function show(content, title) {
  const before = document.activeElement;
  const dialog = h("dialog", { "aria-labelledby": title }, content);
  dialog.addEventListener("close", () => { dialog.remove(); before?.focus?.(); });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask for the token; call `done` when it was set or removed. */
export function askToken(done, problem = null) {
  if (document.querySelector("dialog")) return;
  const input = field("Token", { type: "password", required: false });
  const form = h("form", { method: "dialog", class: "stack", onsubmit: (event) => {
    event.preventDefault();
    setToken(input.value);
    dialog.close();
    done();
  } },
  h("h2", { id: "dialog-title" }, "Operator token"),
  problem && h("p", { class: "notice warn" }, problem),
  h("p", { class: "muted" }, "A configured token, or the one in the file operator-token of the state folder. The role read shows everything; changes need operate. It is kept in this tab until the tab is closed."),
  input.element,
  h("div", { class: "actions" },
    hasToken() && h("button", { type: "button", class: "danger", onclick: () => { setToken(""); dialog.close(); done(); } }, "Remove"),
    h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"),
    h("button", { type: "submit", class: "primary" }, "Use this token")));
  const dialog = show(form, "dialog-title");
  input.input.focus();
}

/** Set up the switch of the theme: auto, light, dark. */
export function themeSwitch(button) {
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("gateway-theme") || "auto"; } catch { /* auto */ }
  if (!themes.includes(theme)) theme = "auto";
  const apply = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    if (button) say(button, `Theme: ${theme}`);
    window.dispatchEvent(new Event("theme"));
  };
  button?.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("gateway-theme", theme); } catch { /* for this page only */ }
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

/** Return an element that says why something cannot be shown. */
export function failure(error) {
  return h("p", { class: "notice fail", role: "alert" }, error.message);
}
