// Now: what holds the memory, and what each model does and why it waits; with the operator's verbs.

import { html } from "./html.js";
import { useState } from "./vendor/hooks.js";
import { call, maySee, modelPath } from "./api.js";
import { bytes, firstLine, isAsleep, isMoving, percent, plural, rate, seconds, shortState } from "./format.js";
import { refresh, sharesOf, useLive } from "./live.js";
import { Command, Dialog, Empty, Problem, Rows, State, useLoaded } from "./parts.js";

const ROW = 41; // pixels, as in style.css

export function Now() {
  const { status, rates } = useLive();
  const [words, setWords] = useState("");
  const [only, setOnly] = useState("all");
  const [asked, setAsked] = useState(null); // {verb, line} or {verb, device}, to be confirmed
  const [emptying, setEmptying] = useState(false);
  if (!status) return html`<p class="soft">Reading the status.</p>`;
  if (status.configuration.error)
    return html`<${Empty} title="The configuration is invalid: no model is served">
      <pre>${status.configuration.error}</pre><p>Once it is repaired:</p><${Command} text="sudo systemctl reload vllmd" /></${Empty}>`;
  const shown = status.models.filter(
    (line) => line.name.toLowerCase().includes(words.toLowerCase()) && (only === "all" || groupOf(line) === only),
  );
  const counts = countsOf(status.models);
  return html`<${Troubles} status=${status} />
    <section aria-labelledby="devices"><h2 id="devices">Memory</h2>
      <${Devices} status=${status} onAsk=${setAsked} /></section>
    <section aria-labelledby="models"><h2 id="models">Models</h2>
      ${status.models.length === 0
        ? html`<${NoModels} />`
        : html`<div class="filters">
            <label>Name <input type="search" value=${words} onInput=${(event) => setWords(event.target.value)} /></label>
            <div role="group" aria-label="state">${["all", ...GROUPS].map(
              (group) => html`<button type="button" class="chip" aria-pressed=${only === group} onClick=${() => setOnly(group)}>
                ${group} ${group === "all" ? status.models.length : counts[group]}</button>`,
            )}</div>
            ${maySee("admin") && status.models.some(isThere) && html`<button type="button" aria-haspopup="dialog" onClick=${() => setEmptying(true)}>stop all</button>`}</div>
          <${Rows} items=${shown} height=${ROW} columns=${COLUMNS} label="models"
            render=${(line) => html`<${Line} key=${line.name} line=${line} rates=${rates[line.name]} onAsk=${setAsked} />`} />
          ${shown.length === 0 && html`<p class="soft">No model is called so.</p>`}`}</section>
    ${asked && html`<${Ask} ...${asked} line=${asked.line && (status.models.find((line) => line.name === asked.line.name) || asked.line)} onClose=${() => setAsked(null)} />`}
    ${emptying && html`<${StopAll} lines=${status.models.filter(isThere)} onClose=${() => setEmptying(false)} />`}`;
}

/** Whether an engine of the model is there, or about to be. */
const isThere = (line) => line.state !== "stopped" && line.state !== "error";

const GROUPS = ["waiting", "loaded", "asleep", "stopped", "failed", "disabled"];
const COLUMNS = [["model"], ["state"], ["queue", "number"], ["running", "number"], ["tokens/s", "number wide"],
  ["first byte", "number wide"], ["next", "wide roomy"], [html`<span class="unseen">actions</span>`, "verbs"]]; // prettier-ignore

function groupOf(line) {
  if (line.disabled) return "disabled";
  if (line.queued || line.waiting_for) return "waiting";
  if (line.state === "error") return "failed";
  if (line.state === "stopped") return "stopped";
  return isAsleep(line.state) ? "asleep" : "loaded";
}

function countsOf(lines) {
  const counts = Object.fromEntries(GROUPS.map((group) => [group, 0]));
  for (const line of lines) counts[groupOf(line)] += 1;
  return counts;
}

const MOST_TROUBLES = 5; // failed models whose causes are told above everything else

/** What whoever looks in the morning must not have to scroll for: what failed, and why. */
function Troubles({ status }) {
  const failed = status.models.filter((line) => line.state === "error" || line.never);
  const more = failed.length - MOST_TROUBLES;
  if (failed.length === 0 && !status.configuration.refused && !status.launcher_trouble) return null;
  return html`<div class="problem troubles" role="status" aria-label="what is wrong">
    ${status.launcher_trouble && html`<p>No engine starts or ends, because of the launcher: ${status.launcher_trouble}</p>`}
    ${status.configuration.refused && html`<p>The configuration files are not in force, a restart would serve no model: ${status.configuration.refused}</p>`}
    ${failed.slice(0, MOST_TROUBLES).map((line) => html`<p key=${line.name}><strong>${line.name}</strong> ${line.never ? `can never be loaded: ${line.never}` : `has failed: ${firstLine(line.failure)}`}</p>`)}
    ${more > 0 && html`<p>and ${plural(more, "more model")}</p>`}</div>`;
}

