// The frame of the dashboard: pages by the fragment of the URL, the connection, token and theme.

import { hasToken } from "./api.js";
import { askToken, themeSwitch } from "./controls.js";
import { put, say } from "./dom.js";
import { duration } from "./format.js";
import { stream } from "./stream.js";
import { clients } from "./pages/clients.js";
import { configuration } from "./pages/configuration.js";
import { explain } from "./pages/explain.js";
import { overview } from "./pages/overview.js";
import { upstreams } from "./pages/upstreams.js";

const PAGES = { "": ["Overview", overview], upstreams: ["Upstreams", upstreams], clients: ["Clients", clients], explain: ["Explain", explain], configuration: ["Configuration", configuration] };
const main = document.getElementById("main");
const connection = document.getElementById("connection");
const operator = document.getElementById("operator");
let shown = { name: null, abort: new AbortController(), page: null };

function route() {
  const [, name = "", ...rest] = location.hash.replace(/^#/, "").split("/");
  let argument = rest.join("/");
  try { argument = decodeURIComponent(argument); } catch { /* as it is */ }
  return [name in PAGES ? name : "", argument];
}

function show() {
  if (location.hash === "#main") { main.focus(); return; }
  const [name, argument] = route();
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (shown.name === name && shown.page?.select) { shown.page.select(argument); return; }
  const isFirst = shown.name === null;
  shown.abort.abort();
  const [title, page] = PAGES[name];
  document.title = `${title} · API Gateway`;
  const abort = new AbortController();
  put(main);
  shown = { name, abort, page: page(main, argument, abort.signal) };
  if (!isFirst) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
}

function connected() {
  const words = { connecting: "Connecting", live: "Live", refused: "Not authorised" };
  const lost = stream.lostAt ? `Connection lost ${duration((Date.now() - stream.lostAt) / 1000)} ago` : "Connection lost";
  connection.dataset.state = stream.state;
  const text = words[stream.state] ?? (stream.error ? "Not connected" : lost);
  say(connection, stream.error ? `${text}: ${stream.error.message}` : text);
}

function greet() {
  const { operator: name, role, version } = stream.hello;
  say(operator, name === "local" ? `local (${role})` : `${name} (${role})`);
  say(document.getElementById("version"), `API Gateway ${version}`);
}

stream.addEventListener("state", () => {
  connected();
  if (stream.state === "refused") askToken(() => stream.connect(), hasToken() ? stream.error.message : null);
});
stream.addEventListener("hello", greet);
setInterval(() => { if (stream.state === "lost") connected(); }, 1000);
operator.addEventListener("click", () => askToken(() => stream.connect()));
themeSwitch(document.getElementById("theme"));
addEventListener("hashchange", show);
show();
connected();
stream.connect();
