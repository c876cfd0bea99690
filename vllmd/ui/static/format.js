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

const trim = (value) => value.toFixed(value < 10 ? 1 : 0).replace(/\.0$/, "");
