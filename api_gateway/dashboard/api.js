// Requests to the gateway. The token is in the session storage of this tab and in the Authorization field, nowhere else.

const BASE = new URL("../", import.meta.url);
const KEY = "gateway-operator-token";

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail || `Status ${status}`);
    this.status = status;
    this.problem = problem;
  }
}

let token = read();

function read() {
  try { return sessionStorage.getItem(KEY) || ""; } catch { return ""; }
}

export function hasToken() {
  return token !== "";
}

export function setToken(value) {
  token = value.trim();
  try {
    if (token) sessionStorage.setItem(KEY, token);
    else sessionStorage.removeItem(KEY);
  } catch { /* without storage, the token is in memory only */ }
}

/** Return a segment of a path: a slash is %2F, a percent sign %25. */
export function segment(text) {
  return encodeURIComponent(text).replace(/[!'()*]/g, (one) => `%${one.charCodeAt(0).toString(16).toUpperCase()}`);
}

function headers(body) {
  const fields = {};
  if (token) fields.Authorization = `Bearer ${token}`;
  if (body !== undefined) fields["Content-Type"] = "application/json";
  return fields;
}

/** Return why a browser cannot send a request for this path, null if it can: URLs resolve the segments `.` and `..`. */
export function unsendable(path) {
  const meant = place(path).split("?")[0];
  return new URL(place(path), BASE).pathname === meant ? null
    : "A browser cannot send this request: it resolves the dots in the path, which would then name something else. Use the curl command, or the command line api-gateway.";
}

/** Return a path of the API with the path below which the gateway is. */
function place(path) {
  return BASE.pathname + path.replace(/^\//, "");
}

/** Send a request; return the response, of any status. Throws ApiError if a browser cannot send it, TypeError if the
 * gateway cannot be reached. */
export async function send(method, path, body, options = {}) {
  const problem = unsendable(path);
  if (problem) throw new ApiError(0, { detail: problem });
  return fetch(new URL(place(path), BASE), {
    method, headers: headers(body), body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
    credentials: "omit", ...options,
  });
}

/** Send a request and return the body of its response. Throws ApiError for an error status. */
export async function call(method, path, body, options = {}) {
  let response;
  try {
    response = await send(method, path, body, options);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError(0, { detail: "The gateway cannot be reached." });
  }
  const text = await response.text();
  let content = text;
  try { content = JSON.parse(text); } catch { /* not JSON */ }
  if (!response.ok) throw new ApiError(response.status, typeof content === "object" && content ? content : { detail: text });
  return content;
}

/** Return the command that sends the same request, without the token itself. */
export function curl(method, path, body) {
  const quoted = (text) => `'${String(text).replace(/'/g, "'\\''")}'`;
  const parts = ["curl"];
  if (method !== "GET") parts.push("-X", method);
  parts.push('-H "Authorization: Bearer $TOKEN"');
  if (body !== undefined) parts.push("-H 'Content-Type: application/json'", "-d", quoted(JSON.stringify(body)));
  if (unsendable(path)) parts.push("--path-as-is", quoted(BASE.origin + place(path)));
  else parts.push(quoted(new URL(place(path), BASE).href));
  return parts.join(" ");
}
