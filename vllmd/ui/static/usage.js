// Usage: who used how much, by key, model and day; as a table, as curves, and as a file to take along.

import { html } from "./html.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import uPlot from "./vendor/uplot.js";
import { call } from "./api.js";
import { count, csvOf, save, seconds } from "./format.js";
import { Empty, Problem, axes, useLoaded } from "./parts.js";

const TIMES = [["24h", "the last day"], ["7d", "the last week"], ["30d", "the last 30 days"], ["365d", "the last year"]];
const WHAT = [
  ["requests", "requests", count], ["errors", "errors", count], ["prompt", "prompt tokens", count], ["cached", "of them cached", count],
  ["answer", "answer tokens", count], ["engine_seconds", "engine time", seconds], ["device_seconds", "GPU time", seconds],
  ["memory_mib_seconds", "GPU memory", (amount) => `${hours(amount / 1024 / 3600)} GiB h`],
]; // prettier-ignore

const hours = (amount) => (amount < 100 ? amount.toFixed(2) : count(amount));

export function Usage() {
  const [by, setBy] = useState("key");
  const [since, setSince] = useState("30d");
  const [what, setWhat] = useState("answer");
  const path = (names) => `/admin/usage?by=${names}&since=${since}`;
  const { value, error } = useLoaded((signal) => call("GET", path(by), undefined, { signal }), [by, since]);
  const over = useLoaded((signal) => call("GET", path(`${since === "24h" ? "hour" : "day"},${by === "day" ? "model" : by}`), undefined, { signal }), [by, since]);
  const rows = value?.rows || [], shown = WHAT.filter(([field]) => rows.some((row) => row[field] !== undefined));
  return html`<h2>Usage</h2><div class="filters">
      <label>By <select value=${by} onChange=${(event) => setBy(event.target.value)}>${["key", "model", "day", "key,model"].map((each) => html`<option value=${each}>${each.replace(",", " and ")}</option>`)}</select></label>
      <label>Since <select value=${since} onChange=${(event) => setSince(event.target.value)}>${TIMES.map(([each, title]) => html`<option value=${each}>${title}</option>`)}</select></label>
      <label>Curve of <select value=${what} onChange=${(event) => setWhat(event.target.value)}>${WHAT.map(([each, title]) => html`<option value=${each}>${title}</option>`)}</select></label>
      <button type="button" disabled=${!rows.length} onClick=${() => save(`vllmd-usage-${by.replace(",", "-")}.csv`, csvOf(rows))}>Export as CSV</button></div>
    <${Problem} error=${error} />${value?.trouble && html`<p class="problem" role="alert">${value.trouble}</p>`}
    ${value && rows.length === 0
      ? html`<${Empty} title="Nothing has been used since then"><p>Each request counts here from its end on, by its key, its model and the hour.</p></${Empty}>`
      : html`${over.value && html`<${Curves} rows=${over.value.rows} by=${by === "day" ? "model" : by} what=${what} />`}
        <table class="rows" aria-label="usage"><thead><tr>${by.split(",").map((each) => html`<th scope="col">${each}</th>`)}${shown.map(([field, title]) => html`<th scope="col" class="number">${title}</th>`)}</tr></thead>
        <tbody>${rows.map((row) => html`<tr key=${by.split(",").map((each) => row[each]).join(" ")}>${by.split(",").map((each) => html`<th scope="row">${row[each] || "(no key)"}</th>`)}
          ${shown.map(([field, , format]) => html`<td class="number">${format(row[field])}</td>`)}</tr>`)}</tbody></table>
        <p>How they would fare on other devices, with other settings of models or another policy: <a href="#/plan">Plan</a>.</p>`}`;
}

const MOST_CURVES = 6;

/** The largest users, a line each, over time. */
function Curves({ rows, by, what }) {
  const own = useRef(null);
  const times = [...new Set(rows.map(timeOf))].sort((first, second) => first - second);
  const nameOf = (row) => by.split(",").map((each) => row[each] || "(no key)").join(", ");
  const totals = {};
  for (const row of rows) totals[nameOf(row)] = (totals[nameOf(row)] || 0) + (row[what] || 0);
  const names = Object.keys(totals).sort((first, second) => totals[second] - totals[first]).slice(0, MOST_CURVES);
  useEffect(() => {
    if (times.length < 2) return undefined;
    const [axis] = axes(), format = WHAT.find(([field]) => field === what)[2];
    const data = names.map((name) => times.map((at) => rows.filter((row) => timeOf(row) === at && nameOf(row) === name).reduce((sum, row) => sum + (row[what] || 0), 0)));
    const plot = new uPlot({ width: own.current.clientWidth, height: 200, axes: [axis, { ...axis, size: 80, values: (_, ticks) => ticks.map(format) }],
      series: [{}, ...names.map((name, at) => ({ label: name, stroke: `hsl(${(at * 67 + 210) % 360} 60% 50%)`, width: 2, value: (_, amount) => (amount === null ? "-" : format(amount)) }))] },
      [times, ...data], own.current);
    const resize = () => plot.setSize({ width: own.current.clientWidth, height: 200 });
    window.addEventListener("resize", resize);
    return () => {
      window.removeEventListener("resize", resize);
      plot.destroy();
    };
  }, [rows, by, what]);
  return times.length >= 2 && html`<div ref=${own} class="curve" role="img" aria-label=${`${what} over time by ${by}`}></div>`;
}

/** Days and hours are UTC. */
const timeOf = (row) => Date.parse(row.hour ? row.hour.replace(/Z?$/, "Z") : row.day) / 1000;
