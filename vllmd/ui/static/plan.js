// Plan: what this machine's own traffic would have met on other devices, with other settings or another policy.

import { html } from "./html.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import uPlot from "./vendor/uplot.js";
import { call, maySee } from "./api.js";
import { bytes, clock, count, percent, plural, seconds } from "./format.js";
import { useLive } from "./live.js";
import { Command, Empty, ModelPick, Problem, axes } from "./parts.js";

const TIMES = [[1, "the last day"], [7, "the last week"], [30, "the last 30 days"]];
const POLICIES = ["adaptive", "lru"];
const MIB = 2 ** 20;
const KEPT = {}; // what was asked and found last, for whoever looks at another view meanwhile

export function Plan() {
  const { status } = useLive();
  const [asked, setAsked] = useState(KEPT.asked || { days: 7, more: 1, size: "", policy: "", model: "", settings: "" });
  const [found, setFound] = useState(KEPT.found || null);
  const [error, setError] = useState(null);
  const [running, setRunning] = useState(null);
  useEffect(() => () => running?.abort(), [running]);
  if (!status) return html`<p class="soft">Reading the status.</p>`;
  if (!maySee("admin"))
    return html`<${Empty} title="Plans are for administrators"><p>They cost computing time. On the machine:</p><p><${Command} text="vllmctl simulate --recorded 7d" /></p></${Empty}>`;
  const largest = Math.max(0, ...status.devices.map((device) => device.memory));
  const set = (name) => (event) => setAsked({ ...asked, [name]: event.target.value });
  const ask = async (event) => {
    event.preventDefault();
    const stop = new AbortController();
    setRunning(stop);
    setError(null);
    try {
      const told = await call("POST", "/admin/plan", bodyOf(asked, status), { signal: stop.signal });
      Object.assign(KEPT, { asked, found: told });
      setFound(told);
    } catch (failure) {
      if (!stop.signal.aborted) setError(failure);
    }
    setRunning(null);
  };
  return html`<h2>Plan</h2>
    <p>What the requests that vllmd has recorded would have met with something else, beside how it is: computed by the scheduler itself under a virtual clock. Loading times are those of an A100 by the size of the weights.</p>
    <form onSubmit=${ask}><div class="filters">
      <label>Requests of <select value=${asked.days} onChange=${set("days")}>${TIMES.map(([days, title]) => html`<option value=${days}>${title}</option>`)}</select></label>
      <label>More GPUs <input type="number" min="0" max="16" value=${asked.more} onInput=${set("more")} /></label>
      <label>Memory of each, GiB <input type="number" min="1" step="any" value=${asked.size} placeholder=${largest ? Math.round(largest / 2 ** 30) : "80"} onInput=${set("size")} /></label>
      <label>Policy <select value=${asked.policy} onChange=${set("policy")}><option value="">${status.policy} (as it is)</option>${POLICIES.filter((each) => each !== status.policy).map((each) => html`<option>${each}</option>`)}</select></label>
      <${ModelPick} label="Model with other settings" names=${status.models.map((line) => line.name)} value=${asked.model} none="none" onPick=${(model) => setAsked({ ...asked, model })} /></div>
      ${asked.model && html`<label class="block">Its settings, one a line, as in vllmd.yaml <textarea rows="3" value=${asked.settings} placeholder="gpu_memory: 30GiB" onInput=${set("settings")}></textarea></label>`}
      <div class="buttons"><button type="button" disabled=${!running} onClick=${() => running.abort()}>Stop</button><button type="submit" class="primary" disabled=${Boolean(running)}>Compute</button></div></form>
    <${Problem} error=${error} />
    <div aria-live="polite">${running ? html`<p class="soft">Computing; a second for each thousand requests, as a rule.</p>` : found && html`<${Found} found=${found} />`}</div>`;
}

/** What the API is asked: devices as a list of sizes, settings as an object. */
export function bodyOf({ days, more, size, policy, model, settings }, status) {
  const own = status.devices.map((device) => device.memory);
  const each = size ? Number(size) * 2 ** 30 : Math.max(0, ...own) || 80 * 2 ** 30;
  const devices = [...own, ...Array.from({ length: Number(more) }, () => each)].map((amount) => `${Math.round(amount / MIB)}MiB`);
  const body = { since: Date.now() / 1000 - 86400 * Number(days) };
  if (devices.length > own.length) body.devices = devices.join(",");
  if (policy) body.policy = policy;
  if (model) body.models = { [model]: settingsOf(settings) };
  return body;
}

