// The frame around the views: who is signed in, where one is, and whether the daemon answers.

import { html } from "./html.js";
import { render } from "./vendor/preact.js";
import { useEffect, useState } from "./vendor/hooks.js";
import { currentSession, onSession, signOut } from "./api.js";
import { follow, useLive } from "./live.js";
import { Models } from "./models.js";
import { Now } from "./now.js";
import { Plan } from "./plan.js";
import { Requests } from "./requests.js";
import { SignIn, codeOf } from "./signin.js";
import { Try } from "./try.js";
import { Usage } from "./usage.js";
import { Why } from "./why.js";

const VIEWS = { now: ["Now", Now], why: ["Why", Why], requests: ["Requests", Requests], models: ["Models", Models], try: ["Try", Try], usage: ["Usage", Usage], plan: ["Plan", Plan] };

/** `#/models/NAME` is the view `models` with the name. */
function placeOf(hash) {
  const [view, ...rest] = hash.replace(/^#\/?/, "").split("/");
  return { view: view in VIEWS ? view : "now", name: rest.map(decodeURIComponent).join("/") };
}

function App() {
  const [, poke] = useState({});
  const [place, setPlace] = useState(placeOf(location.hash));
  useEffect(() => onSession(() => poke({})), []);
  useEffect(() => {
    const moved = () => {
      setPlace(placeOf(location.hash));
      document.getElementById("main")?.focus({ preventScroll: true });
      window.scrollTo(0, 0);
    };
    window.addEventListener("hashchange", moved);
    return () => window.removeEventListener("hashchange", moved);
  }, []);
  const session = currentSession();
  useEffect(() => (session ? follow() : undefined), [session?.token]);
  useEffect(() => {
    document.title = session ? `${VIEWS[place.view][0]} - vllmd` : "vllmd";
  }, [place.view, Boolean(session)]);
  if (!session || codeOf(location.hash)) return html`<${SignIn} />`;
  const View = VIEWS[place.view][1];
  return html`<a class="skip" href="#main" onClick=${skip}>to the content</a>
    <header><strong class="brand">vllmd <${Version} /></strong>
      <nav aria-label="views">${Object.entries(VIEWS).map(([id, [title]]) => html`<a key=${id} href=${`#/${id}`} aria-current=${place.view === id ? "page" : undefined}>${title}</a>`)}</nav>
      <span class="who"><span class="soft">${session.name || "operator"}${session.scopes.includes("admin") ? "" : ", read only"}</span>
        <button type="button" class="small" onClick=${signOut}>Sign out</button></span></header>
    <${Banner} />
    <main id="main" tabindex="-1"><h1 class="unseen">${VIEWS[place.view][0]}</h1><${View} key=${`${place.view}/${place.name}`} name=${place.name} /></main>`;
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function Version() {
  const { status } = useLive();
  return html`<span class="soft version">${status?.version}</span>`;
}

function Banner() {
  const { trouble } = useLive();
  return html`<div role="status" class=${trouble ? "banner" : ""}>${trouble}</div>`;
}

render(html`<${App} />`, document.getElementById("app"));