function NoModels() {
  return html`<${Empty} title="No model is configured">
    <p>Add one, and ask it something:</p>
    <p><${Command} text=${'vllmctl run smollm2 "What is the capital of France?"'} /></p>
    <p class="soft">Or name models in /etc/vllmd/vllmd.yaml; <code>man vllmd.yaml</code> has every setting.</p></${Empty}>`;
}

function Devices({ status, onAsk }) {
  if (status.trouble) return html`<p class="problem" role="alert">The devices do not answer: ${status.trouble}</p>`;
  if (status.devices.length === 0) return html`<p class="soft">There is no GPU here; models run on the CPU.</p><${Host} status=${status} />`;
  return html`<div class="devices">${status.devices.map((device) => html`<${Device} key=${device.index} status=${status} device=${device} onAsk=${onAsk} />`)}</div>
    <${Host} status=${status} />`;
}

function Device({ status, device, onAsk }) {
  const { shares, free } = sharesOf(status, device);
  const width = (amount) => ({ width: `${(100 * amount) / device.memory}%` });
  const said = shares.map((share) => `${share.name} ${bytes(share.memory)}, ${shortState(share.state)}`);
  return html`<div class="device">
    <div class="device-head"><strong>GPU ${device.index}</strong> <span class="soft">${device.name}</span>
      <span class="soft">${bytes(free)} free of ${bytes(device.memory)}</span>
      ${told(device.utilisation) && html`<span class="soft">${Math.round(device.utilisation)} % busy</span>`}
      ${device.power !== null && html`<span class="soft">${Math.round(device.power)} W</span>`}
      ${device.temperature !== null && html`<span class="soft">${Math.round(device.temperature)} °C</span>`}
      ${device.throttled && html`<span class="warn">slowed down: ${device.throttled}</span>`}
      ${device.wedged && html`<span class="warn">${device.wedged}</span>`}
      ${maySee("admin") && html`<button type="button" class="small" aria-label=${`${device.drained ? "give back" : "drain"} GPU ${device.index}`} onClick=${() => onAsk({ verb: device.drained ? "undrain" : "drain", device })}>
        ${device.drained ? "give back" : "drain"}</button>`}</div>
    <div class="bar" role="img" aria-label=${`GPU ${device.index}: ${[...said, `${bytes(free)} free`].join("; ")}`}>
      ${shares.map((share) => html`<span key=${share.name} class=${`share ${isAsleep(share.state) ? "asleep" : ""}`} style=${{ ...width(share.memory), "--hue": hueOf(share.name) }}
        title=${`${share.name}: ${bytes(share.memory)}, ${shortState(share.state)}`}>${percent(share.memory, device.memory) > 8 ? share.name : ""}</span>`)}
      ${device.external > 0 && html`<span class="share external" style=${width(device.external)} title=${`other programs: ${bytes(device.external)}`}>others</span>`}
      <span class="free" style=${width(free)}></span>
      ${device.reserve > 0 && html`<span class="share reserve" style=${width(device.reserve)} title=${`reserve: ${bytes(device.reserve)}`}></span>`}</div></div>`;
}

function Host({ status }) {
  const { budget, promised } = status.host_memory;
  return html`<p class="soft">Host memory for engines: ${bytes(promised)} of ${bytes(budget)} promised.</p>${status.host && html`<${Hardware} status=${status} host=${status.host} />`}`;
}

const told = (figure) => figure !== null && figure !== undefined;

/** What the machine is made of; how busy it is stands in the line that is always in sight. */
function Hardware({ status, host }) {
  const facts = [["system", host.system], ["CPUs", host.cpus], ["memory", bytes(host.memory)], ["devices from", status.source]];
  const now = [told(host.load) && `load ${host.load} on ${plural(host.cpus, "CPU")}`, told(host.available) && `${bytes(host.available)} of ${bytes(host.memory)} memory available`].filter(Boolean);
  return html`<details class="hardware"><summary>Hardware <span class="soft">${now.join(", ")}</span></summary>
    <dl class="facts">${facts.filter(([, value]) => value).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
      ${status.devices.map((device) => html`<div key=${device.index}><dt>GPU ${device.index}</dt><dd>${aboutDevice(device)}</dd></div>`)}</dl>
    ${journalOf(status.backend) && html`<p>vllmd's own log: <${Command} text=${journalOf(status.backend)} /></p>`}</details>`;
}

/** The command that shows the daemon's own log, which only the journal keeps; "" where there is none. */
function journalOf(backend) {
  if (!backend.startsWith("systemd")) return "";
  return `journalctl ${backend === "systemd-user" ? "--user " : ""}-u vllmd -f`;
}

