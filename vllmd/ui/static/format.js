// Figures for people. Amounts are bytes, times are seconds, moments are Unix time.

export function bytes(amount) {
  if (amount === null || amount === undefined) return "";
  for (const [unit, scale] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (Math.abs(amount) >= scale) return `${trim(amount / scale)} ${unit}`;
  return `${Math.round(amount)} B`;
}

export function seconds(amount) {
  if (amount === null || amount === undefined) return "";
  if (amount < 0.001) return "0 s";
  if (amount < 1) return `${Math.round(amount * 1000)} ms`;
  if (amount < 60) return `${amount < 10 ? trim(amount) : Math.round(amount)} s`;
  if (amount < 3600) return `${Math.floor(amount / 60)} min ${Math.round(amount % 60)} s`;
  if (amount < 172800) return `${Math.floor(amount / 3600)} h ${Math.round((amount % 3600) / 60)} min`;
  return `${Math.round(amount / 86400)} days`;
}

export function count(amount) {
  if (amount === null || amount === undefined) return "";
  if (amount >= 1e6) return `${trim(amount / 1e6)} M`;
  return amount >= 1e4 ? `${trim(amount / 1e3)} k` : String(Math.round(amount));
}

export const rate = (amount) => (amount ? (amount < 10 ? amount.toFixed(1) : String(Math.round(amount))) : "");
export const plural = (amount, noun) => `${amount} ${noun}${amount === 1 ? "" : "s"}`;
export const percent = (part, whole) => (whole > 0 ? Math.round((100 * part) / whole) : 0);

export function clock(at) {
  const when = new Date(at * 1000);
  const time = when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return when.toDateString() === new Date().toDateString() ? time : `${when.toLocaleDateString()} ${time}`;
}

export const STATES = {
  stopped: "stopped",
  starting: "starting",
  running: "running",
  draining: "draining",
  falling_asleep: "falling asleep",
  sleeping_l1: "asleep (weights in host memory)",
  sleeping_l2: "asleep (weights dropped)",
  waking: "waking",
  stopping: "stopping",
  error: "failed",
};
export const shortState = (state) => (state.startsWith("sleeping") ? `asleep, level ${state.at(-1)}` : STATES[state] || state);
export const isAsleep = (state) => state.startsWith("sleeping");
export const isMoving = (state) => ["starting", "draining", "falling_asleep", "waking", "stopping"].includes(state);

/** Tokens per second of a request, while its prompt was read and while it was answered; null where that cannot be said. */
export function speedsOf({ tokens, seconds: whole, first_byte_seconds: first, queue_seconds: queue, load_seconds: load, stream }) {
  if (!tokens || !stream || first === null || first === undefined) return { prompt: null, answer: null };
  const reading = first - (queue || 0) - (load || 0), writing = whole - first;
  const per = (amount, time) => (amount > 1 && time > 0.01 ? amount / time : null);
  return { prompt: per(tokens.prompt - (tokens.cached || 0), reading), answer: per(tokens.answer - 1, writing) };
}

/** What a reason says, without the engine's log below it. */
export const firstLine = (reason) => reason.split("\n")[0].replace(/; its (last log lines|log around that, and its last lines):$/, "");

/** A table for spreadsheets. */
export function csvOf(rows) {
  const fields = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  // A text that begins like a formula would be one in a spreadsheet.
  const cell = (value) => (typeof value === "string" ? `"${value.replace(/^([=+\-@\t\r])/, "'$1").replaceAll('"', '""')}"` : (value ?? ""));
  return [fields.join(","), ...rows.map((row) => fields.map((field) => cell(row[field])).join(","))].join("\r\n") + "\r\n";
}

export function save(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const trim = (value) => value.toFixed(value < 10 ? 1 : 0).replace(/\.0$/, "");
