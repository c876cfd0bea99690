// Models: what each one is, what it takes, what its engine writes.

import { html } from "./html.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { call, lines, maySee, modelPath, text } from "./api.js";
import { bytes, seconds } from "./format.js";
import { refresh, useLive } from "./live.js";
import { Empty, Problem, Rows, State, useLoaded } from "./parts.js";
import { Requests } from "./requests.js";
import { Store } from "./store.js";
import { Why } from "./why.js";

const KEPT_LINES = 2000;
const ROW = 41; // pixels
const COLUMNS = [["model"], ["state"], ["engine"], ["context", "number"], ["can", "wide"]];
const LEASE = "page"; // the name of the leases that are made here

export function Models({ name }) {
  const { status } = useLive();
  if (!status) return html`<p class="soft">Reading the status.</p>`;
  if (!name) return html`<${List} status=${status} />`;
  const line = status.models.find((each) => each.name === name);
  if (!line) return html`<${Empty} title=${`There is no model ${name}`}><p><a href="#/models">All models</a></p></${Empty}>`;
  return html`<${Model} key=${name} line=${line} />`;
}

function List({ status }) {
  const { value, error } = useLoaded((signal) => call("GET", "/admin/models", undefined, { signal }), []);
  const cards = Object.fromEntries((value?.data || []).map((card) => [card.id, card]));
  const [words, setWords] = useState("");
  const others = (value?.data || []).filter((card) => card.members || card.parent);
  const shown = words ? status.models.filter((line) => line.name.toLowerCase().includes(words.toLowerCase())) : status.models;
  return html`${maySee("admin") && html`<${Store} />`}<h2>Models</h2><${Problem} error=${error} />
    <div class="filters"><label>Name <input type="search" value=${words} onInput=${(event) => setWords(event.target.value)} /></label></div>
    <${Rows} items=${shown} height=${ROW} columns=${COLUMNS} label="models" render=${(line) => html`<tr key=${line.name}><th scope="row"><a href=${`#/models/${encodeURIComponent(line.name)}`}>${line.name}</a></th>
      <td><${State} state=${line.state} />${line.disabled && html` <span class="warn">disabled</span>`}</td><td>${line.config.engine}</td><td class="number">${cards[line.name]?.max_model_len ?? ""}</td>
      <td class="wide soft">${(cards[line.name]?.capabilities || []).join(", ")}</td></tr>`} />
    ${shown.length === 0 && html`<p class="soft">${words ? "No model is called so." : "No model is configured."}</p>`}
    ${others.length > 0 && html`<h3>Other names</h3><${Rows} items=${others} height=${ROW} columns=${[["name"], ["what"]]} label="other names" render=${(card) => html`<tr key=${card.id}><th scope="row">${card.id}</th>
      <td>${card.members ? `a pool of ${card.members.join(", ")}` : html`of <a href=${`#/models/${encodeURIComponent(card.parent)}`}>${card.parent}</a>`}</td></tr>`} />`}`;
}

function Lease({ line }) {
  const [hours, setHours] = useState(4);
  const [error, setError] = useState(null);
  const held = line.leases.includes(LEASE);
  const act = async (event) => {
    event.preventDefault();
    try {
      if (held) await call("DELETE", `${modelPath(line.name, "lease")}?lease=${LEASE}`);
      else await call("POST", modelPath(line.name, "lease"), { lease: LEASE, deadline_seconds: 3600 * hours });
      setError(null);
      refresh();
    } catch (refused) {
      setError(refused);
    }
  };
  return html`<form onSubmit=${act} class="filters">${!held && html`<label>Hours <input type="number" min="0.1" step="0.1" value=${hours} onInput=${(event) => setHours(Number(event.target.value))} /></label>`}
    <button type="submit">${held ? "Give the lease back" : "Keep it loaded"}</button></form><${Problem} error=${error} />`;
}

function Probe({ line }) {
  const [found, setFound] = useState(null);
  const [error, setError] = useState(null);
  const probe = async () => {
    try {
      setError(null);
      setFound(await call("POST", `${modelPath(line.name, "probe")}?all=true&limit=60`));
    } catch (refused) {
      setError(refused);
    }
  };
  return html`<p><button type="button" onClick=${probe}>Probe its engines</button>
    ${found && html` <span role="status">${found.replicas.map((each) => `${each.name}: ${each.seconds === null ? each.message : seconds(each.seconds)}`).join("; ")}</span>`}</p><${Problem} error=${error} />`;
}

function Model({ line }) {
  const [tab, setTab] = useState("about");
  const tabs = { about: "About", log: "Log", why: "Why", requests: "Requests", metrics: "Metrics" };
  return html`<h2>${line.name} <${State} state=${line.state} /></h2>
    <div role="tablist" class="tabs" aria-label=${line.name}>${Object.entries(tabs).map(([id, title]) => html`<button type="button" role="tab" id=${`tab-${id}`}
      aria-selected=${tab === id} aria-controls="panel" onClick=${() => setTab(id)}>${title}</button>`)}</div>
    <div role="tabpanel" id="panel" aria-labelledby=${`tab-${tab}`}>
      ${tab === "about" && html`<${About} line=${line} />${maySee("admin") && html`<h3>Keep and probe</h3><${Lease} line=${line} /><${Probe} line=${line} />`}`}${tab === "log" && html`<${Log} name=${line.name} />`}
      ${tab === "why" && html`<${Why} model=${line.name} />`}${tab === "requests" && html`<${Requests} only=${line.name} />`}${tab === "metrics" && html`<${Metrics} line=${line} />`}</div>`;
}

