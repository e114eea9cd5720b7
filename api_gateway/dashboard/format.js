// Numbers, durations and times as text.

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1e6) return `${trim(value / 1e6, digits)} M`;
  if (Math.abs(value) >= 1e4) return `${trim(value / 1e3, digits)} k`;
  return trim(value, digits);
}

function trim(value, digits) {
  if (Number.isInteger(value)) return String(value);
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.max(Math.abs(value), 1e-9))));
  return String(Number(value.toFixed(Math.min(places, 6))));
}

export function percent(part, whole) {
  if (!whole) return "–";
  const share = (part / whole) * 100;
  if (share > 0 && share < 0.1) return "<\u00a00.1\u00a0%";
  return `${share >= 10 || Number.isInteger(share) ? Math.round(share) : share.toFixed(1)}\u00a0%`; // a line does not break before the sign
}

/** Milliseconds as [text, unit]. */
export function latency(ms) {
  if (ms === null || ms === undefined) return ["–", ""];
  if (ms >= 1000) return [trim(ms / 1000, 3), "s"];
  return [trim(ms, 3), "ms"];
}

export function milliseconds(ms) {
  return latency(ms).filter(Boolean).join("\u00a0");
}

export function duration(seconds) {
  const value = Math.max(0, seconds);
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  if (value < 172800) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} days`;
}

/** A time of today as 14:03:07, another with its date. `at`: seconds since the epoch, or ISO 8601. */
export function clock(at) {
  if (at === null || at === undefined) return "–";
  const time = new Date(typeof at === "number" ? at * 1000 : at);
  if (Number.isNaN(time.getTime())) return "–";
  const text = time.toLocaleTimeString("en-GB");
  return time.toDateString() === new Date().toDateString() ? text : `${time.toLocaleDateString("en-CA")} ${text}`;
}

export function seconds(at) {
  return typeof at === "number" ? at : new Date(at).getTime() / 1000;
}

export function plural(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** Say that the figures of a limit are those of the share of one process; processes is null if they are not. */
export function share(processes, verb) {
  return processes === null || processes === undefined ? "" : ` (the store ${verb} unavailable: the share of one of ${number(processes)} processes)`;
}
