// What the page knows of the machine, kept current while somebody looks at it.
//
// The daemon's events say that something changed; the status is then read anew, never more often than costs the daemon
// one part in thirty of its time. A page in the background lets go of its connection: it must not keep a daemon awake
// that would otherwise exit.

import { useEffect, useState } from "./vendor/hooks.js";
import { call, currentSession, events, text } from "./api.js";
import { isMoving } from "./format.js";

const QUIET = 5000, MOVING = 1000, SHARE = 30; // ms, ms, and how much longer than a look the next one is waited for
const LONGEST = 15000; // ms; a busy machine must not make it minutes
const METRICS_EVERY = 5000; // ms
const KEPT_SAMPLES = 3600, KEPT_DECISIONS = 2000;
const FIRST_RETRY = 500, LAST_RETRY = 10000; // ms

export const live = {
  status: null,
  decisions: [], // oldest first
  samples: [], // {at, devices: what sharesOf tells of each, host: as in the status}, oldest first
  rates: {}, // model -> {tokens, requests, firstByte}; per second, and seconds
  trouble: "", // why there is no connection
};
const watchers = new Set();
let scheduled = 0, running = null, wanted = false, last = 0, took = 0;

function changed() {
  if (scheduled) return;
  scheduled = requestAnimationFrame(() => {
    scheduled = 0;
    for (const watcher of watchers) watcher({});
  });
}

/** Render again whenever `live` changes. */
export function useLive() {
  const [, poke] = useState({});
  useEffect(() => {
    watchers.add(poke);
    return () => watchers.delete(poke);
  }, []);
  return live;
}

/** Keep `live` current until the returned function is called. */
export function follow() {
  const begin = () => {
    if (!document.hidden && !running && currentSession()) {
      running = new AbortController();
      keepReading(running.signal);
      keepListening(running.signal);
      keepCounting(running.signal);
    }
  };
  const end = () => {
    running?.abort();
    running = null;
  };
  const onVisibility = () => (document.hidden ? end() : begin());
  document.addEventListener("visibilitychange", onVisibility);
  begin();
  return () => {
    document.removeEventListener("visibilitychange", onVisibility);
    end();
  };
}

/** Read the status soon: something was just asked for. */
export const refresh = () => (wanted = true);

async function keepReading(signal) {
  let retry = FIRST_RETRY;
  while (!signal.aborted) {
    try {
      const began = performance.now();
      const status = await call("GET", "/admin/status", undefined, { signal });
      took = performance.now() - began;
      last = performance.now();
      retry = FIRST_RETRY;
      live.status = status;
      live.trouble = "";
      remember(status);
      changed();
    } catch (error) {
      if (signal.aborted || error.status === 401) return;
      live.trouble = error.status ? error.message : `${error.message}; trying again`;
      changed();
      await pause(retry, signal);
      retry = Math.min(2 * retry, LAST_RETRY);
      continue;
    }
    await until(() => wanted || performance.now() >= last + interval(), signal, Math.min(took * SHARE, LONGEST));
    wanted = false;
  }
}

const interval = () => (live.status?.models.some((line) => line.in_flight || line.queued || isMoving(line.state)) ? MOVING : QUIET);

async function keepListening(signal) {
  let retry = FIRST_RETRY;
  while (!signal.aborted) {
    try {
      const known = await call("GET", "/admin/decisions", undefined, { signal });
      live.decisions = known.decisions.slice(-KEPT_DECISIONS);
      changed();
      for await (const event of events("/admin/events", { signal })) {
        retry = FIRST_RETRY;
        live.decisions = [...live.decisions.slice(1 - KEPT_DECISIONS), event];
        if (event.state) become(event.model, event.state);
        wanted = true;
        changed();
      }
    } catch (error) {
      if (signal.aborted || error.status === 401 || error.status === 403) return;
    }
    await pause(retry, signal);
    retry = Math.min(2 * retry, LAST_RETRY);
  }
}

/** An event says what became of a model; of thousands the status is read seldom, and this one need not wait for it. */
function become(name, state) {
  const line = live.status?.models.find((each) => each.name === name);
  if (line) line.state = state;
}

/** Rates are differences of the metrics' counters. */
async function keepCounting(signal) {
  let before = null;
  while (!signal.aborted) {
    try {
      const at = performance.now() / 1000;
      const now = { at, ...countersOf(await text("/metrics", { signal })) };
      if (before) live.rates = ratesBetween(before, now);
      before = now;
      changed();
    } catch {
      before = null; // the page shows no rates then; what is wrong stands in the banner
    }
    await pause(METRICS_EVERY, signal);
  }
}

const COUNTED = {
  vllmd_model_tokens_total: "tokens",
  vllmd_model_requests_total: "requests",
  vllmd_model_time_to_first_byte_seconds_sum: "waited",
  vllmd_model_time_to_first_byte_seconds_count: "answers",
};

export function countersOf(metrics) {
  const found = {};
  for (const line of metrics.split("\n")) {
    const name = line.slice(0, line.indexOf("{"));
    const counter = COUNTED[name];
    if (!counter) continue;
    const model = /model="((?:[^"\\]|\\.)*)"/.exec(line);
    const value = Number(line.slice(line.lastIndexOf("}") + 1).trim().split(" ")[0]);
    if (model) ((found[counter] ||= {})[model[1]] = (found[counter][model[1]] || 0) + value);
  }
  return found;
}

export function ratesBetween(before, now) {
  const passed = now.at - before.at, rates = {};
  const grown = (counter, model) => Math.max(0, (now[counter]?.[model] || 0) - (before[counter]?.[model] || 0));
  for (const model of Object.keys(now.requests || {})) {
    const answers = grown("answers", model);
    rates[model] = {
      tokens: grown("tokens", model) / passed,
      requests: grown("requests", model) / passed,
      firstByte: answers ? grown("waited", model) / answers : null,
    };
  }
  return rates;
}

function remember(status) {
  const devices = status.devices.map((device) => sharesOf(status, device));
  live.samples = [...live.samples.slice(1 - KEPT_SAMPLES), { at: Date.now() / 1000, devices, host: status.host }];
}

/** The engines that hold memory of a device, and what is left of it; bytes. */
export function sharesOf(status, device) {
  const shares = [];
  for (const line of enginesOf(status))
    if (line.devices.includes(device.index) && line.memory > 0)
      shares.push({ name: line.name, state: line.state, memory: line.memory });
  const held = shares.reduce((sum, share) => sum + share.memory, 0);
  const free = Math.max(0, device.memory - device.reserve - device.external - held);
  return { power: device.power, temperature: device.temperature, utilisation: device.utilisation, index: device.index, memory: device.memory, reserve: device.reserve, external: device.external, shares, held, free };
}

/** A line for every engine: a model's own, or those of its replicas. */
export const enginesOf = (status) => status.models.flatMap((line) => (line.replicas?.length ? line.replicas : [line]));

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

async function until(condition, signal, least) {
  await pause(Math.max(100, least), signal);
  while (!signal.aborted && !condition()) await pause(100, signal);
}