/** `name: value` lines; a value is JSON where it is any, else a text. */
export function settingsOf(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const [name, ...rest] = line.split(":"), value = rest.join(":").trim();
    if (!name.trim()) continue;
    try {
      found[name.trim()] = JSON.parse(value);
    } catch {
      found[name.trim()] = value;
    }
  }
  return found;
}

const FIGURES = [
  ["GPUs", (run) => run.devices.map(bytes).join(", ") || "none"], ["policy", (run) => run.policy],
  ["requests served", (run) => count(run.served)], ["failed", (run) => count(run.failed)], ["starts and wakes", (run) => count(run.swaps)],
  ["mean wait", (run) => seconds(run.wait.mean)], ["95 % waited at most", (run) => seconds(run.wait.p95)], ["longest wait", (run) => seconds(run.wait.longest)],
  ["mean time to the last token", (run) => seconds(run.latency.mean)],
  ["GPUs worked", (run) => Object.values(run.busy).map((share) => `${percent(share, 1)} %`).join(", ")],
]; // prettier-ignore

function Found({ found }) {
  const { runs } = found, names = [...new Set(runs.flatMap((run) => Object.keys(run.models)))];
  const cut = found.recorded > found.requests ? `, of ${count(found.recorded)}` : "";
  names.sort((first, second) => (runs[0].models[second]?.requests || 0) - (runs[0].models[first]?.requests || 0));
  return html`<p class="soft">${plural(found.requests, "request")}${cut}, from ${clock(found.since)} on.
      ${Object.entries(found.left_out).map(([name, why]) => html` <span class="warn">${name} is left out: ${why}.</span>`)}</p>
    <table class="rows" aria-label="plan"><thead><tr><th scope="col">figure</th>${runs.map((run) => html`<th scope="col" class="number">${run.name}</th>`)}</tr></thead>
      <tbody>${FIGURES.map(([title, told]) => html`<tr key=${title}><th scope="row">${title}</th>${runs.map((run) => html`<td class="number">${told(run)}</td>`)}</tr>`)}</tbody></table>
    <h3>Requests that wait</h3><${Waiting} runs=${runs} />
    <h3>By model</h3><table class="rows" aria-label="plan by model"><thead><tr><th scope="col">model</th><th scope="col" class="number">requests</th>
      ${runs.map((run) => html`<th scope="col" class="number">mean wait, ${run.name}</th><th scope="col" class="number wide">starts and wakes</th>`)}</tr></thead>
      <tbody>${names.map((name) => html`<tr key=${name}><th scope="row">${name}</th><td class="number">${count(runs[0].models[name]?.requests)}</td>
        ${runs.map(({ models: { [name]: own } }) => html`<td class="number">${own ? seconds(own.wait.mean) : "-"}</td><td class="number wide">${own ? own.swaps : "-"}</td>`)}</tr>`)}</tbody></table>`;
}

/** How many wait over time, a line for each run. */
function Waiting({ runs }) {
  const own = useRef(null);
  const times = [...new Set(runs.flatMap((run) => run.samples.map((sample) => sample.at)))].sort((first, second) => first - second);
  useEffect(() => {
    const data = runs.map((run) => {
      const at = new Map(run.samples.map((sample) => [sample.at, sample.queued]));
      return times.map((time) => at.get(time) ?? null);
    });
    const [x, y] = axes();
    const plot = new uPlot({ width: own.current.clientWidth, height: 180, scales: { x: { time: false } }, axes: [{ ...x, values: (_, ticks) => ticks.map(seconds) }, y],
      series: [{ label: "after", value: (_, at) => seconds(at) || "-" }, ...runs.map((run, at) => ({ label: run.name, stroke: `hsl(${(at * 187 + 210) % 360} 60% 50%)`, width: 2, spanGaps: true }))] },
      [times, ...data], own.current);
    const resize = () => plot.setSize({ width: own.current.clientWidth, height: 180 });
    window.addEventListener("resize", resize);
    return () => {
      window.removeEventListener("resize", resize);
      plot.destroy();
    };
  }, [runs]);
  const most = runs.map((run) => `${run.name}: at most ${Math.max(0, ...run.samples.map((sample) => sample.queued))}`).join("; ");
  return html`<div ref=${own} class="curve" role="img" aria-label=${`Requests that wait. ${most}`}></div>`;
}
