// The state of the gateway, kept up to date by server-sent events that are read with fetch.

import { ApiError, call, send } from "./api.js";

const SILENCE = 10000; // milliseconds without an event, after which the connection counts as lost
const LONGEST_DELAY = 8000;
const HOUR = 3600;

class Stream extends EventTarget {
  constructor() {
    super();
    this.state = "connecting"; // connecting, live, lost, refused
    this.lostAt = null;
    this.error = null; // the error response to the last attempt to connect
    this.hello = null;
    this.overview = null;
    this.problems = [];
    this.points = [];
    this.upstreams = new Map();
    this.changed = new Set(); // upstreams that the last frame has changed
    this.failures = 0;
    this.run = 0;
  }

  /** Connect, now or again with another token. */
  connect() {
    this.abort?.abort();
    this.run += 1;
    this.error = null;
    this.#set("connecting");
    this.#follow(this.run);
  }

  async #follow(run) {
    while (run === this.run) {
      const abort = (this.abort = new AbortController());
      try {
        await this.#read(abort);
      } catch (error) {
        if (run !== this.run) return;
        this.error = error instanceof ApiError ? error : null;
        if (this.error && [401, 403].includes(error.status)) { this.#set("refused"); return; }
      }
      if (run !== this.run) return;
      if (this.state !== "lost") this.lostAt = Date.now();
      this.#set("lost");
      const delay = Math.min(LONGEST_DELAY, 500 * 2 ** Math.min(this.failures, 6));
      this.failures += 1;
      await new Promise((done) => setTimeout(done, delay));
    }
  }

  async #read(abort) {
    let timer = null;
    const expect = () => { clearTimeout(timer); timer = setTimeout(() => abort.abort(), SILENCE); };
    expect();
    try {
      const response = await send("GET", "/dashboard/events", undefined, { signal: abort.signal });
      if (!response.ok) {
        let problem = {};
        try { problem = await response.json(); } catch { /* no problem details */ }
        throw new ApiError(response.status, problem);
      }
      this.fresh = true;
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        expect();
        rest += value;
        const events = rest.split("\n\n");
        rest = events.pop();
        for (const one of events) this.#receive(one);
      }
    } finally {
      clearTimeout(timer);
    }
  }

  #receive(text) {
    const name = /^event: (.*)$/m.exec(text)?.[1];
    const data = /^data: (.*)$/m.exec(text)?.[1];
    if (!name || !data) return;
    const value = JSON.parse(data);
    if (this.fresh) { // a new connection sends everything
      this.fresh = false;
      this.gone = new Set(this.upstreams.keys());
      this.isComplete = false;
    }
    if (name === "hello") { this.hello = value; this.dispatchEvent(new Event("hello")); }
    else if (name === "overview") { this.overview = value; this.skew = value.at - Date.now() / 1000; }
    else if (name === "problems") this.problems = value;
    else if (name === "points") this.#add(value);
    else if (name === "gone") for (const one of value) { this.upstreams.delete(one); this.changed.add(one); }
    else if (name === "upstreams") {
      for (const one of value) { this.upstreams.set(one.name, one); this.changed.add(one.name); this.gone?.delete(one.name); }
    } else if (name === "frame") {
      for (const one of this.gone ?? []) { this.upstreams.delete(one); this.changed.add(one); }
      this.gone = null;
      this.failures = 0;
      this.error = null;
      this.#set("live");
      this.dispatchEvent(new Event("frame"));
      this.changed.clear();
    }
  }

  #add(points) {
    const last = this.points.at(-1)?.at ?? 0;
    this.points.push(...points.filter((one) => one.at > last));
    const oldest = this.points.at(-1).at - HOUR;
    this.points = this.points.filter((one) => one.at > oldest);
  }

  #set(state) {
    if (this.state === state) return;
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }

  /** The time of the gateway, in seconds since the epoch. */
  now() {
    return Date.now() / 1000 + (this.skew ?? 0);
  }

  get mayChange() {
    return this.hello?.role === "operate";
  }
}

export const stream = new Stream();

/** Call `update` at each frame until `signal` is aborted, and once now if there is a frame. */
export function watch(signal, update) {
  stream.addEventListener("frame", update, { signal });
  if (stream.overview) update();
}

/** Call `load` every `interval` milliseconds while the page is shown; a call begins when the one before has ended. */
export function poll(signal, interval, load) {
  let timer = null;
  const turn = async () => {
    if (!document.hidden) {
      try { await load(); } catch (error) { if (error.name !== "AbortError") console.warn(error.message); }
    }
    if (!signal.aborted) timer = setTimeout(turn, interval);
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  turn();
}

export { call };
