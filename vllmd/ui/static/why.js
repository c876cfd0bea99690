// Why: the decisions as they were made, under the curve of the memory that they moved.

import { html } from "./html.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import uPlot from "./vendor/uplot.js";
import { bytes, clock, firstLine, seconds } from "./format.js";
import { useLive } from "./live.js";
import { Empty, ModelPick, Rows } from "./parts.js";

const ROW = 41; // pixels
const LEAST_SPAN = 60; // seconds

export function Why({ model: asked = "" }) {
  const { decisions, samples, status } = useLive();
  const [model, setModel] = useState(asked);
  const [wanted, setWanted] = useState("held");
  const curves = Object.keys(CURVES).filter((id) => isTold(status, id));
  const what = curves.includes(wanted) ? wanted : curves[0];
  const [open, setOpen] = useState(null);
  const names = [...new Set(decisions.map((decision) => decision.model))].filter(Boolean).sort();
  const shown = decisions.filter((decision) => !model || decision.model === model || victimsOf(decision).some(({ name }) => name === model)).reverse();
  return html`
    <section aria-labelledby="curve"><h2 id="curve">${CURVES[what || "held"].title} over time</h2>
      ${curves.length > 1 && html`<div class="filters"><label>Curve of <select value=${what} onChange=${(event) => setWanted(event.target.value)}>${curves.map((id) => html`<option value=${id}>${CURVES[id].title}</option>`)}</select></label></div>`}
      ${what ? html`<${Curve} key=${what} what=${what} samples=${samples} status=${status} />` : html`<p class="soft">There is no device whose memory could be drawn.</p>`}</section>
    <section aria-labelledby="decisions"><h2 id="decisions">Decisions</h2>
      <div class="filters"><${ModelPick} label="Model" names=${names} value=${model} none="all" onPick=${setModel} /></div>
      ${shown.length === 0
        ? html`<${Empty} title="Nothing has been decided yet"><p>Each start, sleep, stop and failure stands here with its reason, also those of earlier runs of vllmd.</p></${Empty}>`
        : html`<${Rows} items=${shown} height=${ROW} columns=${[["time"], ["model"], ["what"], ["why"]]} label="decisions"
            render=${(decision, at) => html`<${Decision} key=${`${decision.at} ${decision.what} ${decision.model}`} decision=${decision}
              open=${open === decision} onOpen=${() => setOpen(open === decision ? null : decision)} />`} />`}</section>`;
}

/** `[{name, level}]` of the models that leave for another one; level 1 and 2 are asleep, 3 is stopped. */
export function victimsOf(decision) {
  const told = decision.numbers?.victims;
  if (!told) return [];
  return told.split(",").map((each) => {
    const cut = each.lastIndexOf(":");
    return { name: each.slice(0, cut), level: Number(each.slice(cut + 1)) };
  });
}

function Decision({ decision, open, onOpen }) {
  const victims = victimsOf(decision);
  const { waiting, waited, cost } = decision.numbers || {};
  return html`<tr class=${decision.what.includes("fail") ? "failed" : ""}>
    <td class="nowrap">${clock(decision.at)}</td><th scope="row">${decision.model || "(no model)"}</th><td>${decision.what}</td>
    <td><button type="button" class="link" aria-expanded=${open} onClick=${onOpen}>${firstLine(decision.why)}</button>
      ${victims.length > 0 && html` <span class="soft">${victims.map(({ name, level }) => `${name} ${level >= 3 ? "stops" : `sleeps, level ${level}`}`).join("; ")}</span>`}
      ${waiting > 0 && html` <span class="soft">${waiting} waited${waited ? ` ${seconds(waited)}` : ""}</span>`}
      ${cost > 0 && html` <span class="soft">expected to take ${seconds(cost)}</span>`}
      ${open && html`<dl class="numbers">${Object.entries(decision.numbers || {}).map(([name, value]) => html`<div><dt>${name}</dt><dd>${String(value)}</dd></div>`)}</dl>
        ${decision.why.includes("\n") && html`<pre>${decision.why}</pre>`}`}</td></tr>`;
}

const CURVES = {
  held: { title: "Memory", told: bytes, about: "Memory held by engines" },
  utilisation: { title: "Utilisation", told: (share) => (share === null ? "" : `${Math.round(share)} %`), about: "Share of time that it computed" },
  power: { title: "Power", told: (watts) => (watts === null ? "" : `${Math.round(watts)} W`), about: "Power" },
  temperature: { title: "Temperature", told: (degrees) => (degrees === null ? "" : `${Math.round(degrees)} °C`), about: "Temperature" },
  load: { title: "Load of the CPUs", told: (load) => (load === null ? "" : load.toFixed(1)), about: "Load of the CPUs", ofHost: ({ load }) => load },
  used: { title: "Host memory", told: bytes, about: "Host memory in use", ofHost: ({ memory, available }) => (available === null ? null : memory - available) },
};

/** Whether the machine tells what the curve is of. */
function isTold(status, id) {
  if (CURVES[id].ofHost) return Boolean(status?.host) && CURVES[id].ofHost(status.host) !== null;
  return Boolean(status) && status.devices.some((device) => id === "held" || typeof device[id] === "number");
}

/** A line per device, or one for the host; what the page has seen since it was opened. */
function Curve({ what, samples, status }) {
  const { told, about, ofHost } = CURVES[what];
  const names = ofHost ? ["the host"] : status.devices.map((device) => `GPU ${device.index}`);
  const own = useRef(null), plot = useRef(null);
  const style = getComputedStyle(document.documentElement);
  const count = names.length;
  useEffect(() => {
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const largest = ofHost ? status.host.memory : Math.max(...status.devices.map((device) => device.memory));
    const isMemory = what === "held" || what === "used";
    const series = names.map((name, at) => ({ label: name, stroke: `hsl(${(at * 67 + 210) % 360} 60% 50%)`, width: 2,
      paths: uPlot.paths.stepped({ align: 1 }), value: (_, amount) => told(amount) || "-" }));
    plot.current = new uPlot(
      { width: own.current.clientWidth, height: 180, series: [{}, ...series], axes: [axis, { ...axis, size: 70, ...(isMemory && { splits: () => [0, 1, 2, 3, 4].map((part) => (part * largest) / 4) }), values: (_, ticks) => ticks.map(told) }],
        scales: { x: { range: (_, first, last) => [Math.min(first, last - LEAST_SPAN), last] }, y: isMemory ? { range: [0, largest] } : {} }, cursor: { y: false } },
      dataOf(samples, count, what), own.current);
    const resize = () => plot.current.setSize({ width: own.current.clientWidth, height: 180 });
    window.addEventListener("resize", resize);
    return () => {
      window.removeEventListener("resize", resize);
      plot.current.destroy();
    };
  }, [count]);
  useEffect(() => plot.current?.setData(dataOf(samples, count, what)), [samples]);
  const last = samples.at(-1);
  const said = last ? (ofHost ? told(ofHost(last.host)) : last.devices.map((device) => `GPU ${device.index}: ${told(device[what])}`).join("; ")) : "";
  return html`<div ref=${own} class="curve" role="img" aria-label=${`${about}. ${said}`}></div>`;
}

function dataOf(samples, count, what) {
  const { ofHost } = CURVES[what];
  if (ofHost) return [samples.map((sample) => sample.at), samples.map((sample) => (sample.host ? ofHost(sample.host) : null))];
  const devices = Array.from({ length: count }, (_, at) => samples.map((sample) => sample.devices[at]?.[what] ?? null));
  return [samples.map((sample) => sample.at), ...devices];
}