function aboutDevice(device) {
  const { name, memory, id, node, cpus, links } = device;
  const beside = links?.length > 0 && `linked to GPU ${links.join(", ")}`;
  const near = told(node) && `NUMA node ${node}${cpus?.length ? ` with ${plural(cpus.length, "CPU")}` : ""}`;
  return [name, bytes(memory), beside, near, id].filter(Boolean).join("; ");
}

/** A colour of its own for each name, the same every time. */
export function hueOf(name) {
  let sum = 0;
  for (const letter of name) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

function Line({ line, rates, onAsk }) {
  const waits = line.waiting_for || (line.queued ? "its turn" : "");
  const phase = isMoving(line.state) && (line.detail || line.phase);
  return html`<tr>
    <th scope="row"><a href=${`#/models/${encodeURIComponent(line.name)}`}>${line.name}</a>
      ${line.pinned && html` <span class="tag">pinned</span>`}
      ${line.leases.length > 0 && html` <span class="tag" title=${line.leases.join(", ")}>${plural(line.leases.length, "lease")}</span>`}
      ${line.replicas.length > 1 && html` <span class="tag">${line.serving} of ${line.replicas.length} replicas</span>`}</th>
    <td><${State} state=${line.state} />
      ${line.disabled && html` <span class="warn" title=${line.disabled}>disabled: ${line.disabled}</span>`}
      ${phase && html` <span class="soft">${phase}</span>`}
      ${waits && html` <span class="warn">waits for ${waits}</span>`}
      ${line.silent >= 30 && html` <span class="warn">no answer for ${seconds(line.silent)}</span>`}
      ${line.never && html` <span class="bad-text">can never be loaded: ${line.never}</span>`}
      ${line.state === "error" && html` <span class="bad-text" title=${line.failure}>${firstLine(line.failure)}</span>`}</td>
    <td class="number">${line.queued || ""}</td><td class="number">${line.in_flight || ""}</td>
    <td class="number wide">${rate(rates?.tokens)}</td><td class="number wide">${seconds(rates?.firstByte)}</td>
    <td class="wide roomy soft">${nextOf(line)}</td>
    <td class="verbs">${maySee("admin") && verbsOf(line).map((verb) => html`<button type="button" class="small" aria-label=${`${VERBS[verb].title} ${line.name}`}
      onClick=${() => onAsk({ verb, line })}>${VERBS[verb].title}</button>`)}
      ${maySee("admin") && html`<button type="button" class="small" aria-haspopup="dialog" aria-label=${`more for ${line.name}`} onClick=${() => onAsk({ verb: line.leases.includes(LEASE) ? "release" : "lease", line })}>more</button>`}</td></tr>`;
}

const MOST_PREVIEWED = 30; // models; of more only the names are shown

/** What stopping each of them will do, in the daemon's own words; then it is done for one after the other. */
function StopAll({ lines, onClose }) {
  const [names] = useState(() => lines.map((line) => line.name)); // what comes meanwhile was not shown, and is not stopped
  const [left, setLeft] = useState(null); // how many are still to be asked, once it has begun
  const [refused, setRefused] = useState([]);
  const { value, error } = useLoaded((signal) => Promise.all(names.slice(0, MOST_PREVIEWED).map((name) => call("GET", `${modelPath(name, "preview")}?action=unload`, undefined, { signal }))), []);
  const confirmed = async (event) => {
    event.preventDefault();
    const failed = [];
    for (const [at, name] of names.entries()) {
      setLeft(names.length - at);
      try {
        await post(name, "unload");
      } catch (failure) {
        failed.push(`${name}: ${failure.message}`);
      }
    }
    refresh();
    setLeft(0);
    setRefused(failed);
    if (failed.length === 0) onClose();
  };
  return html`<${Dialog} title=${`stop ${plural(names.length, "model")}`} onClose=${onClose}><form onSubmit=${confirmed}>
    ${value ? html`<dl class="preview" aria-label="what it will do">${names.slice(0, MOST_PREVIEWED).map((name, at) => html`<dt key=${name}>${name}</dt><dd>${value[at].text}</dd>`)}</dl>` : html`<p class="preview">Asking vllmd what that would do.</p>`}
    ${names.length > MOST_PREVIEWED && html`<p>And ${names.slice(MOST_PREVIEWED).join(", ")}.</p>`}
    <p class="soft">The next request for a model loads it again; “drain” and “disable” keep them away.</p>
    <${Problem} error=${error} />${refused.map((text) => html`<p class="problem" role="alert">${text}</p>`)}
    <div class="buttons"><button type="button" onClick=${onClose}>${left === 0 ? "Close" : "Cancel"}</button>
      <button type="submit" class="primary" disabled=${left !== null || !value}>stop all</button></div></form></${Dialog}>`;
}

function nextOf(line) {
  if (line.rests_in !== null) return `${isAsleep(line.state) ? "deeper or stops" : "rests"} in ${seconds(line.rests_in)}`;
  return line.idle !== null && line.state === "running" ? `idle for ${seconds(line.idle)}` : "";
}

/** Those that have a button of their own; `every` action is behind "more". */
export function verbsOf(line) {
  if (line.disabled) return ["enable"];
  if (line.state === "stopped" || line.state === "error") return ["load"];
  if (isAsleep(line.state)) return ["load", "unload"];
  return ["sleep", "unload", "restart", line.pinned ? "unpin" : "pin"];
}

const every = (line) => ["load", "sleep", "unload", "restart", line.pinned ? "unpin" : "pin", line.leases.includes(LEASE) ? "release" : "lease", "probe", line.disabled ? "enable" : "disable"];

const LEASE = "page"; // the name of the leases that are made here
const post = (name, verb, body) => call("POST", modelPath(name, verb), body);
const VERBS = {
  load: { title: "load", act: (name) => post(name, "load") },
  sleep: { title: "sleep", act: (name) => post(name, "sleep") },
  unload: { title: "stop", act: (name) => post(name, "unload") },
  restart: {
    title: "restart",
    act: async (name) => {
      await post(name, "unload?wait=true");
      return post(name, "load");
    },
  },
  pin: { title: "pin", act: (name) => post(name, "pin", { pinned: true }) },
  unpin: { title: "unpin", act: (name) => post(name, "pin", { pinned: false }) },
  lease: { title: "lease", act: (name, { hours }) => post(name, "lease", { lease: LEASE, deadline_seconds: 3600 * hours }) },
  release: { title: "give the lease back", act: (name) => call("DELETE", `${modelPath(name, "lease")}?lease=${LEASE}`) },
  probe: { title: "probe", act: (name) => post(name, "probe?all=true&limit=60"), tells: (found) => found.replicas.map((each) => `${each.name}: ${each.seconds === null ? each.message : seconds(each.seconds)}`).join("; ") },
  disable: { title: "disable", act: (name, { message }) => post(name, "disable", message ? { message } : {}) },
  enable: { title: "enable", act: (name) => post(name, "enable") },
  drain: { title: "drain", act: (index) => call("POST", `/admin/devices/${index}/drain`, { drained: true }) },
  undrain: { title: "give back", act: (index) => call("POST", `/admin/devices/${index}/drain`, { drained: false }) },
};

/** What it will do, in the daemon's own words, and then it does it. */
function Ask({ verb: first, line, device, onClose }) {
  const [verb, setVerb] = useState(first);
  const [given, setGiven] = useState({ hours: 4, message: "" });
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [told, setTold] = useState("");
  const { title, act, tells } = VERBS[verb];
  const what = device ? `GPU ${device.index}` : line.name;
  const path = device ? `/admin/devices/${device.index}/preview` : modelPath(line.name, "preview");
  const preview = useLoaded((signal) => call("GET", `${path}?action=${verb}`, undefined, { signal }), [verb, line?.state, line?.in_flight]);
  const confirmed = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const found = await act(device ? device.index : line.name, given);
      refresh();
      if (!tells) return onClose();
      setTold(tells(found));
    } catch (failure) {
      setError(failure);
    }
    setBusy(false);
  };
  const set = (name, value) => setGiven({ ...given, [name]: value });
  return html`<${Dialog} title=${first ? `${title} ${what}` : what} onClose=${onClose}>
    <form onSubmit=${confirmed}>
      ${!device && html`<label class="block">Action <select value=${verb} onChange=${(event) => (setVerb(event.target.value), setTold(""), setError(null))}>
        ${every(line).map((each) => html`<option value=${each}>${VERBS[each].title}</option>`)}</select></label>`}
      ${verb === "disable" && html`<label class="block">Message to its clients <input maxlength="500" value=${given.message} placeholder="an operator has taken it out of use" onInput=${(event) => set("message", event.target.value)} /></label>`}
      ${verb === "lease" && html`<label class="block">Hours <input type="number" min="0.1" step="0.1" required value=${given.hours} onInput=${(event) => set("hours", Number(event.target.value))} /></label>`}
      <p class="preview" aria-live="polite">${preview.value?.action === verb ? preview.value.text : "Asking vllmd what that would do."}</p>
      <${Problem} error=${error || preview.error} />${told && html`<p role="status">${told}</p>`}
      <div class="buttons"><button type="button" onClick=${onClose}>${told ? "Close" : "Cancel"}</button>
        <button type="submit" class="primary" disabled=${busy || preview.value?.action !== verb || !preview.value.possible}>${title} ${what}</button></div></form></${Dialog}>`;
}
