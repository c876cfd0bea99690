// Now: what holds the memory, and what each model does and why it waits; with the operator's verbs.

import { html } from "./html.js";
import { useState } from "./vendor/hooks.js";
import { call, maySee, modelPath } from "./api.js";
import { bytes, isAsleep, isMoving, percent, plural, rate, seconds, shortState } from "./format.js";
import { refresh, sharesOf, useLive } from "./live.js";
import { Command, Dialog, Empty, Problem, Rows, State } from "./parts.js";

const ROW = 41; // pixels, as in style.css

export function Now() {
  const { status, rates } = useLive();
  const [words, setWords] = useState("");
  const [only, setOnly] = useState("all");
  const [asked, setAsked] = useState(null); // {verb, line}, to be confirmed
  if (!status) return html`<p class="soft">Reading the status.</p>`;
  if (status.configuration.error)
    return html`<${Empty} title="The configuration is invalid: no model is served">
      <pre>${status.configuration.error}</pre><p>Once it is repaired:</p><${Command} text="sudo systemctl reload vllmd" /></${Empty}>`;
  const shown = status.models.filter(
    (line) => line.name.toLowerCase().includes(words.toLowerCase()) && (only === "all" || groupOf(line) === only),
  );
  const counts = countsOf(status.models);
  return html`
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
            )}</div></div>
          <${Rows} items=${shown} height=${ROW} columns=${COLUMNS} label="models"
            render=${(line) => html`<${Line} key=${line.name} line=${line} rates=${rates[line.name]} onAsk=${setAsked} />`} />
          ${shown.length === 0 && html`<p class="soft">No model is called so.</p>`}`}</section>
    ${asked && html`<${Confirm} ...${asked} status=${status} onClose=${() => setAsked(null)} />`}`;
}

const GROUPS = ["waiting", "loaded", "asleep", "stopped", "failed"];
const COLUMNS = [["model"], ["state"], ["queue", "number"], ["running", "number"], ["tokens/s", "number wide"],
  ["first byte", "number wide"], ["next", "wide"], [html`<span class="unseen">actions</span>`, "verbs"]]; // prettier-ignore

function groupOf(line) {
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
      ${device.power !== null && html`<span class="soft">${Math.round(device.power)} W</span>`}
      ${device.temperature !== null && html`<span class="soft">${Math.round(device.temperature)} °C</span>`}
      ${device.throttled && html`<span class="warn">slowed down: ${device.throttled}</span>`}
      ${device.wedged && html`<span class="warn">${device.wedged}</span>`}
      ${maySee("admin") && html`<button type="button" class="small" onClick=${() => onAsk({ verb: device.drained ? "undrain" : "drain", device })}>
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
  return html`<p class="soft">Host memory for engines: ${bytes(promised)} of ${bytes(budget)} promised.</p>`;
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
      ${phase && html` <span class="soft">${phase}</span>`}
      ${waits && html` <span class="warn">waits for ${waits}</span>`}
      ${line.state === "error" && html` <span class="bad-text" title=${line.failure}>${line.failure.split("\n")[0]}</span>`}</td>
    <td class="number">${line.queued || ""}</td><td class="number">${line.in_flight || ""}</td>
    <td class="number wide">${rate(rates?.tokens)}</td><td class="number wide">${seconds(rates?.firstByte)}</td>
    <td class="wide soft">${nextOf(line)}</td>
    <td class="verbs">${maySee("admin") && verbsOf(line).map((verb) => html`<button type="button" class="small" aria-label=${`${VERBS[verb].title} ${line.name}`}
      onClick=${() => onAsk({ verb, line })}>${VERBS[verb].title}</button>`)}</td></tr>`;
}

function nextOf(line) {
  if (line.rests_in !== null) return `${isAsleep(line.state) ? "deeper or stops" : "rests"} in ${seconds(line.rests_in)}`;
  return line.idle !== null && line.state === "running" ? `idle for ${seconds(line.idle)}` : "";
}

export function verbsOf(line) {
  if (line.state === "stopped" || line.state === "error") return ["load"];
  if (isAsleep(line.state)) return ["load", "unload"];
  return ["sleep", "unload", "restart", line.pinned ? "unpin" : "pin"];
}

const VERBS = {
  load: { title: "load", does: whatLoadDoes, act: (name) => call("POST", modelPath(name, "load")) },
  sleep: {
    title: "sleep",
    does: (line) => `${finishes(line)} Its weights move to host memory, and its device memory is free for others. The next request wakes it.`,
    act: (name) => call("POST", modelPath(name, "sleep")),
  },
  unload: {
    title: "stop",
    does: (line) => `${finishes(line)} Its engine is stopped and all of its memory is free. The next request starts it again${lastStart(line)}.`,
    act: (name) => call("POST", modelPath(name, "unload")),
  },
  restart: {
    title: "restart",
    does: (line) => `${finishes(line)} Its engine is stopped and started anew${lastStart(line)}. Requests that come meanwhile wait.`,
    act: async (name) => {
      await call("POST", `${modelPath(name, "unload")}?wait=true`);
      return call("POST", modelPath(name, "load"));
    },
  },
  pin: {
    title: "pin",
    does: () => "It is neither put to sleep nor stopped to make room for others, until it is unpinned or vllmd restarts.",
    act: (name) => call("POST", modelPath(name, "pin"), { pinned: true }),
  },
  unpin: {
    title: "unpin",
    does: () => "It may sleep, and make room for others, again.",
    act: (name) => call("POST", modelPath(name, "pin"), { pinned: false }),
  },
  drain: {
    title: "drain",
    does: (_, status, device) => `Nothing new is put on GPU ${device.index}. ${onDevice(status, device)} Meant for maintenance; an idle vllmd does not exit while a GPU is drained.`,
    act: (_, device) => call("POST", `/admin/devices/${device.index}/drain`, { drained: true }),
  },
  undrain: {
    title: "give back",
    does: (_, status, device) => `Models may be put on GPU ${device.index} again.`,
    act: (_, device) => call("POST", `/admin/devices/${device.index}/drain`, { drained: false }),
  },
};

const finishes = (line) => (line.in_flight ? `${plural(line.in_flight, "request")} that it answers now come to their end first.` : "It answers nothing now.");
const lastStart = (line) => (line.last_start_seconds ? `, which took ${seconds(line.last_start_seconds)} last time` : "");

function whatLoadDoes(line, status) {
  const free = status.devices.map((device) => sharesOf(status, device).free);
  const room = free.length ? `Free now: ${free.map((amount, index) => `${bytes(amount)} on GPU ${index}`).join(", ")}. ` : "";
  const time = line.last_start_seconds ? ` Its last start took ${seconds(line.last_start_seconds)}.` : "";
  const how = isAsleep(line.state) ? "It is woken." : "Its engine is started.";
  return `${how} ${room}Where it does not fit, models that are idle leave for it; busy ones finish what they answer first.${time}`;
}

function onDevice(status, device) {
  const names = sharesOf(status, device).shares.map((share) => share.name);
  return names.length ? `${names.join(", ")} finish what they answer and leave it.` : "Nothing is on it now.";
}

function Confirm({ verb, line, device, status, onClose }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const { title, does, act } = VERBS[verb];
  const what = device ? `GPU ${device.index}` : line.name;
  const confirmed = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      await act(device ? null : line.name, device);
      refresh();
      onClose();
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${`${title} ${what}`} onClose=${onClose}>
    <p>${does(line, status, device)}</p><${Problem} error=${error} />
    <form onSubmit=${confirmed} class="buttons">
      <button type="button" onClick=${onClose}>Cancel</button>
      <button type="submit" class="primary" disabled=${busy}>${title} ${what}</button></form></${Dialog}>`;
}