function About({ line }) {
  const { value: card, error } = useLoaded((signal) => call("GET", `/admin/models/${encodeURIComponent(line.name)}`, undefined, { signal }), [line.name, line.state]);
  const facts = [
    ["model", line.config.model], ["engine", line.config.engine], ["aliases", (line.config.aliases || []).join(", ")],
    ["context", card?.max_model_len && `${card.max_model_len} tokens`], ["can", card?.capabilities?.join(", ")],
    ["memory expected", card && bytes(card.memory) && `${bytes(card.memory)} on each of its devices`],
    ["memory held", line.memory > 0 && `${bytes(line.memory)} on GPU ${line.devices.join(", ")}`],
    ["requests at a time", card?.limits?.concurrency], ["longest queue", card?.limits?.queue],
    ["last start", seconds(line.last_start_seconds)],
    ["of which", Object.entries(line.start_phases || {}).filter(([, took]) => took >= 0.05).map(([phase, took]) => `${phase} ${seconds(took)}${phase === "weights" && line.loader ? ` (${line.loader})` : ""}`).join(", ")],
    ["unit", line.unit], ["process", line.pid],
    ["disabled", line.disabled], ["waits for", line.waiting_for], ["leases", line.leases.join(", ")],
  ]; // prettier-ignore
  const { value: settings } = useLoaded((signal) => text(`/admin/config?model=${encodeURIComponent(line.name)}`, { signal }), [line.name]);
  return html`<${Problem} error=${error} />
    ${line.failure && html`<div class="problem" role="alert"><strong>It failed.</strong><pre>${line.failure}</pre></div>`}
    ${line.never && html`<div class="problem" role="alert"><strong>It can never be loaded.</strong> ${line.never}</div>`}
    <dl class="facts">${facts.filter(([, value]) => value).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${String(value)}</dd></div>`)}</dl>
    ${settings && html`<h3>Settings</h3><p class="soft">Those that are not the defaults, and where each comes from.</p><pre class="log" tabindex="0" aria-label="settings">${settings}</pre>`}
    ${line.replicas.length > 1 && html`<h3>Replicas</h3><table class="rows"><thead><tr><th scope="col">replica</th><th scope="col">state</th><th scope="col">health</th>
      <th scope="col" class="number">running</th><th scope="col" class="number">first byte</th></tr></thead><tbody>${line.replicas.map((each) => html`<tr key=${each.name}>
      <th scope="row">${each.name}</th><td><${State} state=${each.state} /></td><td>${each.health}</td><td class="number">${each.in_flight}</td><td class="number">${seconds(each.latency)}</td></tr>`)}</tbody></table>`}`;
}

function Log({ name }) {
  const [shown, setShown] = useState([]);
  const [words, setWords] = useState("");
  const [error, setError] = useState(null);
  const end = useRef(null);
  useEffect(() => {
    const stop = new AbortController();
    (async () => {
      try {
        let waiting = [];
        for await (const line of lines(`/admin/logs/${encodeURIComponent(name)}?lines=200&follow=true`, { signal: stop.signal })) {
          if (waiting.push(line) === 1)
            setTimeout(() => {
              const more = waiting;
              waiting = [];
              setShown((before) => [...before, ...more].slice(-KEPT_LINES));
            }, 50);
        }
      } catch (failure) {
        if (!stop.signal.aborted) setError(failure);
      }
    })();
    return () => stop.abort();
  }, [name]);
  useEffect(() => {
    const box = end.current;
    if (box && box.scrollHeight - box.scrollTop - box.clientHeight < 200) box.scrollTop = box.scrollHeight;
  }, [shown]);
  const told = words ? shown.filter((line) => line.toLowerCase().includes(words.toLowerCase())) : shown;
  return html`<${Problem} error=${error} /><div class="filters"><label>Only lines with <input type="search" value=${words} onInput=${(event) => setWords(event.target.value)} /></label></div>
    ${shown.length > 0 ? html`<pre class="log" ref=${end} tabindex="0" aria-label="log">${told.join("\n")}</pre>` : !error && html`<p class="soft">Nothing has been written yet.</p>`}`;
}

function Metrics({ line }) {
  const { value, error, again } = useLoaded((signal) => text(`/metrics?model=${encodeURIComponent(line.name)}`, { signal }), [line.name, line.state]);
  return html`<p><button type="button" class="small" onClick=${again}>read again</button></p><${Problem} error=${error} />
    ${value && html`<pre class="log" tabindex="0" aria-label="metrics">${value.split("\n").filter((each) => !each.startsWith("#")).join("\n")}</pre>`}`;
}
