// The small parts that every view is made of.

import { html } from "./html.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { isAsleep, isMoving, shortState } from "./format.js";

/** A dot and a word; the word says it all, the dot helps the eye. */
export function State({ state }) {
  const kind = state === "error" ? "bad" : state === "running" ? "good" : isMoving(state) ? "busy" : isAsleep(state) ? "asleep" : "off";
  return html`<span class="state ${kind}">${shortState(state)}</span>`;
}

/** What stands where there is nothing to show, and what to do about it. */
export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2>${children}</div>`;

/** An error in words. */
export const Problem = ({ error }) => error && html`<p class="problem" role="alert">${error.message || String(error)}</p>`;

/** A command to type, with a button that copies it. */
export function Command({ text }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard?.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<span class="command"><code>${text}</code>
    <button type="button" class="small" onClick=${copy} aria-label=${`copy ${text}`}>${copied ? "copied" : "copy"}</button></span>`;
}

/** A dialog over the page; it is closed by Escape, by its buttons, and not by a click beside it. */
export function Dialog({ title, children, onClose }) {
  const own = useRef(null);
  useEffect(() => {
    const dialog = own.current, before = document.activeElement;
    dialog.showModal();
    return () => before?.focus?.();
  }, []);
  return html`<dialog ref=${own} onClose=${onClose} aria-labelledby="dialog-title">
    <h2 id="dialog-title">${title}</h2>${children}</dialog>`;
}

/** Rows of which only those in sight are in the document, so that thousands cost no more than a screenful. */
export function Rows({ items, height, render, columns, label }) {
  const own = useRef(null);
  const [top, setTop] = useState(0);
  useEffect(() => {
    const onScroll = () => own.current && setTop(Math.max(0, -own.current.getBoundingClientRect().top));
    window.addEventListener("scroll", onScroll, { passive: true });
    window.addEventListener("resize", onScroll);
    onScroll();
    return () => {
      window.removeEventListener("scroll", onScroll);
      window.removeEventListener("resize", onScroll);
    };
  }, []);
  const whole = items.length <= 100;
  const first = whole ? 0 : Math.max(0, Math.floor(top / height) - 20);
  const shown = whole ? items : items.slice(first, first + Math.ceil(window.innerHeight / height) + 40);
  const after = whole ? 0 : items.length - first - shown.length;
  const gap = (rows) => rows > 0 && html`<tr class="gap" aria-hidden="true" style=${{ height: `${rows * height}px` }}><td colspan=${columns.length}></td></tr>`;
  return html`<table ref=${own} class="rows" aria-label=${label} aria-rowcount=${items.length + 1}>
    <thead><tr>${columns.map(([name, kind]) => html`<th scope="col" class=${kind || ""}>${name}</th>`)}</tr></thead>
    <tbody>${gap(first)}${shown.map((item, at) => render(item, first + at))}${gap(after)}</tbody></table>`;
}

const MOST_OPTIONS = 50; // of which one is picked; of more the name is typed

/** Picks a model by its name. `none`: what stands for no model; "" where there must be one. */
export function ModelPick({ label, names, value, none = "", onPick }) {
  const [words, setWords] = useState(null); // what is typed, until it is a model's name
  const id = useRef(`pick-${Math.random().toString(36).slice(2)}`);
  if (names.length <= MOST_OPTIONS)
    return html`<label>${label} <select value=${value} onChange=${(event) => onPick(event.target.value)}>${none && html`<option value="">${none}</option>`}${names.map((name) => html`<option value=${name}>${name}</option>`)}</select></label>`;
  const typed = words ?? value;
  const near = typed === value && words === null ? [] : names.filter((name) => name.toLowerCase().includes(typed.toLowerCase())).slice(0, MOST_OPTIONS);
  const type = (event) => {
    const text = event.target.value;
    setWords(text);
    if (names.includes(text) || (none && !text)) onPick(text);
  };
  return html`<label>${label} <input type="search" list=${id.current} value=${typed} placeholder=${none || "the name of a model"} onInput=${type} onBlur=${() => setWords(null)} />
    <datalist id=${id.current}>${near.map((name) => html`<option value=${name}></option>`)}</datalist></label>`;
}

/** The axes of a curve, in the colours of the page. */
export function axes() {
  const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  return [axis, { ...axis, size: 70 }];
}

/** Load something now, and again whenever `keys` change; `{value, error, again}`. */
export function useLoaded(load, keys) {
  const [state, setState] = useState({ value: null, error: null });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    load(stop.signal).then(
      (value) => setState({ value, error: null }),
      (error) => error.name !== "AbortError" && setState((before) => ({ ...before, error })),
    );
    return () => stop.abort();
  }, [...keys, turn]);
  return { ...state, again: () => setTurn((before) => before + 1) };
}
